"""Gate: a client's bytes held to the granted name for as long as anything in the clear can name a server."""
