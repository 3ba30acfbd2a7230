"""Events that enter the queue: those of the platform, the operational ones, and those that a job recovers."""
