"""Every way to mount data arrives as it was asked for, and can be moved on from there."""

from __future__ import annotations

from typing import Any

import docker.types
import pytest

from tests.support.fleet import Fleet

pytestmark = [pytest.mark.lab, pytest.mark.timeout(150)]

SLEEP = ["sh", "-c", "trap 'exit 0' TERM; sleep 100000 & wait"]
FIELDS = ("Type", "Name", "Source", "Destination", "Driver", "RW", "Propagation")
"""All but the mode, which is ``z`` as soon as a volume is asked for by its name."""


def mounts_of(fleet: Fleet, host: str, name: str) -> list[dict[str, Any]]:
    """What is mounted in the container in fact, by destination."""
    found = fleet.present(host, name).attrs["Mounts"]
    return sorted(({key: mount.get(key) for key in FIELDS} for mount in found), key=lambda mount: mount["Destination"])


def labels_of(fleet: Fleet, host: str, volume: str) -> dict[str, str]:
    labels = fleet.docker[host].volumes.get(volume).attrs["Labels"] or {}
    return {name: value for name, value in labels.items() if not name.startswith("cargo.")}


def test_mounts_of_every_kind_arrive_as_they_were_asked_for_and_go_on_from_there(fleet: Fleet) -> None:
    """F9: named, anonymous and declared volumes, labels, nocopy, read-only, one mount inside of another, propagation."""
    alpha = fleet.docker["alpha"]
    for volume in ("outer", "inner", "bare", "fixed"):
        alpha.volumes.create(volume, labels={"shop": volume, "empty": ""})
    fleet.volume_path("alpha", "fixed", "file").write_text("fixed\n")
    for bind in ("shown", "plain"):
        place = fleet.alpha.path(f"/srv/{bind}")
        place.mkdir()
        (place / "file").write_text(f"{bind}\n")
    fleet.sleeper(
        "mounted",
        image="redis",  # whose image declares the volume /data
        volumes=[
            "outer:/outer",
            "inner:/outer/inner",
            "/etc",  # anonymous, over a directory that the image fills
            "fixed:/fixed:ro",
            "/srv/plain:/plain:ro",
        ],
        mounts=[
            docker.types.Mount("/bin/bare", "bare", no_copy=True),
            docker.types.Mount("/shown", "/srv/shown", "bind", propagation="rslave"),
            docker.types.Mount("/scratch", None, "tmpfs"),
        ],
        tmpfs={"/quick": "size=1m"},
    )
    inside = "echo outer > /outer/file; echo inner > /outer/inner/file; echo declared > /data/file; echo x > /etc/mine"
    fleet.execute("alpha", "mounted", inside)
    before = mounts_of(fleet, "alpha", "mounted")
    asked = fleet.present("alpha", "mounted").attrs
    assert {"/outer", "/outer/inner", "/etc", "/fixed", "/shown", "/plain", "/bin/bare", "/data"} <= {
        mount["Destination"] for mount in before
    }
    look = (
        "cat /outer/file /outer/inner/file /data/file /etc/mine /fixed/file /shown/file /plain/file; "
        "ls -A /bin/bare /scratch; ls /etc; ls -A /outer; touch /fixed/new /plain/new 2>&1 || true"
    )
    seen = fleet.execute("alpha", "mounted", look)
    assert seen.count("Read-only file system") == 2

    for migration, source, target in (("mounted-1", "alpha", "beta"), ("mounted-2", "beta", "alpha")):
        fleet.migrate(migration, "mounted", source=source, target=target, on_release="remove")
        assert fleet.execute(target, "mounted", look) == seen
        assert mounts_of(fleet, target, "mounted") == before
        for volume in ("outer", "inner", "bare", "fixed"):
            assert labels_of(fleet, target, volume) == {"shop": volume, "empty": ""}
        now = fleet.present(target, "mounted").attrs
        assert now["HostConfig"]["Mounts"] == asked["HostConfig"]["Mounts"]
        assert now["HostConfig"]["Tmpfs"] == asked["HostConfig"]["Tmpfs"]
        assert set(asked["HostConfig"]["Binds"]) - {"/etc"} <= set(now["HostConfig"]["Binds"])
        fleet.control(migration, "finalise")
        fleet.wait_for(migration, "finalised")
        fleet.wait_running(target, "mounted")
        assert fleet.execute(target, "mounted", look) == seen
        for place in ("/srv/shown", "/srv/plain"):  # binds are a person's: a release leaves them
            fleet.lab.host(source).run(["rm", "-r", place])
    fleet.assert_sound("mounted-2")
