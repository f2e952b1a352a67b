"""No command of the operator's guide goes untyped: what is on the page is what the tests walk through."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.test_guide import PAGE, RUINOUS, SCENES
from tests.support.guide import PageError, missing, parse

GOOD = """
<!-- scene: first exit: 1 -->
```console
$ one \\
    two
an answer
alpha# three
```
"""


def test_every_block_has_a_scene_and_every_scene_a_block() -> None:
    assert {block.scene for block in parse(PAGE)} == {*SCENES, *RUINOUS}


def test_a_page_is_read_as_a_person_reads_it(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(GOOD)
    (block,) = parse(page)
    assert (block.scene, block.code, block.line) == ("first", 1, 3)
    assert [(command.where, command.text) for command in block.commands] == [("$", "one two"), ("alpha", "three")]
    assert block.commands[0].answer == ("an answer",)


@pytest.mark.parametrize(
    "spoilt",
    [
        GOOD.replace("<!-- scene: first exit: 1 -->\n", ""),
        GOOD.replace("scene: first", "a note"),
        GOOD.replace("console", "bash"),
        GOOD.replace("console", ""),
        GOOD.replace("$ one", "one"),
        GOOD.rpartition("```")[0],
    ],
)
def test_what_nobody_would_run_is_a_mistake(tmp_path: Path, spoilt: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(spoilt)
    with pytest.raises(PageError):
        parse(page)


def test_answers_are_compared_without_times_ids_and_numbers_but_in_order() -> None:
    said = "   7    +2.217 s  hostd/beta  sync_finished  1 file, 0.4 s\nthen 0123456789ab\nlast"
    assert missing(["  12   +99.000 s  hostd/beta sync_finished  1 file, 7.0 s", "…", "last"], said) is None
    assert missing(["then fedcba9876543210", "l…t"], said) is None
    assert missing(["last", "then 0123456789ab"], said) == "then 0123456789ab"
    assert missing(["las"], said) == "las"
