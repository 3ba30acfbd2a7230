"""``host.toml`` over a reload: the new image goes on with the text that was tried, whatever is in the file by then.

A file that somebody is writing just then would end the daemon, and with it every plugin. What was written later takes
effect with the next reload.
"""

from __future__ import annotations

import logging
from pathlib import Path

from isolator.errors import IsolatorError, NotFoundError, UsageError
from isolator.policy.host import HostConfig
from isolator.policy.parse.trusted import load_host_config, read_trusted

logger = logging.getLogger(__name__)


def settings_text(path: Path) -> str:
    """The text of the file, empty without one; raises DeniedError or UsageError for one that is not to be believed."""
    try:
        return read_trusted(path).decode()
    except NotFoundError:
        return ""
    except UnicodeDecodeError:
        raise UsageError(str(path), "is not UTF-8", "save it as UTF-8") from None


def settings_of(text: str | None, path: Path) -> HostConfig:
    """The settings that came with a state; those in the file if none did. Raises UsageError, DeniedError."""
    if text is None:
        return load_host_config(path)
    from isolator.policy.parse.host_file import parse_host_config

    return parse_host_config(text.encode(), source=str(path)) if text else HostConfig()


def note_change(text: str | None, path: Path) -> None:
    """Log that the file holds something else by now than ``text``, which is in force."""
    try:
        changed = text is not None and settings_text(path) != text
    except IsolatorError as error:
        logger.warning("%s", error)
        changed = True
    if changed:
        logger.warning("%s has changed; it takes effect with 'isolator reload'", path)
