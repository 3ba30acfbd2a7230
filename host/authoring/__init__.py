"""The author's loop: schemas, templates, tests, packages and signatures of plugins. Nothing of a daemon imports it."""
