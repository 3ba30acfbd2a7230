"""Collector of what a caller offers (PROCESS C), with the caller's rights, for one staging. Root never imports it."""
