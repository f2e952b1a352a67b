"""A virtual machine with a kernel of its own, for what the kernel here may lack: an NFS client.

QEMU without acceleration, Debian's cloud kernel (``scripts/setup --guest`` brings both), an initramfs of busybox and a
few modules, and a disk made from this machine's Python, the tools that the project calls, and the project. It boots in
seconds, knows no service, and runs ``tests/support/guest_agent.py`` alone. Everything lives in a network namespace and
a temporary directory, and is gone when it ends.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import structlog
import typing_extensions

REPOSITORY = Path(__file__).parents[2]
KERNEL = REPOSITORY / ".venv" / "guest-kernel"
TOOLS = ("mount", "umount", "stat", "rsync", "sshfs")
MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "nfsv4", "overlay", "fuse")
DISK_MIB = 400
BOOT_SECONDS = 600.0
"""A few on an idle machine; without acceleration every other load tells."""
ANSWER_SECONDS = 600.0
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_Result = TypeVar("_Result")


class GuestError(AssertionError):
    """The guest could not do what it was told, or has ended."""


class Net:
    """A network namespace with a tap: the source's side of the wire. ``10.0.0.1`` is the source."""

    SOURCE, TARGET, STRANGER = "10.0.0.1", "10.0.0.2", "10.0.0.3"

    def __init__(self, name: str) -> None:
        self.name = name
        subprocess.run(["ip", "netns", "add", name], check=True)
        for words in ("tuntap add tap0 mode tap", f"addr add {self.SOURCE}/24 dev tap0", "link set lo up"):
            subprocess.run(["ip", "-n", name, *words.split()], check=True)
        self.link(up=True)

    def link(self, *, up: bool) -> None:
        """Plug or unplug the cable."""
        subprocess.run(["ip", "-n", self.name, "link", "set", "tap0", "up" if up else "down"], check=True)

    def within(self, act: Callable[[], _Result]) -> _Result:
        """What ``act`` returns, run in this namespace; so do the processes that it starts."""
        results: list[_Result] = []
        failures: list[BaseException] = []

        def run() -> None:
            with open(f"/run/netns/{self.name}") as namespace:
                assert _libc.setns(namespace.fileno(), _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
            try:
                results.append(act())
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if failures:
            raise failures[0]
        return results[0]

    def close(self) -> None:
        subprocess.run(["ip", "netns", "del", self.name], check=False)


class Guest:
    """A running guest; ``order`` calls a method of ``guest_agent.Guest``."""

    def __init__(self, process: subprocess.Popen[bytes], line: socket.socket, console: Path) -> None:
        self._process = process
        self._line = line
        self._console = console
        self._pending = b""

    def order(self, name: str, *arguments: Any, timeout_seconds: float = ANSWER_SECONDS) -> Any:
        """Raises GuestError with the guest's words."""
        self._line.sendall(json.dumps([name, *arguments]).encode() + b"\n")
        said = self.hear(timeout_seconds)
        if "error" in said:
            raise GuestError(f"{name}: {said['error']}\n{said['trace']}")
        return said["answer"]

    def hear(self, timeout_seconds: float) -> dict[str, Any]:
        """The next line that it says."""
        deadline = time.monotonic() + timeout_seconds
        while b"\n" not in self._pending:
            self._line.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                piece = self._line.recv(65536)
            except TimeoutError:
                piece = b""
            if not piece:
                tail = self._console.read_text(errors="replace")[-3000:] if self._console.exists() else ""
                raise GuestError(f"the guest says nothing; its console:\n{tail}")
            self._pending += piece
        line, _, self._pending = self._pending.partition(b"\n")
        said: dict[str, Any] = json.loads(line)
        return said

    def close(self) -> None:
        self._line.close()
        self._process.kill()
        self._process.wait()


@contextmanager
def booted(directory: Path, net: Net) -> Iterator[Guest]:
    """A guest on ``net`` with the target's address, ready for orders."""
    version = kernel_version()
    initramfs, disk = _initramfs(directory, version), _disk(directory)
    wire, console = directory / "wire", directory / "console"
    command = ["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1024"]
    command += ["-nodefaults", "-no-reboot", "-display", "none", "-kernel", str(KERNEL / f"boot/vmlinuz-{version}")]
    command += ["-initrd", str(initramfs), "-append", "console=ttyS0 panic=-1 quiet mitigations=off"]
    command += ["-drive", f"file={disk},format=raw,if=virtio,cache=unsafe"]
    command += ["-netdev", "tap,id=n0,ifname=tap0,script=no,downscript=no", "-device", "virtio-net-pci,netdev=n0"]
    command += ["-serial", f"file:{console}", "-serial", f"unix:{wire},server=on,wait=off"]
    process = net.within(lambda: subprocess.Popen(command))
    try:
        line = _connected(wire, process)
        guest = Guest(process, line, console)
        guest.hear(BOOT_SECONDS)
        yield guest
    finally:
        process.kill()
        process.wait()


def _connected(wire: Path, process: subprocess.Popen[bytes]) -> socket.socket:
    line = socket.socket(socket.AF_UNIX)
    deadline = time.monotonic() + 20
    while True:
        try:
            line.connect(str(wire))
        except OSError:
            assert process.poll() is None, "QEMU has ended"
            assert time.monotonic() < deadline, "QEMU does not come up"
            time.sleep(0.02)
        else:
            return line


def _initramfs(directory: Path, version: str) -> Path:
    return made_initramfs(
        directory,
        version,
        MODULES,
        [
            "/bin/busybox mount -t proc proc /root/proc",
            "/bin/busybox mount -t sysfs sys /root/sys",
            "/bin/busybox mount -t devtmpfs dev /root/dev",
            "/bin/busybox mount -t tmpfs run /root/run",
            "/bin/busybox ip link set lo up",
            "/bin/busybox ip link set eth0 up",
            f"/bin/busybox ip addr add {Net.TARGET}/24 dev eth0",
            "export PATH=/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 PYTHONPATH=/project:/packages",
            f"exec /bin/busybox chroot /root {_python()} -m tests.support.guest_agent",
        ],
    )


def kernel_version() -> str:
    """Of the guest's kernel, with its modules' dependencies known."""
    version = next((KERNEL / "lib/modules").iterdir()).name
    if not (KERNEL / "lib/modules" / version / "modules.dep").exists():
        subprocess.run(["depmod", "-b", str(KERNEL), version], check=True)
    return version


def made_initramfs(directory: Path, version: str, modules: Sequence[str], then: Sequence[str]) -> Path:
    """Loads ``modules``, mounts the disk at /root, and goes on with the lines of ``then``."""
    root = directory / "initramfs"
    for name in ("bin", "m", "proc", "sys", "dev", "root"):
        (root / name).mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "/bin/busybox", root / "bin/busybox")
    base = KERNEL / "lib/modules" / version
    needs = dict(line.split(":", 1) for line in (base / "modules.dep").read_text().splitlines())
    order: list[str] = []
    for module in modules:
        place = next(path for path in needs if path.endswith(f"/{module}.ko"))
        order += [path for path in (*reversed(needs[place].split()), place) if path not in order]
    for path in order:
        shutil.copy(base / path, root / "m" / Path(path).name)
    lines = [
        "#!/bin/busybox sh",
        "/bin/busybox mount -t proc proc /proc",
        "/bin/busybox mount -t devtmpfs dev /dev",
        *(f"/bin/busybox insmod /m/{Path(path).name}" for path in order),
        "/bin/busybox mount -t ext4 /dev/vda /root",
        *then,
    ]
    (root / "init").write_text("\n".join(lines) + "\n")
    (root / "init").chmod(0o755)
    file = directory / "initramfs.cpio"
    with file.open("wb") as output:
        listing = subprocess.run(["find", "."], cwd=root, capture_output=True, check=True).stdout
        subprocess.run(
            ["busybox", "cpio", "-o", "-H", "newc"], cwd=root, input=listing, stdout=output,
            stderr=subprocess.DEVNULL, check=True,
        )  # fmt: skip
    return file


def _python() -> str:
    return os.path.realpath(sys.executable)


def _disk(directory: Path) -> Path:
    root = directory / "disk"
    for name in ("proc", "sys", "dev", "run", "tmp", "bin", "project/tests/support"):
        (root / name).mkdir(parents=True)
    skip = shutil.ignore_patterns(
        "__pycache__", "test", "dist-packages", "site-packages", "idlelib", "ensurepip", "config-*"
    )
    library = Path(sysconfig.get_path("stdlib"))
    shutil.copytree(
        library, root / library.relative_to("/"), ignore=skip, symlinks=False, ignore_dangling_symlinks=True
    )
    for package in ("hostd", "events"):
        shutil.copytree(REPOSITORY / package, root / "project" / package, ignore=skip)
    shutil.copy(REPOSITORY / "tests/support/guest_agent.py", root / "project/tests/support")
    for package in (root / "project/tests", root / "project/tests/support"):
        (package / "__init__.py").touch()
    for module in (msgspec, structlog):
        assert module.__file__
        shutil.copytree(Path(module.__file__).parent, root / "packages" / module.__name__, ignore=skip)
    shutil.copy(typing_extensions.__file__, root / "packages")
    shutil.copy(shutil.which("busybox") or "/bin/busybox", root / "bin/busybox")
    programs = [_python(), *(tool for name in TOOLS if (tool := shutil.which(name)))]
    extensions = [str(path) for path in root.rglob("*.so")]
    for program in programs:
        _copy(program, root)
    for library_file in _libraries([*programs, *extensions]):
        _copy(library_file, root)
    disk = directory / "disk.img"
    command = ["mke2fs", "-q", "-t", "ext4", "-b", "4096", "-d", str(root), str(disk), f"{DISK_MIB}M"]
    subprocess.run(command, check=True)
    shutil.rmtree(root)
    return disk


def _libraries(programs: list[str]) -> set[str]:
    done = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=False)
    words = [word for line in done.stdout.splitlines() if line.startswith("\t") for word in line.split()]
    return {word for word in words if word.startswith("/")}


def _copy(file: str, root: Path) -> None:
    to = root / file.lstrip("/")
    to.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        if not to.exists():
            shutil.copy(os.path.realpath(file), to)
