"""The other side of the control socket."""
