"""Plugins that come, change and go, and requests to the supervisor, which starts and stops them."""
