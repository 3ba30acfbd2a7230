"""Plugins whose state is copied."""

from tests.system.daemon import ECHO

BUSY = ECHO.replace(
    "    while True:\n",
    """\
    import threading
    def scribble():
        number = 0
        while True:
            number += 1
            with open(os.environ["PLUGIN_STATE_DIR"] + "/scribble", "w") as file:
                file.write(str(number) * 5000)
                file.flush()
                os.fsync(file.fileno())
    threading.Thread(target=scribble, daemon=True).start()
    while True:
""",
    1,
)
"""Answers, and writes to its state all the time."""
