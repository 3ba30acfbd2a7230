"""Part of this host in a cluster, joined to the rest of it. Loaded only with ``[cluster]``.

``member`` composes node, follower and fences with the parts that know plugins, ``values`` keeps what plugins store,
``types`` the event types of all hosts.
"""
