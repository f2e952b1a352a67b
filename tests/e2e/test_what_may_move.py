"""Names with every odd character move; what a host's configuration keeps stays, and the pattern is named."""

from __future__ import annotations

import re
from typing import Any

import docker.types
import pytest

from events import schema
from tests.support.fleet import Fleet, differences

pytestmark = [pytest.mark.lab, pytest.mark.timeout(120)]

ODD = 'o d\'d "q" $(x) `y` ;&|é\u202e,:\\040*?[z]%s{}#~=\n-'
"""As much as a path can hold and Docker takes."""
CONTAINER = "O_d.d--9._-"
VOLUME = "V_o.l--um.e._-"
LABELS = {
    'quo\'te "d" $(x)': "a\n\tb\\ \u202e é 'q' \"q\" `x`",
    "a/b=c, d:e": "",
    " ": "x" * 5000,
    "com.example..": "{{.Name}} %s \x01",
}
SLEEP = ["sh", "-c", "trap 'exit 0' TERM; sleep 100000 & wait"]


def configure(fleet: Fleet, host: str, moves: str) -> None:
    """The agent there has this section [moves] until the test ends."""
    where = fleet.lab.host(host)
    file = where.path("/etc/cargo/hostd.cfg")
    usual = file.read_text()

    def back() -> None:
        file.write_text(usual)
        where.hostd.restart()

    fleet.at_end(back)
    file.write_text(re.sub(r"(?ms)^\[moves\].*?(?=^\[|\Z)", "", usual) + f"\n[moves]\n{moves}\n")
    where.hostd.restart()


def refused(fleet: Fleet, migration: str) -> str:
    """What the rejection or the abort says."""
    event = fleet.wait_for(migration, "rejected", "aborted")
    first = fleet.events(migration)
    if isinstance(event.data, schema.Rejected):
        return "\n".join(event.data.reasons)
    return "\n".join(e.data.reason for e in first if isinstance(e.data, schema.AbortOrdered))


def test_names_paths_and_labels_with_every_odd_character_arrive_as_they_were(fleet: Fleet) -> None:
    """D19, O10: container, volume, bind paths on the host and in the container, labels of container and volume."""
    volume = fleet.docker["alpha"].volumes.create(VOLUME, labels=LABELS)
    place = f"/srv/{ODD}/{ODD}"
    outside = fleet.alpha.path(place)
    outside.mkdir(parents=True)
    (outside / ODD).write_text("in the bind\n")
    (outside / "folder").mkdir()
    (outside / "folder" / ODD).write_bytes(b"x" * 200_000)
    inside = f"/data {ODD.replace(chr(10), '')}/{ODD.replace(chr(10), '')}"
    fleet.run(
        CONTAINER,
        command=SLEEP,
        labels=LABELS,
        environment={"ODD": ODD},
        mounts=[docker.types.Mount(inside, place, "bind"), docker.types.Mount("/volume", VOLUME, "volume")],
    )
    fleet.volume_path("alpha", VOLUME, ODD).write_text("in the volume\n")
    before = fleet.describe("alpha", place, f"/var/lib/docker/volumes/{VOLUME}/_data")
    asked = fleet.present("alpha", CONTAINER).attrs
    fleet.migrate("what-odd", CONTAINER)
    fleet.wait_for("what-odd", "verified")
    found = fleet.present("beta", CONTAINER).attrs
    labels = {name: text for name, text in found["Config"]["Labels"].items() if not name.startswith("cargo.")}
    assert labels == asked["Config"]["Labels"]
    assert found["Config"]["Env"] == asked["Config"]["Env"]
    theirs = {mount["Destination"]: mount["Source"] for mount in found["Mounts"]}
    assert theirs == {mount["Destination"]: mount["Source"] for mount in asked["Mounts"]}
    assert volume.attrs["Labels"].items() <= fleet.docker["beta"].volumes.get(VOLUME).attrs["Labels"].items()
    for expected, seen in zip(before, fleet.describe_seen("beta", CONTAINER, inside, "/volume"), strict=True):
        assert differences(expected, seen, apart_from=("blocks",)) == []
    assert fleet.cargoctl("history", "what-odd").returncode == 0
    fleet.assert_sound("what-odd")


def test_a_host_keeps_what_its_configuration_does_not_let_go_or_come(fleet: Fleet) -> None:
    """F9: told at once by the source, before anything is made by the target, each by its pattern."""
    for bind in ("open", "opened", "own", "shut"):
        fleet.alpha.path(f"/srv/{bind}").mkdir()
    fleet.alpha.path("/srv/open/link").symlink_to("/srv/own")
    configure(fleet, "alpha", "containers = what-*\nnot_volumes = *-keys\nnot_binds = /srv/own")
    configure(fleet, "beta", "not_containers = *-pet\nbinds = /srv/open* /srv/own")
    wanted: dict[str, tuple[dict[str, Any], list[str]]] = {
        "other-1": (
            {},
            ["alpha does not let the container 'other-1' be moved: its setting containers has only what-*"],
        ),
        "what-keys": ({"what-keys": {"bind": "/k"}}, ["alpha", "not_volumes has *-keys"]),
        "what-own": ({"/srv/own": {"bind": "/o"}}, ["alpha", "not_binds has /srv/own"]),
        "what-link": ({"/srv/open/link": {"bind": "/o"}}, ["alpha", "/srv/own", "not_binds has /srv/own"]),
        "what-pet": ({}, ["beta", "not_containers has *-pet"]),
        "what-shut": ({"/srv/shut": {"bind": "/s"}}, ["beta", "binds has only /srv/open*, /srv/own"]),
    }
    for name, (volumes, _) in wanted.items():
        fleet.sleeper(name, volumes=volumes)
        fleet.request(f"may-{name}", name)
    for name, (_, words) in wanted.items():
        said = refused(fleet, f"may-{name}")
        for part in words:
            assert part in said, (name, said)
        assert fleet.running("alpha", name)
    for name in wanted:  # once nothing is under way any more that would be found too
        fleet.assert_clean("beta", f"may-{name}")
    fleet.sleeper("what-fine", volumes={"/srv/opened": {"bind": "/o"}, "what-v": {"bind": "/v"}})
    fleet.migrate("may-what-fine", "what-fine")
