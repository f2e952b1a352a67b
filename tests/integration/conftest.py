"""What tests of the union share: a source behind an sshd, and a mount that is brought from it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.unions import Link, Stand


@pytest.fixture(scope="module")
def link() -> Iterator[Link]:
    """A source, and a way to it."""
    with Link() as link:
        yield link


@pytest.fixture
def stand(link: Link) -> Iterator[Stand]:
    """One mount, not yet brought; its source answers again afterwards, whatever the test did to it."""
    stand = Stand(link)
    try:
        yield stand
    finally:
        link.sshd.stop()
        link.sshd.start()
        stand.close()
