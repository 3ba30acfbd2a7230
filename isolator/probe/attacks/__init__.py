"""Attacks on a cage from inside, bound into it; imports only the standard library and itself."""
