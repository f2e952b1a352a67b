"""Storage that both hosts reach is attached on the target, never copied.

The share is an ext2 on a loop device, a kind that the lab's agents are told to take for shared: the hosts have one
kernel, so what both of them mount is one file system, as coherent as a share can be.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import docker.types
import pytest

from events import schema
from tests.support.fleet import Fleet

pytestmark = [pytest.mark.lab, pytest.mark.timeout(150)]
SHARE_BYTES = 16 * 1024**2


@dataclass
class Share:
    """A file system that both hosts can mount."""

    device: str
    place: Path
    """Where the test itself has it mounted."""

    def volume(self, fleet: Fleet, host: str, name: str, **options: str) -> None:
        """A volume of the local driver for it, as a person makes one for NFS."""
        driver_opts = {"type": "ext2", "device": self.device, **options}
        fleet.docker[host].volumes.create(name, driver="local", driver_opts=driver_opts)


@pytest.fixture
def share(tmp_path: Path) -> Iterator[Share]:
    image, place = tmp_path / "share.img", tmp_path / "share"
    image.touch()
    os.truncate(image, SHARE_BYTES)
    subprocess.run(["mkfs.ext2", "-q", str(image)], check=True)
    command = ["losetup", "--find", "--show", str(image)]
    device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        place.mkdir()
        subprocess.run(["mount", "-t", "ext2", device, str(place)], check=True)
        try:
            (place / "goods").write_text("goods of the share")
            yield Share(device, place)
        finally:
            subprocess.run(["umount", str(place)], check=True)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def run(fleet: Fleet, name: str, share: str, own: str) -> None:
    mounts = [docker.types.Mount("/share", share), docker.types.Mount("/own", own)]
    fleet.sleeper(name, mounts=mounts, restart_policy={"Name": "always"})
    fleet.execute("alpha", name, "echo own > /own/file; echo alpha > /share/written")


def history(fleet: Fleet, migration: str) -> str:
    return json.dumps(fleet.etcdctl("get", "--prefix", fleet.keys.migration(migration)))


def prepared(fleet: Fleet, migration: str) -> schema.SourcePrepared:
    (found,) = [e.data for e in fleet.events(migration) if isinstance(e.data, schema.SourcePrepared)]
    return found


def test_a_volume_on_shared_storage_is_attached_and_the_other_one_moves(fleet: Fleet, share: Share) -> None:
    """F9, F14: nothing of the share is copied, and its options are in no event, no record and no log."""
    share.volume(fleet, "alpha", "sv-share", o="errors=continue")
    run(fleet, "sv", "sv-share", "sv-own")
    events = fleet.migrate("sv-1", "sv")
    told = prepared(fleet, "sv-1")
    assert [m.name for m in told.mounts if m.kind == "volume"] == ["sv-own"]
    assert [(m.name, m.destination, m.file_system) for m in told.shared] == [("sv-share", "/share", "ext2")]
    assert fleet.execute("beta", "sv", "cat /share/goods /share/written /own/file") == "goods of the sharealpha\nown\n"
    fleet.execute("beta", "sv", "echo beta > /share/written")
    assert (share.place / "written").read_text() == "beta\n"
    verified = [event.data for event in events if isinstance(event.data, schema.Verified)]
    assert sorted(verified[0].digests) == ["/", "/own"]
    said = history(fleet, "sv-1") + "".join(
        log.read_text(errors="replace") for log in fleet.lab.spec.logs.glob("*.hostd.log")
    )
    assert "errors=continue" not in said
    assert share.device not in said
    assert fleet.docker["beta"].volumes.get("sv-share").attrs["Options"]["device"] == share.device
    fleet.control("sv-1", "rollback")
    fleet.wait_end("sv-1", "rolled_back")
    fleet.wait_running("alpha", "sv")
    assert fleet.execute("alpha", "sv", "cat /share/written /own/file") == "beta\nown\n", (
        "a share needs no carrying back"
    )
    fleet.assert_clean("beta", "sv-1")
    assert (share.place / "goods").read_text() == "goods of the share"


def test_an_abort_leaves_the_share_alone(fleet: Fleet, share: Share) -> None:
    """F9."""
    share.volume(fleet, "alpha", "sa-share")
    run(fleet, "sa", "sa-share", "sa-own")
    fleet.failpoints("hostd/beta", "target.apply_dirty:before_effect=error(broken)")
    fleet.request("sa-1", "sa")
    fleet.wait_for("sa-1", "source_stopped")
    fleet.control("sa-1", "abort")
    fleet.wait_end("sa-1", "aborted")
    fleet.failpoints("hostd/beta", "")
    fleet.wait_running("alpha", "sa")
    fleet.assert_clean("beta", "sa-1")
    assert fleet.execute("alpha", "sa", "cat /share/goods /share/written") == "goods of the sharealpha\n"


def test_a_share_that_the_target_cannot_attach_is_refused_before_the_stop(fleet: Fleet, share: Share) -> None:
    """F9: tried by the target's own Docker, in ``prepare``."""
    numbers = os.stat(share.device).st_rdev
    node = fleet.alpha.path("/srv") / "only-here"
    os.mknod(node, 0o600 | 0o060000, numbers)
    fleet.docker["alpha"].volumes.create("st-share", driver_opts={"type": "ext2", "device": "/srv/only-here"})
    run(fleet, "st", "st-share", "st-own")
    fleet.request("st-1", "st")
    events = fleet.wait_end("st-1", "aborted")
    assert "source_stopped" not in [event.type for event in events]
    reason = next(event.data.reason for event in events if isinstance(event.data, schema.AbortOrdered))
    assert "cannot attach" in reason
    assert fleet.running("alpha", "st")
    fleet.assert_clean("beta", "st-1")
    node.unlink()


def test_a_bind_on_a_share_needs_the_same_share_at_the_same_place(fleet: Fleet, share: Share) -> None:
    """F9: refused with what to do, and then done."""
    for host in (fleet.alpha, fleet.beta):
        host.path("/srv/share").mkdir(exist_ok=True)
    mount = ["mount", "-t", "ext2", share.device, "/srv/share"]
    fleet.alpha.run(mount)
    (share.place / "deep").mkdir()
    try:
        run(fleet, "sb", "sb-plain", "sb-own")
        fleet.present("alpha", "sb").remove(force=True)
        binds = [docker.types.Mount("/share", "/srv/share/deep", type="bind")]
        fleet.sleeper("sb", mounts=binds)
        fleet.execute("alpha", "sb", "echo alpha > /share/written")
        fleet.request("sb-1", "sb")
        events = fleet.wait_end("sb-1", "aborted")
        reason = next(event.data.reason for event in events if isinstance(event.data, schema.AbortOrdered))
        assert f"mount {share.device!r} here at the same place" in reason
        assert "source_stopped" not in [event.type for event in events]
        fleet.beta.run(mount)
        fleet.migrate("sb-2", "sb")
        assert fleet.execute("beta", "sb", "cat /share/written; echo beta > /share/written") == "alpha\n"
        assert (share.place / "deep" / "written").read_text() == "beta\n"
        fleet.present("beta", "sb").remove(force=True)
    finally:
        for host in (fleet.alpha, fleet.beta):
            host.run(["umount", "/srv/share"], check=False)
