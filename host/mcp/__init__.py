"""Model Context Protocol: servers as sidecars, and their tools for editors and agents. Imported when one is there."""
