"""A simulated world gives the coordinator's service its own clock; the tests that come after get the real one back."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

import coordinator.service as service_module


@pytest.fixture(autouse=True)
def the_real_clock_comes_back() -> Iterator[None]:
    yield
    service_module.__dict__["time"] = time
