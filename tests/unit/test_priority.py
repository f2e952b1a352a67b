"""Background work steps back, with everything it starts, and nothing of that stays behind."""

import os
import subprocess
import threading

import pytest

from hostd.priority import NICENESS, in_background


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_the_work_and_its_processes_are_nice_and_the_caller_stays_as_it_was() -> None:
    before = niceness()

    def work() -> tuple[int, str]:
        told = subprocess.run(["ionice"], check=True, capture_output=True, text=True).stdout.strip()
        return niceness(), told + subprocess.run(["nice"], check=True, capture_output=True, text=True).stdout.strip()

    inside, child = in_background(work)
    assert inside == max(NICENESS, before)
    assert child == f"best-effort: prio 7{inside}"
    assert niceness() == before


def test_an_error_of_the_work_is_the_callers() -> None:
    with pytest.raises(ZeroDivisionError):
        in_background(lambda: 1 // 0)
