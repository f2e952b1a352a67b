"""Targets: manifests applied to real trees, by an agent that is root. A canary lies where each way out would lead.

Nothing outside of the directories that were handed over may be opened, made, changed or removed, whatever a manifest says and
whatever symlinks, devices and hard links lie in the tree. Opening is watched by an audit hook, the rest by looking at the canary.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import msgspec

from events.errors import CargoError
from hostd.federation import fold_placeholders
from hostd.manifest import Entry, decode_manifest
from hostd.placement import apply, prune
from tests.fuzz.campaign import Target
from tests.fuzz.hosts import ENTRIES, SCRATCH, framed

ROOT = SCRATCH / "ground"
CANARY = ROOT / "canary"
ALLOWED = ROOT / "allowed"
_opened: list[str] = []
_watching: list[bool] = []
"""Not empty while something must keep inside."""


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event in (
        "open",
        "os.listdir",
        "os.mkdir",
        "os.remove",
        "os.rmdir",
        "os.rename",
        "os.link",
        "os.symlink",
        "os.chmod",
        "os.chown",
    ):
        for argument in arguments[event == "os.symlink" : 2]:  # a link's target is data
            path = os.fsdecode(argument) if isinstance(argument, str | bytes | os.PathLike) else ""
            if path.startswith("/") and not path.startswith(("/proc/self/fd/", str(ALLOWED))):
                _opened.append(f"{event} {path}")
            if ".." in path.split("/"):
                _opened.append(f"{event} {path}")


sys.addaudithook(_watch)


def _ground() -> tuple[Path, tuple[Any, ...]]:
    """A tree with every way out in it, and how the canary looks."""
    shutil.rmtree(ROOT, ignore_errors=True)
    tree = ALLOWED / "tree"
    (tree / "a" / "deep").mkdir(parents=True)
    CANARY.mkdir()
    (CANARY / "file").write_bytes(b"alive")
    (CANARY / "folder").mkdir()
    (tree / "a" / "file").write_bytes(b"12345")
    os.link(tree / "a" / "file", tree / "a" / "twin")
    os.symlink(CANARY, tree / "out")
    os.symlink("../../canary/file", tree / "a" / "up")
    os.symlink(CANARY / "file", tree / "zero")
    os.symlink("/", tree / "gone")
    (tree / "a" / "deep" / "file").write_bytes(b"x")
    return tree, _look()


def _look() -> tuple[Any, ...]:
    seen = []
    for path in (CANARY, CANARY / "file", CANARY / "folder"):
        status = path.lstat()
        seen.append(
            (
                status.st_ino,
                status.st_mode,
                status.st_uid,
                status.st_gid,
                status.st_size,
                status.st_mtime_ns,
                status.st_nlink,
                os.listxattr(path),
            )
        )
    return (
        *seen,
        sorted(os.listdir(CANARY)),
        (CANARY / "file").read_bytes(),
        sorted(os.listdir(ROOT)),
        sorted(os.listdir("/")),
    )


def run_apply(raw: bytes) -> None:
    """``apply`` twice, ``prune``, and the fold of what became of it."""
    entries = list(decode_manifest(framed(raw)))
    tree, before = _ground()
    mode = len(raw) % 4
    _opened.clear()
    _watching.append(True)
    try:
        _apply(tree, entries, everything=mode in (1, 2), layer=mode == 3)
    finally:
        _watching.clear()
    assert _look() == before, "the canary was touched"
    assert not _opened, _opened[:3]


def _apply(tree: Path, entries: list[Entry], *, everything: bool, layer: bool) -> None:
    spare, basis, replica = ALLOWED / "spare", ALLOWED / "basis", ALLOWED / "replica"
    with contextlib.suppress(CargoError):
        prune(tree, spare, entries, layer=layer)
    for _ in range(2):
        with contextlib.suppress(CargoError):
            apply(tree, basis, entries, everything=everything, spare=spare, layer=layer)
    replica.mkdir(exist_ok=True)
    with contextlib.suppress(CargoError):
        fold_placeholders(tree, replica, ALLOWED, layer=layer)


OUT = [
    [Entry(b"", "d", 0o755), Entry(b"out", "d", 0o755), Entry(b"out/file", "f", 0o644, size=9, stale=True)],
    [Entry(b"", "d", 0o755, stale=True), Entry(b"out", "l", 0o777, link_target=b"/"), Entry(b"out/file", "-")],
    [
        Entry(b"", "d", 0o755),
        Entry(b"a", "d", 0o755),
        Entry(b"a/up", "f", 0o600, size=3),
        Entry(b"zero", "f", 0o644, uid=5),
    ],
    [Entry(b"", "d", 0o755), Entry(b"gone", "d", 0o700, stale=True), Entry(b"gone/etc", "d", 0o700, stale=True)],
]
SEEDS = [msgspec.msgpack.encode(entries) for entries in (ENTRIES, *OUT)]

TARGETS = (Target("trees", run_apply, SEEDS, "msgpack", 1),)
