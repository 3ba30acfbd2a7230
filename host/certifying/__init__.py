"""The host of a private daemon of ``isolator certify``, which plays the faults of the protocol. No other loads it."""
