"""The console: an HTTP API and pages to look at. Loaded only where an operator has turned it on, or typed it."""
