"""Templates of ``isolator new``: one working plugin per language. ``{{name}}`` becomes the plugin's name.

The files end in ``.txt`` so that no tool of this project takes them for its own.
"""
