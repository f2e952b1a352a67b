"""What ssh and rsync said, judged once: the error it means, the numbers in it.

Pure: text in, verdict out. What it must never do: call something transient that a repetition cannot mend for
sure (a changed host key, a full disk), or call anything a success.

Stands between the tools' output and ``hostd/transport.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from events.errors import CargoError, PermanentError, TransientError
from hostd.peer import Peer

MAX_FILES_NAMED = 20
_SSH_REFUSED = re.compile(r"Permission denied \([a-z]")
"""With the ways of authentication in the brackets. rsync says the same of a file, with the number of the error there."""


class HostKeyError(PermanentError):
    """The peer did not prove its pinned identity (C8). Never retried, never accepted by a program."""


class AuthenticationError(PermanentError):
    """The peer refused our key (C7)."""


@dataclass(frozen=True)
class RsyncResult:
    """What one transfer did."""

    bytes_received: int
    """On the wire, as rsync counts."""
    files: int
    """Regular files transferred."""
    literal_bytes: int
    matched_bytes: int
    seconds: float
    vanished: bool
    """Files disappeared while they were read; the source was live, and another round will tell (D2)."""


@dataclass(frozen=True)
class Progress:
    """A running transfer, as rsync reports it."""

    bytes: int
    files: int


_GATE_REFUSED = re.compile(r"^cargo-gate on \S+: refused: (.*)$", re.MULTILINE)


def gate_error(peer: Peer, stderr: str) -> TransientError | None:
    """What the gate of the peer (``hostd/ssh_gate.py``) said, if it has refused this; None if it has not.

    It can be tried again: the peer's agent may not have read yet what lets it admit this.
    """
    refused = _GATE_REFUSED.search(stderr)
    if refused is None:
        return None
    return TransientError(
        f"{peer.host} does not admit this by SSH: {refused.group(1)}. Nothing was transferred. It admits what its agent "
        "knows to be in progress with this host; look at that agent's log there"
    )


def ssh_error(peer: Peer, stderr: str) -> CargoError:
    """The error that ssh's words mean. Unknown words count as transient: a retry is bounded, a wrong verdict is not."""
    where = f"{peer.host} ({peer.address} port {peer.port})"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    last = next((line for line in reversed(lines) if "Warning: Permanently added" not in line), "no reason given")
    if (by_gate := gate_error(peer, stderr)) is not None:
        return by_gate
    if "REMOTE HOST IDENTIFICATION HAS CHANGED" in stderr:
        return HostKeyError(
            f"SECURITY: {where} presents another host key than the pinned one. Either the host was reinstalled or "
            "somebody stands in between. Nothing was transferred and nothing will be until a person has "
            "compared the keys and corrected the known_hosts file."
        )
    if "Host key verification failed" in stderr or "host key is known for" in stderr:
        return HostKeyError(
            f"SECURITY: no pinned host key matches {where}. Nothing was transferred. Put the host's key, under the "
            f"name {peer.host}, into {peer.known_hosts}."
        )
    refused = ("Too many authentication failures", "Load key", "no such identity", "UNPROTECTED PRIVATE KEY")
    if _SSH_REFUSED.search(stderr) or any(words in stderr for words in refused):
        return AuthenticationError(
            f"{where} does not accept the key {peer.identity} for user {peer.user}: {last}. The data did not move; "
            "install the agent's public key there."
        )
    if "Bad configuration option" in stderr or "terminating, " in stderr:
        return PermanentError(f"ssh refuses its configuration for {where}: {last}")
    return TransientError(f"{where} cannot be reached over ssh: {last}")


_RSYNC_FILE_ERROR = re.compile(r"^rsync: (?:\[[^\]]*\] )?(.*\(\d+\).*)$", re.MULTILINE)
_FATAL_ERRNO = re.compile(r"\((?:28|122|30|1|13|95|36|75)\)")
"""ENOSPC, EDQUOT, EROFS, EPERM, EACCES, EOPNOTSUPP, ENAMETOOLONG, EOVERFLOW: the same next time."""
_ENDINGS = {
    1: "its arguments were not understood",
    2: "the two rsync versions do not understand each other (or the remote shell prints text at log-in)",
    3: "a file or directory could not be selected",
    4: "the other side's rsync lacks something that was asked for",
    6: "the daemon could not append to its log",
    11: "a file could not be read or written",
    24: "files vanished although the source had stopped",
    25: "more would have been deleted than is allowed",
    124: "the remote shell failed",
    125: "the remote shell was killed",
    126: "the remote command could not be run",
    127: "rsync was not found on the other side; install it there",
}


_VANISHED = re.compile(
    r"(?:get_acl: |get_xattr\w*: |rsync_xal_get: |readlink_stat|link_stat|opendir|send_files failed)"
    r".*\((?:2|6|20|21|22|40|61)\)\Z"
)
"""ENOENT, ENOTDIR, ENODATA, where the sender looks at one file of the tree: somebody has just removed or moved it. Or
put something of another kind in its place: ENXIO for a socket or FIFO, EISDIR, EINVAL where a link was to be read,
ELOOP where a file was."""
_CHANGED_KIND = "ABORTING due to invalid path from sender"
"""rsync's receiver trusts no file below what is no directory. A live tree may look like that for a moment."""
_GONE = "file has vanished: "
MAX_WORDS_CHARACTERS = 60_000
"""More than that may have been cut, and what was cut may have been something else."""


_NO_DIRECTORY = re.compile(r"get_acl: sys_acl_get_file\(.*, ACL_TYPE_DEFAULT\): Permission denied")
"""libacl's words for the default ACL of what is no directory. On the source, one was replaced just before rsync looked.
Here, it became one of several names of a device there, as whiteouts of a layer are: rsync has replaced it already."""


def only_vanished(stderr: str) -> bool:
    """Whether an exit with 23 means no more than that files went away, or became others, while they were looked at (D2).

    rsync has a code of its own for that, but takes it only if the file was gone already when it was opened.
    """
    named = _RSYNC_FILE_ERROR.findall(stderr)
    fine = all(_VANISHED.match(words) or _NO_DIRECTORY.match(words) for words in named)
    return bool(named) and len(stderr) < MAX_WORDS_CHARACTERS and fine


_UNREADABLE_NOW = re.compile(r"send_files failed to open .*\(13\)\Z")
"""EACCES for root: what may not be read, or a device that has just taken a file's place, on a file system without devices."""


def rsync_error(peer: Peer, code: int, stderr: str, *, live: bool = False) -> CargoError:
    """The error that rsync's exit code and words mean: the rows D1 to D8 of the fault catalogue.

    ``live``: the tree changes while it is copied, so another attempt may meet something else under the same name.
    """
    if (by_gate := gate_error(peer, stderr)) is not None:
        return by_gate
    if "Host key verification failed" in stderr or _SSH_REFUSED.search(stderr) or "HAS CHANGED" in stderr:
        return ssh_error(peer, stderr)
    files = _RSYNC_FILE_ERROR.findall(stderr)
    named = "; ".join(files[:MAX_FILES_NAMED])
    if len(files) > MAX_FILES_NAMED:
        named += f"; and {len(files) - MAX_FILES_NAMED} more"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    words = named or (lines[0] if lines else "no reason given")
    if "No space left on device" in stderr or "Disk quota exceeded" in stderr or "Read-only file system" in stderr:
        return PermanentError(
            f"the copy from {peer.host} does not fit or may not be written here: {words}. What arrived is "
            "incomplete and is not used; free space on this host."
        )
    if code == 23:
        text = f"rsync from {peer.host} could not bring every file: {words}. The copy is incomplete and is not used."
        fatal = any(_FATAL_ERRNO.search(one) for one in files if not (live and _UNREADABLE_NOW.match(one)))
        return PermanentError(text) if fatal else TransientError(text)
    if code == 2 and (_CHANGED_KIND in stderr or _GONE in stderr or files):  # who names files speaks the same protocol
        return TransientError(
            f"a directory on {peer.host} became something else while rsync looked at it{': ' if named else ''}{named}. The "
            "copy is incomplete and is not used; it can be tried again."
        )
    if code in _ENDINGS:
        return PermanentError(f"rsync from {peer.host} failed (exit {code}): {_ENDINGS[code]}: {words}")
    return TransientError(f"the transfer from {peer.host} was interrupted (rsync exit {code}): {words}")


MAX_LINE_BYTES = 64 * 1024
"""Of a line of output that has no end yet. rsync's own are short; what a remote shell prints has any length."""
_STATISTICS = frozenset(
    {b"Total bytes received", b"Number of regular files transferred", b"Literal data", b"Matched data"}
)


class OutputReader:
    """Understands rsync's output as it comes: progress2 lines ended by CR, and the final statistics."""

    _PROGRESS = re.compile(rb"\s{0,40}(\d{1,20})\s{1,40}\d{1,3}%")
    _COUNT = re.compile(rb"xfr#(\d{1,20})")
    _STATISTIC = re.compile(rb"([A-Z][A-Za-z -]{0,60}): (\d{1,20})")

    def __init__(self, on_progress: Callable[[Progress], None] | None) -> None:
        self._on_progress = on_progress
        self._rest = bytearray()
        self._files = 0
        self._statistics: dict[bytes, int] = {}

    @property
    def held_bytes(self) -> int:
        """How much of an unfinished line is kept."""
        return len(self._rest)

    def feed(self, chunk: bytes) -> None:
        """Take in what has come, of any length."""
        *lines, rest = re.split(rb"[\r\n]", chunk)
        for line in lines:
            self._line(bytes(self._rest) + line)
            self._rest.clear()
        self._rest += rest[: MAX_LINE_BYTES - len(self._rest)]

    def _line(self, line: bytes) -> None:
        if (found := self._STATISTIC.match(line)) is not None and found.group(1) in _STATISTICS:
            self._statistics[found.group(1)] = int(found.group(2))
        elif (seen := self._PROGRESS.match(line)) is not None and self._on_progress is not None:
            if (count := self._COUNT.search(line)) is not None:
                self._files = int(count.group(1))
            self._on_progress(Progress(bytes=int(seen.group(1)), files=self._files))

    def result(self, seconds: float, *, vanished: bool) -> RsyncResult:
        self.feed(b"\n")
        return RsyncResult(
            bytes_received=self._statistics.get(b"Total bytes received", 0),
            files=self._statistics.get(b"Number of regular files transferred", 0),
            literal_bytes=self._statistics.get(b"Literal data", 0),
            matched_bytes=self._statistics.get(b"Matched data", 0),
            seconds=seconds,
            vanished=vanished,
        )
