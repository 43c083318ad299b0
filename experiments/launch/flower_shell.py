"""Flower's command line as one long-lived process: it takes commands on stdin, answers on stdout.

`experiments.launch.superlink` runs it as a script, in a process of its own because Flower's ``--format json`` prints to
the real standard output and resets `sys.stdout`. Importing `flwr` takes 0.7–2 s: once here, while the SuperLink starts.
"""

import json
import sys
from importlib.metadata import entry_points

END = "\x1e"
"""Ends an answer; the command's exit status follows on the same line."""


def serve() -> None:
    """Execute one JSON list of arguments per line of stdin, until it closes."""
    (script,) = entry_points(group="console_scripts", name="flwr")
    flwr = script.load()
    for line in sys.stdin:
        status = 0
        try:
            flwr(json.loads(line), standalone_mode=False)
        except Exception as error:  # whatever a command raises is its answer, not the end of the shell
            print(f"{type(error).__name__}: {error}")
            status = 1
        print(f"{END}{status}", flush=True)


if __name__ == "__main__":
    serve()
