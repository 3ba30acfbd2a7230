"""Registration: from a stranger's folder to an approved plugin on disk."""
