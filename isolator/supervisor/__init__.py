"""Supervisor (PROCESS S, root): decides which plugins run, and composes cages, services and registrations."""
