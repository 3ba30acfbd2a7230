"""Texts with which a page may be made to act, and a plugin that writes them wherever it can."""

from __future__ import annotations

import itertools
import json
import textwrap

_ACT = "window.acted=1"
_SHAPES = (
    "<script>{act}</script>", "<ScRiPt >{act}</sCrIpT>", "<img src=x onerror={act}>", '<img src=x onerror="{act}">',
    "<svg onload={act}>", "<svg><script>{act}</script></svg>", "<svg><animate onbegin={act} attributeName=x dur=1s>",
    "<body onload={act}>", "<iframe srcdoc='<script>parent.{act}</script>'>", "<iframe src=javascript:parent.{act}>",
    "<a href=javascript:{act}>x</a>", "<a href=' javascript:{act}'>x</a>", "<form action=javascript:{act}><button>x",
    "<input autofocus onfocus={act}>", "<details open ontoggle={act}>", "<video><source onerror={act}>",
    "<math><mtext></mtext><script>{act}</script></math>", "<style>@import 'http://127.0.0.1:9/x';</style>",
    "<link rel=stylesheet href=http://127.0.0.1:9/x>", "<meta http-equiv=refresh content='0;url=javascript:{act}'>",
    "<base href=http://127.0.0.1:9/>", "<object data=javascript:{act}>", "<embed src=javascript:{act}>",
    "<template><script>{act}</script></template>", "{{{{7*7}}}}<b id=injected>",
    "{{% if 1 %}}<i id=injected>{{% endif %}}",
    "${{7*7}}<u id=injected>", "#{{7*7}}<p id=injected>", "javascript:{act}//<s id=injected>",
)  # fmt: skip
_WRAPS = (
    "{}", '">{}', "'>{}", "</title>{}", "</script>{}", "</textarea>{}", "</pre>{}", "-->{}", "]]>{}", "\u202e{}",
    "\u200b{}\u200d", "\x1b[31m{}\x1b]8;;http://x\x07", "\x00{}", "&lt;{}", "\u05d0{}\u2066",
)  # fmt: skip

PAYLOADS = tuple(wrap.format(shape.format(act=_ACT)) for wrap, shape in itertools.product(_WRAPS, _SHAPES))
assert len(PAYLOADS) >= 200
GROUPS = tuple(" ".join(PAYLOADS[start : start + 9]) for start in range(0, len(PAYLOADS), 9))
"""The same, several at a time: as many lines as a page shows."""

PLUGIN = textwrap.dedent("""\
    #!/usr/bin/python3
    import json, os, socket, struct, sys, time
    GROUPS = json.loads(GROUPS_JSON)
    path = os.environ["PLUGIN_SOCKET"]
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(1)

    def look_up(text):
        label = text.encode()[:60]
        question = b"".join(bytes([len(part)]) + part for part in (label, b"example")) + b"\\0"
        query = struct.pack("!6H", 7, 0x100, 1, 0, 0, 0) + question + struct.pack("!2H", 1, 1)
        address = [line.split()[1] for line in open("/etc/resolv.conf") if line.startswith("nameserver")][0]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(1)
            try:
                sock.sendto(query, (address, 53))
                sock.recv(512)
            except OSError:
                pass

    def ask(text):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(1)
            try:
                sock.connect(os.environ["PLUGIN_HOST_SOCKET"])
                call = {"jsonrpc": "2.0", "id": 1, "method": text[:120], "params": {}}
                sock.sendall(json.dumps(call).encode() + b"\\n")
                sock.recv(4096)
            except (OSError, KeyError):
                pass

    while True:
        connection, _ = server.accept()
        request = json.loads(connection.recv(4096))
        number = int(request["params"]["deployment_id"][1:])
        text = GROUPS[number % len(GROUPS)]
        sys.stdout.buffer.write(text.encode("utf-8", "replace") + b"\\n")
        sys.stderr.buffer.write(text.encode("utf-8", "replace") + b"\\n")
        if number == 0:
            sys.stdout.write("<script>window.acted=1</script>" * 40000 + "\\n")
        for out in (sys.stdout, sys.stderr):
            out.flush()
        if number == 0:
            time.sleep(1.5)  # what comes in the second of such a line is dropped
        look_up(text)
        ask(text)
        reply = {"jsonrpc": "2.0", "id": request["id"], "result": {"status": "ok", "detail": text[:900]}}
        connection.sendall(json.dumps(reply).encode() + b"\\n")
        connection.close()
    """).replace("GROUPS_JSON", repr(json.dumps(GROUPS)))
