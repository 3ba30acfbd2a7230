"""The zygote: a process whose copies become the daemon's services, so that they share what all of them import."""
