"""What every test shares: one thread, and float64 where a test compares with exact mathematics."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def float64() -> Iterator[None]:
    """float64 as the default dtype, so that schedules and noise come in it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
