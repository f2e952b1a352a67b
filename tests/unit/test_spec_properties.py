"""Docker's description with anything in any place: an error of ours, or a specification that works."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from events.errors import CargoError
from hostd.fidelity import Shortfall, Target, dropped, shortfalls, stripped
from hostd.inventory import Sizer, container_record
from hostd.spec import data_mounts, decode_spec, encode_spec, from_inspect, port_bindings, to_create_body
from hostd.spec_rules import target_problems
from tests.support.inspected import container, image

text = st.text(st.characters(exclude_categories=()), max_size=20)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | text
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)


def places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [way] if way else []
    if isinstance(value, dict):
        for key, inner in value.items():
            found += places(inner, (*way, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            found += places(inner, (*way, index))
    return found


def change(document: Any, way: tuple[Any, ...], value: Any, remove: bool) -> None:
    for step in way[:-1]:
        document = document[step]
    if remove:
        del document[way[-1]]
    else:
        document[way[-1]] = value


@st.composite
def mutated(draw: st.DrawFn, original: dict[str, Any]) -> dict[str, Any]:
    for _ in range(draw(st.integers(1, 4))):
        ways = places(original)
        if ways:
            change(original, draw(st.sampled_from(ways)), draw(values), draw(st.booleans()))
    return original


@settings(max_examples=400, deadline=None)
@given(
    st.builds(container).flatmap(mutated),
    st.just(image()) | st.builds(image).flatmap(mutated),
    st.sampled_from(["x", "sha256:1"]),
)
def test_a_damaged_description_never_crashes(raw: dict[str, Any], picture: dict[str, Any], name: str) -> None:
    """F2: a foreign daemon's or host's JSON is judged, not trusted."""
    container_record(raw, volumes={}, used=[], sizer=Sizer())
    for look in (data_mounts, port_bindings):
        with contextlib.suppress(CargoError):
            look(raw)
    try:
        spec, _, _ = from_inspect(raw, picture)
        assert encode_spec(decode_spec(encode_spec(spec))) == encode_spec(spec)
        body = to_create_body(spec, image=name, labels={"cargo.migration": "m"})
    except CargoError:
        return
    assert json.loads(json.dumps(body))["HostConfig"]["RestartPolicy"] == {"Name": "no"}
    target_problems(spec, networks={"bridge": raw}, architecture="x86_64")
    lacking: list[Shortfall] = []
    with contextlib.suppress(CargoError):
        lacking = shortfalls(spec, Target(cpus=1, cgroup_driver="systemd", path_exists=lambda _path: False))
    stripped(spec, [shortfall.name for shortfall in [*lacking, *dropped(body, raw)]])
