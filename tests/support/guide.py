"""The commands of a page of the documentation, with what the page shows of their answers, and how they are run in the lab.

A block of commands is fenced as ``console`` and stands below ``<!-- scene: NAME -->``, which says in which situation it
holds; ``tests/e2e/test_guide.py`` makes that situation. A command follows a prompt: ``$`` where cargoctl and etcdctl are,
``alpha#`` or ``beta#`` as root on that host, ``etcd#`` as root where etcd runs. Lines below it are its answer, as far as the
page shows it: each must come, in that order; ``…`` stands for anything, and times, ids and the numbers of events are not
compared. ``exit: 1`` in the comment says that a command of the block ends so.

What it must never do: let a block pass that nobody runs. So ``parse`` refuses blocks without a scene and fences that it
does not know.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SCENE = re.compile(r"<!-- scene: (?P<name>[a-z0-9-]+)(?: exit: (?P<code>\d))? -->")
PROMPT = re.compile(r"(?P<where>\$|(?:alpha|beta|etcd)#) (?P<command>.*)")
WITHOUT_COMMANDS = frozenset({"text", "json", "ini"})
"""Fences that show something and are nothing to type."""
RUN_ELSEWHERE = frozenset({"sh"})
"""``tests/integration/test_packages.py`` runs all of those, in a tree of Debian's."""


@dataclass(frozen=True)
class Command:
    """One command and what the page shows of its answer."""

    where: str
    """``$``, ``alpha``, ``beta`` or ``etcd``."""
    text: str
    answer: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """The commands between two fences."""

    scene: str
    line: int
    commands: tuple[Command, ...]
    code: int = 0
    """The exit code that a command of it may have besides 0, and one must have."""


class PageError(Exception):
    """A page that cannot be tested as it is written."""


def parse(page: Path) -> list[Block]:
    """Every ``console`` block of the page, in its order. Raises PageError."""
    lines = page.read_text().splitlines()
    blocks = []
    at = 0
    while at < len(lines):
        fence = re.fullmatch(r"\s*```(.*)", lines[at])
        at += 1
        if fence is None:
            continue
        end = next((n for n in range(at, len(lines)) if lines[n].strip() == "```"), None)
        if end is None:
            raise PageError(f"{page.name}:{at}: the block does not end")
        if fence[1] == "console":
            blocks.append(_block(page, at, lines[at - 2], lines[at:end]))
        elif fence[1] not in WITHOUT_COMMANDS | RUN_ELSEWHERE:
            raise PageError(f"{page.name}:{at}: nobody would run a block of {fence[1] or 'no kind'!r}; call it console")
        at = end + 1
    return blocks


def _block(page: Path, line: int, above: str, body: Sequence[str]) -> Block:
    scene = SCENE.fullmatch(above.strip())
    if scene is None:
        raise PageError(f"{page.name}:{line}: the block has no scene, so nobody would run it")
    commands: list[Command] = []
    for text in body:
        prompt = PROMPT.fullmatch(text)
        if commands and commands[-1].text.endswith("\\") and not commands[-1].answer:
            joined = commands[-1].text[:-1].rstrip() + " " + text.strip()
            commands[-1] = Command(commands[-1].where, joined, ())
        elif prompt is not None:
            commands.append(Command(prompt["where"].rstrip("#"), prompt["command"], ()))
        elif not commands:
            raise PageError(f"{page.name}:{line}: it does not begin with a prompt")
        elif text.strip():
            last = commands[-1]
            commands[-1] = Command(last.where, last.text, (*last.answer, text))
    if not commands:
        raise PageError(f"{page.name}:{line}: the block is empty")
    return Block(scene["name"], line, tuple(commands), int(scene["code"] or 0))


_SHOWN = re.compile(r" {4}((?:sudo |etcdctl |cargoctl |cargo-|scripts/)\S.*)")


def listed(page: Path) -> list[str]:
    """Commands that a page shows indented, each on a line of its own with what it does behind two blanks or more.

    ``a b | c d`` stands for ``a b d`` and ``a c d``; ``[x]`` for one with and one without.
    """
    found = []
    for line in page.read_text().splitlines():
        shown = _SHOWN.fullmatch(line)
        if shown is not None:
            found += _variants(re.split(r"\s{2,}|\s#", shown[1])[0])
    return found


def _variants(text: str) -> list[str]:
    either = re.search(r"[\w-]+(?: \| [\w-]+)+", text)
    if either is not None:
        words = either[0].split(" | ")
        return [text[: either.start()] + word + text[either.end() :] for word in words]
    optional = re.search(r" \[([^]]+)\]", text)
    if optional is not None:
        return [text[: optional.start()], f"{text[: optional.start()]} {optional[1]}"]
    return [text]


# --- what was answered ---------------------------------------------------------------------------------

_VARYING = (
    (re.compile(r"^\s*\d+(?=\s+[+-]\d+\.\d{3} s)"), "N"),
    (re.compile(r"[+-]\d+\.\d{3} s\b"), "TIME"),
    (re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+(?:Z|[+-]\d\d:\d\d)?"), "TIME"),
    (re.compile(r"\b[0-9a-f]{12,}\b"), "ID"),
    (re.compile(r"\b\d+(?:\.\d+)? (?:s|min|h|ms)\b"), "TIME"),
    (re.compile(r"\bevent \d+\b"), "event N"),
    (re.compile(r"\b\d+ events\b"), "N events"),
)
"""What differs between two runs, however alike they are."""


def plain(line: str) -> str:
    """``line`` without what differs between two runs."""
    for pattern, name in _VARYING:
        line = pattern.sub(name, line)
    return " ".join(line.split())


def missing(expected: Sequence[str], said: str) -> str | None:
    """The first line of ``expected`` that ``said`` does not have behind the ones before; None when all came."""
    lines = [plain(line) for line in said.splitlines()]
    at = 0
    for wanted in expected:
        if wanted.strip() == "…":
            continue
        pattern = re.compile(".*".join(map(re.escape, plain(wanted).split("…"))))
        found = next((n for n in range(at, len(lines)) if pattern.fullmatch(lines[n])), None)
        if found is None:
            return wanted
        at = found + 1
    return None
