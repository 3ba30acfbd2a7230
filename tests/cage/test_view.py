"""Parts of a cage's view that come from the process which starts it."""

from __future__ import annotations

import pytest

from isolator.ipc.messages import Environment
from isolator.policy.model import EffectivePolicy
from isolator.supervisor.cage_spec import sidecar_environment


def test_certificates_come_along_where_a_cage_has_them_and_the_policy_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that is the daemon's alone would leave a program without any authority."""
    monkeypatch.setenv("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/root/own.pem")
    monkeypatch.setenv("NODE_EXTRA_CA_CERTS", "/etc/ssl/certs/more.pem")
    policy = EffectivePolicy(plugin="any", env={"NODE_EXTRA_CA_CERTS": "/etc/ssl/company.pem"})
    found = sidecar_environment("any", policy, Environment(env={"key": "value"}))
    assert found["SSL_CERT_FILE"] == "/etc/ssl/certs/ca-certificates.crt"
    assert "REQUESTS_CA_BUNDLE" not in found and found["NODE_EXTRA_CA_CERTS"] == "/etc/ssl/company.pem"
