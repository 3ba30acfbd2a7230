"""Attacks: every attempt of the battery is stopped by the whole cage, and gets through when its layers are off."""
