"""What the daemons do not use they do not load, and whoever does use it gets the real one."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from events.lean_imports import absent, postponed

UNUSED = ("asyncio", "chardet", "charset_normalizer", "cryptography", "grpc.aio", "rich")
SPARE = "this"
"""A module of the standard library that nothing here has loaded."""


@pytest.fixture(autouse=True)
def _unloaded(capsys: pytest.CaptureFixture[str]) -> None:
    sys.modules.pop(SPARE, None)  # it prints when it is loaded, which capsys swallows


def test_an_idle_agent_has_loaded_nothing_that_it_does_not_use() -> None:
    """Each of these costs memory on every host, or comes with others that do (docs/performance.md)."""
    program = f"import sys, hostd.main; print(*(name for name in {UNUSED!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout.split(), done.stderr) == ([], "")


def test_what_is_absent_cannot_be_imported_and_comes_back_afterwards() -> None:
    with absent(SPARE, "os"):
        with pytest.raises(ImportError):
            importlib.import_module(SPARE)
        assert importlib.import_module("os").sep, "what is loaded already stays"
    assert importlib.import_module(SPARE).s


def test_what_is_postponed_is_loaded_by_its_first_use() -> None:
    with postponed(SPARE):
        stand_in = importlib.import_module(SPARE)
    assert SPARE not in sys.modules
    assert stand_in.s == importlib.import_module(SPARE).s
    assert sys.modules[SPARE] is not stand_in


def test_what_is_postponed_may_be_used_at_once() -> None:
    with postponed(SPARE):
        assert importlib.import_module(SPARE).s
        loaded = sys.modules[SPARE]
    assert sys.modules[SPARE] is loaded, "the real one stays"
