"""Plugins of ``tests/compat/plugins``: each has a real client library, a policy of its own, and another side."""

from __future__ import annotations

import json

from tests.compat.program import Plugin, Service
from tests.compat.rows.services import SERVICES

_POSTGRESQL = next(service for service in SERVICES if service.name == "PostgreSQL, psql")
_REDIS = Service("", "", 6380, r"""
redis-server --port 0 --tls-port 6380 --tls-cert-file ca.pem --tls-key-file key.pem --tls-auth-clients no \
    --protected-mode no --save '' >log 2>&1 &
""", "", packages="redis-server")  # fmt: skip
_DASHBOARD = Service("", "", 8447, r"""
cat >server.py <<'END'
import asyncio, ssl, websockets
async def shout(s, *_):
    async for m in s: await s.send(m.upper() + "!")
async def main():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER); context.load_cert_chain("ca.pem", "key.pem")
    async with websockets.serve(shout, "0.0.0.0", 8447, ssl=context): await asyncio.Future()
asyncio.run(main())
END
python3 server.py >log 2>&1 &
""", "", packages="python3-websockets")  # fmt: skip
_CHUNK = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "any"}
_STREAMED = "".join(
    f"data: {json.dumps({**_CHUNK, 'choices': [choice]})}\n\n"
    for choice in (
        {"index": 0, "delta": {"role": "assistant", "content": "All "}},
        {"index": 0, "delta": {"content": "new"}, "finish_reason": "stop"},
    )
)


def _json(**fields: object) -> str:
    return json.dumps(fields)


PLUGINS = (
    Plugin("slack-sdk", "slack_sdk", "a message to a channel", "pip3", "1.5", ("chat.postMessage", "d1 is live"),
           _json(ok=True, ts="1.5")),
    Plugin("axios", "axios", "a message to a channel, on a connection that is kept", "npm", "m7",
           ("/webhooks/1/s3cret", "d1 is live"), _json(id="m7")),
    Plugin("httpx", "httpx", "a status, in stream mode on one event loop", "pip3", "77",
           ("/api/v4/projects/p1/statuses/d1", "success"), _json(id=77)),
    Plugin("requests", "requests", "a comment, with retries: the first try is answered 503", "pip3", "10042",
           ("/rest/api/2/issue/p1/comment", "d1 deployed"), _json(id="10042"), fails_once=True, more=True),
    Plugin("boto3", "boto3", "an object in a bucket, signed", "pip3", "abc",
           ("PUT /deploys/p1/d1.json", "AWS4-HMAC-SHA256"), "", headers={"ETag": '"abc"'}, more=True),
    Plugin("google-sheets", "google-api-python-client", "a row of a sheet", "pip3", "A1:B1",
           ("/v4/spreadsheets/s1/values/A1:append", "Bearer s3cret"), _json(updates={"updatedRange": "A1:B1"}),
           more=True),
    Plugin("openai", "openai", "an answer of a language model, read as it comes", "pip3", "All new",
           ("/v1/chat/completions", "Release notes of d1"), _STREAMED, headers={"Content-Type": "text/event-stream"},
           more=True),
    Plugin("sentry-sdk", "sentry_sdk", "an envelope, compressed, from a thread of its own", "pip3", "32 digits",
           ("/api/1/envelope/", "sentry_key=s3cret"), _json(id="x"), more=True),
    Plugin("psycopg", "psycopg 3", "a row in PostgreSQL over TLS", "pip3", "(1, 'd1', 12)",
           server=_POSTGRESQL, more=True),
    Plugin("redis", "redis-py", "a pipeline to Redis over TLS", "pip3", "length 1, a clock: True",
           server=_REDIS, more=True),
    Plugin("undici", "undici", "a change event, from a pool of connections", "npm", "success",
           ("/v2/change/enqueue", "d1 deployed"), _json(status="success"), more=True),
    Plugin("octokit", "@octokit/rest", "a deployment's status", "npm", "success",
           ("/repos/me/p1/deployments/7/statuses", "token s3cret"), _json(state="success"), more=True),
    Plugin("got", "got", "a purge, with retries: the first try is answered 503", "npm", "z9",
           ("/zones/1/purge_cache", "Bearer s3cret"), _json(result={"id": "z9"}), fails_once=True, more=True),
    Plugin("pg", "pg", "a row in PostgreSQL over TLS, from a pool", "npm", '"id":"d1"',
           server=_POSTGRESQL, more=True),
    Plugin("nodemailer", "nodemailer", "a mail over SMTP within TLS", "npm", "250 kept",
           ("RCPT TO:<team@example.com>", "Subject: d1 is live"), more=True),
    Plugin("ws", "ws", "a lasting websocket, in stream mode", "npm", "D1!", server=_DASHBOARD, more=True),
    Plugin("go-github", "go-github (Go)", "a release", "go", "https://x/r/1",
           ("/repos/me/p1/releases", '"tag_name":"d1"'), _json(html_url="https://x/r/1"),
           packages="golang-go golang-github-google-go-github-dev", more=True),
    Plugin("ureq", "ureq and rustls (Rust)", "an event in a room", "cargo", "$e1",
           ("PUT /rooms/1/send/m.room.message/d1", "is live"), _json(event_id="$e1"),
           packages="cargo librust-ureq-dev librust-rustls-pemfile-dev librust-serde-json-dev", more=True),
    Plugin("java-http-client", "java.net.http.HttpClient (Java)", "a request, on a runtime of its own", "jlink", "c3",
           ("POST /checks", "app.example"), _json(check="c3"), packages="openjdk-17-jdk-headless", more=True),
)  # fmt: skip
