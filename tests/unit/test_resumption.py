"""An rsync that crashes over parts of files is found out, and gets none. Programs of these names are put first in PATH."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostd.resumption import Resumption

GOES_ON = """
for last; do before=$file; file=$last; done
cp "$before/file" "$file/file"
"""
CRASHES = """
for word; do case $word in --partial-dir=*) parts=${word#*=};; esac; done
[ ! -e "$parts/file" ] || kill -SEGV $$
"""
LIES = """
for word; do case $word in --partial-dir=*) parts=${word#*=};; esac; file=$word; done
cp "$parts/file" "$file/file"
"""


def install(program: Path, script: str) -> None:
    """Replaced as a package replaces it, and noting how often it runs."""
    draft = program.with_suffix(".new")
    draft.write_text(f"#!/bin/sh\necho >> {program.parent}/runs\n{script}")
    draft.chmod(0o755)
    draft.replace(program)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "bin"
    place.mkdir()
    monkeypatch.setenv("PATH", f"{place}:/usr/bin:/bin")
    return place / "rsync"


@pytest.mark.parametrize(("script", "expected"), [(GOES_ON, True), (CRASHES, False), (LIES, False), ("exit 23", False)])
def test_only_an_rsync_that_completes_a_part_gets_parts(
    program: Path, tmp_path: Path, script: str, *, expected: bool
) -> None:
    """D3: Debian 12's receiver dies of a part at each attempt, and the migration with it."""
    install(program, script)
    assert Resumption().possible(tmp_path) is expected
    assert [path.name for path in tmp_path.iterdir()] == ["bin"], "nothing is left behind"


def test_it_is_tried_once_and_again_when_rsync_was_replaced(program: Path, tmp_path: Path) -> None:
    """An upgrade of rsync needs no restart of the agent."""
    resumption = Resumption()
    install(program, CRASHES)
    assert not resumption.possible(tmp_path)
    assert not resumption.possible(tmp_path)
    install(program, GOES_ON)
    assert resumption.possible(tmp_path)
    assert (program.parent / "runs").read_text() == "\n" * 2


def test_a_host_without_rsync_is_no_concern_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not Resumption().possible(tmp_path)
