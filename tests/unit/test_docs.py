"""Pages that are generated from the code are current."""

import re
from pathlib import Path

import pytest

from docskit.__main__ import DOCS, PAGES


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_current(name: str) -> None:
    assert (Path(DOCS) / name).read_text() == PAGES[name](), "run scripts/docs and review the difference"


def test_the_tests_that_the_threat_model_names_exist() -> None:
    tests = Path(__file__).parents[1]
    text = (Path(DOCS) / "security.md").read_text()
    defined = {
        name for file in tests.rglob("test_*.py") for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 10
    assert named <= defined, named - defined
    assert [path for path in re.findall(r"`(tests/[\w/]+\.py)`", text) if not (tests.parent / path).exists()] == []
