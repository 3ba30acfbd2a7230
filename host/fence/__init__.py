"""Fences of plugins on the host's side: past a plugin's deadline it is sent nothing, and answered nothing."""
