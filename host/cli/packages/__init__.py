"""MCP servers from package registries, resolved in a cage and staged like any stranger's folder."""
