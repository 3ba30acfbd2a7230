"""Plugins with one fault of the protocol each, for ``isolator certify`` to find, and without one."""
