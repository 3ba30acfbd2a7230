"""Commands that build cages."""
