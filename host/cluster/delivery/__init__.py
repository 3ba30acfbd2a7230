"""Queue of a host in a cluster: events go to the log, and lanes hold what the log gives to this host.

``cloudevent`` is an event's text in the log, ``places`` are the events that counted, by their place, ``queue`` is the
queue with those differences, ``cursor`` reads for one shard, ``follower`` keeps the cursors in step with the log.
"""
