"""Outages: whole daemons and servers on machines of their own, what goes wrong with them, and who notices."""
