"""Requests, grants, and how the two meet in an effective policy."""
