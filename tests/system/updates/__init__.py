"""From one version of a plugin to the next, in a whole daemon."""
