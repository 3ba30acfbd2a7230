"""Key file: the keys that config is sealed with, beside the database, readable by the host's user alone."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import stat
from pathlib import Path

from isolator.errors import IsolatorError
from isolator.linux.descriptors import owning
from isolator.linux.durable import replace_file


class KeyFile:
    """The host's keys, newest first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys: list[bytes] = []

    def load(self) -> bool:
        """Read the file; False if there is none. Raises IsolatorError when others could have read or written it."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise IsolatorError(str(self.path), f"cannot be opened: {error.strerror}", "restore the key file") from None
        with owning(fd):
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
                why = f"must be a plain file of uid {os.geteuid()} with mode 0600"
                remedy = "if others may have read it, restore mode and owner, then run 'isolator config rotate-key'"
                raise IsolatorError(str(self.path), why, remedy)
            try:
                self.keys = [base64.b64decode(key, validate=True) for key in json.loads(os.read(fd, 4096))["keys"]]
            except (ValueError, KeyError, TypeError, RecursionError):
                self.keys = []
        if not self.keys or any(len(key) != 32 for key in self.keys):
            self.keys = []
            raise IsolatorError(str(self.path), "is damaged", "restore it from a backup")
        return True

    def save(self, keys: list[bytes]) -> None:
        """Replace the file in one step, synced."""
        content = json.dumps({"keys": [base64.b64encode(key).decode() for key in keys]}).encode()
        replace_file(self.path, content, temporary=self.path.with_name(f".{self.path.name}.new"), mode=0o600)
        self.keys = keys

    def seal(self, plugin: str, key: str, value: str) -> bytes:
        """Encrypt a value; it opens only under the same plugin and key name."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # a host without config needs none of it

        nonce = os.urandom(12)
        return _key_id(self.keys[0]) + nonce + AESGCM(self.keys[0]).encrypt(nonce, value.encode(), _place(plugin, key))

    def open(self, plugin: str, key: str, sealed: bytes) -> str:
        """Decrypt; raises IsolatorError when no key fits or the row was moved or changed."""
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        for candidate in self.keys:
            if _key_id(candidate) == sealed[:4]:
                with contextlib.suppress(InvalidTag):
                    return AESGCM(candidate).decrypt(sealed[4:16], sealed[16:], _place(plugin, key)).decode()
        raise IsolatorError(f"config {key} of {plugin}", "cannot be decrypted with this host's key", "set it again")


def _key_id(key: bytes) -> bytes:
    return hashlib.sha256(b"isolator-config-key" + key).digest()[:4]


def _place(plugin: str, key: str) -> bytes:
    return f"{plugin}\0{key}".encode()
