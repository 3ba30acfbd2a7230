"""Lines, JSON and messages of untrusted peers."""
