"""Typed wrappers for what the standard library does not offer; the only users of ctypes."""
