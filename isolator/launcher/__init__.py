"""The launcher process, what runs in the child, and pid 1 of the cage. Standard library only."""
