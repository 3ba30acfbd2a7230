"""Database of the host: a queue of transactions, each on disk before whoever waits for it goes on."""
