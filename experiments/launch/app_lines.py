"""The app's own lines out of a log in which Flower and Ray have much to say about themselves."""

import re

_FLOWER = re.compile(r"^(?:\x1b\[\d+m)?(DEBUG|INFO|WARNING|ERROR) (?:\x1b\[0m)?: +(.*)$")
_ACTOR = re.compile(r"^(?:\x1b\[\d+m)?(\(\w+ pid=[^)]*\))(?:\x1b\[0m)? ")
_NOISE = re.compile(
    "|".join(
        (
            "Using SuperLink: ",
            "Starting logstream for run_id ",
            "Starting Flower Simulation$",
            "Start `flwr-serverapp` process$",
            r"Since flwr 1\.32, default simulated SuperNodes changed",
            r"Federation `.*` \(\d+ simulated SuperNodes\)",
            "To change federation size, use the following command:",
            r"\tflwr federation simulation-config ",
            r"Successfully installed .* to /.*/apps/",
            ".*FutureWarning: Tip: In future versions of Ray, ",
            r"  warnings\.warn\($",
            "Manually terminating ClientAppActor",
            r"aggregate_train: Received \d+ results and 0 failures$",
            r"\s*$",
        )
    )
)
_FRAME = re.compile(r"\s+File \"|\s*\S+\.so[.\d]*\(|\s*@ +0x|\*\*\* |(Current thread|Thread) 0x|Extension modules: ")
_SERVER = re.compile(r"\S+ INFO \[uvicorn")
_LAST, _WIDEST = 5, 300


def said_at_the_end(log: str) -> str:
    r"""Return the last lines of a process that broke off, without frames of its stack and what it says in every run.

    >>> print(said_at_the_end("\x1b[92mINFO \x1b[0m:      Starting SuperExec\nCheck failed: no memory\n  @ 0x7f"))
    Check failed: no memory
    """
    quiet = QuietLog()
    told = [quiet.line(line) for line in log.splitlines() if not (_ordinary(line) or _FRAME.match(line))]
    return "\n".join([line[:_WIDEST] for line in told if line and line.strip()][-_LAST:])


def _ordinary(line: str) -> bool:
    record = _FLOWER.match(line)
    return bool(_SERVER.match(line)) or (record is not None and record[1] != "ERROR")


class QuietLog:
    """Reads a run's log line by line and tells what of it is for the user."""

    def __init__(self) -> None:
        self._over = False

    def line(self, line: str) -> str | None:
        r"""Return the line as the user should see it, or None for noise.

        What follows Flower's exit code is its advice on where to read about exit codes.

        >>> log = QuietLog()
        >>> log.line("\x1b[93mWARNING \x1b[0m:   peer-3 answered late")
        'warning: peer-3 answered late'
        >>> log.line("\x1b[92mINFO \x1b[0m:      Starting Flower Simulation")
        """
        actor = _ACTOR.match(line)
        bare = line[actor.end() :] if actor else line
        record = _FLOWER.match(bare)
        text = record[2] if record else bare
        self._over = self._over or (record is not None and text.startswith("Exit Code: "))
        if self._over or (_NOISE.match(text) and (record or text.strip())):
            return None
        if record and record[1] in ("WARNING", "ERROR") and not text.startswith("error: "):
            text = f"{record[1].lower()}: {text}"
        return f"{actor[1]} {text}" if actor else text
