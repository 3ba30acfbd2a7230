"""One-shot deliveries of plugins in Python: a request and its reply on each connection."""

import contextlib
import json
import os
import socket
import traceback


def serve(handle):
    """Answer each event with what ``handle`` makes of it; what fails is tried again later."""
    path = os.environ["PLUGIN_SOCKET"]
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        while True:
            connection, _ = listener.accept()
            with connection, connection.makefile("rw") as stream, contextlib.suppress(OSError, ValueError):
                request = json.loads(stream.readline())
                try:
                    result = handle(request["params"])
                except Exception as error:
                    traceback.print_exc()
                    result = {"status": "retry", "detail": repr(error)}
                stream.write(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": result}) + "\n")
