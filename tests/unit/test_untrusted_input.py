"""Each thing that fuzzing found, once more by itself. docs/fuzzing.md lists them."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from coordinator import admission, controls, lifecycle, recording
from events import records, schema
from events.errors import CargoError, ChainError, PermanentError, RefusedError, SchemaError
from events.failpoints import parse
from events.schema import FileRef, Stamp, decode_head, next_event
from hostd import engine, engine_containers, fold, target
from hostd.effects.manifests import fetched_from
from hostd.federation import Union
from hostd.image_archive import layers_missing
from hostd.image_identity import identity_of
from hostd.journal import Journal
from hostd.own_file import read_own
from hostd.spec import decode_spec, encode_spec, from_inspect
from hostd.tool_words import MAX_LINE_BYTES, OutputReader
from hostd.turn import MAX_ATTEMPTS_BEFORE_CLAIM, Tell, Turns
from tests.support.histories import History
from tests.support.inspected import container, image

STAMP = Stamp(uuid="u", at="2030-01-01T00:00:00.000Z", by="coordinator/c1", boot="b", epoch=1)
HALF_A_PAIR = "\ud800"


# --- the bus -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", [r'{"control":"abort","reason":"\ud800"}', r'{"control":"abort","\ud800":1}', r'{"control":"\ud800"}']
)
def test_a_control_with_text_that_no_event_can_hold_is_refused(text: str) -> None:
    """F2: it ended the coordinator, and the key made its next life end, too."""
    control = controls.parse(text.encode())
    assert control.problem
    answer = controls.answer(control, lifecycle.Lifecycle())
    assert isinstance(answer, schema.ControlRefused)
    next_event(None, answer, cause=0, stamp=STAMP)


def test_an_event_of_text_that_is_not_unicode_is_an_error_with_words() -> None:
    with pytest.raises(SchemaError, match="was not written"):
        next_event(None, schema.AbortOrdered(reason=HALF_A_PAIR), cause=0, stamp=STAMP)


@pytest.mark.parametrize("raw", [b"\xff", b'{"v":1,"seq":1,"uuid":"\xff"}', b"[" * 100_000, b""])
def test_a_head_that_cannot_be_read_is_an_error_with_words(raw: bytes) -> None:
    with pytest.raises(SchemaError):
        decode_head(raw)


@pytest.mark.parametrize(
    "text",
    ["a.b:c=kill@" + "9" * 5000, "a.b:c=delay(nan)", "a.b:c=delay(1e999)", "a.b:c=delay(-1)", "a.b:c=kill@\u0661"],
)
def test_a_failpoint_with_a_number_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(CargoError):
        parse(text)


def test_reasons_without_end_from_an_agent_fit_into_the_rejection() -> None:
    """F2: an agent's record may name ten thousand reasons, each of any length."""
    long = records.ContainerRecord(
        id="c", name="web", image="", image_id="", running=True, refusals=("\u202e" * 9000, *["r"] * 5000)
    )
    world = admission.World(
        hosts={"alpha": records.HostRecord(host="alpha", address="a")}, containers={"alpha": {"web": long}}
    )
    answer = admission.examine("m", b'{"container":"web","source":"alpha","target":"beta"}', world)
    assert isinstance(answer, schema.Rejected)
    assert "more reasons" in answer.reasons[-1]
    next_event(None, answer, cause=0, stamp=STAMP)


def test_sizes_without_end_from_an_agent_are_too_large_and_nothing_else() -> None:
    """F2: a record may hold any number that JSON can."""
    mount = records.MountRecord(kind="volume", name="v", destination="/v", tree="/v", size_bytes=10**400)
    huge = records.ContainerRecord(id="c", name="web", image="", image_id="", running=True, mounts=(mount,))
    hosts = {name: records.HostRecord(host=name, address="a", free_bytes=5) for name in ("alpha", "beta")}
    world = admission.World(hosts=hosts, containers={"alpha": {"web": huge}})
    answer = admission.examine("m", b'{"container":"web","source":"alpha","target":"beta"}', world)
    assert isinstance(answer, schema.Rejected)
    assert "bytes free" in answer.reasons[0]
    next_event(None, answer, cause=0, stamp=STAMP)


def test_failures_of_any_length_fit_into_the_order_to_abort() -> None:
    history = History()
    for name in ("requested", "prepare_ordered"):
        history.add(name)
    for by in ("hostd/alpha", "hostd/beta"):
        history.add(
            schema.StepFailed(step="prepare", reason="\u0001" * 9000, retrying=False, attempt=1, advice="a"), by=by
        )
    [draft] = lifecycle.decide(lifecycle.fold(history.events)).append
    assert isinstance(draft.data, schema.AbortOrdered)
    next_event(history.events[-1], draft.data, cause=1, stamp=STAMP)


def test_an_export_with_text_that_is_not_unicode_is_refused() -> None:
    meta = {"cargo_history": 1, "migration": "m", "events": 0, "head": False, "encoding": "text", "exported_at": "x"}
    with pytest.raises(recording.FileFormatError, match="not Unicode"):
        recording.parse([json.dumps({**meta, "request": HALF_A_PAIR}).encode()])


# --- Docker ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", [b'{"Type":"\xff"}', b"[" * 100_000, b"[1]", b'{"Actor":[1]}'])
def test_a_line_of_dockers_events_that_cannot_be_read_still_wakes(line: bytes) -> None:
    found = engine._event(line)
    assert found is not None
    assert found.kind == "resync"
    engine._raise_said_error("loading", [line])


@pytest.mark.parametrize(
    "info",
    [{"NCPU": "x"}, {"Plugins": []}, {"Plugins": {"Log": [1, "a"]}}, {"SecurityOptions": 5}, {"Runtimes": "runc"}],
)
def test_an_engine_that_describes_itself_in_another_way_is_an_error_with_words(info: dict[str, Any]) -> None:
    with pytest.raises(PermanentError, match="not one that this version understands"):
        engine.info_in({}, info)


@pytest.mark.parametrize(
    "row", [None, {}, {"Id": 1}, {"Id": "c", "Image": "i", "ImageID": "s", "State": "x", "Names": 5}]
)
def test_a_listed_container_of_another_shape_is_an_error_with_words(row: Any) -> None:
    with pytest.raises(PermanentError):
        engine_containers._summary(row)


def test_a_name_that_is_not_unicode_is_not_asked_for() -> None:
    with pytest.raises(PermanentError, match="not a name"):
        engine._segment(HALF_A_PAIR)


def test_layers_that_are_no_list_are_none() -> None:
    assert identity_of({"RootFS": {"Layers": 5}})["layers"] == []


def nested(depth: int) -> Any:
    inner: Any = 1
    for _ in range(depth):
        inner = [inner]
    return inner


def test_a_specification_nested_without_end_is_refused_on_both_hosts() -> None:
    raw = container()
    spec, _, _ = from_inspect(raw, image())
    deep = msgspec.structs.replace(spec, config={**spec.config, "X": nested(200)})
    with pytest.raises(PermanentError, match="too deeply"):
        decode_spec(encode_spec(deep))
    raw["HostConfig"]["X"] = nested(200)
    with pytest.raises(PermanentError, match="too deeply"):
        from_inspect(raw, image())


def test_a_specification_with_a_wrong_type_where_it_matters_is_refused_when_it_is_read() -> None:
    spec, _, _ = from_inspect(container(), image())
    for part in ({"Mounts": [{"Target": "/x", "Source": []}]}, {"Mounts": [{"Target": "/x", "VolumeOptions": [1]}]}):
        with pytest.raises(PermanentError):
            decode_spec(encode_spec(msgspec.structs.replace(spec, host_config={**spec.host_config, **part})))


# --- tools and files -------------------------------------------------------------------------------


def test_output_that_never_ends_a_line_is_not_kept() -> None:
    """D13: a remote shell may print anything for ever."""
    reader = OutputReader(None)
    for _ in range(100):
        reader.feed(b"x" * 60_000)
    assert reader.held_bytes <= MAX_LINE_BYTES


def test_statistics_with_numbers_without_end_or_of_unknown_names_are_not_kept() -> None:
    seen: list[int] = []
    reader = OutputReader(lambda progress: seen.append(progress.bytes))
    reader.feed(b"Total bytes received: " + b"9" * 5000 + b"\n" + b"9" * 5000 + b" 5%\n")
    for number in range(1000):
        reader.feed(b"Name %s: 5\n" % (b"a" * (number % 50)))
    assert len(reader._statistics) <= 4
    assert reader.result(1.0, vanished=False).bytes_received < 10**21
    assert seen == []


def archive(*members: tuple[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, body in members:
            member = tarfile.TarInfo(name)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
    return stream.getvalue()


@pytest.mark.parametrize(
    "raw",
    [b"", b"no tar", archive(("manifest.json", b"[[[")), archive(("manifest.json", b"x"))[:700], archive(("a", b"b"))],
)
def test_an_archive_that_is_none_is_refused(raw: bytes, tmp_path: Path) -> None:
    file = tmp_path / "image"
    file.write_bytes(raw)
    with pytest.raises(PermanentError, match="nothing was loaded"):
        layers_missing(file, ("sha256:a",))


@pytest.mark.parametrize("name", ["../../../../etc/x", "/etc/passwd", "a" * 63, "A" * 64, ""])
def test_a_file_of_a_peer_is_never_kept_under_a_name_that_the_peer_chose(name: str, tmp_path: Path) -> None:
    """D19: the digest in the event becomes a file's name here."""

    @dataclass
    class NoPeer:
        host: str = "alpha"

    with pytest.raises(PermanentError, match="no SHA-256"):
        fetched_from(None, NoPeer(), FileRef(path="/x", size_bytes=1, sha256=name))  # type: ignore[arg-type]


# --- the agent's own files ---------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [b"", b"\xff", b"\xc0", b"\x91\xa3abc"])
def test_a_damaged_record_of_the_agents_own_stops_the_step_and_changes_nothing(raw: bytes, tmp_path: Path) -> None:
    """D24: it does not pass for a record that is not there."""
    tree, place, journal = tmp_path / "tree", tmp_path / "place", tmp_path / "journal"
    tree.mkdir()
    place.mkdir()
    journal.write_bytes(raw)
    before = (tree.stat().st_ino, place.stat().st_ino)
    for look in (lambda: fold.swapped(place, journal), lambda: fold.swap_into_place(tree, place, journal)):
        with pytest.raises(PermanentError, match=r"own record .*journal cannot be read"):
            look()
    assert (tree.stat().st_ino, place.stat().st_ino) == before
    union = Union(tmp_path / "stage", place)
    union.stage.mkdir()
    (union.stage / "placeholders").write_bytes(raw)
    with pytest.raises(PermanentError, match="placeholders"):
        union.fill_list()


def test_a_record_that_is_a_directory_or_is_not_there_is_an_error_with_words(tmp_path: Path) -> None:
    for file in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(PermanentError, match="own record"):
            read_own(file, int)


@pytest.mark.parametrize("seen", [b'{"seq":0,"digest":"x"}', b'{"seq":-1,"digest":"x"}', b'{"seq":99,"digest":"x"}'])
def test_evidence_of_an_event_that_cannot_be_is_evidence_all_the_same(seen: bytes, tmp_path: Path) -> None:
    """E26: what was seen is not in this history."""
    (tmp_path / "m.json").write_bytes(seen)
    for events in ([], History().up_to("sync_ordered").events):
        with pytest.raises(ChainError):
            Journal(tmp_path).check("m", events)


@pytest.mark.parametrize("raw", [b"\xff\xfe", b"[" * 100_000, b'{"seq":"1"}', b""])
def test_evidence_that_cannot_be_read_is_none(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.json").write_bytes(raw)
    Journal(tmp_path).check("m", [])


def test_a_failure_is_told_whatever_its_words_hold() -> None:
    """D19: a path that is not Unicode in the words of an error, and reasons of any number and length."""
    history = History()
    for name in ("requested", "prepare_ordered", "source_prepared"):
        history.add(name)
    turns = Turns(target.PLAN, "beta")
    decision = turns.learn(history.events)
    for error in (
        PermanentError("/data/\udcff" * 3000),
        RefusedError(["\x01" * 5000 for _ in range(500)]),
        RefusedError(["\udcff"]),
    ):
        turn = turns._failed(decision, error)
        assert isinstance(next(turn), Tell)
        append = next(turn)
        stamp = msgspec.structs.replace(STAMP, by="hostd/beta")
        next_event(history.events[-1], append.data, cause=1, stamp=stamp)  # type: ignore[union-attr]
    assert turns.failures < MAX_ATTEMPTS_BEFORE_CLAIM
