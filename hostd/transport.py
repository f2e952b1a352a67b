"""The data plane's wire: one adapter for ssh, rsync and sshfs, and NFS in the latter's place. The target pulls; nothing is ever pushed.

What it must never do: accept a host key that is not pinned, ask a person anything, hand a path to a shell, or
call a transfer complete that rsync does not call complete. Everything that comes from the other side (exit
codes, messages, file lists) is judged here, once, and becomes one of three things: a TransientError (try again,
within a bound), a PermanentError (nobody should try again), or a result.

How the connections are held: for each peer there is a generated ssh configuration in the run directory (so that
no user's or machine's own ssh settings matter, and no option has to survive another program's quoting) and one
*master* connection, started and watched here, which rsync and ssh calls join. An sshfs view has a connection
of its own, because it must outlive this process; whichever of its ssh processes comes first carries the others.

Flow: ``prepare_target`` checks the peer; the pre-copy rounds and the fill call ``rsync_pull``; the cut-over
fetches the dirty manifest with ``fetch`` and looks at the source through ``mount_remote``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from events.errors import CancelledError, PermanentError, TransientError
from events.schema import FileRef
from hostd import mounts, nfs_client
from hostd.entry import LAYER_MARKS
from hostd.nfs_client import Export, force_unmount, mount_export
from hostd.peer import SETTING, Peer, ssh_config
from hostd.process import (
    MAX_STDERR_BYTES,
    STOP_GRACE_SECONDS,
    Running,
    destination_lock,
    environment,
    run,
    stop,
)
from hostd.resumption import Resumption
from hostd.tool_words import (
    AuthenticationError,
    HostKeyError,
    OutputReader,
    Progress,
    RsyncResult,
    only_vanished,
    rsync_error,
    ssh_error,
)

__all__ = [
    "AuthenticationError",
    "HostKeyError",
    "Peer",
    "Progress",
    "RsyncResult",
    "Transport",
    "sync_filesystem",
]

LOCK_SECONDS = 0.1
MASTER_TIMEOUT_SECONDS = 30
"""Connect, key exchange and authentication, on a loaded machine."""
STALL_TIMEOUT_SECONDS = 120
"""Default for rsync's own ``--timeout``: time without any progress, not time in all (C6)."""
STALLS = 2
"""After so many of them a transfer is given up that rsync itself still waits for (``hostd/stall.py``)."""
PROBE_TIMEOUT_SECONDS = 5.0
SSHFS_CONNECTIONS = 3
"""SFTP sessions of one view, over one connection: a long read must not make every other reader wait. Each counts for sshd's MaxSessions."""
ENDING_SECONDS = 3.0
"""How long a view that has just been unmounted may take to end; whatever lives longer belongs to another migration."""
MAX_CONTROL_PATH = 100
"""A socket's name holds 107 bytes, and ssh first binds a temporary name that is longer by 17."""
MAX_FETCH_BYTES = 4 * 1024**3

_WILDCARDS = re.compile(rb"[*?\[]")
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class _Master:
    process: subprocess.Popen[bytes]
    log: Path


class Transport:
    """Connections to peers and the transfers over them. One per agent; safe to use from several threads."""

    def __init__(self, run_dir: Path) -> None:
        """``run_dir`` is private to this agent (0700) and on a local, preferably volatile, file system.

        Raises PermanentError when its path is too long for a socket or has characters ssh would interpret.
        """
        self.run_dir = run_dir.absolute()
        if not SETTING.fullmatch(str(self.run_dir)):
            raise PermanentError(f"the run directory {str(self.run_dir)!r} has characters that ssh would interpret")
        self.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._masters: dict[str, _Master] = {}
        self._lock = threading.Lock()
        self._peer_locks: dict[str, threading.Lock] = {}
        self._resumption = Resumption()

    # --- connections ---------------------------------------------------------------------------

    def check(self, peer: Peer, *, cancelled: threading.Event | None = None) -> None:
        """Make sure a live master connection to the peer exists.

        Raises HostKeyError, AuthenticationError (both permanent), TransientError when it cannot be reached, or
        CancelledError once ``cancelled`` is set.
        """
        with self._lock:
            peer_lock = self._peer_locks.setdefault(self._key(peer), threading.Lock())
        while not peer_lock.acquire(timeout=LOCK_SECONDS):
            _still_wanted(cancelled)  # whoever has it may be waiting for a host that does not answer
        try:
            _still_wanted(cancelled)
            self._configure(peer)
            if not self._master_answers(peer):
                self._open_master(peer, cancelled)
        finally:
            peer_lock.release()

    def close(self) -> None:
        """End every master connection, also those that an earlier life of this agent left, and wait for them."""
        with self._lock:
            masters, self._masters = self._masters, {}
        for master_socket in sorted(self.run_dir.glob("*.sock")):
            config = master_socket.with_suffix(".conf")
            if config.exists():
                run(["ssh", "-F", str(config), "-O", "exit", "--", _alias_of(config)], timeout_seconds=5)
        for master in masters.values():
            stop(master.process)
            master.log.unlink(missing_ok=True)
        for master_socket in self.run_dir.glob("*.sock"):
            master_socket.unlink(missing_ok=True)

    def let_go(self, peer: Peer) -> None:
        """End the master connection to a peer, unless something still goes through it. The next use opens another."""
        with self._lock:
            peer_lock = self._peer_locks.setdefault(self._key(peer), threading.Lock())
        with peer_lock:
            deadline = time.monotonic() + ENDING_SECONDS
            while self._in_use(peer):
                if time.monotonic() > deadline:
                    return
                time.sleep(0.05)
            config, control = self._config_path(peer, shared=True), self._control_path(peer)
            if config.exists() and control.exists():  # an earlier life of this agent may have opened it
                run(["ssh", "-F", str(config), "-O", "exit", "--", peer.alias], timeout_seconds=5)
            with self._lock:
                master = self._masters.pop(self._key(peer), None)
            if master is not None:
                stop(master.process)
                master.log.unlink(missing_ok=True)
            control.unlink(missing_ok=True)

    def _in_use(self, peer: Peer) -> bool:
        """Whether a transfer or a view of any migration has this peer's configuration, other than the master."""
        configurations = [os.fsencode(self._config_path(peer, shared=shared)) for shared in (True, False)]
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                line = (place / "cmdline").read_bytes()
                if any(path in line for path in configurations) and b"ControlMaster=yes" not in line:
                    return True
        return False

    def _key(self, peer: Peer) -> str:
        """A short name that changes with anything that decides whom we talk to, and as whom."""
        fields = (peer.host, peer.address, peer.port, peer.user, peer.identity, peer.known_hosts)
        return hashlib.sha256(repr(fields).encode()).hexdigest()[:12]

    def _control_path(self, peer: Peer) -> Path:
        return self.run_dir / f"{self._key(peer)}.sock"

    def _config_path(self, peer: Peer, *, shared: bool) -> Path:
        return self.run_dir / f"{self._key(peer)}{'' if shared else '-own'}.conf"

    def _view_socket(self) -> Path:
        """Where the sessions of a view that is about to be opened find their common connection.

        One key exchange then opens them all; where they cannot join, each connects for itself. A name for each opening: an
        ssh process of an earlier one may still wait for a peer that does not answer, and whoever joined it would wait, too.
        """
        for left in self.run_dir.glob("*.view"):  # ssh removes its own, unless it was killed
            with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as asking:
                asking.setblocking(False)
                if asking.connect_ex(os.fsencode(left)) == errno.ECONNREFUSED:
                    left.unlink(missing_ok=True)
        return self.run_dir / f"{secrets.token_hex(6)}.view"

    def _configure(self, peer: Peer) -> None:
        control = self._control_path(peer)
        if len(os.fsencode(control)) >= MAX_CONTROL_PATH - 17:
            raise PermanentError(
                f"the run directory's path is too long for ssh's control socket: {control}. Choose a shorter one."
            )
        for shared in (True, False):
            file = self._config_path(peer, shared=shared)
            text = ssh_config(peer, control if shared else None)
            if not file.exists() or file.read_text() != text:
                _write_private(file, text)

    def _master_answers(self, peer: Peer) -> bool:
        if not self._control_path(peer).exists():
            return False
        config = self._config_path(peer, shared=True)
        done = run(["ssh", "-F", str(config), "-O", "check", "--", peer.alias], timeout_seconds=5)
        return done is not None and done.returncode == 0

    def _open_master(self, peer: Peer, cancelled: threading.Event | None) -> None:
        key, control = self._key(peer), self._control_path(peer)
        with self._lock:
            dead = self._masters.pop(key, None)
        if dead is not None:
            stop(dead.process)
        control.unlink(missing_ok=True)
        log = self.run_dir / f"{key}.log"
        config = self._config_path(peer, shared=True)
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                ["ssh", "-F", str(config), "-o", "ControlMaster=yes", "-N", "-T", "--", peer.alias],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=environment(),
                start_new_session=True,
            )
        with self._lock:
            self._masters[key] = _Master(process, log)
        deadline = time.monotonic() + MASTER_TIMEOUT_SECONDS
        while not self._master_answers(peer):
            unwanted = cancelled is not None and cancelled.is_set()
            if unwanted or process.poll() is not None or time.monotonic() > deadline:
                stop(process)
                with self._lock:
                    self._masters.pop(key, None)
                words = log.read_text(errors="replace")[-MAX_STDERR_BYTES:]
                log.unlink(missing_ok=True)
                _still_wanted(cancelled)
                raise ssh_error(peer, words)
            time.sleep(0.01)

    # --- one file ------------------------------------------------------------------------------

    def fetch(
        self,
        peer: Peer,
        ref: FileRef,
        to: Path,
        *,
        limit_bytes: int = MAX_FETCH_BYTES,
        bwlimit_kib: int = 0,
        on_progress: Callable[[Progress], None] | None = None,
        cancelled: threading.Event | None = None,
    ) -> None:
        """Bring one file of the peer to ``to`` (mode 0600, replaced atomically) and verify size and SHA-256.

        A file that is said to be larger than ``limit_bytes`` is not even asked for. Raises PermanentError when it is missing or is not what the reference says.
        """
        if not 0 <= ref.size_bytes <= limit_bytes:
            raise PermanentError(f"{ref.path} on {peer.host} is said to have {ref.size_bytes} bytes; not fetched")
        self.check(peer, cancelled=cancelled)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=to.parent) as directory:
            arrived = Path(directory) / "file"
            command = [
                *self._rsync(peer),
                "--whole-file",
                "--chmod=F0600",
                "--perms",
                f"--max-size={ref.size_bytes}",
                "--stats",
                *(["--info=progress2,flist0,name0", "--outbuf=L"] if on_progress is not None else []),
                *([f"--bwlimit={bwlimit_kib}"] if bwlimit_kib > 0 else []),
                f"--timeout={STALL_TIMEOUT_SECONDS}",
                "--",
                self._remote(peer, os.fsencode(ref.path)),
                str(arrived),
            ]
            self._perform(peer, command, lock=None, live=False, on_progress=on_progress, cancelled=cancelled)
            if not arrived.is_file() or arrived.is_symlink():
                raise PermanentError(f"{ref.path} on {peer.host} is not a file of {ref.size_bytes} bytes")
            _verify(arrived, ref, peer)
            with arrived.open("rb") as file:
                os.fsync(file.fileno())
            arrived.replace(to)

    # --- trees ---------------------------------------------------------------------------------

    def rsync_pull(
        self,
        peer: Peer,
        tree: bytes | str,
        destination: Path,
        *,
        temp_dir: Path,
        partial_dir: Path | None = None,
        files_from: Iterable[bytes] | None = None,
        single_file: bool = False,
        live: bool = False,
        expect_entries: int = 0,
        checksum: bool = False,
        reread: bool = False,
        layer: bool = False,
        plain: bool = False,
        basis: Path | None = None,
        bwlimit_kib: int = 0,
        fsync: bool = True,
        timeout_seconds: int = STALL_TIMEOUT_SECONDS,
        stream: int = 0,
        on_progress: Callable[[Progress], None] | None = None,
        cancelled: threading.Event | None = None,
    ) -> RsyncResult:
        """Make ``destination`` equal to the peer's ``tree``; one invocation, so that hard links are found (D15).

        ``temp_dir`` and ``partial_dir`` lie outside of the destination, on its file system: a file appears by
        an atomic rename, unless the destination was empty and all of the tree comes. ``files_from`` (relative paths, any bytes) limits the transfer to those paths, not
        recursively, and removes nothing, unless something of another kind is brought in its place. ``single_file`` says
        that ``tree`` and ``destination`` are files. ``live`` says that the source still changes, so that a
        vanished file is no failure. ``expect_entries`` is the least number of entries that the tree's top must
        have before anything may be deleted here (D7, D22). ``checksum`` compares contents instead of size and
        time; ``reread`` transfers every listed file whatever its size and time. ``layer`` says that the tree is a
        container's writable layer, whose marks of overlayfs belong to it. ``plain`` says that nothing in the tree has a second
        name, an attribute, an ACL, or fewer blocks than its size takes, so that into an empty destination nobody need ask for them. ``basis`` is a tree of older
        versions: with ``reread`` it only saves traffic, without it a file of equal size and time is copied from it.
        What an interrupted transfer had of a file lies in ``partial_dir``, where this host's rsync can go on with it.
        ``fsync`` returns only when everything is on disk. ``timeout_seconds`` bounds a stall, not the whole.
        ``stream``: transfers of different numbers may go into one destination at once, if their ``files_from`` have nothing
        in common.

        Raises TransientError, PermanentError (see ``rsync_error``), CancelledError.
        """
        raw = os.fsencode(tree)
        self.check(peer, cancelled=cancelled)
        fresh = files_from is None and not single_file and _is_empty(destination)
        if expect_entries > 0 and not single_file and not fresh:
            _require_entries(peer, raw, self._entries(peer, raw, timeout_seconds, cancelled), expect_entries)
        if plain and fresh and _gives_no_attributes(destination):
            command = [*self._rsync(peer), "-a"]
        else:
            command = [*self._rsync(peer), "-aHAXS"]
            marks = sorted(map(os.fsdecode, LAYER_MARKS)) if layer else []
            command += [*(f"--filter=+x {mark}" for mark in marks), "--filter=-x trusted.overlay.*"]
        command += ["--numeric-ids", "--from0"]
        # By default rsync takes two times within one second for the same, of files and of directories.
        command += ["--modify-window=-1"]
        command += ["--stats", "--info=progress2,flist0,name0", "--outbuf=L", f"--timeout={timeout_seconds}"]
        if fresh:
            # A temporary file and a rename for each of many small files take as long as everything else. Nothing is
            # here yet that a half-written file could spoil; what an interruption leaves is transferred again the other way.
            command += ["--inplace"]
        else:
            command += [f"--temp-dir={temp_dir}"]
            if partial_dir is not None and self._resumption.possible(self.run_dir):
                command += [f"--partial-dir={partial_dir}"]
        command += ["--checksum"] if checksum else []
        command += ["--ignore-times"] if reread else []
        command += [f"--copy-dest={basis}"] if basis is not None else []
        command += [f"--bwlimit={bwlimit_kib}"] if bwlimit_kib > 0 else []
        with contextlib.ExitStack() as stack:
            if files_from is not None:
                listing = stack.enter_context(_listing(self.run_dir, files_from))
                # rsync holds what it is sent against what it asked for: quadratic in the list, and refusing whole
                # transfers of trees in motion. A first round takes any name from this peer anyway; names that
                # lead out of the tree are refused all the same.
                command += [f"--files-from={listing}", "--no-r", "--dirs", "--trust-sender"]
                # Not --delete-missing-args: some security fixes have receivers refuse it (RsyncProject/rsync#910).
                command += ["--force", *(["--ignore-missing-args"] if live else [])]
            elif not single_file:
                command += ["--delete"]
            end = b"" if single_file else b"/"
            local = os.fsencode(destination.absolute()) + end
            command += ["--", self._remote(peer, raw.rstrip(b"/") + end), local]
            lock = stack.enter_context(destination_lock(self.run_dir, destination, cancelled, stream=stream))
            # After any error rsync deletes nothing any more, so a comparison of everything must do without.
            forgiving = live and not checksum and not single_file
            result = self._perform(
                peer,
                command,
                lock=lock,
                live=live,
                forgiving=forgiving,
                stall_seconds=STALLS * timeout_seconds,
                on_progress=on_progress,
                cancelled=cancelled,
            )
        if fresh and expect_entries > 0:  # nothing could be deleted, so mostly it needs no question of its own
            entries = len(os.listdir(destination))
            if entries < expect_entries and result.vanished:  # what was there has gone since
                entries = self._entries(peer, raw, timeout_seconds, cancelled)
            _require_entries(peer, raw, entries, expect_entries)
        if fsync:
            sync_filesystem(destination)
        return result

    def _entries(self, peer: Peer, tree: bytes, timeout_seconds: int, cancelled: threading.Event | None) -> int:
        """How many entries the peer's directory has."""
        command = [*self._rsync(peer), "--list-only", "--dirs", f"--timeout={timeout_seconds}", "--"]
        command += [self._remote(peer, tree.rstrip(b"/") + b"/")]
        process = Running(command, lock=None)
        output = process.collect(cancelled)
        # What went away while it was listed is simply not counted.
        vanished = process.returncode == 24 or (process.returncode == 23 and only_vanished(process.stderr))
        if process.returncode != 0 and not vanished:
            raise rsync_error(peer, process.returncode, process.stderr)
        return max(0, len(output.splitlines()) - 1)  # the first line is the tree itself

    def _rsync(self, peer: Peer) -> list[str | bytes]:
        config = self._config_path(peer, shared=True)
        # rsync splits this on blanks and honours double quotes; the run directory has neither quote nor backslash.
        return ["rsync", "-e", f'ssh -F "{config}"', "--secluded-args", "--no-human-readable", "--no-motd"]

    def _remote(self, peer: Peer, path: bytes) -> bytes:
        if not path.startswith(b"/") or b"\0" in path:
            raise PermanentError(f"{path!r} is not an absolute path on {peer.host}")
        # No remote shell sees the path (--secluded-args), but the remote rsync expands wildcards, and takes a
        # backslash for an escape if, and only if, there are any.
        if _WILDCARDS.search(path):
            path = re.sub(rb"([*?\[\\])", rb"\\\1", path)
        return peer.alias.encode() + b":" + path

    def _perform(
        self,
        peer: Peer,
        command: list[str | bytes],
        *,
        lock: int | None,
        live: bool,
        forgiving: bool = False,
        stall_seconds: float = STALLS * STALL_TIMEOUT_SECONDS,
        on_progress: Callable[[Progress], None] | None,
        cancelled: threading.Event | None,
    ) -> RsyncResult:
        started = time.monotonic()
        process = Running(command, lock=lock, stall_seconds=stall_seconds)
        watcher = OutputReader(on_progress)
        process.follow(watcher.feed, cancelled)
        vanished = process.returncode == 24 or (
            forgiving and process.returncode == 23 and only_vanished(process.stderr)
        )
        if process.returncode != 0 and not (vanished and live):
            raise rsync_error(peer, process.returncode, process.stderr, live=live)
        return watcher.result(time.monotonic() - started, vanished=vanished)

    # --- the remote view -----------------------------------------------------------------------

    def mount_remote(
        self,
        peer: Peer,
        tree: bytes | str,
        mountpoint: Path,
        export: Export | None = None,
        *,
        cancelled: threading.Event | None = None,
    ) -> None:
        """Show the peer's tree at ``mountpoint``, read-only, through sshfs. A dead earlier mount is replaced.

        With ``export``, by NFS (``hostd/nfs_client.py``); all that follows holds for it too.

        Nothing is cached inside sshfs and attributes are asked anew each time, because the view is opened before
        the source stops and read after it: a remembered size would cut the contents short. (The lower layer
        on top, ``hostd/lower.py``, is cached, from the cut-over on, when nothing changes any more.)
        Symlinks that lead out of the tree are shown but refuse to be read, so the source cannot make this
        host read its own files.

        A read that is under way when the connection breaks gets EIO; the next one connects again.

        Raises TransientError, PermanentError, and CancelledError once ``cancelled`` is set, which is looked at between
        the steps of this; then it may be mounted or not.
        """
        raw = os.fsencode(tree)
        if not raw.startswith(b"/") or b"\0" in raw:
            raise PermanentError(f"{raw!r} is not an absolute path on {peer.host}")
        with self._lock:
            mount_lock = self._peer_locks.setdefault(f"mount {mountpoint}", threading.Lock())
        with mount_lock:  # the fill and the supervision may both find it dead
            self._mount_remote(peer, raw, mountpoint, export, cancelled)

    def _mount_remote(
        self, peer: Peer, raw: bytes, mountpoint: Path, export: Export | None, cancelled: threading.Event | None
    ) -> None:
        if self.probe(mountpoint):
            return
        # Also tells a changed key from an unreachable host, in words sshfs does not have.
        self.check(peer, cancelled=cancelled)
        self.unmount_remote(mountpoint, dead=True)
        if export is not None:
            mount_export(export, mountpoint)
            if not self.probe(mountpoint):
                raise TransientError(f"{export.source} is mounted by NFS, but does not answer")
            return
        options = [
            "ro,allow_other,idmap=none,reconnect,dir_cache=no",
            "attr_timeout=0,ac_attr_timeout=0,entry_timeout=1,negative_timeout=0",
            f"max_conns={SSHFS_CONNECTIONS}",
            f"ControlMaster=auto,ControlPath={_in_options(self._view_socket())}",
        ]
        command: list[str | bytes] = ["sshfs", "-F", str(self._config_path(peer, shared=False))]
        command += ["-o", ",".join(options)]
        command += [
            peer.alias.encode() + b":" + (raw.rstrip(b"/") or b"/"),
            os.fsencode(mountpoint.absolute()),
        ]
        done = run(command, timeout_seconds=MASTER_TIMEOUT_SECONDS)
        if done is None:
            self.unmount_remote(mountpoint, dead=True)
            raise TransientError(f"sshfs to {peer.host} did not come up within {MASTER_TIMEOUT_SECONDS} s")
        if done.returncode != 0:
            words = done.stderr.decode("utf-8", "replace")
            if "No such file" in words or "Not a directory" in words or "Permission denied\n" in words:
                raise PermanentError(f"{os.fsdecode(raw)} on {peer.host} cannot be shown here: {words.strip()}")
            raise ssh_error(peer, words)
        # It may open one more connection for this question: to end it before that can be there would be to begin for ever.
        if not self.probe(mountpoint, timeout_seconds=MASTER_TIMEOUT_SECONDS):
            raise TransientError(f"sshfs to {peer.host} is mounted, but does not answer")
        _still_wanted(cancelled)
        _open_connections(mountpoint)

    @staticmethod
    def unmount_remote(mountpoint: Path, *, dead: bool = False) -> None:
        """Unmount the view, and wait until its processes have ended. Harmless when there is none.

        ``dead``: it does not answer, or nobody needs it any more. Then its process is ended first, so that whoever
        hangs in it gets an error and lets go. Raises TransientError while it is in use.
        """
        record = mounts.mount_at(mountpoint)
        if dead and record is not None and record.kind in nfs_client.KINDS:
            force_unmount(mountpoint, timeout_seconds=STOP_GRACE_SECONDS)
        name = mounts.resolved(mountpoint)
        processes = mounts.processes_with_argument(name, program=b"sshfs")
        deadline = time.monotonic() + (STOP_GRACE_SECONDS if dead else 0.0)
        if dead:
            _kill(processes)
        while True:
            try:
                mounts.unmount(mountpoint)
                break
            except TransientError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.01)
        # Its mount is gone, so it serves nobody: it only waits for a dead peer.
        _kill(mounts.wait_until_gone(processes, timeout_seconds=STOP_GRACE_SECONDS))

    @staticmethod
    def probe(mountpoint: Path, *, timeout_seconds: float = PROBE_TIMEOUT_SECONDS) -> bool:
        """Whether a remote view is mounted there and its peer answers (D14). Asks in a child, which may hang."""
        record = mounts.mount_at(mountpoint)
        if record is None or record.kind not in ("fuse.sshfs", *nfs_client.KINDS):
            return False
        done = run(["stat", "--", str(mountpoint.absolute())], timeout_seconds=timeout_seconds)
        return done is not None and done.returncode == 0


# --- files -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _listing(directory: Path, paths: Iterable[bytes]) -> Iterator[str]:
    """A file of NUL-ended relative paths for --files-from. A leading dot keeps ``#`` and ``;`` ordinary."""
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".list-") as file:
        for path in paths:
            if path in {b"", b"."}:
                continue  # listing the root would bring all that is directly in it
            if path.startswith(b"/") or b"\0" in path or b".." in path.split(b"/"):
                raise PermanentError(f"{path!r} is not a path inside of the tree")
            file.write(b"./" + path + b"\0")
        file.flush()
        yield file.name


def _in_options(path: Path) -> str:
    """``path`` as sshfs takes it out of a list, and ssh out of a line."""
    return '"' + str(path).replace(",", "\\,") + '"'


def _still_wanted(cancelled: threading.Event | None) -> None:
    if cancelled is not None and cancelled.is_set():
        raise CancelledError("the view of the source was not wanted any more")


def _require_entries(peer: Peer, tree: bytes, entries: int, wanted: int) -> None:
    """D7, D22: an unmounted source is an empty directory, and --delete would make the copy equal to it."""
    if entries < wanted:
        raise PermanentError(
            f"{os.fsdecode(tree)} on {peer.host} has {entries} entries where at least {wanted} were expected: "
            "it may not be mounted. Nothing was deleted on this side; look at the source before trying again."
        )


def _is_empty(directory: Path) -> bool:
    try:
        return not any(directory.iterdir())
    except FileNotFoundError:
        return True


def _gives_no_attributes(directory: Path) -> bool:
    """Whether what is made in it comes without an ACL or a label, which rsync would have to take away."""
    try:
        return all(name.startswith("trusted.overlay.") for name in os.listxattr(directory))
    except OSError:
        return False


def _open_connections(mountpoint: Path) -> None:
    """Make sshfs open all of its sessions now.

    It opens each when it first has use for it, and lets every reader wait meanwhile: for a server to start there, and for a key exchange
    where it cannot join a connection. A container that has just been started would read its second file then. A directory that is held open keeps its connection busy, so the next
    goes through another. In a child, which may hang; what fails here fails again, and is told, when somebody reads.
    """
    held = f"import os, sys; [os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECTORY) for _ in range({SSHFS_CONNECTIONS})]"
    run([sys.executable, "-I", "-S", "-c", held, str(mountpoint.absolute())], timeout_seconds=MASTER_TIMEOUT_SECONDS)


def _kill(processes: list[int]) -> None:
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _verify(file: Path, ref: FileRef, peer: Peer) -> None:
    size = file.stat().st_size
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if size != ref.size_bytes or digest != ref.sha256:
        raise PermanentError(
            f"{ref.path} from {peer.host} is not the file that was announced: {size} bytes, SHA-256 {digest}, expected "
            f"{ref.size_bytes} bytes, {ref.sha256}. It was not used."
        )


def sync_filesystem(path: Path) -> None:
    """syncfs(2) of the file system that holds ``path``: one flush instead of one fsync a file (A16)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if _libc.syncfs(descriptor) != 0:
            code = ctypes.get_errno()
            raise PermanentError(f"{path} could not be written to disk: {os.strerror(code)}")
    finally:
        os.close(descriptor)


def _alias_of(config: Path) -> str:
    return config.read_text().split("\n", 1)[0].removeprefix("Host ")


def _write_private(file: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=".new-", delete=False) as new:
        new.write(text)
    Path(new.name).replace(file)
