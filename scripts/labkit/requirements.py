"""What the lab needs of the machine, asked before anything is changed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from labkit.errors import CommandFailedError, MissingRequirementError
from labkit.network import interface_exists, routes_in_the_way
from labkit.process import PATH, clean_environment
from labkit.spec import LabSpec

COMMANDS = {
    "containerd": "containerd",
    "dockerd": "docker.io",
    "etcd": "etcd-server",
    "ip": "iproute2",
    "iptables": "iptables",
    "nft": "nftables",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
    "tini": "tini",
    "unshare": "util-linux",
}
"""Command: the Debian package that brings it."""


def _filesystem_known(name: str) -> bool:
    def listed() -> bool:
        return any(line.split()[-1] == name for line in Path("/proc/filesystems").read_text().splitlines())

    if not listed() and shutil.which("modprobe", path=PATH):
        subprocess.run(["modprobe", "-q", name], check=False, env=clean_environment(), capture_output=True)
    return listed()


def missing(spec: LabSpec) -> list[str]:
    """All that stands in the way, in plain words; empty when the lab can be made."""
    if os.geteuid() != 0:
        return ["the lab makes namespaces, mounts and interfaces, which takes root: use sudo"]
    reasons = [
        f"the command {name} is missing (Debian package {package}); scripts/setup installs it"
        for name, package in COMMANDS.items()
        if shutil.which(name, path=PATH) is None
    ]
    for name, use in (("overlay", "Docker and the union"), ("fuse", "sshfs and the union")):
        if not _filesystem_known(name):
            reasons.append(f"this kernel has no {name} file system, which {use} need")
    if not Path("/dev/fuse").exists():
        reasons.append("/dev/fuse is missing; sshfs and the union need it")
    if not any(line.split()[2] in {"cgroup", "cgroup2"} for line in Path("/proc/mounts").read_text().splitlines()):
        reasons.append("no cgroup hierarchy is mounted below /sys/fs/cgroup; Docker needs it")
    if shutil.which("unshare", path=PATH):
        argv = ["unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "true"]
        tried = subprocess.run(argv, check=False, capture_output=True, text=True, env=clean_environment())
        if tried.returncode != 0:
            reasons.append(f"namespaces cannot be made here: {tried.stderr.strip()}")
    if shutil.which("ip", path=PATH) and not interface_exists(spec.prefix):
        try:
            for route in routes_in_the_way(spec):
                reasons.append(f"the subnet {spec.subnet}.0/24 is in use here ({route}); choose another one")
        except CommandFailedError as error:
            reasons.append(f"the machine's routes cannot be read: {error}")
    return reasons


def check(spec: LabSpec) -> None:
    """Raises MissingRequirementError with every reason."""
    reasons = missing(spec)
    if reasons:
        raise MissingRequirementError(reasons)
