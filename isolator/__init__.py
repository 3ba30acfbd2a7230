"""Confinement of untrusted processes: policy, layers, launcher, supervisor, broker, audit.

The import rule is the privilege rule: ``host`` may import ``isolator``; nothing here imports ``host``.
"""

import os

__version__ = "0.1.0"

# pydantic would look through every installed package for plugins of its own and import them into a root process.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
