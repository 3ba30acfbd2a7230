"""Tests against the real kernel; they mirror the packages. Attacks are in ``escape``, whole daemons in ``system``."""
