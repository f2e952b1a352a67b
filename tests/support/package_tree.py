"""A Debian tree to install packages in: an overlay whose changes are in memory, in namespaces of its own.

Nothing of it outlives the process that holds it. It shares the network with the machine, unless it is given addresses of
its own, and no process, mount or ``/run``: no service manager is seen in it, so packages start nothing.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from labkit.process import PATH
from labkit.waiting import wait_until

ENVIRONMENT = {"PATH": PATH, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive", "HOME": "/root"}
COMMAND_SECONDS = 300
_ENTER = """
set -e
mount --make-rprivate /
mount -t tmpfs none "$2"
mkdir "$2/upper" "$2/work" "$2/root"
mount -t overlay none "$2/root" -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work"
mount -t proc proc "$2/root/proc"
mount -t sysfs -o ro sys "$2/root/sys"
mount --rbind /dev "$2/root/dev"
mount -t tmpfs none "$2/root/run"
mount -t tmpfs none "$2/root/tmp"
mkdir -p "$2/root/run/lock" "$2/root/run/packages" "$2/root/run/changed"
mount --bind "$2/upper" "$2/root/run/changed"
mount --bind "$3" "$2/root/run/packages"
echo ready
exec chroot "$2/root" sleep infinity
"""


class PackageTree:
    """Commands run in it as root. ``/run/packages`` shows the packages to be installed."""

    def __init__(self, holder: int, lower: Path, alone: bool) -> None:
        self._holder = holder
        self._lower = lower
        self._alone = alone

    @property
    def root(self) -> Path:
        """The tree, as seen from the machine."""
        return Path(f"/proc/{self._holder}/root")

    def line(self, *argv: str) -> list[str]:
        """What runs a command in the tree."""
        network = ["-n"] if self._alone else []
        return ["nsenter", "-t", str(self._holder), "-m", "-p", *network, "-r", "-w", "--", *argv]

    def start(self, *argv: str, quiet: bool = False) -> subprocess.Popen[str]:
        """A command that goes on in the tree; it ends with the tree at the latest. ``quiet``: nobody listens to it."""
        pipe = subprocess.DEVNULL if quiet else subprocess.PIPE
        return subprocess.Popen(
            self.line(*argv),
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=subprocess.STDOUT,
            text=True,
            env=ENVIRONMENT,
        )

    def run(self, *argv: str, check: bool = True, given: str | None = None) -> subprocess.CompletedProcess[str]:
        """A command in the tree, to its end. Fails with what it said, unless ``check`` is off."""
        done = subprocess.run(
            self.line(*argv),
            capture_output=True,
            text=True,
            check=False,
            input=given or "",
            env=ENVIRONMENT,
            timeout=COMMAND_SECONDS,
        )
        if check:
            assert done.returncode == 0, f"{' '.join(argv)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        return done

    def added(self) -> set[str]:
        """Every path that was not there at the beginning and outlasts a reboot, but for the package manager's own notes."""
        line = self.line("find", "/run/changed", "-printf", "%P\\0")
        told = subprocess.run(line, capture_output=True, check=True, env=ENVIRONMENT, timeout=COMMAND_SECONDS).stdout
        paths = {os.fsdecode(path) for path in told.split(b"\0") if path}
        found = {f"/{path}" for path in paths if not os.path.lexists(self._lower / path)}
        return {path for path in found if not path.startswith(("/var/lib/dpkg/", "/var/log/", "/var/cache/"))}


@contextlib.contextmanager
def package_tree(lower: Path, packages: Path, addresses: Sequence[str] = ()) -> Iterator[PackageTree]:
    """A tree that begins as ``lower`` is; ``packages`` is shown in it. With ``addresses`` it has a network of its own."""
    with tempfile.TemporaryDirectory(prefix="cargo-pkg-") as point:
        network = ["--net"] if addresses else []
        command = ["unshare", "--mount", "--pid", *network, "--fork", "--kill-child", "--", "sh", "-c", _ENTER, "sh"]
        keeper = subprocess.Popen([*command, str(lower), point, str(packages)], stdout=subprocess.PIPE, text=True)
        try:
            assert keeper.stdout is not None
            assert keeper.stdout.readline().strip() == "ready", "the tree could not be made"
            [holder] = Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children").read_text().split()
            _wait_for_root(int(holder))
            tree = PackageTree(int(holder), lower, alone=bool(addresses))
            for words in (
                ("link set lo up", *(f"addr add {address}/32 dev lo" for address in addresses)) if addresses else ()
            ):
                tree.run("ip", *words.split())
            yield tree
        finally:
            keeper.kill()
            keeper.wait()
            if keeper.stdout is not None:
                keeper.stdout.close()


def _wait_for_root(holder: int) -> None:
    wait_until(lambda: os.readlink(f"/proc/{holder}/exe").endswith("sleep"), "the tree was not entered", 10)
