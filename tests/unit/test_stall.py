"""What counts as moving: bytes through any process of a transfer, but not its signs of life."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from hostd.stall import LEAST_BYTES, StallWatch, moved_bytes
from labkit.waiting import wait_until

ALLOWED_SECONDS = 80.0


@pytest.fixture
def pipe() -> Iterator[subprocess.Popen[bytes]]:
    """A process whose child passes on what it is given."""
    process = subprocess.Popen(["sh", "-c", "cat > /dev/null; :"], stdin=subprocess.PIPE, bufsize=0)
    yield process
    process.communicate()


def give(pipe: subprocess.Popen[bytes], size_bytes: int) -> None:
    """Returns when it has gone through."""
    assert pipe.stdin is not None
    before = moved_bytes(pipe.pid) or 0
    pipe.stdin.write(bytes(size_bytes))
    wait_until(lambda: (moved_bytes(pipe.pid) or 0) >= before + size_bytes, "it does not go through", 20)


def test_a_transfer_that_moves_a_little_all_the_time_is_none(pipe: subprocess.Popen[bytes]) -> None:
    """C6."""
    watch = StallWatch(pipe.pid, ALLOWED_SECONDS, 0.0)
    for now in range(10, 400, 40):
        give(pipe, LEAST_BYTES)
        assert not watch.stalled(now)


def test_signs_of_life_are_no_transfer(pipe: subprocess.Popen[bytes]) -> None:
    """D3."""
    watch = StallWatch(pipe.pid, ALLOWED_SECONDS, 0.0)
    give(pipe, LEAST_BYTES)
    verdicts = []
    for now in range(10, 110, 10):
        give(pipe, 50)
        verdicts.append(watch.stalled(now))
    assert verdicts == [False] * 8 + [True] * 2


def test_of_one_that_has_ended_nothing_is_said() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    assert not StallWatch(process.pid, ALLOWED_SECONDS, 0.0).stalled(1000.0)
