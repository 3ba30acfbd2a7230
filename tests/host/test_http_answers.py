"""The outcomes that answers of plugins with the mode ``http`` mean, and what they are sent."""

from __future__ import annotations

import base64
import hashlib
import hmac
import sys
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from host.channel.cloud_events import outcome_of, sign
from host.channel.http import Response
from host.delivery.modes import check_mode
from isolator.errors import IsolatorError


def answer(status: int, body: bytes = b"", retry_after: str | None = None, *, whole: bool = True) -> Response:
    return Response(status, retry_after, body, whole)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (200, "ok"), (204, "ok"), (299, "ok"), (409, "ok"),
        (408, "retry"), (425, "retry"), (429, "retry"), (500, "retry"), (503, "retry"), (599, "retry"),
        (300, "rejected"), (301, "rejected"), (304, "rejected"), (400, "rejected"), (404, "rejected"),
        (499, "rejected"), (410, "busy"),
    ],
)  # fmt: skip
def test_status_is_the_outcome(status: int, kind: str) -> None:
    assert outcome_of(answer(status)).kind == kind


@pytest.mark.parametrize(
    ("retry_after", "pause"),
    [
        ("7", 7.0), ("0", 0.1), ("601", 600.0), ("9" * 5000, 600.0), ("-5", None), ("soon", None), ("", None),
        ("1.5", None), ("\u0663", None), (None, None), ("Thu, 01 Jan 1970 00:00:00 GMT", 0.1),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 600.0), ("Mon, 99 Foo 2026 99:99:99 GMT", None),
        ("Fri, 31 Dec 2026 23:59:59 +" + "9" * 400, None),
    ],
)  # fmt: skip
def test_pause_is_what_was_asked_for_within_ten_minutes(retry_after: str | None, pause: float | None) -> None:
    assert outcome_of(answer(503, retry_after=retry_after)).retry_after == pause


def test_pause_may_be_a_date() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    pause = outcome_of(answer(429, retry_after=date)).retry_after
    assert pause is not None and 90 < pause <= 100


@pytest.mark.parametrize("body", [b"<html>fine</html>", b'{"status": 7}', b'{"status": ', b'["ok"]', b"\xff\xfe", b""])
def test_body_that_is_no_result_changes_nothing(body: bytes) -> None:
    assert (outcome_of(answer(200, body)).kind, outcome_of(answer(200, body)).status) == ("ok", "ok")


def test_result_that_was_cut_is_none() -> None:
    assert outcome_of(answer(200, b'{"status": "posted"}', whole=False)).status == "ok"
    assert outcome_of(answer(200, b'{"status": "posted"}')).status == "posted"


@pytest.mark.parametrize(
    ("secret", "key"),
    [("whsec_" + base64.b64encode(b"k" * 24).decode(), b"k" * 24), ("not base64!", b"not base64!")],
)
def test_signature_is_that_of_standard_webhooks(secret: str, key: bytes) -> None:
    headers = dict(sign(secret, "ev_1", 1700000000, b"{}"))
    expected = base64.b64encode(hmac.new(key, b"ev_1.1700000000.{}", hashlib.sha256).digest()).decode()
    assert headers == {
        "webhook-id": "ev_1", "webhook-timestamp": "1700000000", "webhook-signature": f"v1,{expected}"
    }  # fmt: skip


def test_mode_without_its_package_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("host.delivery.http", "host.channel.http", "host.channel.cloud_events"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "h11", None)
    with pytest.raises(IsolatorError, match=r"mode http: needs the Python package h11; .*isolator\[http\]"):
        check_mode("http")
    check_mode("stream")
