"""Root trees of other systems than the machine's own, for hosts with a newer Docker: made once, then cached.

A tree is made by debootstrap when a lab first asks for it, without a service being started; what Cargo's agent needs
of Python is installed beside it for that system's own interpreter. Both are only ever the lower layer of a host's
root (see launch), so hosts share them and nothing of a lab is in them. Needs a Debian mirror and a Python package
index, as scripts/setup does; a tree that is here needs neither.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from labkit.errors import CommandFailedError, LabError
from labkit.process import PATH
from labkit.spec import CACHE, OWN_ROOT, REPOSITORY, ROOT_TREES

MIRROR = "http://deb.debian.org/debian"
MIRROR_VARIABLE = "CARGO_LAB_MIRROR"
LIBRARY = "opt/cargo/lib"
"""Where in a tree the Python packages lie; hosts have it in PYTHONPATH."""
MAKE_SECONDS = 1800.0


@dataclass(frozen=True)
class Recipe:
    """What a tree is made of."""

    suite: str
    python: str
    packages: tuple[str, ...]


RECIPES = {
    "debian13": Recipe(
        suite="trixie",
        python="3.13",
        packages=(
            *("ca-certificates", "docker.io", "docker-cli", "containerd", "runc", "tini", "python3"),
            *("rsync", "openssh-client", "openssh-server", "openssh-sftp-server", "sshfs", "fuse3"),
            *("iproute2", "iptables", "nftables", "procps", "kmod", "acl", "attr"),
        ),
    )
}
assert tuple(RECIPES) == ROOT_TREES
PLAIN_RECIPES = {
    # What Cargo's packages depend on, and nothing of Cargo; the lab's hosts have the machine's own tree instead.
    "debian12": Recipe(
        suite="bookworm",
        python="3.11",
        packages=(
            *("ca-certificates", "docker.io", "python3", "rsync", "openssh-client", "openssh-server", "sshfs", "fuse3"),
            *("iproute2", "iptables", "kmod", "procps", "systemd"),
        ),
    ),
    "debian13": RECIPES["debian13"],
}
BOOTABLE_RECIPES = {
    # A whole Debian with its service manager, for a virtual machine. It lacks the kernel (see scripts/setup --guest) and Cargo.
    "debian12": Recipe(
        suite="bookworm",
        python="3.11",
        packages=(
            *PLAIN_RECIPES["debian12"].packages,
            *("systemd-sysv", "dbus", "udev", "apparmor", "etcd-server", "etcd-client", "iputils-ping", "netbase"),
        ),
    ),
}


def layers(name: str, say: Callable[[str], None] | None = None) -> list[Path]:
    """The directories that make up the root tree ``name``, uppermost first; made if they are not there.

    ``say`` gets a line before anything that takes long. Raises LabError with the end of the tool's words.
    """
    if name == OWN_ROOT:
        return []
    recipe = RECIPES[name]
    told = say or (lambda line: print(line, file=sys.stderr, flush=True))
    packages = _python_packages()
    return [
        _made(
            f"{name}-python", [recipe.python, packages], lambda place: _install_python(recipe, packages, place), told
        ),
        _made(name, asdict(recipe), lambda place: _bootstrap(recipe, place), told),
    ]


def plain_tree(name: str, say: Callable[[str], None] | None = None) -> Path:
    """A tree of PLAIN_RECIPES, without Cargo; made if it is not there. Raises LabError as ``layers`` does."""
    recipe = PLAIN_RECIPES[name]
    told = say or (lambda line: print(line, file=sys.stderr, flush=True))
    return _made(name, asdict(recipe), lambda place: _bootstrap(recipe, place), told)


def bootable_tree(name: str, say: Callable[[str], None] | None = None) -> Path:
    """A tree of BOOTABLE_RECIPES; made if it is not there. Raises LabError as ``layers`` does."""
    recipe = BOOTABLE_RECIPES[name]
    told = say or (lambda line: print(line, file=sys.stderr, flush=True))
    return _made(f"{name}-bootable", asdict(recipe), lambda place: _bootstrap(recipe, place), told)


def _made(name: str, key: object, make: Callable[[Path], None], say: Callable[[str], None]) -> Path:
    """The cached directory of this name and key; a half-made one never gets the name."""
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    place = CACHE / "roots" / f"{name}-{digest}"
    if place.is_dir():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(place.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)  # two labs may want it at the same time
        if place.is_dir():
            return place
        say(f"making {place}, once; later labs find it there")
        draft = place.with_name(f".{place.name}.part")
        if draft.exists():
            shutil.rmtree(draft)
        try:
            draft.mkdir()
            make(draft)
            draft.chmod(0o755)
            draft.replace(place)
        finally:
            if draft.exists():
                shutil.rmtree(draft)
    finally:
        os.close(fd)
    return place


def _bootstrap(recipe: Recipe, place: Path) -> None:
    if shutil.which("debootstrap", path=PATH) is None:
        _run(["apt-get", "-q", "-y", "--no-install-recommends", "install", "debootstrap"])
    mirror = os.environ.get(MIRROR_VARIABLE) or MIRROR
    wanted = f"--include={','.join(recipe.packages)}"
    _run(["debootstrap", "--variant=minbase", wanted, recipe.suite, str(place), mirror])
    shutil.rmtree(place / "var/cache/apt", ignore_errors=True)


def _install_python(recipe: Recipe, packages: Sequence[str], place: Path) -> None:
    """For the tree's interpreter, by the machine's pip: which has the machine's settings for it."""
    with tempfile.TemporaryDirectory() as wheels:
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
        # Packages that exist as source only, of pure Python, are made wheels first: pip builds none for another version.
        sources = [name for name in packages if name.startswith("etcd3")]
        _run([*pip, "wheel", "--use-pep517", "--no-deps", "--wheel-dir", wheels, *sources])
        target = ["--target", str(place / LIBRARY), "--python-version", recipe.python, "--only-binary=:all:"]
        _run([*pip, "install", *target, "--find-links", wheels, *packages])


def _python_packages() -> list[str]:
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        return [str(name) for name in tomllib.load(file)["project"]["dependencies"]]


def _run(argv: Sequence[str]) -> None:
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
    environment["PATH"] = f"{environment.get('PATH', '')}:{PATH}"
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, errors="replace", check=False, stdin=subprocess.DEVNULL,
            env=environment, timeout=MAKE_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise LabError(f"{argv[0]} took over {MAKE_SECONDS:.0f} s; is the mirror in reach?") from error
    except OSError as error:
        raise LabError(f"{argv[0]} cannot be run: {error}") from error
    if done.returncode != 0:
        raise CommandFailedError(list(argv), done.returncode, done.stdout[-2000:], done.stderr[-2000:])
