"""A cage's view of the host: the search path for programs, and the folders that a policy opens."""

from __future__ import annotations

import errno
import os

from isolator.errors import ConfinementError

PATH = "/usr/local/bin:/usr/bin:/bin"
_CERTIFICATES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NODE_EXTRA_CA_CERTS")


def time_zone() -> str:
    """``TZ`` of a cage that sets none: that of the process which starts it, or UTC; never the host's ``localtime``.

    Without the variable each runtime has a guess of its own.
    """
    return os.environ.get("TZ", "UTC")


def certificate_variables() -> dict[str, str]:
    """Variables that lead to certificates, of the process that starts a cage, where a cage has them, too."""
    found = {name: os.environ.get(name, "") for name in _CERTIFICATES}
    return {name: path for name, path in found.items() if path.startswith("/etc/ssl/certs/")}


def open_read_path(path: str) -> int:
    """An O_PATH descriptor of a path that a policy lets a plugin read; no component may be a link."""
    from isolator.linux.files import open_nofollow

    try:
        return open_nofollow(path)
    except OSError as error:
        why = "a component is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        many = error.errno == errno.EMFILE
        remedy = "name fewer paths, or raise 'ulimit -Hn'" if many else "name its real path, without symbolic links"
        raise ConfinementError(f"read path {path}", why or "", remedy) from None
