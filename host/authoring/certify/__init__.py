"""``isolator certify``: the faults of the protocol, played against a plugin in its cage; report and certificate."""
