"""What the tests share."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from deployed import Federated

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

# A busy machine makes no property wrong; and CI tries the same examples every time, developers new ones.
settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=bool(os.environ.get("CI"))
)
settings.load_profile("untimed")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what neither takes minutes nor goes through Flower and Ray, and tell what may not run side by side."""
    for item in items:
        if not any(map(item.get_closest_marker, ("slow", "flower"))):
            item.add_marker(pytest.mark.quick)
        if "federation" in item.fixturenames or item.get_closest_marker("flower"):
            # The federation is one and takes long to start; a simulation's Ray takes all cores. In two processes the
            # one would starve the other: a round of real peers has a limit of time.
            item.add_marker(pytest.mark.xdist_group("flower"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of the real data sets, where there is one."""
    folder = os.environ.get("FEDKD_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("FEDKD_DATA does not name a folder with cifar10.npz and pretrained/")
    return Path(folder)


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Federated]":
    """A real federation on this machine, up for all tests that need one: it takes long to start."""
    from deployed import share_federation

    yield from share_federation(tmp_path_factory.mktemp)
