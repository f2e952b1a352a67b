"""The libraries that go into cargo-common: Cargo and all it needs, in one directory that serves several Pythons.

Extension modules carry the version of the Python they were built for in their names, so those of Debian 12 and of
Debian 13 lie side by side; everything else is the same file for both, which is checked, not assumed.
"""

from __future__ import annotations

import filecmp
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

PYTHONS = ("3.11", "3.13")
"""Of Debian 12 and 13. debian/control and debian/rules name them too; a test compares."""
OURS = "cargo-migrate"
PRUNED = ("bin", "**/__pycache__", "**/tests", "pygments/**/*.pyi")
"""What pip leaves that no process of ours ever loads."""
TIMEOUT_SECONDS = 900.0


class BuildError(Exception):
    """The packages cannot be built; the text says why, with the end of the tool's own words."""


def make_site(repository: Path, site: Path, scratch: Path) -> None:
    """Fill ``site``. Needs a Python package index. Raises BuildError."""
    wheels = scratch / "wheels"
    wheel_of(repository, scratch / "source", wheels)
    first, *others = PYTHONS
    _install(site, first, wheels, [OURS], dependencies=True)
    pinned = [
        f"{found.metadata['Name']}=={found.version}"
        for found in distributions(path=[str(site)])
        if found.metadata["Name"] != OURS
    ]
    for version in others:
        other = scratch / f"site-{version}"
        _install(other, version, wheels, [OURS, *pinned], dependencies=False)
        merge(other, site)
    for pattern in PRUNED:
        for path in site.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in site.rglob("*.py"):
        path.chmod(0o644)  # some wheels mark modules as executable


def wheel_of(repository: Path, source: Path, wheels: Path) -> Path:
    """Build the project's wheel from a copy of its sources, so that no file of the build stays in the tree."""
    source.mkdir(parents=True)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy2(repository / name, source)
    for name in ("events", "coordinator", "hostd"):
        shutil.copytree(repository / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run([*_pip(), "wheel", "--no-deps", "--wheel-dir", str(wheels), str(source)])
    [wheel] = wheels.glob("cargo_migrate-*.whl")
    return wheel


def merge(other: Path, site: Path) -> None:
    """Add to ``site`` what ``other`` has beyond it. Raises BuildError where both have a file that differs."""
    for path in sorted(other.rglob("*")):
        name = path.relative_to(other)
        if path.is_dir() or "__pycache__" in name.parts:
            continue
        place = site / name
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, place)
        elif not any(part.endswith(".dist-info") for part in name.parts) and not filecmp.cmp(path, place, False):
            raise BuildError(f"{name} differs between the Pythons {', '.join(PYTHONS)}: they cannot share a directory")


def _pip() -> list[str]:
    return [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]


def _install(target: Path, version: str, wheels: Path, names: Sequence[str], *, dependencies: bool) -> None:
    # Published as source only, of pure Python; pip builds none itself for another version than its own.
    if not any(wheels.glob("etcd3-*")):
        run([*_pip(), "wheel", "--use-pep517", "--no-deps", "--wheel-dir", str(wheels), _etcd3(wheels)])
    line = [*_pip(), "install", "--target", str(target), "--python-version", version, "--only-binary=:all:"]
    line += ["--no-compile", "--find-links", str(wheels)]
    run([*line, *([] if dependencies else ["--no-deps"]), *names])


def _etcd3(wheels: Path) -> str:
    """The requirement as the project's wheel states it."""
    [ours] = distributions(path=[str(next(wheels.glob("cargo_migrate-*.whl")))])
    [requirement] = [line for line in ours.requires or [] if line.startswith("etcd3")]
    return requirement


def run(argv: Sequence[str], *, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """What the command prints. Raises BuildError with the end of its words when it fails."""
    try:
        done = subprocess.run(
            argv, cwd=cwd, env=env, capture_output=True, text=True, errors="replace", check=False,
            stdin=subprocess.DEVNULL, timeout=TIMEOUT_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{argv[0]} cannot be run to its end: {error}") from error
    if done.returncode != 0:
        raise BuildError(f"{' '.join(argv)} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout
