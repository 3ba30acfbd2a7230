"""Tools for the machine's users that find its files locked by another tool."""

from __future__ import annotations

from pathlib import Path

import pytest

from isolator.errors import IsolatorError
from isolator.layers import user


@pytest.mark.parametrize("code", [1, 10])
def test_tool_that_finds_a_file_locked_is_run_again(tmp_path: Path, code: int) -> None:
    """1: passwd is locked, 10: group is (userdel(8))."""
    tool = tmp_path / "tool"
    tool.write_text(f'#!/bin/sh\nmkdir "{tmp_path}/$1" 2>/dev/null && exit {code}\nexit 0\n')
    tool.chmod(0o755)
    assert user._account_tool([str(tool), "once"], "somebody") == 0


def test_other_failure_is_told_at_once(tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    tool.write_text(f'#!/bin/sh\necho no such shell >&2\nmkdir "{tmp_path}/once" || echo again >&2\nexit 3\n')
    tool.chmod(0o755)
    with pytest.raises(IsolatorError, match="system user somebody: no such shell; see /etc/passwd"):
        user._account_tool([str(tool)], "somebody")
