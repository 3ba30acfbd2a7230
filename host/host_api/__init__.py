"""Host API: methods that a plugin may call, each under one permission; every call is on the trail."""
