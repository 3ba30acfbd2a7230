"""``isolator run`` of users with the role ``runner``, through the daemon. Loaded only where somebody has that role."""
