"""Life of each plugin: what may be done with it, and the task that owns its runs."""
