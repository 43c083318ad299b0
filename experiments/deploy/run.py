"""`fedkd deploy run`: submits a run to a deployment's SuperLink and follows it; its status is Flower's own verdict."""

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from experiments.deploy.layout import CONNECTION, Deployment
from experiments.deploy.trial import flower, require_up
from experiments.launch.app_lines import QuietLog
from experiments.launch.bundle import bundled
from experiments.launch.preflight import check_folder
from experiments.launch.runner import COMPLETED, Setting, run_config
from experiments.launch.superlink import FlowerCommand, LaunchError
from fedkd.settings.config import RunConfig

_VERDICT_WAIT = 0.5


def run(
    deployment: Deployment, app: Path, settings: Mapping[str, Setting], *, out: Callable[[str], None] = print
) -> str:
    """Run a Flower app on a deployment and wait for its end; Ctrl-C stops it.

    Args:
        deployment: whose SuperLink is up.
        app: the folder with the app's pyproject.toml.
        settings: the run config's keys that differ from the app's defaults, checked here before they are sent.
        out: takes every line meant for the user.

    Returns:
        why the run did not complete; empty if it did.

    Raises:
        FedkdError: nothing listens where the SuperLink should.
        LaunchError: Flower refused the app or its settings, or the SuperLink is not there.
    """
    if not settings.get("resume"):  # else the settings are those of the run that is resumed
        settings = {**settings_of(deployment), **settings}
    check_folder(RunConfig.from_mapping(settings))
    require_up(deployment)
    with flower(deployment) as flwr, tempfile.TemporaryDirectory(prefix="fedkd-") as scratch:
        bundle = bundled(app, Path(scratch) / "bundle")
        answer = flwr.json("run", str(bundle), CONNECTION, "--run-config", run_config(settings))
        if not answer.get("success"):
            raise LaunchError("Flower refused the run: " + str(answer.get("error-message", "")).strip())
        run_id = str(answer["run-id"])
        try:
            _follow(flwr, run_id, out)
        except KeyboardInterrupt:
            with flower(deployment) as other:
                other.json("stop", run_id, CONNECTION)
            return "stopped by the user"
        return _verdict(flwr, run_id)


def settings_of(deployment: Deployment) -> dict[str, Setting]:
    """Return what a run on a deployment needs: its number of peers, and no control that pools their data."""
    return {"peers": deployment.peers, "controls": "isolated"}


def _follow(flwr: FlowerCommand, run_id: str, out: Callable[[str], None]) -> None:
    quiet = QuietLog()
    for line in flwr.lines("log", run_id, CONNECTION, "--stream"):
        if (told := quiet.line(line)) is not None:
            out(told)


def _verdict(flwr: FlowerCommand, run_id: str) -> str:
    while True:
        answer = flwr.json("ls", CONNECTION, "--run-id", run_id)
        if not answer.get("runs"):  # the SuperLink has gone, or forgotten the run
            return str(answer.get("error-message", "")).strip() or "the SuperLink does not know the run any more"
        found = answer["runs"][0]
        status = str(found["status"])
        if status == COMPLETED:
            return ""
        if status.startswith("finished"):
            return str(found["status-details"]).partition("failed with exception: ")[2] or f"{status} {found}"
        time.sleep(_VERDICT_WAIT)
