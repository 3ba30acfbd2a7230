"""Confinement of untrusted processes: policy, layers, launcher, supervisor, broker, audit.

The import rule is the privilege rule: ``host`` may import ``isolator``; nothing here imports ``host``.
"""

__version__ = "0.1.0"
