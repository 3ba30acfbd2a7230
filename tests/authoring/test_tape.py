"""Recordings: what they keep, what never gets into them, and bad ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from host.authoring.recorder.tape import RecordingError, Redactor, Response, Tape, to_line

HEAD = '{"isolator_recording": 1}'
HOOK = "https://hooks.example.com/T0/B0-secret"


def redactor(**secrets: str) -> Redactor:
    made = Redactor()
    made.know(secrets)
    return made


def tape(*lines: str) -> Tape:
    return Tape("\n".join((HEAD, *lines)).encode())


@pytest.mark.parametrize(
    ("secrets", "url", "hidden"),
    [
        ({"hook": HOOK}, HOOK, "B0-secret"),
        ({"token": "s3cr3t/="}, "https://a.example/x?q=s3cr3t%2F%3D", "s3cr3t"),
        ({}, "https://a.example/x?access_token=abc&page=2", "abc"),
        ({"login": "https://me:hunter22@a.example/x"}, "https://a.example/me/hunter22", "hunter22"),
    ],
)
def test_secret_of_a_url_is_hidden_and_is_found_again_with_another_one(
    secrets: dict[str, str], url: str, hidden: str
) -> None:
    kept = redactor(**secrets).request("GET", url, b"")
    assert hidden not in kept.url and "redacted" in kept.url
    others = {key: value.replace(hidden, "another1") for key, value in secrets.items()}
    assert redactor(**others).request("GET", url.replace(hidden, "another1"), b"") == kept


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/json", b'{"list": [{"access_token": "abcdef", "expires": 1}]}'),
        ("application/x-www-form-urlencoded", b"refresh_token=abcdef&expires=1"),
        ("text/plain", b"you sent my-own-secret: abcdef".replace(b"abcdef", b"config-value")),
    ],
)
def test_secret_of_an_answer_is_hidden_and_the_rest_is_kept(kind: str, body: bytes) -> None:
    made = redactor(key="config-value")
    headers = [("Content-Type", kind), ("Set-Cookie", "abcdef"), ("X-Auth-Token", "abcdef"), ("X-Page", "config-value")]
    answer = made.response(200, headers, body)
    line = to_line(made.request("GET", "https://a.example/", b"config-value"), answer)
    assert "abcdef" not in line and "config-value" not in line
    assert ("content-type", kind) in answer.headers and answer.status == 200
    assert b"expires" in answer.body or b"you sent" in answer.body


def test_answers_to_one_request_are_played_in_order_and_the_last_for_ever() -> None:
    made = redactor()
    asked = made.request("POST", "https://a.example/", b"1")
    lines = [to_line(asked, Response(200, (("x", "y"),), body)) for body in (b"one", b"\xff\xfe")]
    played = tape(*lines)
    assert [answer.body for _ in range(3) if (answer := played.play(asked))] == [b"one", b"\xff\xfe", b"\xff\xfe"]


def test_request_with_another_body_is_answered_and_another_address_is_not() -> None:
    made = redactor()
    played = tape(to_line(made.request("POST", "https://a.example/", b"1"), Response(204, (), b"")))
    assert played.play(made.request("POST", "https://a.example/", b"2")) == Response(204, (), b"")
    assert played.play(made.request("GET", "https://a.example/", b"1")) is None
    assert played.play(made.request("POST", "https://a.example/other", b"1")) is None


GOOD: dict[str, dict[str, object]] = {
    "request": {"method": "GET", "url": "https://a.example/", "body_sha256": "0"},
    "response": {"status": 200, "headers": [["a", "b"]], "body": "text"},
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "first line"),
        (b'{"isolator_recording": 2}', "first line"),
        (f"{HEAD}\n{{".encode(), "line 2 is not JSON"),
        (f"{HEAD}\n{'[' * 100_000}".encode(), "line 2 is not JSON"),
        (f"{HEAD}\n[]".encode(), "line 2 is no exchange"),
        *(
            (f"{HEAD}\n{json.dumps(GOOD | {side: GOOD[side] | change})}".encode(), "line 2 is no exchange")
            for side, change in [
                ("request", {"url": 1}), ("response", {"status": 99}), ("response", {"status": True}),
                ("response", {"headers": [["a"]]}), ("response", {"headers": [["a", 1]]}), ("response", {"body": 1}),
                ("response", {"body_base64": "?"}),
            ]
        ),
    ],
)  # fmt: skip
def test_bad_recording_is_refused_with_its_line(text: bytes, expected: str) -> None:
    with pytest.raises(RecordingError, match=expected):
        Tape(text)


def test_file_that_is_no_recording_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    import subprocess

    recording = tmp_path / "answers.jsonl"
    recording.write_text("{}")
    words = ["unshare", "-n", "isolator", "dev", str(tmp_path), "--recording", str(recording)]
    ran = subprocess.run(words, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert ran.returncode == 1 and "its first line is not" in ran.stderr, ran
