"""Reload: the supervisor executes the program that is installed by now, in place, and its cages go on running.

``ask`` (reloader.py) → ``try`` (trial.py: the new program reads the state and changes nothing) → come to rest (rest.py)
→ exec (reloader.py) → adopt (adopt.py) → exchange of the services (exchange.py). What crosses the exec is
isolator.ipc.handover's, written and read by formats.py.
"""
