"""``isolator top``: what plugins use and do at present, beside their caps; the daemon and the host above them."""
