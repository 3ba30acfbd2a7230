"""The self-attack: each probe tries one escape from inside a cage."""
