"""Another version of the product, made from this one's tree: a copy with another number and, at will, other code.

A lab's daemons run it in the place of their own (``run_version``); what they had on disk and in the store stays.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from labkit import Process
from labkit.spec import REPOSITORY

PACKAGES = ("coordinator", "events", "hostd")
METADATA = "cargo_migrate.egg-info"


class Change(NamedTuple):
    """A piece of text in a file of the copy, and what stands there instead; it must be there."""

    file: str
    old: str
    new: str


OPTIONAL_FIELD = (
    Change(
        "events/schema.py",
        '    """t: image present, names, ports and space checked, container created but not started."""\n',
        '    """t: image present, names, ports and space checked, container created but not started."""\n\n'
        "    remark: str | msgspec.UnsetType = msgspec.UNSET\n",
    ),
    Change("events/schema.py", "class SyncFinished(Data, frozen=True, kw_only=True):", "class SyncFinished(Data, frozen=True, kw_only=True):\n    rate: float | msgspec.UnsetType = msgspec.UNSET"),
)  # fmt: skip
"""What a later version may add: optional, and not written while nobody uses it."""
_IGNORED = tuple(
    Change(file, '"bwlimit_ordered",', '"bwlimit_ordered",\n        "surveyed",')
    for file in ("coordinator/lifecycle.py", "hostd/source.py", "hostd/target.py")
)
NEW_EVENT = (
    *OPTIONAL_FIELD,
    Change(
        "events/schema.py",
        "class BwlimitOrdered(Data,",
        'class Surveyed(Data, frozen=True, kw_only=True):\n    """c: of tomorrow."""\n\n    kib: int\n\n\nclass BwlimitOrdered(Data,',
    ),
    Change("events/schema.py", '    "bwlimit_ordered": EventType(', '    "surveyed": EventType(Surveyed, (C,), None),\n    "bwlimit_ordered": EventType('),
    Change("coordinator/controls.py", "else BwlimitOrdered(kib=control.kib)", "else __import__('events.schema').schema.Surveyed(kib=control.kib)"),
    *_IGNORED,
)  # fmt: skip
"""A version whose coordinator answers the control ``bwlimit`` with an event that nobody knows today."""


def version_tree(version: str, changes: Sequence[Change] = ()) -> Path:
    """A copy of the product under that number. The caller removes it. Raises AssertionError when a change has no place."""
    (REPOSITORY / "build").mkdir(exist_ok=True)
    tree = Path(tempfile.mkdtemp(prefix=f"version-{version}-", dir=REPOSITORY / "build"))
    tree.chmod(0o755)
    for package in PACKAGES:
        shutil.copytree(REPOSITORY / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPOSITORY / METADATA, tree / METADATA)
    metadata = tree / METADATA / "PKG-INFO"
    metadata.write_text(re.sub(r"(?m)^Version: .*$", f"Version: {version}", metadata.read_text(), count=1))
    for change in changes:
        file = tree / change.file
        text = file.read_text()
        assert change.old in text, f"{change.file} has no {change.old!r}: this change has to follow the code"
        file.write_text(text.replace(change.old, change.new, 1))
    return tree


def run_version(daemon: Process, tree: Path | None) -> None:
    """Replace a daemon, which may be dead already, by that version's; None: by this one's."""
    daemon.stop()
    usual = daemon.env["PYTHONPATH"].split(":")
    library = [path for path in usual if path.startswith("/") and not Path(path, "hostd").is_dir()]
    daemon.env["PYTHONPATH"] = ":".join([str(tree or REPOSITORY), *library])
    daemon.env["PYTHONSAFEPATH"] = "1"  # the working directory holds this version
    daemon.start()
