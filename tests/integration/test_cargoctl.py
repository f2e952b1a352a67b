"""``cargoctl`` on a real etcd: histories looked at, proven, moved into files; controls answered; failpoints set."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import structlog

from coordinator import archive, cargoctl
from coordinator.recording import Recording
from coordinator.service import Service
from events import failpoints as faults
from events.etcd import EtcdStore
from events.failpoint_names import FAILPOINTS
from events.store import Delete, Put, Store
from tests.support import played
from tests.support.etcd import EtcdCluster, etcd_cluster
from tests.support.histories import REQUEST, TARGET
from tests.support.played import Player, chained, recorded
from tests.support.records import wait_until

pytestmark = pytest.mark.etcd

DONE, FAILED, USAGE = 0, 1, 2


class Ran(NamedTuple):
    code: int
    out: str
    error: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Ran]


@pytest.fixture(scope="module")
def cluster() -> Iterator[EtcdCluster]:
    with etcd_cluster() as made:
        yield made


@pytest.fixture
def store(cluster: EtcdCluster) -> Iterator[EtcdStore]:
    made = EtcdStore(cluster.endpoints)
    made.delete_prefix(made.keys.root)
    yield made
    made.close()


@pytest.fixture
def run(cluster: EtcdCluster, store: EtcdStore, capsys: pytest.CaptureFixture[str]) -> Run:
    def command(*arguments: str) -> Ran:
        capsys.readouterr()
        try:
            code = cargoctl.main(["--etcd", cluster.endpoints[0], *arguments])
        except SystemExit as error:  # argparse
            code = int(error.code or 0)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return Ran(code, captured.out, captured.err)

    return command


@pytest.fixture
def coordinator(store: EtcdStore) -> Iterator[faults.Failpoints]:
    stop, points = threading.Event(), faults.Failpoints()
    service = Service(store, "c1", points, structlog.wrap_logger(structlog.ReturnLogger()))
    thread = threading.Thread(target=service.run, args=(stop,), daemon=True)
    thread.start()
    yield points
    stop.set()
    points.set("")
    thread.join(10)
    assert not thread.is_alive()


def put(store: Store, recording: Recording, *, pointers: bool = True) -> Recording:
    """Write a history as it is, broken or not."""
    keys, migration = store.keys, recording.migration
    texts = list(recording.texts)
    while len(texts) > 100:  # a transaction takes no more; nobody who is there looks at so long a history
        store.transact((), [Put(keys.event(migration, number), text) for number, text in texts[:100]])
        del texts[:100]
    puts = [Put(keys.event(migration, number), text) for number, text in texts]
    if recording.head is not None:
        puts.append(Put(keys.head(migration), recording.head))
    puts.append(Put(keys.request(migration), b'{"container":"web","source":"alpha","target":"beta"}'))
    puts += [Put(keys.inbox_pointer(host, migration), b"1") for host in ("alpha", "beta") if pointers]
    store.transact((), puts)
    return recording


def several(store: Store) -> dict[str, Recording]:
    """One history of each outcome, with event ids of their own."""
    players = {
        "aborted-1": played.aborted(),
        "completed-1": played.completed(),
        "finalised-1": played.finalised(),
        "rolled-back-1": played.rolled_back(),
        "half-dead-1": played.rolled_back_without_target(),
        "under-way-1": Player().run("target_started"),
    }
    made = {}
    for name, player in players.items():
        rows = [replace(row, uuid=f"{name}-{at}") for at, row in enumerate(player.rows)]
        made[name] = put(store, recorded(chained(rows), name))
    return made


def keys_of(store: Store, migration: str) -> list[str]:
    return [item.key for item in store.range(store.keys.root) if f"/{migration}" in item.key]


# --- looking ---------------------------------------------------------------------------------------


def test_sound_histories_are_proven_one_by_one_and_together(store: EtcdStore, run: Run) -> None:
    """P6: `verify` in production says what the tests' validator says."""
    several(store)
    assert run("verify", "completed-1").code == DONE
    ran = run("verify", "--json")
    assert ran.code == DONE
    assert ran.json["sound"] is True
    assert len(ran.json["migrations"]) == 6


def test_an_edited_history_fails_the_proof_and_is_shown_where(store: EtcdStore, run: Run) -> None:
    """P6, B15: an edit by hand with etcdctl."""
    recording = put(store, played.completed().recording())
    key = store.keys.event("web-1", 3)
    store.put(key, recording.texts[2][1].replace(b'"always"', b'"never!"'))
    ran = run("verify", "web-1")
    assert ran.code == FAILED
    assert "event 4 does not continue event 3" in ran.out
    for command in (("history", "web-1"), ("replay", "web-1"), ("why", "web-1"), ("status", "web-1")):
        assert run(*command).code == FAILED
    assert "cargoctl verify web-1" in run("history", "web-1").error


def test_broken_keys_of_every_kind_are_findings(store: EtcdStore, run: Run) -> None:
    """P6, B15: cut, wiped, strange and unreadable histories are all reported in one run."""
    put(store, played.completed().recording("whole"))
    for name in ("cut", "headless", "unreadable"):
        put(store, played.aborted().recording(name))
    store.delete(store.keys.event("cut", 2))
    store.delete(store.keys.head("headless"))
    store.put(store.keys.event("unreadable", 2), b"\xff{")
    store.put(store.keys.migrations + "bad id!/head", b"{}")
    store.put(store.keys.migrations + "whole/note", b"hello")
    ran = run("verify", "--json")
    assert ran.code == FAILED
    rules = {name: {finding["rule"] for finding in one["findings"]} for name, one in ran.json["migrations"].items()}
    assert "sequence" in rules["cut"]
    assert rules["headless"] == {"head"}
    assert "schema" in rules["unreadable"]
    assert rules["whole"] == {"key"}
    assert any("bad id!" in finding["text"] for finding in ran.json["across"])


def test_two_migrations_of_one_container_are_found_together(store: EtcdStore, run: Run) -> None:
    """P6: only seen across histories."""
    for name in ("web-1", "web-2"):
        put(store, Player().run("sync_armed").recording(name))
    ran = run("verify")
    assert ran.code == FAILED
    assert "one migration a container" in ran.out


def test_a_replay_shows_every_machine_and_proves_the_head(store: EtcdStore, run: Run) -> None:
    """P5: the fold is the recorded head."""
    put(store, played.completed().recording())
    ran = run("replay", "web-1")
    assert ran.code == DONE
    assert "frozen → yielded" in ran.out
    assert "uniting → starting" in ran.out
    assert "is the recorded head: phase completed" in ran.out
    until = run("replay", "web-1", "--until", "4", "--json").json
    assert [step["coordinator"]["state"] for step in until["steps"]] == ["admit", "prepare", "prepare", "pre_copy"]
    assert until["whole"] is False
    assert run("replay", "web-1", "--until", "99").code == USAGE


def test_a_replay_of_a_forged_head_fails(store: EtcdStore, run: Run) -> None:
    """P5: a summary that says something else than the events is no proof."""
    recording = put(store, played.completed().recording())
    assert recording.head is not None
    store.put(store.keys.head("web-1"), recording.head.replace(b'"completed"', b'"finalised"'))
    ran = run("replay", "web-1")
    assert ran.code == FAILED
    assert "the head says 'finalised'" in ran.out


def test_why_names_who_is_waited_for_whether_it_is_heard_of_and_what_can_be_said(store: EtcdStore, run: Run) -> None:
    """P13: a migration that waits says for what."""
    player = Player().run("target_started").fail(TARGET, "no room on the disk")
    put(store, player.recording())
    ran = run("why", "web-1")
    assert ran.code == DONE
    assert "hostd/beta" in ran.out
    assert "silent" in ran.out
    assert "no room on the disk" in ran.out
    store.put(store.keys.host("beta"), b"{}")
    answer = run("why", "web-1", "--json").json
    heard = {party["process"]: party["heard_of"] for party in answer["parties"]}
    assert heard == {"hostd/alpha": False, "hostd/beta": True}
    assert set(answer["possible_controls"]) >= {"rollback", "retry"}
    assert "abort" not in answer["possible_controls"]


def test_why_tells_of_the_way_out_when_the_target_is_dead(store: EtcdStore, run: Run) -> None:
    """Nothing but a person's word replaces the word of a dead host."""
    put(store, Player().run("target_started").control("rollback").recording())
    assert "rollback --discard-target-writes --target-off WHO" in run("why", "web-1").out


# --- files -------------------------------------------------------------------------------------------


def test_an_export_is_read_by_the_same_commands(store: EtcdStore, run: Run, tmp_path: Path) -> None:
    """P5: off the bus, the same history."""
    several(store)
    file = tmp_path / "all.jsonl"
    assert run("export", "--all", "--output", str(file)).code == DONE
    online = {name: run(name, "rolled-back-1").out for name in ("history", "replay")}
    store.delete_prefix(store.keys.root)
    for name, shown in online.items():
        assert run(name, "rolled-back-1", "--file", str(file)).out == shown
    assert run("verify", "--file", str(file)).code == DONE
    assert run("why", "aborted-1", "--file", str(file)).code == DONE
    assert run("history", "--file", str(file)).code == USAGE
    file.write_bytes(file.read_bytes().replace(b'"web.cargo-m"', b'"web.cargo-x"'))
    assert run("verify", "--file", str(file)).code == FAILED


def test_an_export_holds_the_exact_texts_even_of_a_broken_history(store: EtcdStore, run: Run, tmp_path: Path) -> None:
    """B15: evidence is kept byte for byte."""
    put(store, played.aborted().recording())
    store.put(store.keys.event("web-1", 2), b'{"a":\n\xff')
    store.delete(store.keys.event("web-1", 4))
    file = tmp_path / "broken.jsonl"
    assert run("export", "web-1", "--output", str(file)).code == DONE
    (kept,) = archive.read(file).values()
    stored = archive.recorded(store, "web-1")
    assert stored is not None
    assert (kept.texts, kept.head) == (stored.texts, stored.head)
    assert run("verify", "--file", str(file)).code == FAILED


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"hello\n", b'{"cargo_history":9}', b'{"cargo_history":1,"migration":"x","events":5}\n', b"[" * 9999],
)
def test_a_file_that_is_no_export_is_refused_in_words(run: Run, tmp_path: Path, content: bytes) -> None:
    """Malformed input gets a sentence."""
    file = tmp_path / "x.jsonl"
    file.write_bytes(content)
    ran = run("verify", "--file", str(file))
    assert ran.code == FAILED
    assert str(file) in ran.error


def test_the_archive_takes_what_nobody_needs_and_leaves_the_rest(store: EtcdStore, run: Run, tmp_path: Path) -> None:
    """Proven from the file first, then removed with request, control and pointers, in bounded transactions."""
    made = several(store)
    store.put(store.keys.control("aborted-1"), b"abort")
    ran = run("archive", "--older-than", "0", "--output", str(tmp_path), "--json")
    assert ran.code == DONE
    assert set(ran.json["archived"]) == {"aborted-1", "finalised-1", "rolled-back-1"}
    assert ran.json["in_use"] == ["completed-1"]
    assert set(ran.json["kept"]) == {"half-dead-1"}
    for name in ran.json["archived"]:
        assert keys_of(store, name) == []
        assert run("verify", "--file", str(tmp_path / f"{name}.jsonl")).code == DONE
        (kept,) = archive.read(tmp_path / f"{name}.jsonl").values()
        assert kept.texts == made[name].texts
    for name in ("completed-1", "half-dead-1", "under-way-1"):
        stored = archive.recorded(store, name)
        assert stored is not None
        assert (stored.texts, stored.head) == (made[name].texts, made[name].head)


def test_young_histories_are_not_archived(store: EtcdStore, run: Run, tmp_path: Path) -> None:
    several(store)
    ran = run("archive", "--older-than", "36500", "--output", str(tmp_path), "--json")
    assert ran.code == DONE
    assert ran.json["archived"] == {}


def test_a_broken_history_is_never_archived(store: EtcdStore, run: Run, tmp_path: Path) -> None:
    """B15: what is wrong stays where it can be looked at."""
    recording = put(store, played.aborted().recording())
    store.put(store.keys.event("web-1", 3), recording.texts[2][1].replace(b'"always"', b'"never!"'))
    before = keys_of(store, "web-1")
    assert run("archive", "--older-than", "0", "--output", str(tmp_path)).code == FAILED
    assert keys_of(store, "web-1") == before
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_holds_something_else_stops_the_archive(store: EtcdStore, run: Run, tmp_path: Path) -> None:
    put(store, played.aborted().recording())
    other = recorded(chained(Player().run("source_stopped").control("abort", reason="x").run().rows), "web-1")
    archive.write(tmp_path / "web-1.jsonl", [other])
    assert run("archive", "--older-than", "0", "--output", str(tmp_path)).code == FAILED
    assert archive.recorded(store, "web-1") is not None


def test_a_removal_that_was_cut_off_is_finished_by_the_next_one(store: EtcdStore, run: Run, tmp_path: Path) -> None:
    """The archive may be killed anywhere."""
    recording = put(store, played.aborted().recording())
    archive.write(tmp_path / "web-1.jsonl", [recording])
    keys = store.keys
    gone = [keys.head("web-1"), keys.request("web-1"), keys.event("web-1", 1), keys.event("web-1", 2)]
    store.transact((), [Delete(key) for key in [*gone, *(keys.inbox_pointer(h, "web-1") for h in ("alpha", "beta"))]])
    assert run("archive", "--older-than", "0", "--output", str(tmp_path)).code == DONE
    assert keys_of(store, "web-1") == []


def test_what_is_left_of_another_history_is_not_removed(store: EtcdStore, run: Run, tmp_path: Path) -> None:
    """B15: a headless history that the file does not hold is evidence, not a leftover."""
    archive.write(tmp_path / "web-1.jsonl", [played.aborted().recording()])
    put(store, played.completed().recording())
    store.delete(store.keys.head("web-1"))
    assert run("archive", "--older-than", "0", "--output", str(tmp_path)).code == FAILED
    assert archive.recorded(store, "web-1") is not None


def test_a_long_history_leaves_in_batches(store: EtcdStore, run: Run, tmp_path: Path) -> None:
    """B8, E6: more events than one transaction may remove."""
    player = Player().run("target_prepared").control("pause")
    for _ in range(150):
        player.control("finalise")
    put(store, player.control("abort").run("aborted").recording())
    assert run("archive", "--older-than", "0", "--output", str(tmp_path)).code == DONE
    assert keys_of(store, "web-1") == []


def test_a_running_coordinator_takes_an_archived_history_for_archived(
    store: EtcdStore, run: Run, tmp_path: Path, coordinator: faults.Failpoints
) -> None:
    """B15: it raises no alarm, starts nothing anew, and takes a new request of that name for a new one."""
    put(store, played.rolled_back().recording())
    wait_until(lambda: store.get(store.keys.leader) is not None, "a coordinator leads")
    assert run("archive", "--older-than", "0", "--output", str(tmp_path)).code == DONE
    store.put(store.keys.request("web-1"), b"{}")
    wait_until(lambda: store.head("web-1") is not None, "the new request is answered")
    assert [event.type for event in store.read("web-1")] == ["rejected"]


# --- controls ----------------------------------------------------------------------------------------


def test_an_impossible_control_is_answered_with_a_reason(
    store: EtcdStore, run: Run, coordinator: faults.Failpoints
) -> None:
    """What cannot be done now is refused in words."""
    put(store, played.aborted().recording())
    ran = run("finalise", "web-1")
    assert ran.code == FAILED
    assert "only a completed migration can be finalised" in ran.out


def test_a_retry_wakes_the_hosts_once(store: EtcdStore, run: Run, coordinator: faults.Failpoints) -> None:
    """One event, both inboxes; no machine moves."""
    put(store, Player().run("target_started").fail(TARGET, "no room").recording(), pointers=False)
    ran = run("retry", "web-1", "--reason", "there is room now", "--json")
    assert ran.code == DONE
    assert [json.loads(line)["type"] for line in ran.out.splitlines()] == ["resumed"]
    assert store.get(store.keys.inbox_pointer("beta", "web-1")) is not None
    assert run("verify", "web-1").code == DONE


def test_a_retry_of_what_does_not_fail_is_refused(store: EtcdStore, run: Run, coordinator: faults.Failpoints) -> None:
    put(store, Player().run("target_started").recording())
    assert run("retry", "web-1").code == FAILED


def test_a_roll_back_without_the_target_needs_both_words(
    store: EtcdStore, run: Run, coordinator: faults.Failpoints
) -> None:
    """P12: losing the target's writes must be asked for by name."""
    put(store, Player().run("target_started").recording())
    assert run("rollback", "web-1", "--target-off", "ada").code == USAGE
    ran = run("rollback", "web-1", "--target-off", "ada", "--discard-target-writes", "--json")
    assert ran.code == DONE
    said = [json.loads(line) for line in ran.out.splitlines()]
    assert [event["type"] for event in said] == ["rollback_ordered", "target_asserted_off"]
    assert said[0]["data"]["discard_target_writes"] is True
    assert said[1]["data"]["who"] == "ada"


def test_a_control_for_a_history_that_the_coordinator_refuses_fails_and_says_so(
    store: EtcdStore, run: Run, coordinator: faults.Failpoints
) -> None:
    """B15: a key that was taken away without an answer is not a wish that was granted."""
    recording = Player().run("target_started").recording()
    wait_until(lambda: store.get(store.keys.leader) is not None, "a coordinator leads")
    store.put(store.keys.event("web-1", 1), recording.texts[0][1])  # no head yet: it looks cut
    control = store.keys.control("web-1")
    store.put(control, b"pause")
    wait_until(lambda: store.get(control) is None, "the coordinator has seen it")
    put(store, recording)
    ran = run("rollback", "web-1")
    assert ran.code == FAILED
    assert "refuses to act" in ran.error


def test_a_control_that_nobody_answers_says_so_and_stays(store: EtcdStore, run: Run) -> None:
    """Without a coordinator the wish is kept for the next one."""
    put(store, Player().run("target_started").recording())
    ran = run("rollback", "web-1", "--timeout-seconds", "0.3")
    assert ran.code == FAILED
    assert "no coordinator has answered" in ran.error
    assert store.get(store.keys.control("web-1")) is not None
    assert run("abort", "web-1").code == USAGE


# --- failpoints --------------------------------------------------------------------------------------


def test_every_failpoint_is_listed_and_those_in_force_are_shown(store: EtcdStore, run: Run) -> None:
    """The list that the crash matrix is made from."""
    every = [point for points in FAILPOINTS.values() for point in points]
    assert run("failpoints").out.split("\n")[:-1] == every
    spec = "target.start_container:after_effect=kill@2"
    assert run("failpoints", "set", "hostd/beta", spec).code == DONE
    assert run("failpoints", "--json").json["set"] == {"hostd/beta": spec}
    assert run("failpoints", "clear", "hostd/beta").code == DONE
    assert run("failpoints", "list", "--json").json["set"] == {}


@pytest.mark.parametrize(
    ("process", "spec"),
    [
        ("hostd/beta", "nonsense"),
        ("hostd/beta", "target.nothing:before_effect=kill"),
        ("coordinator", "target.start_container:after_effect=kill"),
        ("coordinator", ""),
        ("somebody", "coordinator.completed:before_event=kill"),
        ("hostd/", "target.start_container:after_effect=kill"),
    ],
)
def test_a_fault_that_no_process_has_is_wrong_usage(store: EtcdStore, run: Run, process: str, spec: str) -> None:
    ran = run("failpoints", "set", process, spec)
    assert ran.code == USAGE
    assert ran.error.startswith("cargoctl: ")
    assert store.range(store.keys.failpoint_sets) == []


def test_a_coordinator_follows_its_own_failpoints_even_while_it_waits_at_one(
    store: EtcdStore, run: Run, coordinator: faults.Failpoints
) -> None:
    """A coordinator frozen at a pause goes on when the pause is taken away."""
    wait_until(lambda: store.get(store.keys.leader) is not None, "a coordinator leads")
    run("failpoints", "set", "coordinator", "coordinator.rejected:before_event=pause")
    wait_until(lambda: "coordinator.rejected:before_event" in coordinator._faults, "the fault is in force")
    store.put(store.keys.request("web-1"), b"{}")
    wait_until(lambda: bool(coordinator._passes), "it waits at the point")
    assert store.head("web-1") is None
    run("failpoints", "clear", "coordinator")
    wait_until(lambda: store.head("web-1") is not None, "it has gone on")


def test_an_error_on_demand_makes_the_coordinator_try_again(
    store: EtcdStore, run: Run, coordinator: faults.Failpoints
) -> None:
    """An error at an order is neither the end of the coordinator nor of the migration."""
    wait_until(lambda: store.get(store.keys.leader) is not None, "a coordinator leads")
    run("failpoints", "set", "coordinator", "coordinator.rejected:before_event=error(no)@1")
    wait_until(lambda: "coordinator.rejected:before_event" in coordinator._faults, "the fault is in force")
    store.put(store.keys.request("web-1"), b"{}")
    wait_until(lambda: store.head("web-1") is not None, "the request is answered all the same")
    assert [event.type for event in store.read("web-1")] == ["rejected"]


# --- the command line ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("fly",),
        ("history",),
        ("history", "no such"),
        ("history", "unknown-1"),
        ("history", "x", "--file", "/nowhere.jsonl"),
        ("replay", "unknown-1"),
        ("verify", "unknown-1"),
        ("why", "../etc"),
        ("export", "--output", "/tmp/x"),
        ("export", "a", "--all", "--output", "/tmp/x"),
        ("export", "unknown-1", "--output", "/tmp/x"),
        ("archive", "--older-than", "-1", "--output", "/tmp/x"),
        ("abort", "unknown-1"),
        ("bwlimit", "web-1"),
        ("-c", "/nowhere.cfg", "list"),
        ("replay", "x", "--until", "many"),
    ],
)
def test_wrong_usage_is_answered_with_two_and_a_sentence(run: Run, arguments: tuple[str, ...]) -> None:
    """No traceback for bad input."""
    ran = run(*arguments)
    assert ran.code == USAGE
    assert ran.error


@pytest.mark.parametrize(
    "command",
    [
        "list",
        "migrate",
        "status",
        "history",
        "replay",
        "verify",
        "why",
        "export",
        "archive",
        "failpoints",
        "rollback",
        "retry",
    ],
)
def test_every_command_explains_itself(run: Run, command: str) -> None:
    ran = run(command, "-h")
    assert ran.code == DONE
    assert "--json" in ran.out


def test_an_unreachable_bus_is_a_failure_and_not_an_empty_fleet(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """B14: trouble is never told as absence."""
    monkeypatch.setattr("events.store.DEADLINE_SECONDS", 0.5)
    assert cargoctl.main(["--etcd", "127.0.0.1:1", "status"]) == FAILED


def test_texts_that_look_like_markup_are_shown_as_they_are(store: EtcdStore, run: Run) -> None:
    """D19: what a host says is data."""
    player = Player(REQUEST).run("target_started").fail(TARGET, "[/bold] [link=x] \x1b[2J")
    put(store, player.recording())
    for command in ("history", "why", "status", "replay"):
        ran = run(command, "web-1")
        assert ran.code == DONE
        assert "[/bold]" in ran.out
        assert "\x1b[2J" not in ran.out
