"""A private, real dockerd for one test module: own mount, network and pid namespace, own everything.

It touches nothing of the machine's own Docker: data, sockets, bridge and iptables rules live in a
temporary directory and in namespaces of their own. Because the daemon and all its containers share one
pid namespace, killing that namespace's first process ends every one of them; nothing is searched by name.
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

START_SECONDS = 60.0
STOP_SECONDS = 30.0
APPLETS = ("sh", "sleep", "cat", "ls", "echo", "true", "false", "nc", "touch", "kill", "wc", "hostname")
CGROUPS = Path("/sys/fs/cgroup")


class PrivateDockerd:
    """Use :func:`private_dockerd`. ``url`` is what a client connects to."""

    def __init__(self, root: Path, *, options: tuple[str, ...] = ()) -> None:
        self.root = root
        self.socket = root / "docker.sock"
        self.url = f"unix://{self.socket}"
        self.cgroup = f"cargo-test-{secrets.token_hex(4)}"
        self.options = options
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the daemon and wait until it answers. Raises RuntimeError with the end of its log."""
        argv = [
            "unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc",
            "--propagation", "private",
            "sh", "-c", 'ip link set lo up; exec dockerd "$@"', "dockerd",
            "--data-root", str(self.root / "data"),
            "--exec-root", str(self.root / "exec"),
            "--pidfile", str(self.root / "pid"),
            "--host", self.url,
            "--cgroup-parent", f"/{self.cgroup}",
            "--group", "root",
            *self.options,
        ]  # fmt: skip
        (self.root / "pid").unlink(missing_ok=True)
        with (self.root / "log").open("ab") as log:
            self._process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop(at_once=True)
                raise RuntimeError(f"dockerd did not start:\n{(self.root / 'log').read_text()[-3000:]}")
            time.sleep(0.05)

    def _answers(self) -> bool:
        return self.socket.exists() and self.docker("version", check=False).returncode == 0

    def docker(self, *arguments: str, stdin: bytes = b"", check: bool = True) -> subprocess.CompletedProcess[bytes]:
        """Run the docker command against this daemon: how a test acts as a person would."""
        done = subprocess.run(
            ["docker", *arguments],
            env={**os.environ, "DOCKER_HOST": self.url, "DOCKER_CONFIG": str(self.root)},
            input=stdin,
            capture_output=True,
            timeout=120,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(f"docker {' '.join(arguments)}: {done.stderr.decode(errors='replace')}")
        return done

    def run(self, *arguments: str) -> str:
        """``docker run -d``; the new container's id."""
        return self.docker("run", "-d", *arguments).stdout.decode().strip()

    def import_busybox(self, tag: str, *changes: str) -> str:
        """Make an image of the static busybox with Dockerfile ``changes``; its id."""
        options = [word for change in ("ENV PATH=/bin", *changes) for word in ("--change", change)]
        done = self.docker("import", *options, "-", tag, stdin=busybox_tar())
        return done.stdout.decode().strip()

    def stop(self, *, at_once: bool = False) -> None:
        """End the daemon and whatever runs under it: politely, or as a power cut would. Safe at any time."""
        process, self._process = self._process, None
        if process is None:
            return
        # The namespace's first process is reaped only after the kernel has ended all the others in it,
        # and unshare leaves only after that; so waiting for unshare waits for everything.
        first = _only_child(process.pid) if process.poll() is None else None
        if first is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(first, signal.SIGKILL if at_once else signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def restart(self) -> None:
        """As after a reboot: every container is gone from memory, the data directory stays."""
        self.stop()
        self.start()

    def remove(self) -> None:
        """Stop, then take away every file and cgroup."""
        self.stop(at_once=True)
        for controller in sorted(CGROUPS.glob(f"*/{self.cgroup}")):
            for folder in sorted(controller.rglob("*"), key=lambda p: len(p.parts), reverse=True):
                if folder.is_dir():
                    _rmdir(folder)
            _rmdir(controller)
        shutil.rmtree(self.root)


def _only_child(pid: int) -> int | None:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else None


def _rmdir(folder: Path) -> None:
    # A cgroup stays busy for a moment after its last process was killed.
    deadline = time.monotonic() + 5
    while True:
        try:
            folder.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return


def busybox_tar() -> bytes:
    """A root file system of nothing but the static busybox and links to it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("bin", "tmp", "etc", "image"):
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(folder)
        tar.add(shutil.which("busybox") or "/bin/busybox", "bin/busybox")
        for name in APPLETS:
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
    return buffer.getvalue()


@contextlib.contextmanager
def private_dockerd(*options: str) -> Iterator[PrivateDockerd]:
    """A running daemon; everything of it is gone afterwards. ``options`` are added to its command."""
    # A short path: a Unix socket's name is limited to 108 bytes.
    daemon = PrivateDockerd(Path(tempfile.mkdtemp(prefix="cargo-dockerd-")), options=options)
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.remove()
