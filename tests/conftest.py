"""What every test shares: one thread, and float64 where a test compares with exact mathematics."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: also of the processes that tests start

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from edm_files import EdmWriter, edm_writer_in

torch.set_num_threads(1)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # processes that tests start compile torch once, and not each anew


def pytest_configure(config: pytest.Config) -> None:
    """With ``--dist loadfile`` files start in the order of collection, not those with most tests first."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: at the end no worker waits for another's minutes."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True, scope="session")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of downloads of all tests, empty: what a user has downloaded is not seen."""
    folder = tmp_path_factory.mktemp("downloads")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DISTILLBENCH_DOWNLOADS", str(folder))
        patched.delenv("DISTILLBENCH_SOURCES", raising=False)
        yield folder


@pytest.fixture
def float64() -> Iterator[None]:
    """float64 as the default dtype, so that schedules and noise come in it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def edm_writer(tmp_path: Path) -> Iterator[EdmWriter]:
    """Writes files of networks in EDM's format into the test's folder."""
    with edm_writer_in(tmp_path) as writer:
        yield writer
