"""The self-attack: a battery of attempts made inside a cage, and what makes the cage and reads the answers.

``inside`` is shown to the cage read-only and run there by the system's Python. ``run`` builds the cages and reads the
answers; ``isolator prove`` and the tests use it alike. ``catalogue`` knows every attempt without importing any.
"""
