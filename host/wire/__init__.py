"""Lines and JSON from peers that are not trusted."""
