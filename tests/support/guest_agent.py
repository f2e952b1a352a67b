"""What runs in the guest (``tests/support/guest.py``): the target's part of the project, on a kernel with an NFS client.

Started as the guest's only process; takes one JSON order a line on the second serial port, and answers each with one.
The stage is on the guest's own disk. The transfers by rsync, which go over SSH, are no part of this.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
import traceback
import tty
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from events.errors import CargoError
from hostd import mounts, nfs_client
from hostd.digests import digest_of_file
from hostd.federation import Union
from hostd.manifest import compare, read_manifest, walk
from hostd.nfs_client import Export
from hostd.peer import Peer
from hostd.transport import Transport

PORT = "/dev/ttyS1"
VOLUME = Path("/volume")
VIEW, PAPERS = Path("/view"), Path("/papers")
MAX_TOLD = 20


class QuietTransport(Transport):
    """Nothing is asked of the source's sshd, which is not there."""

    def check(self, peer: Peer, *, cancelled: threading.Event | None = None) -> None:
        return


class Guest:
    """Each public method is an order; arguments and answers are JSON."""

    def __init__(self) -> None:
        self._transport = QuietTransport(Path("/run/cargo"))
        self._peer = Peer("source", "192.0.2.1", 22, "root", Path("/no/key"), Path("/no/hosts"))
        self._union = Union(VOLUME / "cargo", VOLUME / "_data", patience_seconds=60)
        self._reads: dict[int, list[Any]] = {}

    def ping(self) -> str:
        return os.uname().release

    def client_problem(self) -> str:
        return nfs_client.client_problem()

    def address(self, address: str) -> None:
        """Be another host, to whoever looks at addresses."""
        subprocess.run(["/bin/busybox", "ip", "addr", "flush", "dev", "eth0"], check=True)
        subprocess.run(["/bin/busybox", "ip", "addr", "add", f"{address}/24", "dev", "eth0"], check=True)

    def fetch_papers(self, address: str, port: int) -> None:
        """The source's descriptions of its tree."""
        PAPERS.mkdir(exist_ok=True)
        nfs_client.mount_export(Export(address, port, "/cargo-1"), VIEW)
        for name in os.listdir(VIEW):
            shutil.copy(VIEW / name, PAPERS / name)
        nfs_client.force_unmount(VIEW, timeout_seconds=10)

    def try_export(self, address: str, port: int, share: str) -> str:
        return nfs_client.try_export(Export(address, port, share), Path("/trial"))

    def see(self, address: str, port: int) -> list[str]:
        """What differs between the tree as NFS shows it and the source's own description."""
        nfs_client.mount_export(Export(address, port, "/cargo-0"), VIEW)
        try:
            return self._differences(VIEW)
        finally:
            nfs_client.force_unmount(VIEW, timeout_seconds=10)

    def peek(self, address: str, port: int, name: str) -> int:
        """Look at everything once, and read one file: how long it is."""
        nfs_client.mount_export(Export(address, port, "/cargo-0"), VIEW)
        try:
            for _ in walk(VIEW):
                pass
            return len((VIEW / name).read_bytes())
        finally:
            nfs_client.force_unmount(VIEW, timeout_seconds=10)

    def write(self, address: str, port: int) -> str:
        """Try to write in spite of everything: mounted read-write."""
        options = f"rw,vers=4.2,proto=tcp,addr={address},port={port},soft"
        command = ["mount", "-i", "-t", "nfs4", "-o", options, "--", f"{address}:/cargo-0", str(VIEW)]
        subprocess.run(command, check=True)
        try:
            (VIEW / "intruder").write_text("was here")
        except OSError as error:
            return error.strerror
        finally:
            nfs_client.force_unmount(VIEW, timeout_seconds=10)
        return "written"

    def unite(self, address: str, port: int) -> dict[str, Any]:
        """The union with every file's contents on the source."""
        self._union.create()
        applied = self._union.apply(read_manifest(PAPERS / "everything"), everything=True)
        self._attach(address, port)
        self._union.mount_lower()
        self._union.mount_merged()
        record = mounts.mount_at(self._union.remote)
        assert record is not None
        return {"placeholders": len(applied.placeholders), "kind": record.kind, "options": record.options.decode()}

    def attach(self, address: str, port: int) -> str:
        try:
            self._attach(address, port)
        except CargoError as error:
            return str(error)
        return ""

    def _attach(self, address: str, port: int) -> None:
        self._union.attach_remote(self._transport, self._peer, "/tree", Export(address, port, "/cargo-0"))

    def compare(self) -> list[str]:
        """What differs between what a container would see and the source's own description."""
        return self._differences(self._union.place)

    def compare_all_but(self, names: list[str]) -> list[str]:
        """As ``compare``, without reading these files; ``*files`` stands for all of them, and leaves the metadata."""
        left_out = {os.fsencode(name) for name in names}
        place = self._union.place
        expected = list(read_manifest(PAPERS / "digested"))
        if "*files" in names:
            left_out |= {entry.path for entry in expected if entry.kind == "f"}
        seen = []
        for entry in walk(place):
            if entry.kind == "f" and entry.path not in left_out:
                digest = digest_of_file(os.path.join(os.fsencode(place), entry.path))
                entry = msgspec.structs.replace(entry, digest=digest)  # noqa: PLW2901
            seen.append(entry)
        found = compare(expected, seen)
        return [f"{difference.what}: {difference.path[:60]!r}" for difference in found]

    def _differences(self, tree: Path) -> list[str]:
        found = compare(read_manifest(PAPERS / "digested"), walk(tree, digest=True))
        return [f"{difference.what}: {difference.path[:60]!r}" for difference in found]

    def begin_read(self, name: str) -> int:
        """Read a whole file in the background."""
        number = len(self._reads)
        self._reads[number] = []

        def read() -> None:
            began = time.monotonic()
            try:
                data = (self._union.place / name).read_bytes()
                answer: list[Any] = ["read", len(data), len(set(data)), time.monotonic() - began]
            except OSError as error:
                answer = ["error", error.errno, time.monotonic() - began]
            self._reads[number] = answer

        threading.Thread(target=read, daemon=True).start()
        return number

    def end_read(self, number: int, timeout_seconds: float) -> list[Any]:
        """The answer to it; empty while there is none."""
        deadline = time.monotonic() + timeout_seconds
        while not self._reads[number] and time.monotonic() < deadline:
            time.sleep(0.05)
        return self._reads[number]

    def fill(self) -> int:
        """In the place of rsync: bring everything, each file by a rename."""
        count = 0
        for path in self._union.fill_list():
            incoming = self._union.incoming / str(count)
            shutil.copyfile(os.path.join(os.fsencode(self._union.remote), path), incoming)
            to = os.path.join(os.fsencode(self._union.replica), path)
            os.makedirs(os.path.dirname(to), exist_ok=True)
            os.rename(incoming, to)
            count += 1
        return count

    def drop_caches(self) -> None:
        Path("/proc/sys/vm/drop_caches").write_text("3")

    def detach(self) -> float:
        """Let go of the source; how long that took, in seconds."""
        began = time.monotonic()
        self._union.detach_remote()
        return time.monotonic() - began

    def take_down(self) -> float:
        """The whole union, whatever state the source is in; how long that took, in seconds."""
        began = time.monotonic()
        self._union.unmount_all()
        return time.monotonic() - began

    def mounted(self) -> list[str]:
        kinds = [*nfs_client.KINDS, "fuse.cargo", "overlay"]
        return [f"{record.kind} {record.point!r}" for record in mounts.read_mountinfo() if record.kind in kinds]

    def log(self) -> str:
        file = self._union.stage / "lower.log"
        return file.read_text() if file.exists() else ""


def main() -> None:
    """Serve orders for ever."""
    guest = Guest()
    for place in (VOLUME, VIEW):
        place.mkdir(exist_ok=True)
    port = os.open(PORT, os.O_RDWR | os.O_NOCTTY)
    tty.setraw(port)
    with os.fdopen(port, "r+b", buffering=0) as line:
        line.write(b'{"ready": true}\n')
        pending = b""
        while True:
            pending += line.read(65536) or b""
            while b"\n" in pending:
                order, _, pending = pending.partition(b"\n")
                line.write(json.dumps(perform(guest, json.loads(order))).encode() + b"\n")


def perform(guest: Guest, order: list[Any]) -> dict[str, Any]:
    """The answer to one order."""
    name, *arguments = order
    try:
        answer = getattr(guest, name)(*arguments)
    except Exception as error:
        return {"error": f"{error!r}", "trace": traceback.format_exc()}
    if isinstance(answer, list) and len(answer) > MAX_TOLD:
        # Told once each for what it is, so that a rare difference is not hidden behind a frequent one.
        frequent = Counter(str(line).partition(":")[0] for line in answer)
        answer = [line for line in answer if frequent[str(line).partition(":")[0]] <= MAX_TOLD]
        answer += [f"{what}: {count} of them" for what, count in frequent.items() if count > MAX_TOLD]
    return {"answer": answer}


if __name__ == "__main__":
    sys.stdout.flush()
    main()
