"""Where a run was started, and the cure for a trap in how Ray finds code.

Ray puts the driver's working directory ahead of the app's bundle on its workers' ``sys.path``. A SuperLink
that was started in another checkout would so run that checkout's packages, silently. Flower imports the app
before it starts Ray, so the driver steps into the bundle at that moment.
"""

import os
import sys
from pathlib import Path

STARTED_IN = Path.cwd()
"""The working directory when the app was first imported: for `flwr run`, that of its SuperLink."""


def enter_bundle(bundle: Path) -> None:
    """Change into the app's folder, if this process is the driver of a Flower simulation."""
    if Path(sys.argv[0]).name.startswith("flwr-simulation"):
        os.chdir(bundle)
