"""The languages of ``isolator new``: which templates make a plugin of each mode, and how it is built and tested."""

from __future__ import annotations

Files = tuple[tuple[str, str], ...]
"""Pairs of a template, by its place in ``host.templates``, and the file that is written from it."""

_GO: Files = (("go/Makefile.txt", "Makefile"), ("go/go.mod.txt", "go.mod"), ("go/main_test.go.txt", "main_test.go"))
_RUST: Files = (("rust/Makefile.txt", "Makefile"),)
_TYPESCRIPT: Files = (
    ("typescript/Makefile.txt", "Makefile"), ("typescript/package.json.txt", "package.json"),
    ("typescript/tsconfig.json.txt", "tsconfig.json"), ("typescript/test.ts.txt", "test.ts"),
)  # fmt: skip
_PYTHON: Files = (("python/test_plugin.py.txt", "test_plugin.py"),)
_NODE: Files = (("node/test.js.txt", "test.js"),)
_SH: Files = (("sh/test.sh.txt", "test.sh"),)

MODES: dict[str, dict[str, Files]] = {
    "oneshot": {
        "python": (("python/plugin.py.txt", "{name}"), *_PYTHON),
        "node": (("node/plugin.js.txt", "{name}"), *_NODE),
        "typescript": (("typescript/main.ts.txt", "main.ts"), *_TYPESCRIPT),
        "go": (("go/main.go.txt", "main.go"), *_GO),
        "rust": (("rust/main.rs.txt", "main.rs"), *_RUST),
        "sh": (("sh/plugin.sh.txt", "{name}"), *_SH),
    },
    "stream": {
        "python": (("stream/plugin.py.txt", "{name}"), *_PYTHON),
        "node": (("stream/plugin.js.txt", "{name}"), *_NODE),
        "typescript": (("stream/main.ts.txt", "main.ts"), *_TYPESCRIPT),
        "go": (("stream/main.go.txt", "main.go"), *_GO),
        "rust": (("stream/main.rs.txt", "main.rs"), *_RUST),
    },
    "exec": {
        "python": (("exec/plugin.py.txt", "{name}"), *_PYTHON),
        "sh": (("exec/plugin.sh.txt", "{name}"), *_SH),
    },
    "http": {
        "python": (("http/plugin.py.txt", "{name}"), *_PYTHON),
        "node": (("http/plugin.js.txt", "{name}"), *_NODE),
    },
    "mcp": {
        "python": (("mcp/plugin.py.txt", "{name}"), *_PYTHON),
        "node": (("mcp/plugin.js.txt", "{name}"), *_NODE),
    },
}
"""The files of a plugin by mode and language; the first is its program's source."""
LANGUAGES = tuple(MODES["oneshot"])
SHARED: Files = (("common/LICENSE.txt", "LICENSE"), ("common/ci.yml.txt", ".github/workflows/test.yml"))
COMPILED = ("typescript", "go", "rust")
"""Languages with a Makefile, whose first goal is the program."""
RELEASES = {"typescript": "make && make clean", "go": "make", "rust": "make"}
"""Commands after which a folder holds what is to be published."""
TESTS = {
    "python": "python3 -B -m unittest", "node": "node --test test.js", "typescript": "make test", "go": "go test",
    "rust": "make test", "sh": "sh test.sh",
}  # fmt: skip
"""Command that runs a plugin's own tests; what it leaves in the folder would be packed (``-B``: no ``__pycache__``)."""

_PY, _JS = '("deploy.completed", {"project_id": "p1"}', '("deploy.completed", { project_id: "p1" }'
_LINE = '{"jsonrpc":"2.0","method":"deploy.completed","params":{"project_id":"p1"},"id":1}'
CALLS: dict[tuple[str, str], tuple[str, str]] = {
    ("oneshot", "python"): (f"plugin.handle{_PY})", '{"status": "ok"}'),
    ("stream", "python"): (f"asyncio.run(plugin.handle{_PY}))", '{"status": "ok"}'),
    ("exec", "python"): (f"plugin.handle{_PY})", '{"status": "ok"}'),
    ("http", "python"): (f'plugin.handle{_PY}, {{"ce-id": "1"}})', '(200, {"status": "ok"})'),
    ("mcp", "python"): ('plugin.notify("hello", "p1")', '"noted"'),
    ("oneshot", "node"): (f"await plugin.handle{_JS})", '{ status: "ok" }'),
    ("stream", "node"): (f"await plugin.handle{_JS})", '{ status: "ok" }'),
    ("http", "node"): (f'await plugin.handle{_JS}, {{ "ce-id": "1" }})', '[200, { status: "ok" }]'),
    ("mcp", "node"): ('plugin.notify({ text: "hello", project: "p1" })', '"noted"'),
    ("oneshot", "sh"): (f"echo '{_LINE}' | ./{{name}} handle", ""),
    ("exec", "sh"): ('echo \'{"project_id":"p1"}\' | PLUGIN_EVENT_TYPE=deploy.completed ./{name}', ""),
}
"""Call in a plugin's own test and its result, by mode and language; where the test depends on the mode."""
