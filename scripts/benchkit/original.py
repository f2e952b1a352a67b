"""The first Cargo's way, scripted: a union over the whole remote, one rsync a file, and a second outage to let go of it.

As careful as a person can be, where the first Cargo was not: the union is mounted after the stop, every file is waited for, what the
container changed and removed on the union is carried over at the fail-over, and what comes next is created before it is needed. What stays is
the way itself: nothing is copied before the stop, every first access goes over sshfs, and the plain volume costs another stop.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator

from benchkit.stage import CONTAINER, END_SECONDS, TREE, VOLUME, Stage, piped
from labkit.errors import LabError
from labkit.host import Host
from labkit.process import PATH
from labkit.trust import OPERATOR_IDENTITY, SSH_DIRECTORY
from labkit.waiting import wait_until

PLACE = "/var/lib/docker/firstcargo"
"""On the target: remote (sshfs), lower (mergerfs of replica and remote), upper, work, union. The replica is the volume itself."""
ON_UNION = f"{CONTAINER}-on-union"
MOUNT_SECONDS = 10.0


def missing() -> str:
    """Why it cannot be done here; empty when it can."""
    lacking = [name for name in ("mergerfs", "sshfs") if shutil.which(name, path=PATH) is None]
    return f"{' and '.join(lacking)} not installed: apt-get install {' '.join(lacking)}" if lacking else ""


def move(stage: Stage) -> tuple[float, float]:
    """Returns seconds in all, and the (monotonic) time at which the fail-over began."""
    away = stage.away
    away.docker_client().volumes.create(VOLUME)
    stage.create(away)  # for the fail-over
    for name in ("remote", "lower", "upper", "work", "union"):
        away.run(["mkdir", "-p", f"{PLACE}/{name}"])
    union = {f"{PLACE}/union": {"bind": "/data"}}
    stage.create(away, name=ON_UNION, volumes=union, restart_policy={"Name": "no"})
    began = time.monotonic()
    try:
        with _remote(stage, away):
            stage.home.run(["docker", "stop", CONTAINER])
            layers = f"lowerdir={PLACE}/lower,upperdir={PLACE}/upper,workdir={PLACE}/work,redirect_dir=on"
            away.run(["mount", "-t", "overlay", "overlay", "-o", layers, f"{PLACE}/union"])
            try:
                away.run(["docker", "start", ON_UNION])
                _fill(away)
                fail_over = time.monotonic()
                away.run(["docker", "stop", ON_UNION])
                away.run(["rsync", "-a", "--delete", f"{PLACE}/union/", f"{TREE}/"], timeout_seconds=END_SECONDS)
                away.run(["sync", "-f", TREE], timeout_seconds=END_SECONDS)
                away.run(["docker", "rm", ON_UNION])
            finally:
                away.run(["umount", f"{PLACE}/union"])
            away.run(["docker", "start", CONTAINER])
            took = stage.handed_over(began)
    finally:
        away.run(["docker", "rm", "--force", ON_UNION], check=False)
        away.run(["rm", "-rf", "--one-file-system", PLACE])
    return took, fail_over


def _fill(away: Host) -> None:
    """One rsync process for every file, one after the other, through the mount."""
    remote = f"{PLACE}/remote"
    listing = ["env", "-C", remote, "find", ".", "-type", "f", "-print0"]
    each = ["xargs", "--null", "--replace={}", "rsync", "-aR", "--", "{}", f"{TREE}/"]
    piped(away, listing, ["env", "-C", remote, *each])


@contextlib.contextmanager
def _remote(stage: Stage, away: Host) -> Iterator[None]:
    """The source's tree by sshfs, and mergerfs over the replica and it. Nothing is looked up before the source has stopped."""
    options = [
        *("ro", "allow_other", "reconnect", f"IdentityFile={OPERATOR_IDENTITY}", "BatchMode=yes"),
        *("StrictHostKeyChecking=yes", f"UserKnownHostsFile={SSH_DIRECTORY}/known_hosts"),
    ]
    remote = ["sshfs", "-f", *(word for option in options for word in ("-o", option))]
    branches = f"{TREE}=RO:{PLACE}/remote=RO"
    merged = "allow_other,use_ino,inodecalc=path-hash,category.search=ff"
    with (
        _mounted(away, [*remote, f"root@{stage.home.spec.address}:{TREE}"], f"{PLACE}/remote"),
        _mounted(away, ["mergerfs", "-f", "-o", merged, branches], f"{PLACE}/lower"),
    ):
        yield


@contextlib.contextmanager
def _mounted(away: Host, line: list[str], point: str) -> Iterator[None]:
    """A FUSE file system as long as this lasts."""
    serving = away.popen([*line, point], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def there() -> bool:
        if serving.poll() is not None:
            raise LabError(f"{line[0]} ended with {serving.returncode} on {away.spec.name}")
        return away.run(["mountpoint", "-q", point], check=False).returncode == 0

    try:
        wait_until(there, f"{line[0]} did not mount {point}", MOUNT_SECONDS)
        yield
    finally:
        away.run(["umount", "--lazy", point], check=False)
        serving.terminate()
        serving.wait(MOUNT_SECONDS)
