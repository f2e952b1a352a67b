"""Targets: what an agent reads from its tools, from Docker, from its peers' files and from its own disk."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from events.errors import CargoError, PermanentError
from events.schema import Event
from hostd import engine, engine_containers, federation, fold, mounts, networks, placement
from hostd.docker_json import ContainerView, VolumeView, view
from hostd.effects.arrival import read_layer_place
from hostd.entry import Entry, escape
from hostd.fidelity import Target as Facts
from hostd.fidelity import dropped, known_name, refusals, shortfalls, stripped
from hostd.fuse_wire import directory_page
from hostd.image_archive import held_in, layers_missing, pack
from hostd.image_identity import identity_of, is_same
from hostd.inventory import Sizer, container_record
from hostd.journal import Journal
from hostd.lower import ROOT, Listing
from hostd.manifest import (
    MAX_RECORD_BYTES,
    compare,
    decode_manifest,
    read_manifest,
    tree_digest,
    unsupported,
    write_manifest,
)
from hostd.peer import Peer
from hostd.process import MAX_STDERR_BYTES
from hostd.shared_storage import SharedPlace, find_shared, told, volume_problem, without_secrets
from hostd.spec import data_mounts, decode_spec, encode_spec, from_inspect, missing_ports, port_bindings, to_create_body
from hostd.spec_rules import target_problems
from hostd.tool_words import MAX_LINE_BYTES, OutputReader, only_vanished, rsync_error, ssh_error
from tests.fuzz.campaign import Target
from tests.support.histories import History
from tests.support.inspected import container, image

SAMPLES = Path(__file__).parents[1] / "unit" / "samples"
PEER = Peer("alpha", "10.0.0.1", 22, "root", Path("/etc/cargo/ssh/id"), Path("/etc/cargo/ssh/known_hosts"))
FACTS = Facts(cpus=1, cgroup_driver="systemd", path_exists=lambda _path: False, has_program=lambda _name: False)
SCRATCH = Path(tempfile.mkdtemp(prefix="cargo-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)
NETWORK: dict[str, Any] = {
    "Name": "back", "Id": "n1", "Driver": "bridge", "EnableIPv6": False, "Internal": False, "Labels": {"a": "b"}, "Options": {},
    "IPAM": {"Driver": "default", "Options": None, "Config": [{"Subnet": "172.20.0.0/16", "Gateway": "172.20.0.1"}]},
    "Containers": {"x": {"Name": "other", "IPv4Address": "172.20.0.5/16"}},
}  # fmt: skip
ENDPOINT: dict[str, Any] = {"IPAMConfig": {"IPv4Address": "172.20.0.9"}, "Aliases": ["web"]}
VOLUME: dict[str, Any] = {
    "Name": "data", "Driver": "local", "Mountpoint": "/var/lib/docker/volumes/data/_data", "Labels": None, "Options": {"type": "nfs", "o": "addr=1.2.3.4,password=x", "device": ":/x"},
}  # fmt: skip


def _json(raw: bytes) -> Any:
    """As the client of Docker's API reads it."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise PermanentError("not JSON") from error


def _dictionary(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise PermanentError("not an object")
    return value


# --- Docker --------------------------------------------------------------------------------------------


def run_docker(raw: bytes) -> None:
    """``[container, image, volume, network, endpoint]`` as a daemon might describe them."""
    document = _json(raw)
    if not isinstance(document, list) or len(document) != 5:
        return
    inspected, picture, volume, network, endpoint = (part if isinstance(part, dict) else {} for part in document)
    container_record(inspected, volumes={"data": volume}, used=[], sizer=Sizer())
    looks: tuple[Callable[[], object], ...] = (
        lambda: data_mounts(inspected),
        lambda: port_bindings(inspected),
        lambda: engine_containers._summary(inspected),
        lambda: find_shared(data_mounts(inspected), {"data": view(VolumeView, volume, "v")}, (), frozenset({"nfs"})),
        lambda: list(networks.existing_problems("back", network, endpoint, NETWORK)),
        lambda: list(networks.existing_problems("back", NETWORK, endpoint, network)),
        lambda: list(
            networks.creation_problems("back", network, endpoint, {"back": NETWORK, "other": network}, ("10.0.0.1",))
        ),
        lambda: networks.differing_subnets("back", NETWORK, network),
        lambda: json.dumps(networks.create_body("back", networks.definition(network), endpoint, {"l": "m"})),
        lambda: is_same(picture, "x", identity_of(picture)),
    )
    for look in looks:
        with contextlib.suppress(CargoError):
            look()
    spec, _, _ = from_inspect(
        inspected,
        picture,
        volumes={"data": volume},
        networks={"back": network},
        others=[],
        host_name="h",
        user_namespace="0.0",
    )
    _use(encode_spec(spec), inspected)


def run_spec(raw: bytes) -> None:
    """A specification file, as a peer may have written it."""
    _use(raw, container())


def _use(raw: bytes, inspected: dict[str, Any]) -> None:
    spec = decode_spec(raw)
    assert len(repr(spec)) < 10_000
    found: list[str] = []
    with contextlib.suppress(CargoError):
        target_problems(
            spec, networks={"bridge": NETWORK}, architecture="x86_64", api_version="1.41", user_namespace=""
        )
    with contextlib.suppress(CargoError):
        lacking = shortfalls(spec, FACTS)
        refusals(lacking)
        found = [shortfall.name for shortfall in lacking]
    with contextlib.suppress(CargoError):
        told(spec.shared)
        missing_ports(spec, inspected)
        for place in spec.shared:
            without_secrets(volume_problem(place, {"a": "b"}))
    body = to_create_body(spec, image="x", labels={"cargo.migration": "m"})
    assert json.loads(json.dumps(body))["HostConfig"]["RestartPolicy"] == {"Name": "no"}
    found += [shortfall.name for shortfall in dropped(body, inspected)]
    for name in found:
        known_name(name)
    again = stripped(spec, found)
    to_create_body(again, image="x", labels={})


def run_docker_event(raw: bytes) -> None:
    """A line of the event stream, and of an answer that tells of failures in a stream."""
    found = engine._event(raw)
    assert found is None or isinstance(found.kind, str)
    engine._raise_said_error("loading", raw.split(b"\n"))


def run_engine(raw: bytes) -> None:
    """``docker info`` and the rows of lists."""
    document = _json(raw)
    with contextlib.suppress(CargoError):
        engine.info_in(_dictionary(document), _dictionary(document))
    for row in document if isinstance(document, list) else [document]:
        with contextlib.suppress(CargoError):
            engine_containers._summary(row)
        with contextlib.suppress(CargoError):
            view(ContainerView, row, "x")


def run_segment(raw: bytes) -> None:
    """A name as part of a request to Docker: no name leads to another request."""
    quoted = engine._segment(raw.decode("utf-8", "surrogateescape"))
    assert not {"", ".", ".."} & set(quoted.split("/")) and "?" not in quoted and "#" not in quoted and quoted.isascii()


# --- tools ---------------------------------------------------------------------------------------------


def run_words(raw: bytes) -> None:
    """What rsync and ssh write, in pieces of any size."""
    seen: list[int] = []
    reader = OutputReader(lambda progress: seen.append(progress.bytes + progress.files))
    step = 1 + len(raw) % 97
    for start in range(0, len(raw), step):
        reader.feed(raw[start : start + step])
        assert reader.held_bytes <= MAX_LINE_BYTES
    result = reader.result(1.0, vanished=False)
    assert all(
        number < 2**80
        for number in (*seen, result.bytes_received, result.files, result.literal_bytes, result.matched_bytes)
    )
    text = raw[:MAX_STDERR_BYTES].decode("utf-8", "replace")
    only_vanished(text)
    assert isinstance(ssh_error(PEER, text), CargoError)
    for code in (1, 11, 23, 24, 255, 7):
        assert isinstance(rsync_error(PEER, code, text), CargoError)
    for line in raw.split(b"\n"):
        mounts.parse_mountinfo_line(line)


def run_tar(raw: bytes) -> None:
    """An image's archive, of a peer or of Docker."""
    with contextlib.suppress(CargoError):
        held_in([raw[:1000], raw[1000:]], threading.Event())
    file = SCRATCH / "archive"
    with contextlib.suppress(CargoError):
        pack([raw], SCRATCH / "packed", frozenset({"sha256:" + "0" * 64}))
    file.write_bytes(raw)
    for name in layers_missing(file, ("sha256:" + "a" * 64,)):
        assert not name.startswith(("/", "../")) and name != ".."


# --- manifests -----------------------------------------------------------------------------------------


def run_manifest(raw: bytes) -> None:
    """A manifest in a file or in an event."""
    file = SCRATCH / "manifest"
    file.write_bytes(raw)
    with contextlib.suppress(CargoError):
        list(read_manifest(file))
    _weigh(list(decode_manifest(raw)))


def run_entries(raw: bytes) -> None:
    """Any entries in a manifest that is otherwise sound: its author can compute digests too."""
    _weigh(list(decode_manifest(framed(raw))))


def framed(raw: bytes) -> bytes:
    """The manifest of the records in ``raw``, a MessagePack list."""
    try:
        rows = msgspec.msgpack.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise PermanentError("no list") from error
    out, state, count = bytearray(), hashlib.blake2b(digest_size=32), 0
    for row in [["cargo-manifest", 1], *(rows if isinstance(rows, list) else [])]:
        body = msgspec.msgpack.encode(row)
        if not 0 < len(body) <= MAX_RECORD_BYTES:
            continue
        record = len(body).to_bytes(4, "big") + body
        state.update(record)
        out += record
        count += 1
    trailer = msgspec.msgpack.encode([count - 1, state.digest()])
    return bytes(out + b"\0\0\0\0" + len(trailer).to_bytes(4, "big") + trailer)


def _weigh(entries: list[Entry]) -> None:
    for entry in entries:
        parts = entry.path.split(b"/") if entry.path else []
        assert not {b"", b".", b".."} & set(parts) and b"\0" not in entry.path, entry.path
        assert escape(entry.path).isprintable()
    list(unsupported(entries))
    placement.obstacles(entries)
    placement._checked(entries)
    with contextlib.suppress(CargoError):
        list(compare(entries, list(reversed(entries))))
    with contextlib.suppress(CargoError):
        list(compare(entries, entries[1:]))
    with contextlib.suppress(CargoError):
        tree_digest(entries)
    with contextlib.suppress(CargoError):
        write_manifest(SCRATCH / "again", entries)
    listing = Listing([(entry.path, entry.size) for entry in entries if entry.kind == "f" and entry.path])
    for number in range(ROOT, min(len(listing.paths), 20)):
        page = listing.entries(number)
        for offset in (0, 1, len(page), 2**63 - 1, 2**64 - 1):
            assert len(directory_page(page, offset, 4096)) <= 4096
        listing.child(number, b"x/../..")


# --- its own disk --------------------------------------------------------------------------------------


def run_own_files(raw: bytes) -> None:
    """Journals and records that a crash, a full disk or a hand has damaged. Nothing may be done by halves for it."""
    events: list[Event] = History().up_to("sync_ordered").events
    directory = SCRATCH / "own"
    directory.mkdir(exist_ok=True)
    (directory / "m.json").write_bytes(raw)
    with contextlib.suppress(CargoError):
        Journal(directory).check("m", events)
    with contextlib.suppress(CargoError):
        Journal(directory).check("m", [])
    tree, place, file = directory / "tree", directory / "place", directory / "record"
    for made in (tree, place, directory / "replica"):
        made.mkdir(exist_ok=True)
    file.write_bytes(raw)
    union = federation.Union(directory / "stage", place)
    union.stage.mkdir(exist_ok=True)
    for name in (union._placeholders_file.name, "swap", "created"):
        (union.stage / name).write_bytes(raw)
    looks: tuple[Callable[[], object], ...] = (
        lambda: fold.swapped(place, file),
        lambda: fold.may_take_its_place(tree, file),
        lambda: fold.swap_into_place(tree, place, file),
        union._placeholders,
        lambda: read_layer_place(file),
    )
    for look in looks:
        with contextlib.suppress(CargoError):
            look()
    assert tree.is_dir() and place.is_dir()


ENTRIES = [
    Entry(b"", "d", 0o755),
    Entry(b"a", "d", 0o755, stale=True),
    Entry(b"a/file", "f", 0o644, size=5, mtime_ns=1, blocks=8, digest=b"d" * 32, stale=True),
    Entry(b"a/link", "l", 0o777, link_target=b"../file"),
    Entry(b"a/twin", "f", 0o644, size=5, link_group=7, xattrs=((b"user.a", b"1"),)),
    Entry(b"a/\xff\n", "p", 0o600),
    Entry(b"dev", "c", 0o600, rdev=261),
    Entry(b"gone", "-"),
    Entry(b"zero", "f", 0o644, link_group=9),
]


def _manifest() -> bytes:
    file = SCRATCH / "seed"
    write_manifest(file, ENTRIES)
    return file.read_bytes()


def _archive() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, body in (
            ("manifest.json", b'[{"Config":"c","RepoTags":null,"Layers":["x/layer.tar"]}]'),
            ("x/layer.tar", b"tar" * 50),
            ("c", b"{}"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
        link = tarfile.TarInfo("y/layer.tar")
        link.type, link.linkname = tarfile.SYMTYPE, "../x/layer.tar"
        tar.addfile(link)
    return stream.getvalue()


def _docker_seeds() -> list[bytes]:
    pictures: list[Any] = [
        image(),
        {"Id": container()["Image"], "Config": {"Env": ["A=b"]}, "RootFS": {"Layers": ["sha256:1"]}},
    ]
    seeds = [json.dumps([container(), picture, VOLUME, NETWORK, ENDPOINT]) for picture in pictures]
    return [seed.encode() for seed in seeds]


def _spec_seed() -> bytes:
    spec, _, _ = from_inspect(container(), image(), networks={"back": NETWORK})
    share = SharedPlace(
        kind="bind",
        name="/mnt/x",
        destination="/x",
        file_system="nfs4",
        share="10.0.0.5:/e",
        path="/",
        options={"o": "password=x"},
    )
    return encode_spec(msgspec.structs.replace(spec, shared=(share,), networks={"back": ENDPOINT}))


INFO: dict[str, Any] = {
    "ServerVersion": "20.10.24", "Driver": "overlay2", "DockerRootDir": "/var/lib/docker", "KernelVersion": "6.1", "Architecture": "x86_64", "NCPU": 2,
    "Name": "h", "LiveRestoreEnabled": False, "SecurityOptions": ["name=seccomp,profile=default", "name=userns"], "CgroupDriver": "systemd", "CgroupVersion": "2",
    "Runtimes": {"runc": {"path": "runc"}}, "Plugins": {"Log": ["json-file"]}, "MemoryLimit": True, "DriverStatus": [["driver-type", "io.containerd.snapshotter.v1"]],
}  # fmt: skip
ROW: dict[str, Any] = {
    "Id": "c", "Names": ["/web", "/other/web"], "Image": "i", "ImageID": "sha256:1", "State": "running", "Labels": {"a": "b"}, "Mounts": [{"Name": "data"}],
    "Ports": [{"PrivatePort": 80, "PublicPort": 8080, "Type": "tcp", "IP": "0.0.0.0"}],
}  # fmt: skip
WORDS = (
    b"     32,768 100%  0.00kB/s    0:00:00 (xfr#1, to-chk=0/1)\r      1048576  50%  1.00MB/s  0:00:01 (xfr#12, ir-chk=1000/1234)\r\nNumber of regular files transferred: 12\nLiteral data: 99 bytes\nTotal bytes received: 1234\nMatched data: 5 bytes\n",
    b'rsync: [sender] link_stat "/x/y" failed: No such file or directory (2)\nrsync error: some files could not be transferred (code 23) at main.c(1865) [generator=3.5.0]\n',
    b"rsync: [receiver] get_acl: sys_acl_get_file(x, ACL_TYPE_DEFAULT): Permission denied (13)\n",
    b"@@@@@\n@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.\r\n",
    b"root@10.0.0.1: Permission denied (publickey).\n",
    b"36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n",
)  # fmt: skip
OWN = (
    b'{"seq":1,"digest":"x"}', b'{"seq":0,"digest":""}', b'{"seq":-1,"digest":""}', msgspec.msgpack.encode([[b"a/b", 5, 1, b"h"]]), msgspec.msgpack.encode([7]),
    msgspec.msgpack.encode(["c", "/u", "/s"]), msgspec.msgpack.encode([[b"p", 1, 2]]), msgspec.msgpack.encode([True]), msgspec.msgpack.encode({b"a": 1}),
)  # fmt: skip
EVENTS = (
    b'{"Type":"container","Action":"health_status: unhealthy","Actor":{"ID":"x","Attributes":{"name":"web"}}}',
    b'{"stream":"ok"}\n{"error":"no"}',
)

TARGETS = (
    Target("docker", run_docker, _docker_seeds(), "json"),
    Target("spec", run_spec, [_spec_seed()], "json"),
    Target("docker-event", run_docker_event, EVENTS, weight=6),
    Target("engine", run_engine, [json.dumps(INFO).encode(), json.dumps([ROW]).encode()], "json"),
    Target("names", run_segment, (b"web", b"sha256:abc", b"repo/name@sha256:1", b"10.0.0.1:5000/x:tag"), weight=6),
    Target("words", run_words, WORDS),
    Target("tar", run_tar, (_archive(),), weight=1),
    Target("manifest", run_manifest, (_manifest(),), weight=2),
    Target("entries", run_entries, (msgspec.msgpack.encode(ENTRIES),), "msgpack", 2),
    Target("own-files", run_own_files, OWN, weight=1),
)
