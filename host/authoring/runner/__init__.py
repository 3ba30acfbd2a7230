"""Trial of a plugin by a user who is not root: in a cage that a running daemon builds, for the role ``runner``.

The plugin is what ``isolator run`` makes of it: its files (a copy, readable by all) and its socket, under the policy
that the manifest and ``--policy`` give, within ``[runner]`` of the daemon's ``host.toml``. This process is the user's
own, and so are the plugin's bytes that it reads. There is no host API; refused connections are in the daemon's trail.
"""
