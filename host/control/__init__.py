"""Control socket: its server and its verbs."""
