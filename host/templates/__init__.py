"""Templates of ``isolator new``: one working plugin per language. ``{{name}}`` becomes the plugin's name.

What is written from them is under 0BSD (``common/LICENSE.txt``). The files end in ``.txt`` so that no tool of this
project takes them for its own.
"""
