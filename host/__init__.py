"""What serves the platform: registry, queue, dispatch, host API, control socket. Runs unprivileged."""
