"""``scripts/build-deb``: lays out what packaging/debian packs, and has debhelper pack it.

The version is that of pyproject.toml, the packages' only source of it. Nothing is written outside of ``--output``.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import tomllib
from email.utils import formatdate
from pathlib import Path
from typing import Any

from debkit.site import BuildError, make_site, run

REPOSITORY = Path(__file__).resolve().parents[2]
EXIT_OK, EXIT_FAILED = 0, 1
UNITS = {
    "cargo-coordinator.service": "cargo-coordinator.service",
    "cargo-hostd.service": "cargo-hostd.service",
    "cargo-hostd-mounts.service": "cargo-hostd.cargo-hostd-mounts.service",
}
"""In packaging/systemd: the name under which debhelper finds it."""
_PRE_RELEASE = re.compile(r"\.?(a|b|rc|dev)(\d+)")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="scripts/build-deb",
        description="Builds cargo-common, cargo-coordinator and cargo-hostd as Debian packages, for Debian 12 and 13.",
        epilog="Needs Debian's debhelper (scripts/setup installs it) and a Python package index. "
        "Exit codes: 0 built, and their names printed; 1 failed.",
    )
    made.add_argument("--output", type=Path, default=REPOSITORY / "build" / "deb", help="default: build/deb")
    made.add_argument("--quick", action="store_true", help="hardly compressed, for tests: larger, but sooner")
    made.add_argument("--site", type=Path, help="libraries made by an earlier run (kept with --keep-site), for tests")
    made.add_argument("--keep-site", type=Path, help="leave the libraries in this new directory")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Build. Returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="cargo-deb-") as scratch:
            for package in build(Path(scratch), options):
                print(package)
    except BuildError as error:
        print(f"build-deb: {error}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_OK


def build(scratch: Path, options: argparse.Namespace) -> list[Path]:
    """The packages, in ``options.output``. Raises BuildError."""
    if shutil.which("dh") is None or shutil.which("dpkg-buildpackage") is None:
        raise BuildError("debhelper is missing here; scripts/setup installs it (Debian package debhelper)")
    tree = scratch / "tree"
    lay_out(tree)
    if options.site is not None:
        shutil.copytree(options.site, tree / "site")
    else:
        make_site(REPOSITORY, tree / "site", scratch)
    if options.keep_site is not None:
        shutil.copytree(tree / "site", options.keep_site)
    compression = "-Zgzip -z1" if options.quick else "-Zxz"
    environment = {**os.environ, "CARGO_DEB_COMPRESSION": compression, "LC_ALL": "C.UTF-8"}
    run(["dpkg-buildpackage", "--build=binary", "--no-sign", "--jobs=auto"], cwd=tree, env=environment)
    options.output.mkdir(parents=True, exist_ok=True)
    for stale in options.output.glob("cargo-*.deb"):
        stale.unlink()
    return [Path(shutil.copy2(made, options.output)) for made in sorted(scratch.glob("*.deb"))]


def lay_out(tree: Path) -> None:
    """Everything but the libraries: debian/, units, configuration, documentation, commands."""
    packaging = REPOSITORY / "packaging"
    shutil.copytree(packaging / "debian", tree / "debian")
    shutil.copytree(packaging / "config", tree / "config")
    for unit, name in UNITS.items():
        shutil.copy2(packaging / "systemd" / unit, tree / "debian" / name)
    (tree / "debian" / "changelog").write_text(changelog(), encoding="utf-8")
    shutil.copy2(REPOSITORY / "README.md", tree)
    shutil.copytree(REPOSITORY / "docs" / "samples", tree / "samples")
    (tree / "md").mkdir()
    for page in (REPOSITORY / "docs").glob("*.md"):
        shutil.copy2(page, tree / "md")
    # Not under its own name: debhelper would take it for a second Debian changelog.
    shutil.copy2(REPOSITORY / "CHANGELOG.md", tree / "md" / "releases.md")
    (tree / "bin").mkdir()
    for name, entry in project()["scripts"].items():
        module, _, function = entry.partition(":")
        lines = f"#!/usr/lib/cargo/bin/python3 -I\nimport sys\n\nfrom {module} import {function}\n\nsys.exit({function}())\n"
        (tree / "bin" / name).write_text(lines, encoding="utf-8")


def changelog() -> str:
    """One entry, of the version that is built; what changed stands in the project's own."""
    dated = run(["git", "-C", str(REPOSITORY), "log", "-1", "--format=%ct"]).strip()
    [maintainer] = re.findall(
        r"^Maintainer: (.*)$", (REPOSITORY / "packaging/debian/control").read_text(), re.MULTILINE
    )
    return (
        f"cargo-migrate ({debian_version(project()['version'])}) unstable; urgency=medium\n\n"
        "  * What changed stands in /usr/share/doc/cargo-common/releases.md.\n\n"
        f" -- {maintainer}  {formatdate(int(dated), localtime=False)}\n"
    )


def project() -> dict[str, Any]:
    """The [project] table of pyproject.toml."""
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        return dict(tomllib.load(file)["project"])


def debian_version(version: str) -> str:
    """As Debian sorts it: what comes before a release is marked with a tilde."""
    return _PRE_RELEASE.sub(r"~\1\2", version)


if __name__ == "__main__":
    sys.exit(main())
