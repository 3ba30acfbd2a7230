"""``isolator mcp``."""
