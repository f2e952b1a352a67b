"""Pages that are generated from the code are current."""

from pathlib import Path

import pytest

from docskit.__main__ import DOCS, PAGES


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_current(name: str) -> None:
    assert (Path(DOCS) / name).read_text() == PAGES[name](), "run scripts/docs and review the difference"
