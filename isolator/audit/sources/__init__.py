"""Where audit records come from besides the daemon's own processes."""
