"""The durable delivery queue: interface and the embedded SQLite one."""
