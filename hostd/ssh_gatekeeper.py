"""The agent's side of the gate: writes down what each peer may ask for, withdraws it, ends what was admitted.

    <state_dir>/gate/grants/<peer>/<migration>.grant   durable before the peer learns that it may ask
    <state_dir>/gate/tools                             the programs that serve, and the files that they load
    <state_dir>/gate/sessions/<pid>                    written by the gate; ended here when the grant goes
    <state_dir>/gate/admitted, refused                 the gate's lists, bounded; refusals are told in the agent's log

Files, not a socket: the target goes on reading while the source's agent is restarted, is replaced, or is dead, and after
a reboot of the host. For the same reason no grant ends by the clock. It ends with the phase that needs it, and what an
agent that was away has missed is withdrawn as soon as it reads the history again.

It must never admit anything that ``hostd/ssh_grants.py`` does not name. Stands beside ``hostd/runner.py``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import structlog

from events.errors import PermanentError, TransientError
from hostd.ending import kill
from hostd.fold import sync_directory, write_durably
from hostd.ssh_gate import FORMAT, RefusedError, escaped, read_grant, start_of
from hostd.ssh_grants import Admission

LOCK_SECONDS = 10.0
"""A gate holds the lock for some milliseconds, between reading the grants and noting its session."""
END_SECONDS = 5.0
LDD_SECONDS = 30.0
MAX_TOLD = 20
"""Refusals named in the agent's log at one look; the rest is counted."""
MAX_READ_BYTES = 64 * 1024
SFTP_SERVERS = (
    "/usr/lib/openssh/sftp-server",
    "/usr/libexec/openssh/sftp-server",
    "/usr/lib/ssh/sftp-server",
    "/usr/libexec/sftp-server",
)
"""Where Debian, Fedora, Arch and the BSDs keep it."""
_LIBRARY = re.compile(r"^\s+(?:\S+ => )?(/\S+) \(0x[0-9a-f]+\)$", re.MULTILINE)


_UNKNOWN = object()


class Gatekeeper:
    """One per agent; safe to use from several threads."""

    def __init__(self, state_dir: Path, log: structlog.stdlib.BoundLogger) -> None:
        self._migrations = state_dir.absolute() / "migrations"
        self._directory = state_dir.absolute() / "gate"
        self._log = log
        self._mutex = threading.Lock()
        self._settled: dict[str, Admission | None] = {}
        """What is on disk, of those migrations whose history this life of the agent has read."""
        self._told: tuple[int, int] | None = None
        self._barred: frozenset[str] = frozenset()

    def open(self) -> None:
        """Make the directories. Raises PermanentError."""
        try:
            for name in ("", "grants", "sessions", "root"):
                (self._directory / name).mkdir(mode=0o700, parents=True, exist_ok=True)
            (self._directory / "lock").touch(mode=0o600)
            self._write_tools()
            self._told = self._end_of_refused()
        except OSError as error:
            raise PermanentError(
                f"what peers may ask for by SSH cannot be kept in {self._directory}: {error}"
            ) from error

    def unsettled(self) -> list[str]:
        """Migrations with a grant on disk whose history this life of the agent has not read yet."""
        with self._mutex:
            return sorted({file.stem for file in self._files("*")} - set(self._settled))

    # --- admitting and withdrawing -------------------------------------------------------------

    def settle(self, migration: str, admission: Admission | None) -> None:
        """Make what is on disk equal to ``admission``, durably; when that is nothing, end what was admitted.

        Raises TransientError.
        """
        if self._is_settled(migration, self._admissible(admission)):
            return  # without waiting for whoever withdraws another
        with self._mutex:
            admission = self._admissible(admission)
            if self._is_settled(migration, admission):
                return
            try:
                if admission is None:
                    self._withdraw(migration)
                else:
                    self._write(migration, admission)
            except OSError as error:
                self._settled.pop(migration, None)
                raise TransientError(
                    f"what the peer may ask for by SSH could not be written to {self._directory}: {error}"
                ) from error
            self._settled[migration] = admission

    def bar(self, peers: frozenset[str]) -> None:
        """Admit ``peers`` to nothing, whatever a migration calls for, and end what they were admitted to. Others again.

        They were removed from the fleet. Raises TransientError; what is left then goes with the migration's next turn.
        """
        with self._mutex:
            if peers == self._barred:
                return
            self._barred = peers
            self._settled.clear()
            try:
                for file in self._files("*"):
                    if file.parent.name in peers:
                        self._log.warning("no member any more", peer=file.parent.name, migration=file.stem)
                        self._withdraw(file.stem)
            except OSError as error:
                raise TransientError(
                    f"what removed hosts may ask for by SSH could not be withdrawn: {error}"
                ) from error

    def _admissible(self, admission: Admission | None) -> Admission | None:
        return None if admission is not None and admission.peer in self._barred else admission

    def _is_settled(self, migration: str, admission: Admission | None) -> bool:
        return self._settled.get(migration, _UNKNOWN) == admission

    def forget(self, migration: str) -> None:
        """The migration has ended here; a grant that is left all the same is looked at again."""
        with self._mutex:
            self._settled.pop(migration, None)

    def _files(self, migration: str) -> list[Path]:
        """Grants of one migration; ``*`` for those of all."""
        every = (self._directory / "grants").glob("*/*.grant")
        return [file for file in every if migration in ("*", file.stem)]

    def _write(self, migration: str, admission: Admission) -> None:
        self._write_tools()
        place = self._directory / "grants" / admission.peer
        place.mkdir(mode=0o700, exist_ok=True)
        file = place / f"{migration}.grant"
        for other in self._files(migration):
            if other != file:
                self._withdraw(migration)
        content = self._content(migration, admission, _real_places(file))
        if file.exists() and file.read_bytes() == content:
            return
        write_durably(file, content)
        sync_directory(place.parent)

    def _content(self, migration: str, admission: Admission, known: dict[bytes, bytes]) -> bytes:
        lines = [FORMAT, b"migration " + migration.encode(), b"role " + admission.role.encode()]
        for tree in admission.trees:
            kind = b"file " if tree.single_file else b"viewed " if tree.viewed else b"tree "
            lines.append(kind + _with_real_place(os.fsencode(tree.path), known))
        directory = os.fsencode(self._migrations / migration)
        lines.append(b"directory " + _with_real_place(directory, known))
        lines += [b"name " + escaped(name.encode()) for name in admission.names]
        return b"\n".join([*lines, b"end"]) + b"\n"

    def _withdraw(self, migration: str) -> None:
        files = self._files(migration)
        sessions = self._sessions()
        if not files and not any(migration in held for _, _, held in sessions):
            return
        with self._alone():
            for file in files:
                file.unlink(missing_ok=True)
                sync_directory(file.parent)
            concerned = [(pid, start) for pid, start, held in self._sessions() if migration in held]
        for pid, start in concerned:
            if start_of(pid) == start:
                self._log.info("ending what was admitted", migration=migration, pid=pid)
                _end(pid, start)
        self._prune()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """While no gate is between reading the grants and noting its session."""
        with (self._directory / "lock").open("rb") as lock:
            deadline = time.monotonic() + LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.005)
            yield

    # --- sessions ------------------------------------------------------------------------------

    def _sessions(self) -> list[tuple[int, bytes, list[str]]]:
        """Process, its start, and the migrations by which it was admitted."""
        found = []
        for file in (self._directory / "sessions").iterdir():
            with contextlib.suppress(OSError, ValueError):
                start, *held = file.read_bytes().splitlines()
                found.append((int(file.name), start, [os.fsdecode(migration) for migration in held]))
        return found

    def _prune(self) -> None:
        """Forget the sessions that have ended."""
        for pid, start, _ in self._sessions():
            if start_of(pid) != start:
                with self._alone(), contextlib.suppress(FileNotFoundError):
                    if (self._directory / "sessions" / str(pid)).read_bytes().splitlines()[:1] == [start]:
                        (self._directory / "sessions" / str(pid)).unlink()

    # --- what was refused ----------------------------------------------------------------------

    def look(self) -> None:
        """Tell what was refused since the last look, and forget sessions that have ended. Never raises for a file's sake."""
        with self._mutex:
            try:
                self._prune()
                lines = self._refused()
            except OSError as error:
                self._log.warning("what the SSH gate noted cannot be read", reason=str(error))
                return
        for line in lines[:MAX_TOLD]:
            self._log.warning("refused by the SSH gate", request=line)
        if len(lines) > MAX_TOLD:
            self._log.warning("the SSH gate refused more", requests=len(lines) - MAX_TOLD)

    def _refused(self) -> list[str]:
        file = self._directory / "refused"
        if not file.exists():
            return []
        with file.open("rb") as opened:
            status = os.fstat(opened.fileno())
            inode, offset = self._told or (status.st_ino, 0)
            start = offset if inode == status.st_ino and offset <= status.st_size else 0
            opened.seek(start)
            raw = opened.read(MAX_READ_BYTES)
            self._told = (status.st_ino, start + len(raw))
        return raw.decode("utf-8", "replace").splitlines()

    def _end_of_refused(self) -> tuple[int, int] | None:
        file = self._directory / "refused"
        if not file.exists():
            return None
        status = file.stat()
        return status.st_ino, status.st_size

    # --- the programs that serve ---------------------------------------------------------------

    def _write_tools(self) -> None:
        """An update may have changed what they load, so it is looked at before each migration."""
        programs = {
            "rsync": shutil.which("rsync"),
            "sftp-server": next((path for path in SFTP_SERVERS if os.access(path, os.X_OK)), None),
        }
        lines = []
        for name, path in programs.items():
            if path is None:
                self._log.warning("a program that serves peers is not installed", program=name)
                continue
            lines.append(b"program %s %s" % (name.encode(), escaped(os.fsencode(path))))
            lines += [b"library %s %s" % (name.encode(), escaped(file)) for file in _loaded_by(path)]
        content = b"\n".join(lines) + b"\n"
        file = self._directory / "tools"
        if not file.exists() or file.read_bytes() != content:
            write_durably(file, content)


def _loaded_by(program: str) -> list[bytes]:
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(["ldd", program], capture_output=True, env=environment, timeout=LDD_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"ldd {program} does not end") from error
    return [os.fsencode(found) for found in _LIBRARY.findall(os.fsdecode(done.stdout))]


def _with_real_place(path: bytes, known: dict[bytes, bytes]) -> bytes:
    """A path and where it lies. Symlinks are followed here, by the agent, once for each migration: the data's own owner
    may put one into a tree's place later. The gate follows none."""
    return escaped(path) + b"\t" + escaped(known.get(path) or os.path.realpath(path))


def _real_places(file: Path) -> dict[bytes, bytes]:
    """What an earlier life of the agent has found."""
    if not file.exists():
        return {}
    try:
        grant = read_grant(os.fsencode(file))
    except RefusedError:
        return {}
    return {path: real for path, real, _, _ in grant.trees}


def _end(pid: int, start: bytes) -> None:
    kill(pid, lambda: start_of(pid) == start, timeout_seconds=END_SECONDS)
