"""What the tests share."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of the real data sets, where there is one."""
    folder = os.environ.get("FEDKD_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("FEDKD_DATA does not name a folder with cifar10.npz and pretrained/")
    return Path(folder)
