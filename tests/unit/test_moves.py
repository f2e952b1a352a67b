"""What a host's configuration lets be moved, and what it does not, with the pattern in the words."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from events.schema import Request, Requested
from events.settings import SettingsError
from hostd import settings
from hostd.effects import check_target, describe_container
from hostd.fidelity import known_name, stripped
from hostd.moves import Moves, Place, privilege_refusal, refusals, undeclared
from hostd.spec import ContainerSpec, from_inspect
from tests.support.histories import prepared
from tests.support.inspected import container, image
from tests.unit.test_settings import MINIMAL, write

STRICT = Moves(
    containers=("web-*", "db?"), not_containers=("web-secret",), volumes=("data*",), not_volumes=("*-keys",), binds=("/srv", "/home/*/data"), not_binds=("/srv/own",)
)  # fmt: skip


@pytest.mark.parametrize(
    ("container", "places", "said"),
    [
        ("web-1", [], []),
        ("db1", [Place("volume", "data-1"), Place("bind", "/srv/x"), Place("bind", "/home/ada/data/deep")], []),
        ("other", [], ["container 'other'", "setting containers has only web-*, db?"]),
        ("web-secret", [], ["setting not_containers has web-secret"]),
        ("web-1", [Place("volume", "logs")], ["volume 'logs'", "setting volumes has only data*"]),
        ("web-1", [Place("volume", "data-keys")], ["setting not_volumes has *-keys"]),
        ("web-1", [Place("bind", "/srvx")], ["bind /srvx", "setting binds has only /srv, /home/*/data"]),
        ("web-1", [Place("bind", "/srv/own/deep")], ["setting not_binds has /srv/own"]),
        ("web-1", [Place("bind", "/srv/a/../own")], ["setting not_binds has /srv/own"]),
        ("web-1", [Place("bind", "/home/a/b/data")], ["setting binds has only"]),
        (
            "web-1",
            [Place("bind", "/srv/link", "/etc/cron.d")],
            ["/srv/link, which is /etc/cron.d there,", "binds has only"],
        ),
        ("o", [Place("volume", "v"), Place("bind", "/b")], ["container 'o'", "volume 'v'", "bind /b"]),
    ],
)
def test_a_refusal_names_what_and_by_which_pattern(container: str, places: list[Place], said: list[str]) -> None:
    """F9."""
    found = "\n".join(refusals(STRICT, "alpha", container, places))
    assert bool(found) == bool(said)
    for words in said:
        assert words in found


@pytest.mark.parametrize(
    "path", ["/etc", "/etc/cron.d", "/usr/local/bin", "/root/.ssh", "/var/lib/docker/volumes", "//etc/x", "/srv/../etc"]
)
def test_without_a_word_nothing_is_moved_from_or_to_the_systems_own_directories(path: str) -> None:
    """F9: data of another host must not become this host's programs."""
    assert "not_binds" in refusals(Moves(), "beta", "web", [Place("bind", path)])[0]
    assert (
        refusals(Moves(), "beta", "web", [Place("bind", "/srv/x"), Place("bind", "/root/data"), Place("volume", "v")])
        == []
    )


@pytest.mark.parametrize(
    ("moves", "host_config", "consented", "words"),
    [
        (Moves(), {}, False, ""),
        (Moves(), {"Privileged": False}, False, ""),
        (Moves(), {"Privileged": True}, False, '"privileged": true into the request'),
        (Moves(), {"Privileged": True}, True, ""),
        (Moves(privileged="never"), {"Privileged": True}, True, "its setting privileged is never"),
    ],
)
def test_a_privileged_container_moves_by_consent_and_where_the_host_lets_it(
    moves: Moves, host_config: dict[str, Any], consented: bool, words: str
) -> None:
    found = " ".join(privilege_refusal(moves, "alpha", host_config, consented))
    assert bool(found) == bool(words)
    assert words in found


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"Binds": ["/etc:/host"]}, "/etc"),
        ({"Binds": ["/srv/www/../..:/host"]}, "/srv/www/../.."),
        ({"Binds": ["theirs:/x"]}, "theirs"),
        ({"Mounts": [{"Type": "bind", "Source": "/", "Target": "/host"}]}, "/"),
        (
            {
                "Mounts": [
                    {"Type": "volume", "Target": "/x", "VolumeOptions": {"DriverConfig": {"Options": {"o": "bind"}}}}
                ]
            },
            "without a name",
        ),
        ({"VolumesFrom": ["neighbour"]}, "the volumes of neighbour"),
        ({"PidMode": "container:neighbour"}, "PidMode container:neighbour"),
        ({"NetworkMode": "container:neighbour"}, "NetworkMode"),
    ],
)
def test_a_specification_cannot_ask_for_what_the_history_does_not_name(asked: dict[str, Any], words: str) -> None:
    """F9: it is another host's word."""
    assert words in " ".join(undeclared(asked, ["/srv/www", "data"]))


def test_what_the_mounts_name_may_be_asked_for() -> None:
    fine = {
        "Binds": ["/srv/www/:/www:ro", "data:/data"], "Mounts": [{"Type": "tmpfs", "Target": "/t"}, {"Type": "volume", "Source": "data", "Target": "/d"}],
        "VolumesFrom": None, "PidMode": "host", "NetworkMode": "bridge",
    }  # fmt: skip
    assert undeclared(fine, ["/srv/www", "data"]) == []


def test_the_settings_are_read_and_the_default_is_the_documented_one(tmp_path: Path) -> None:
    assert settings.load(write(tmp_path, MINIMAL)).moves == Moves()
    text = MINIMAL + "[moves]\ncontainers = web-*, db\nnot_binds =\nprivileged = never\n"
    found = settings.load(write(tmp_path, text)).moves
    assert (found.containers, found.not_binds, found.privileged) == (("web-*", "db"), (), "never")
    with pytest.raises(SettingsError, match="ask or never") as caught:
        settings.load(write(tmp_path, MINIMAL + "[moves]\nprivileged = perhaps\nbinds = srv\n"))
    assert "absolute" in str(caught.value)


# --- the two steps that ask ----------------------------------------------------------------------------


def asked(host: str, moves: Moves, spec: ContainerSpec, **wish: Any) -> Any:
    """As much of a step's context as the questions look at."""
    request = Request(container="web", source="alpha", target="beta", **wish)
    view = SimpleNamespace(
        request=request,
        requested=Requested(request=request, container_id=spec.container_id),
        source_prepared=prepared(mounts=spec.mounts),
    )
    return SimpleNamespace(host=host, view=view, bench=SimpleNamespace(settings=SimpleNamespace(moves=moves)))


def mighty() -> ContainerSpec:
    raw = container()
    raw["HostConfig"]["Privileged"] = True
    return from_inspect(raw, image())[0]


def test_a_privileged_container_is_asked_about_on_both_hosts() -> None:
    """F10: consent keeps the right, `without` leaves it behind, and a host may say never to either."""
    spec, never = mighty(), Moves(privileged="never")
    plain = stripped(spec, ["privileged"])
    assert known_name("privileged") and not plain.host_config.get("Privileged")
    leaves, comes = describe_container._kept_here, check_target._not_let_in
    assert leaves(asked("alpha", Moves(), spec, privileged=True), spec) == []
    assert leaves(asked("alpha", Moves(), spec, without=("privileged",)), spec) == []
    assert "the container is privileged" in leaves(asked("alpha", Moves(), spec), spec)[0]
    assert "alpha moves no privileged" in leaves(asked("alpha", never, spec, privileged=True), spec)[0]
    assert "alpha moves no privileged" in leaves(asked("alpha", never, spec, without=("privileged",)), spec)[0]
    assert comes(asked("beta", Moves(), spec, privileged=True), spec) == []
    assert "the container is privileged" in comes(asked("beta", Moves(), spec), spec)[0]
    assert "beta moves no privileged" in comes(asked("beta", never, spec, privileged=True), spec)[0]
    assert comes(asked("beta", never, plain, without=("privileged",)), plain) == []


def test_a_target_takes_no_specification_that_asks_for_more_than_the_history_names() -> None:
    """F9: a source that was taken over writes whatever it likes into it."""
    raw = container()
    raw["HostConfig"]["Binds"] = ["data:/data", "/srv/www:/www:ro"]
    spec = from_inspect(raw, image())[0]
    context = asked("beta", Moves(), spec)
    assert check_target._not_let_in(context, spec) == []
    spec.host_config["Binds"].append("/root:/root")
    assert "'/root'" in "".join(check_target._not_let_in(context, spec))
