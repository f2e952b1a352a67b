"""A lab host with a kernel of its own: a virtual machine on the lab's network, with dockerd, sshd and the agent on it.

For what the kernel of this machine may lack, above all an NFS client. QEMU without acceleration, Debian's cloud kernel
(``scripts/setup --guest`` brings both), and a disk made from the lab's Debian 13 tree, the kernel's modules and the
project. To the coordinator and the other hosts it is a host like any other; tests reach it by ssh from one of those.
What it must never do: outlive the test. Everything lies in a temporary directory, and its cable ends with the process.
"""

from __future__ import annotations

import base64
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from hostd.manifest import Entry, decode_manifest
from labkit import Lab, roots
from labkit.errors import CommandFailedError, LabError
from labkit.network import BRIDGE, hardware_address, ip_batch
from labkit.process import MARK, clean_environment
from labkit.spec import REPOSITORY, HostSpec
from labkit.trust import OPERATOR_IDENTITY, SSH_DIRECTORY, without_locked_root, write_trust
from labkit.waiting import wait_until
from tests.support.guest import KERNEL, kernel_version, made_initramfs

NAME = "gamma"
DISK_MIB = 2500
MEMORY_MIB = 1536
MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "nfsv4", "overlay", "fuse", "bridge", "veth")
BOOT_SECONDS = 1200.0
"""Until the agent has registered: a minute on an idle machine. Without acceleration every other load tells, and dockerd
gives a containerd of its own 15 seconds only, so that one is started before."""
BIG_BYTES = 3 * 1024 * 1024
MAKE_STALE = f"""
    mkdir -p /data/big
    for n in 1 2 3; do
        head -c {BIG_BYTES} /dev/urandom > /data/big/$n
        sha256sum < /data/big/$n > /data/big/$n.sum
    done
    echo changed > /data/calm
"""
"""What a container does to its data right before it is moved to the guest, and how it finds it there (``CHECK``)."""
CHECK = """
    cd /data/big
    for n in 1 2 3; do [ "$(sha256sum < $n)" = "$(cat $n.sum)" ]; done
    [ "$(cat /data/calm)" = changed ]
"""
COMMAND_SECONDS = 300.0
DAEMON_JSON = '{"hosts": ["unix:///run/docker.sock"], "storage-driver": "overlay2"}\n'
MAIN = """#!/bin/sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
mount -t cgroup2 cgroup /sys/fs/cgroup
hostname {name}
ip link set lo up
ip link set eth0 up
ip addr add {address}/24 dev eth0
ip route add default via {gateway}
mkdir -p -m 700 /run/sshd /run/cargo /var/lib/cargo
/usr/sbin/sshd -f {ssh}/sshd_config -E /var/log/sshd.log
containerd > /var/log/containerd.log 2>&1 &
until [ -S /run/containerd/containerd.sock ]; do sleep 1; done
while :; do dockerd --containerd /run/containerd/containerd.sock >> /var/log/dockerd.log 2>&1; sleep 1; done &
until [ -S /run/docker.sock ]; do sleep 1; done
cd /project
PYTHONPATH=/project:/{library} python3 -m hostd.main -c /etc/cargo/hostd.cfg > /var/log/hostd.log 2>&1 &
while :; do wait; sleep 1; done
"""
DUMP = """if 1:
    import sys
    from pathlib import Path
    from hostd.manifest import walk, write_manifest
    write_manifest(Path(sys.argv[1]), walk(Path(sys.argv[2]), digest=True))
"""


@dataclass
class GuestHost:
    """The running machine."""

    lab: Lab
    spec: HostSpec
    console: Path
    control: str = ""
    """Where on the first host the connection to it stays open between commands; empty: each has its own."""

    dump: ClassVar[tuple[str, ...]] = ("env", f"PYTHONPATH=/project:/{roots.LIBRARY}", "python3", "-c", DUMP)
    """What writes down a complete description of a tree: takes a file and the tree."""

    def run(self, argv: Sequence[str], *, check: bool = True, timeout_seconds: float = COMMAND_SECONDS) -> str:
        """What a command on it says, by ssh from the first host. Raises CommandFailedError when ``check``."""
        options = ["BatchMode=yes", "StrictHostKeyChecking=yes", f"UserKnownHostsFile={SSH_DIRECTORY}/known_hosts"]
        if self.control:
            options += ["ControlMaster=auto", f"ControlPath={self.control}", "ControlPersist=yes"]
        line = ["ssh", "-i", OPERATOR_IDENTITY, "-o", "ConnectTimeout=60"]
        line += [word for option in options for word in ("-o", option)]
        line += [f"root@{self.spec.address}", shlex.join(argv)]
        done = self.lab.hosts[0].run(line, check=check, timeout_seconds=timeout_seconds)
        return str(done.stdout)

    def shell(self, script: str, *, check: bool = True, timeout_seconds: float = COMMAND_SECONDS) -> str:
        """The same, of a shell."""
        return self.run(["sh", "-ec", script], check=check, timeout_seconds=timeout_seconds)

    def execute(self, container: str, script: str) -> str:
        """What a shell in a container on it says."""
        return self.run(["docker", "exec", container, "sh", "-ec", script])

    def running(self, container: str) -> bool:
        """Whether a container of that name runs there."""
        said = self.run(["docker", "inspect", "-f", "{{.State.Running}}", container], check=False)
        return said.strip() == "true"

    def mounts(self) -> list[str]:
        """Kinds and points of what the product mounts."""
        lines = [line.split(" ") for line in self.run(["cat", "/proc/mounts"]).splitlines()]
        kinds = ("nfs4", "fuse.sshfs", "fuse.cargo")
        return [f"{words[2]} {words[1]}" for words in lines if words[2] in kinds or "cargo-union" in words[0]]

    def describe(self, tree: str) -> list[Entry]:
        """A complete description of a tree there, digests of contents included."""
        file = f"/tmp/tree-{time.monotonic_ns()}"
        self.run([*self.dump, file, tree])
        raw = base64.b64decode(self.run(["base64", file]))
        self.run(["rm", file])
        return list(decode_manifest(raw))

    def describe_seen(self, container: str, destination: str) -> list[Entry]:
        """The same, of what a running container sees."""
        pid = self.run(["docker", "inspect", "-f", "{{.State.Pid}}", container]).strip()
        return self.describe(f"/proc/{pid}/root{destination}")

    def link(self, *, up: bool) -> None:
        """Plug or unplug its cable."""
        ip_batch([f"link set {self.spec.name} {'up' if up else 'down'}"], inside=self.lab._hub.pid)

    def logs(self) -> str:
        """The ends of its console and daemons' logs, for a failing test."""
        console = self.console.read_text(errors="replace")[-3000:] if self.console.exists() else ""
        with suppress(LabError):
            console += self.shell("tail -n 40 /var/log/dockerd.log /var/log/hostd.log", check=False)
        return console


@contextmanager
def booted_host(lab: Lab, directory: Path) -> Iterator[GuestHost]:
    """The machine as host ``gamma`` of a lab that is up; returns when its agent has registered."""
    spec = HostSpec(NAME, f"{lab.spec.subnet}.9")
    write_trust(replace(lab.spec, hosts=(*lab.spec.hosts, spec)))
    version = kernel_version()
    disk = _disk(lab, spec, directory, version)
    initramfs = made_initramfs(
        directory,
        version,
        MODULES,
        ["/bin/busybox umount /proc /dev", "exec /bin/busybox switch_root /root /sbin/lab-init"],
    )
    console = directory / "console"
    with plugged(lab, spec):
        process = powered_on(lab, spec, disk, initramfs, console, MEMORY_MIB)
        guest = GuestHost(lab, spec, console)
        try:
            wait_registered(guest, process)
            yield guest
        finally:
            process.kill()
            process.wait()


@contextmanager
def plugged(lab: Lab, spec: HostSpec) -> Iterator[None]:
    """A cable from the lab's bridge, of the host's name, for as long as the block lasts."""
    hub, name = lab._hub.pid, spec.name
    assert hub is not None
    ip_batch([f"tuntap add {name} mode tap", f"link set {name} master {BRIDGE}", f"link set {name} up"], inside=hub)
    try:
        yield
    finally:
        ip_batch([f"link del {name}"], inside=hub)


def powered_on(
    lab: Lab, spec: HostSpec, disk: Path, initramfs: Path, console: Path, memory_mib: int, append: str = ""
) -> subprocess.Popen[bytes]:
    """QEMU with that disk on the plugged cable; it ends when the guest reboots or switches off."""
    version = kernel_version()
    command = ["nsenter", "-t", str(lab._hub.pid), "-n", "qemu-system-x86_64", "-accel", "tcg,thread=multi"]
    command += ["-cpu", "max", "-smp", "2", "-m", str(memory_mib), "-nodefaults", "-no-reboot", "-display", "none"]
    command += ["-kernel", str(KERNEL / f"boot/vmlinuz-{version}"), "-initrd", str(initramfs)]
    command += ["-append", f"console=ttyS0 panic=-1 quiet mitigations=off {append}".rstrip()]
    command += ["-drive", f"file={disk},format=raw,if=virtio,cache=unsafe"]
    command += ["-netdev", f"tap,id=n0,ifname={spec.name},script=no,downscript=no"]
    command += ["-device", f"virtio-net-pci,netdev=n0,mac={hardware_address(spec.address)}"]
    command += ["-chardev", f"file,id=c0,path={console},append=on", "-serial", "chardev:c0"]
    environment = clean_environment() | {MARK: str(lab.root)}  # so that `lab down` finds it, too
    return subprocess.Popen(command, env=environment)


def wait_registered(guest: GuestHost, process: subprocess.Popen[bytes]) -> None:
    """Until its agent has. Fails with the guest's logs."""

    def registered() -> bool:
        assert process.poll() is None, f"QEMU has ended\n{guest.logs()}"
        line = ["etcdctl", "--endpoints", guest.lab.etcd.endpoints, "get", f"/cargo/hosts/{guest.spec.name}"]
        return bool(
            subprocess.run(
                line, env={**clean_environment(), "ETCDCTL_API": "3"}, capture_output=True, check=False
            ).stdout
        )

    try:
        wait_until(registered, "the guest's agent does not register", BOOT_SECONDS)
    except (TimeoutError, LabError, AssertionError) as error:
        raise AssertionError(f"{error}\n{guest.logs()}") from error


def _disk(lab: Lab, spec: HostSpec, directory: Path, version: str) -> Path:
    """An ext4 image of everything."""
    python, base = roots.layers("debian13")
    root = directory / "root"
    subprocess.run(["cp", "-a", str(base), str(root)], check=True)
    shutil.copytree(python / roots.LIBRARY, root / roots.LIBRARY, symlinks=True, dirs_exist_ok=True)
    skip = shutil.ignore_patterns("__pycache__")
    for package in ("hostd", "events", *(place.name for place in REPOSITORY.glob("*.egg-info"))):
        shutil.copytree(REPOSITORY / package, root / "project" / package, ignore=skip)
    # By the tree's own interpreter, at this machine's speed: compiling takes the emulated one minutes.
    compiling = ["python3", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash"]
    subprocess.run(["chroot", str(root), *compiling, "/project", f"/{roots.LIBRARY}"], check=False)
    modules = root / "usr/lib/modules" / version
    shutil.copytree(KERNEL / "lib/modules" / version, modules, symlinks=True, dirs_exist_ok=True)
    etc = root / "etc"
    shutil.copytree(lab.spec.host_directory(spec.name) / "etc/cargo", etc / "cargo", dirs_exist_ok=True)
    (etc / "docker").mkdir(exist_ok=True)
    (etc / "docker/daemon.json").write_text(DAEMON_JSON)
    (etc / "shadow").write_text(without_locked_root((etc / "shadow").read_text()))
    (etc / "hosts").write_text(f"127.0.0.1 localhost\n{spec.address} {spec.name}\n")
    main = root / "usr/sbin/lab-init"
    main.write_text(
        MAIN.format(
            name=spec.name, address=spec.address, gateway=lab.spec.gateway, ssh=SSH_DIRECTORY, library=roots.LIBRARY
        )
    )
    main.chmod(0o755)
    disk = directory / "disk.img"
    command = ["mke2fs", "-q", "-t", "ext4", "-b", "4096", "-d", str(root), str(disk), f"{DISK_MIB}M"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise CommandFailedError(command, error.returncode, error.stdout, error.stderr) from error
    shutil.rmtree(root)
    return disk
