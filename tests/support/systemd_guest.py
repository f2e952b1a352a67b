"""A lab host that is a whole Debian: booted by systemd, with Cargo from its packages, run by the units they bring.

A virtual machine as in ``guest_host``, whose disk is a Debian tree made by debootstrap with Debian's kernel modules. Nothing
on it is arranged but what an operator arranges: network, SSH keys and pins, and Cargo's configuration. The packages are
put on before it boots, since compiling takes the emulated processor minutes; what they do to services that run is for the
tests. What it must never do: outlive the test, or let a reboot pass for one that the test did not ask for.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from labkit import Lab, roots
from labkit.errors import CommandFailedError, LabError
from labkit.process import PATH
from labkit.spec import HostSpec
from labkit.trust import STATE_DIRECTORY, without_locked_root, write_trust
from labkit.waiting import wait_until
from tests.support.guest import KERNEL, kernel_version, made_initramfs
from tests.support.guest_host import DUMP, GuestHost, plugged, powered_on

NAME = "delta"
COORDINATOR = "c2"
DISK_MIB = 4000
MEMORY_MIB = 2048
BOOT_SECONDS = 1200.0
OFF_SECONDS = 600.0
PYTHON = "/usr/lib/cargo/bin/python3"
APPEND = "net.ifnames=0 systemd.show_status=1"
FILES = {
    "etc/systemd/network/lab.network": (
        "[Match]\nName=eth0\n[Network]\nAddress={address}/24\nGateway={gateway}\nLinkLocalAddressing=no\n"
    ),
    # Only those that do not say: an emulated processor is a dozen times slower than any that Debian thinks of.
    "etc/systemd/system.conf.d/emulated.conf": "[Manager]\nDefaultTimeoutStartSec=900\nDefaultTimeoutStopSec=300\n",
    "etc/systemd/journald.conf.d/kept.conf": "[Journal]\nStorage=persistent\nRateLimitBurst=0\n",
    # Or its heartbeat alone takes a third of an emulated processor.
    "etc/default/etcd": "ETCD_HEARTBEAT_INTERVAL=1000\nETCD_ELECTION_TIMEOUT=10000\n",
    # As the operator's guide has it.
    "etc/ssh/sshd_config.d/cargo.conf": (
        "Match User root\n    PermitRootLogin forced-commands-only\n"
        "    AuthorizedKeysFile .ssh/authorized_keys /etc/cargo/ssh/authorized_keys\n"
    ),
    "etc/cargo/coordinator.cfg": "[coordinator]\nname = " + COORDINATOR + "\n\n[etcd]\nendpoints = {endpoints}\n",
    "etc/hosts": "127.0.0.1 localhost\n{address} {name}\n",
    "etc/hostname": "{name}\n",
}
_GATE = """if 1:
    import sys
    from pathlib import Path
    from hostd.ssh_keys import authorized_line
    print(authorized_line(sys.argv[1], sys.argv[2], state_dir=Path(sys.argv[3])))
"""
_INSTALL = """
set -e
mount -t proc proc "$1/proc"
mount --rbind /dev "$1/dev"
exec chroot "$1" sh -c 'exec dpkg --install /root/packages/*.deb'
"""


@dataclass
class SystemdHost(GuestHost):
    """The running machine, and its switch."""

    disk: Path = Path()
    initramfs: Path = Path()
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    dump: ClassVar[tuple[str, ...]] = (PYTHON, "-I", "-c", DUMP)

    # --- the switch ------------------------------------------------------------------------------

    def power_on(self) -> None:
        """Boot; returns when it is up, and its agent too, if that is enabled."""
        self.process = powered_on(
            self.lab, self.spec, self.disk, self.initramfs, self.console, MEMORY_MIB, append=APPEND
        )
        try:
            wait_until(self._up, "the guest does not come up", BOOT_SECONDS)
        except (TimeoutError, LabError, AssertionError) as error:
            raise AssertionError(f"{error}\n{self.logs()}") from error

    def _up(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, "QEMU has ended"
        with suppress(LabError):
            said = self.run(["systemctl", "is-system-running"], check=False, timeout_seconds=120).strip()
            return said in ("running", "degraded")
        return False

    def cut_power(self) -> None:
        """Nothing that it has not written is written any more."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self._forget_connection()

    def reboot(self) -> float:
        """As a person reboots it; returns after how many seconds it was down."""
        began = time.monotonic()
        self.run(["systemctl", "reboot", "--no-block"], check=False)
        self._forget_connection()
        assert self.process is not None
        try:
            self.process.wait(OFF_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"the guest does not go down\n{self.logs()}") from error
        took = time.monotonic() - began
        self.power_on()
        return took

    # --- looking ----------------------------------------------------------------------------------

    def show(self, unit: str) -> dict[str, str]:
        """What systemd knows of a unit."""
        lines = self.run(["systemctl", "show", "--timestamp=us+utc", unit]).splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def journal(self, unit: str, *options: str) -> list[dict[str, Any]]:
        """What a unit's processes and systemd itself wrote about it since the boot, oldest first."""
        said = self.run(["journalctl", "--no-pager", "-o", "json", "-b", "-u", unit, *options])
        return [json.loads(line) for line in said.splitlines()]

    def told(self, unit: str) -> list[dict[str, Any]]:
        """The lines that the daemon itself logged, read back from the journal."""
        lines = [line["MESSAGE"] for line in self.journal(unit) if line.get("_TRANSPORT") == "stdout"]
        return [json.loads(line) for line in lines if isinstance(line, str) and line.startswith("{")]

    def logs(self) -> str:
        """The ends of its console and journal, for a failing test."""
        console = self.console.read_text(errors="replace")[-3000:] if self.console.exists() else ""
        with suppress(LabError, AssertionError, TimeoutError):
            line = ["journalctl", "--no-pager", "-b", "-n", "150"]
            console += self.run([*line, "-u", "cargo-*", "-u", "docker"], check=False, timeout_seconds=60)
        return console

    def _forget_connection(self) -> None:
        line = ["ssh", "-o", f"ControlPath={self.control}", "-O", "exit", f"root@{self.spec.address}"]
        self.lab.hosts[0].run(line, check=False)


@contextmanager
def booted_debian(lab: Lab, packages: Path, directory: Path) -> Iterator[SystemdHost]:
    """The machine as host ``delta`` of a lab that is up, with ``packages`` installed, and none of the daemons enabled."""
    spec = HostSpec(NAME, f"{lab.spec.subnet}.10")
    write_trust(replace(lab.spec, hosts=(*lab.spec.hosts, spec)))
    disk = _disk(lab, spec, packages, directory)
    then = ["/bin/busybox umount /proc /dev", "exec /bin/busybox switch_root /root /sbin/init"]
    initramfs = made_initramfs(directory, kernel_version(), ("virtio_pci", "virtio_blk"), then)
    host = SystemdHost(lab, spec, directory / "console", control="/run/to-delta", disk=disk, initramfs=initramfs)
    with plugged(lab, spec):
        try:
            host.power_on()
            yield host
        finally:
            host.cut_power()


def _disk(lab: Lab, spec: HostSpec, packages: Path, directory: Path) -> Path:
    """An ext4 image of everything."""
    root = directory / "root"
    _run(["cp", "-a", str(roots.bootable_tree("debian12")), str(root)])
    shutil.copytree(packages, root / "root/packages", ignore=shutil.ignore_patterns("older"))
    _run(["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", _INSTALL, "sh", str(root)])
    version = kernel_version()
    shutil.copytree(KERNEL / "lib/modules" / version, root / "usr/lib/modules" / version, symlinks=True)
    _configure(lab, spec, root)
    for link in ("systemd-networkd", "systemd-networkd-wait-online", "ssh", "etcd", "docker"):
        _run(["systemctl", "--root", str(root), "enable", f"{link}.service"])
    disk = directory / "disk.img"
    _run(["mke2fs", "-q", "-t", "ext4", "-b", "4096", "-d", str(root), str(disk), f"{DISK_MIB}M"])
    shutil.rmtree(root)
    return disk


def _configure(lab: Lab, spec: HostSpec, root: Path) -> None:
    own = lab.spec.host_directory(spec.name) / "etc/cargo"
    shutil.copytree(own, root / "etc/cargo", dirs_exist_ok=True)
    words: Mapping[str, str] = {
        "name": spec.name, "address": spec.address, "gateway": lab.spec.gateway, "endpoints": lab.spec.endpoints,
    }  # fmt: skip
    for name, text in FILES.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.format(**words))
    shutil.rmtree(root / "var/log/journal", ignore_errors=True)
    (root / "var/log/journal").mkdir()
    (root / "etc/machine-id").write_text("")
    shadow = root / "etc/shadow"
    shadow.write_text(without_locked_root(shadow.read_text()))
    # sshd shows the key that the other hosts have pinned; theirs open the gate that the package has installed.
    for end in ("", ".pub"):
        shutil.copy(own / f"ssh/ssh_host_ed25519_key{end}", root / f"etc/ssh/ssh_host_ed25519_key{end}")
    keys = root / "etc/cargo/ssh/authorized_keys"
    kept = [line for line in keys.read_text().splitlines() if not line.startswith("restrict,")]
    for other in lab.spec.hosts:
        public = (lab.spec.host_directory(other.name) / "etc/cargo/ssh/id_ed25519.pub").read_text().strip()
        line = ["chroot", str(root), PYTHON, "-I", "-c", _GATE, other.name, public, STATE_DIRECTORY]
        kept.append(_run(line).strip())
    keys.write_text("".join(f"{line}\n" for line in kept))


def _run(argv: list[str]) -> str:
    environment = {"PATH": PATH, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive", "HOME": "/root"}
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise CommandFailedError(argv, done.returncode, done.stdout, done.stderr)
    return done.stdout
