"""Several hosts: one replicated log decides, and every host reads it alike. Loaded only with ``[cluster]``.

``entries`` are what hosts write, ``fold`` is what they mean (a pure function of the log), ``lease`` is how long a host
may act on what it read (a pure function of its clock), ``placement`` is which host takes which plugin.
"""
