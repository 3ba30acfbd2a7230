"""Foundations that know nothing of Isolator: pauses and rates, classes of named fields, and lean imports."""
