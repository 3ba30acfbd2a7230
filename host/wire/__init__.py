"""Lines and JSON from untrusted peers."""
