"""Only inside the machine of ``./dev vm``: what needs systemd as PID 1, or breaks the host it runs on."""
