"""Keys are built and parsed in one place, and nothing illegal gets through."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from events.keyspace import (
    MAX_SEQ,
    Keyspace,
    Place,
    key_bytes,
    key_text,
    prefix_end,
    safe_id_for,
    valid_container_name,
    valid_host_name,
    valid_migration_id,
)

KEYS = Keyspace("/cargo")
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{1,61}", fullmatch=True)


def test_the_keys_are_those_of_the_design() -> None:
    assert [
        KEYS.request("web-7"),
        KEYS.control("web-7"),
        KEYS.event("web-7", 12),
        KEYS.head("web-7"),
        KEYS.inbox_pointer("beta", "web-7"),
        KEYS.host("beta"),
        KEYS.inventory_item("beta", "web"),
        KEYS.progress("web-7", "beta"),
        KEYS.leader,
        KEYS.failpoints("hostd/beta"),
        KEYS.placement("web"),
    ] == [
        "/cargo/requests/web-7",
        "/cargo/controls/web-7",
        "/cargo/migrations/web-7/ev/000000000012",
        "/cargo/migrations/web-7/head",
        "/cargo/inbox/beta/web-7",
        "/cargo/hosts/beta",
        "/cargo/inventory/beta/web",
        "/cargo/progress/web-7/beta",
        "/cargo/coordinator/leader",
        "/cargo/failpoints/hostd/beta",
        "/cargo/placements/web",
    ]


@given(NAMES, NAMES, st.integers(1, MAX_SEQ))
def test_what_was_built_is_parsed_back(one: str, two: str, seq: int) -> None:
    built = {
        KEYS.request(one): Place("request", (one,)),
        KEYS.control(one): Place("control", (one,)),
        KEYS.event(one, seq): Place("event", (one, str(seq))),
        KEYS.head(one): Place("head", (one,)),
        KEYS.inbox_pointer(one, two): Place("inbox", (one, two)),
        KEYS.host(one): Place("host", (one,)),
        KEYS.inventory_item(one, two): Place("inventory", (one, two)),
        KEYS.progress(one, two): Place("progress", (one, two)),
        KEYS.leader: Place("leader", ()),
        KEYS.failpoints(f"hostd/{one}"): Place("failpoints", (f"hostd/{one}",)),
        KEYS.placement(one): Place("placement", (one,)),
    }
    for key, place in built.items():
        assert KEYS.parse(key) == place


@given(st.text() | st.binary().map(key_text))
def test_parsing_never_fails_and_never_lets_an_illegal_name_through(tail: str) -> None:
    """F2: keys are put by people."""
    for prefix in (
        "",
        KEYS.root,
        KEYS.requests,
        KEYS.migrations,
        KEYS.hosts,
        KEYS.inbox("beta"),
        KEYS.inventories,
    ):
        place = KEYS.parse(prefix + tail)
        if place is not None and place.kind in ("event", "head"):
            assert valid_migration_id(place.parts[0])
        if place is not None and place.kind in ("host", "inbox", "inventory"):
            assert valid_host_name(place.parts[0])


@pytest.mark.parametrize("tail", ["", "a/b", "ünï", "\udcff", " ", "x" * 65, "../x"])
def test_an_illegal_request_is_still_seen_as_a_request(tail: str) -> None:
    """F2: it gets its answer under an id that is legal and always the same."""
    assert KEYS.parse(KEYS.requests + tail) == Place("request", (tail,))
    assert not valid_migration_id(tail)
    safe = safe_id_for(tail)
    assert valid_migration_id(safe)
    assert safe == safe_id_for(key_bytes(tail))
    assert safe.startswith("invalid-")


@pytest.mark.parametrize("text", ["", ".", "-a", "_a", "a/b", "a b", "a\n", "ä", "a" * 65, "a\x00", "..", "¹", "a:b"])
def test_illegal_names_are_refused_where_keys_are_built(text: str) -> None:
    assert not valid_migration_id(text)
    assert not valid_host_name(text)
    with pytest.raises(ValueError, match="legal"):
        KEYS.head(text)
    with pytest.raises(ValueError, match="legal"):
        KEYS.inbox_pointer("beta", text)
    with pytest.raises(ValueError, match="legal"):
        KEYS.inventory(text)


def test_the_limits_are_those_of_docker_and_dns() -> None:
    assert valid_migration_id("a" * 64)
    assert valid_host_name("a" * 63)
    assert not valid_host_name("a" * 64)
    assert valid_container_name("a" * 128)
    assert not valid_container_name("a" * 129)
    assert not valid_container_name("a")
    assert not valid_container_name("/web")


@pytest.mark.parametrize("seq", [0, -1, MAX_SEQ + 1])
def test_a_sequence_number_out_of_range_is_refused(seq: int) -> None:
    with pytest.raises(ValueError, match="sequence"):
        KEYS.event("m", seq)


@pytest.mark.parametrize(
    "tail", ["ev/1", "ev/0000000000012", "ev/000000000000", "ev/", "ev", "heads", "", "ev/١٢٣٤٥٦٧٨٩٠١٢"]
)
def test_what_is_almost_an_event_is_none(tail: str) -> None:
    assert KEYS.parse(f"/cargo/migrations/web/{tail}") is None


@pytest.mark.parametrize("prefix", ["", "cargo", "/cargo/", "/", "//", "/car go", "/cargo\n"])
def test_a_prefix_that_would_make_strange_keys_is_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match="prefix"):
        Keyspace(prefix)


def test_keys_of_another_prefix_are_not_ours() -> None:
    assert KEYS.parse("/cargo2/requests/web") is None
    assert KEYS.parse("/carg") is None
    assert Keyspace("/a/b").parse("/a/b/requests/web") == Place("request", ("web",))


@given(st.integers(1, MAX_SEQ - 1))
def test_events_sort_as_their_numbers_do_and_before_the_head(seq: int) -> None:
    assert KEYS.event("m", seq) < KEYS.event("m", seq + 1) < KEYS.head("m")


@given(st.binary())
def test_any_bytes_survive_as_a_key(raw: bytes) -> None:
    assert key_bytes(key_text(raw)) == raw


@given(st.binary(min_size=1), st.binary(), st.binary())
def test_a_prefix_ends_right_after_its_last_key(prefix: bytes, tail: bytes, other: bytes) -> None:
    end = prefix_end(prefix)
    if end == b"\0":
        assert set(prefix) == {0xFF}
        return
    assert prefix <= prefix + tail < end
    if prefix <= other < end:
        assert other.startswith(prefix)
