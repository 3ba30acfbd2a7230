"""Signals over an exec."""

import signal

HELD = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)
"""Those that wait from before the exec until the new image has handlers for them."""
