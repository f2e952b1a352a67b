"""A secure lab: its operator, who makes the authority, turns etcd's authentication on, and lets hosts join by tokens.

It does with the product's own commands what docs/operators-guide.md tells an operator to do, so a secure lab that is up has
shown that they work. Nothing here is for a lab that is not secure.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from labkit.errors import CommandFailedError, LabError
from labkit.process import clean_environment
from labkit.spec import REPOSITORY, LabSpec

if TYPE_CHECKING:
    from labkit.host import Host

COORDINATOR = "c1"
JOIN_SECONDS = 60.0


def cargoctl(spec: LabSpec, *words: str) -> dict[str, Any]:
    """What ``cargoctl fleet … --json`` says to the operator. Raises CommandFailedError."""
    argv = [sys.executable, "-m", "coordinator.cargoctl", "--etcd", spec.endpoints]
    argv += ["fleet", "--directory", str(spec.fleet_directory), *words, "--json"]
    done = subprocess.run(
        argv,
        cwd=REPOSITORY,
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if done.returncode != 0:
        raise CommandFailedError(argv, done.returncode, done.stdout, done.stderr)
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def _init(spec: LabSpec, *more: str) -> None:
    cargoctl(spec, "init", "--etcd-name", spec.gateway, "--coordinator", COORDINATOR, *more)


def make_files(spec: LabSpec) -> None:
    """What etcd needs to start."""
    _init(spec, "--files-only")


def secure(spec: LabSpec, hosts: list[Host]) -> None:
    """Authentication on, and every host a member. Harmless when repeated."""
    _init(spec)
    members = cargoctl(spec, "list")["members"]
    for host in hosts:
        if not members.get(f"hostd/{host.spec.name}", {}).get("active"):
            join(spec, host)


def join(spec: LabSpec, host: Host) -> None:
    """Let ``host`` join: a token, the command on the host, and a person who compares fingerprints."""
    name = host.spec.name
    token = cargoctl(spec, "token", name)["token"]
    argv = [host.python, "-m", "hostd.main", "join", token, "--address", host.spec.address]
    argv += ["--ssh-host-key", "/etc/cargo/ssh/ssh_host_ed25519_key.pub", "--wait-seconds", str(JOIN_SECONDS)]
    asking = host.popen(
        argv, cwd=str(REPOSITORY), env={"PYTHONPATH": host.python_path}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert asking.stdout is not None
    try:
        asked, shown = asking.stdout.readline(), asking.stdout.readline().decode().strip()
        if b"asks to join" in asked:
            cargoctl(spec, "approve", name, "--fingerprint", shown)
        said, complaints = asking.communicate(timeout=JOIN_SECONDS)
    except subprocess.TimeoutExpired:
        raise LabError(f"{name} did not become a member in time") from None
    finally:
        asking.kill()
    if asking.returncode != 0:
        raise LabError(f"{name} could not join: {complaints.decode(errors='replace')}{said.decode(errors='replace')}")
