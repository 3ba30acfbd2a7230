"""A cage, from clone to the last trace removed."""
