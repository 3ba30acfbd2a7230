"""One file per kernel mechanism; each keeps one promise (see isolator.layers.base)."""
