"""What the attacks from inside a cage, and the demo, say on this kernel with this init."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.support.timeouts import seconds
from tests.vm.service import needs_machine

pytestmark = [pytest.mark.vm, needs_machine]


def test_no_attack_gets_through_from_a_session(tmp_path: Path) -> None:
    policy = tmp_path / "whole-core.toml"
    policy.write_text('[limits]\ncpu = "100%"\n')  # the attempts, one after the other, need half a minute of processor
    command = ["isolator", "prove", "--policy", str(policy), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds(60))
    findings = json.loads(result.stdout)["findings"]
    assert len(findings) > 100
    assert not [finding for finding in findings if finding["outcome"] != "held"]
    assert result.returncode == 0, result.stderr
