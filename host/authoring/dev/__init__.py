"""``isolator dev``: a plugin in its cage while its author writes it."""
