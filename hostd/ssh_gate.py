"""``cargo-hostd gate --peer NAME``: all that another host's SSH key opens here. The forced command of that key.

It admits what the transport of a migration in progress really asks for, and becomes it: an rsync sender of one admitted
tree or file, or a read-only SFTP server of the admitted trees, confined to just these by ``hostd/ssh_jail.py``. What is
admitted stands in the files that this host's agent keeps (``hostd/ssh_gatekeeper.py``). The peer's words only choose
among that; they never widen it. Everything else is refused with a reason and recorded.

What it must never do: start a shell, write to a tree, take the peer's name from anywhere but its own arguments, or pass
on an argument that it does not know.

It is started anew for each channel of a connection, and a part of an outage may wait for it. So: standard library
only, no more modules than needed (no json, re, argparse), no question to the agent, which may be away.

    decide who asks (arguments, root's) -> what is asked (command, rsync's arguments from stdin)
    -> what is admitted (files, under a lock) -> note the session -> confine -> exec
"""

from __future__ import annotations

import fcntl
import os
import select
import stat
import sys
import time

DEFAULT_STATE = b"/var/lib/cargo"
FORMAT = b"cargo-gate 1"
REFUSED_STATUS = 1
ARGUMENT_SECONDS = 30.0
"""How long rsync's arguments may take to arrive; the client sends them at once."""
MAX_ARGUMENT_BYTES = 16 * 1024
MAX_GRANTS = 1000
MAX_RECORD_BYTES = 256 * 1024
"""Of each of the two lists, of which one older generation is kept; the system's journal has everything."""
MAX_RECORDED_CHARACTERS = 500
MAX_NAME_BYTES = 255

SHORT_OPTIONS = frozenset(b"slHogDtpAXrcSdIRW")
"""Of rsync, as the transport's calls lead to on the sending side; what follows ``e`` names the client's abilities."""
LONG_OPTIONS = frozenset(
    (
        b"--numeric-ids",
        b"--from0",
        b"--files-from=-",
        b"--list-only",
        b"--inplace",
        b"--ignore-missing-args",
        b"--delete-missing-args",
    )
)
NUMERIC_OPTIONS = (b"--timeout=", b"--bwlimit=")
INFO_OPTION = b"--info="
_WILDCARDS = b"*?["
_NUMBERS = frozenset(b"0123456789-")
_WORD = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789,._=-")


class RefusedError(Exception):
    """What the peer asked for is not admitted; the text is for the peer and for this host's people."""


class Grant:
    """What one migration admits for one peer."""

    def __init__(self) -> None:
        self.migration = b""
        self.role = b""
        self.trees: list[tuple[bytes, bytes, bool, bool]] = []
        """Path as the history has it, where that really lies, whether it is a directory, whether SFTP shows it."""
        self.directory: tuple[bytes, bytes] | None = None
        """Where the migration's own files lie, and where that really is."""
        self.names: list[bytes] = []
        """Those of them that may be fetched; one ``*`` stands for digits and dashes."""


def main(arguments: list[str] | None = None) -> int:
    """Serve one request. Returns an exit status only if it was refused, or if this was called wrongly."""
    words = [os.fsencode(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    options = dict(zip(words[::2], words[1::2], strict=False))
    peer, state = options.pop(b"--peer", b""), options.pop(b"--state", DEFAULT_STATE)
    if options or len(words) % 2 or not _valid_peer(peer) or not state.startswith(b"/"):
        _say(b"usage: cargo-hostd gate --peer HOST [--state DIRECTORY], as the forced command of that host's key")
        return 2
    return serve(peer, state, os.environb.get(b"SSH_ORIGINAL_COMMAND"))


def serve(peer: bytes, state: bytes, command: bytes | None) -> int:
    """Admit and become what ``command`` asks for, or refuse it."""
    directory = state.rstrip(b"/") + b"/gate"
    asked = command if command is not None else b"(a shell)"
    try:
        wanted, path = _understand(command)
        if wanted is not None:
            asked = b" ".join([*wanted, path])
        _confine_and_become(peer, directory, wanted, path, asked)
    except RefusedError as refusal:
        reason = str(refusal).encode("utf-8", "surrogateescape")
        _say(b"cargo-gate on %s: refused: %s" % (os.uname().nodename.encode(), reason))
        _record(directory, b"refused", peer, asked, reason)
    return REFUSED_STATUS


# --- what is asked -----------------------------------------------------------------------------------


def _understand(command: bytes | None) -> tuple[list[bytes] | None, bytes]:
    """The arguments of an rsync sender and the path it is to send, or (None, b"") for SFTP. Raises RefusedError."""
    if not command:
        raise RefusedError("this key opens no shell; it serves the data of a migration in progress, and nothing else")
    words = command.split(b" ")
    program = words[0].rpartition(b"/")[2]
    if program == b"rsync":
        return _understand_rsync(words)
    # sshd puts the subsystem's own command here. What runs in the end is ours, whatever stands behind it.
    if program in (b"sftp-server", b"internal-sftp") and len(words) == 1:
        return None, b""
    raise RefusedError(f"{_shown(command)} is nothing that a migration needs")


def _understand_rsync(words: list[bytes]) -> tuple[list[bytes], bytes]:
    if words[1:2] != [b"--server"]:
        raise RefusedError("rsync is served as the other end of a transfer only")
    if words[2:3] != [b"--sender"]:
        raise RefusedError("nothing is received here: the host that needs data fetches it")
    clusters = words[3:]
    if not any(b"s" in word.partition(b"e")[0] for word in clusters):
        raise RefusedError("rsync's arguments must come by --secluded-args, so that no shell sees a path")
    *late, path = _secluded_arguments()
    if late[:1] != [b"rsync"] or late[-1:] != [b"."] or not path:
        raise RefusedError("rsync's arguments do not end with one path")
    kept = [_checked_option(option) for option in [*clusters, *late[1:-1]]]
    return [b"rsync", b"--server", b"--sender", *(option for option in kept if option != b"-"), b"."], _literal(path)


def _secluded_arguments() -> list[bytes]:
    """What the client sends before the protocol begins, ended by an empty one; not one byte of the protocol is read."""
    deadline = time.monotonic() + ARGUMENT_SECONDS
    arguments: list[bytes] = []
    argument = bytearray()
    for _ in range(MAX_ARGUMENT_BYTES):
        if not select.select([0], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise RefusedError("rsync's arguments did not arrive")
        byte = os.read(0, 1)
        if not byte:
            raise RefusedError("rsync's arguments ended in the middle")
        if byte != b"\0":
            argument += byte
        elif argument:
            arguments.append(bytes(argument))
            argument.clear()
        elif len(arguments) < 2:
            raise RefusedError("rsync's arguments do not end with one path")
        else:
            return arguments
    raise RefusedError("rsync's arguments are too long")


def _checked_option(option: bytes) -> bytes:
    """The option as the sender gets it, without the ``s`` that has been obeyed. Raises RefusedError."""
    if option[:1] == b"-" and option[1:2] != b"-":
        letters, ability, version = option[1:].partition(b"e")
        if frozenset(letters) <= SHORT_OPTIONS and (not ability or _is_version(version)):
            return b"-" + letters.replace(b"s", b"") + ability + version
    numeric = any(option.startswith(name) and option[len(name) :].isdigit() for name in NUMERIC_OPTIONS)
    told = option.startswith(INFO_OPTION) and frozenset(option) <= _WORD
    if option in LONG_OPTIONS or numeric or told:
        return option
    raise RefusedError(f"rsync with {_shown(option)} is nothing that a migration needs")


def _is_version(text: bytes) -> bool:
    """Whether this is what a client says of itself behind ``e``: digits, a dot, letters."""
    digits, dot, letters = text.partition(b".")
    return bool(dot) and (not digits or digits.isdigit()) and (not letters or letters.isalpha())


def _literal(path: bytes) -> bytes:
    """The path that rsync's word for it means: a backslash escapes if, and only if, there is any wildcard in it."""
    if not any(wildcard in path for wildcard in _WILDCARDS):
        return path
    plain = bytearray()
    escaped = False
    for byte in path:
        if escaped or byte not in b"\\" + _WILDCARDS:
            plain.append(byte)
            escaped = False
        elif byte == 0x5C:
            escaped = True
        else:
            raise RefusedError("a path with wildcards is not sent; a migration names its trees")
    return bytes(plain)


# --- what is admitted --------------------------------------------------------------------------------


def _confine_and_become(peer: bytes, directory: bytes, wanted: list[bytes] | None, path: bytes, asked: bytes) -> None:
    if os.geteuid() != 0:
        raise RefusedError("the gate needs root, to confine what it starts")
    # ctypes is only paid for by what is not refused before.
    from hostd import ssh_jail  # noqa: PLC0415

    lock = _open_lock(directory)  # the agent takes it to withdraw: it sees each session, or the session sees that
    grants = list(_grants(directory, peer))
    if wanted is None:
        holdings, used = _trees_to_look_at(grants, peer)
    else:
        holdings, used = _holding_of(grants, path, peer)
    tool, libraries = _tool(directory, b"rsync" if wanted is not None else b"sftp-server")
    _note_session(directory, used)
    os.close(lock)
    _record(directory, b"admitted", peer, asked, b",".join(used))
    needed = [(file, file, ssh_jail.TOOL) for file in [tool, *libraries]]
    program = [tool, *wanted[1:], path] if wanted is not None else [tool, b"-R", b"-e", b"-l", b"ERROR"]
    capabilities = (ssh_jail.CAP_DAC_READ_SEARCH, *((ssh_jail.CAP_SYS_ADMIN,) if wanted is not None else ()))
    try:
        ssh_jail.become(directory + b"/root", [*holdings, *needed], program, capabilities=capabilities)
    except ssh_jail.JailError as error:
        raise RefusedError(f"it cannot be confined here: {error}") from error


def _trees_to_look_at(grants: list[Grant], peer: bytes) -> tuple[list[tuple[bytes, bytes, str]], list[bytes]]:
    looked_at = [(tree, grant) for grant in grants for tree in grant.trees if tree[2] and tree[3]]
    if not looked_at:
        raise RefusedError(f"no migration in progress with {_shown(peer)} has a tree to look at")
    holdings = {(real, path, "tree") for (path, real, _, _), _ in looked_at}
    return sorted(holdings), sorted({grant.migration for _, grant in looked_at})


def _holding_of(grants: list[Grant], path: bytes, peer: bytes) -> tuple[list[tuple[bytes, bytes, str]], list[bytes]]:
    """The one tree or file that ``path`` names, and the migrations that admit it. Raises RefusedError."""
    if not path.startswith(b"/") or any(part in (b"..", b".") for part in path.split(b"/")) or b"//" in path:
        raise RefusedError(f"{_shown(path)} is no plain absolute path")
    for grant in grants:
        for tree, real, is_directory, _ in grant.trees:
            if path == (tree.rstrip(b"/") + b"/" if is_directory else tree):
                return [(real, tree, "tree" if is_directory else "file")], [grant.migration]
        if grant.directory is not None:
            place, _, name = path.rpartition(b"/")
            if place == grant.directory[0] and any(_is_named(name, pattern) for pattern in grant.names):
                return [(grant.directory[1] + b"/" + name, path, "file")], [grant.migration]
    raise RefusedError(f"no migration in progress with {_shown(peer)} admits {_shown(path)}")


def _is_named(name: bytes, pattern: bytes) -> bool:
    before, star, after = pattern.partition(b"*")
    if not star:
        return name == pattern
    middle = name[len(before) : len(name) - len(after)]
    return name.startswith(before) and name.endswith(after) and bool(middle) and frozenset(middle) <= _NUMBERS


def _open_lock(directory: bytes) -> int:
    try:
        lock = os.open(directory + b"/lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise RefusedError("this host's agent has not admitted anything yet") from error
    fcntl.flock(lock, fcntl.LOCK_SH)
    return lock


def _grants(directory: bytes, peer: bytes) -> list[Grant]:
    place = directory + b"/grants/" + peer
    try:
        names = sorted(name for name in os.listdir(place) if name.endswith(b".grant"))
    except FileNotFoundError:
        return []
    return [read_grant(place + b"/" + name) for name in names[:MAX_GRANTS]]


def read_grant(file: bytes) -> Grant:
    """What a file of the agent's says. Raises RefusedError for one that is not the agent's, or not whole."""
    lines = _trusted_lines(file)
    if lines[:1] != [FORMAT] or lines[-1:] != [b"end"]:
        raise RefusedError("what this host's agent has written is of another version or not whole")
    grant = Grant()
    for line in lines[1:-1]:
        key, _, value = line.partition(b" ")
        fields = [unescaped(field) for field in value.split(b"\t")]
        if key == b"migration":
            grant.migration = fields[0]
        elif key == b"role":
            grant.role = fields[0]
        elif key in (b"tree", b"viewed", b"file"):
            grant.trees.append((fields[0], fields[1], key != b"file", key == b"viewed"))
        elif key == b"directory":
            grant.directory = (fields[0], fields[1])
        elif key == b"name":
            grant.names.append(fields[0])
        else:
            raise RefusedError("what this host's agent has written is of another version")
    return grant


def _tool(directory: bytes, name: bytes) -> tuple[bytes, list[bytes]]:
    """Path of a program, and of the libraries that it loads."""
    path, libraries = b"", []
    for line in _trusted_lines(directory + b"/tools"):
        kind, _, rest = line.partition(b" ")
        tool, _, file = rest.partition(b" ")
        if tool == name and kind == b"program":
            path = unescaped(file)
        elif tool == name and kind == b"library":
            libraries.append(unescaped(file))
    if not path:
        raise RefusedError(f"{_shown(name)} is not installed on this host")
    return path, libraries


def _trusted_lines(file: bytes) -> list[bytes]:
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid() or status.st_mode & 0o022 or not stat.S_ISREG(status.st_mode):
            raise RefusedError(f"{_shown(file)} may have been written by others than this host's agent")
        with open(descriptor, "rb") as opened:
            return opened.read().splitlines()
    except OSError as error:
        raise RefusedError("what this host's agent has admitted cannot be read") from error


def escaped(path: bytes) -> bytes:
    """A path in a line of its own."""
    for raw, word in ((b"\\", b"\\\\"), (b"\n", b"\\n"), (b"\r", b"\\r"), (b"\t", b"\\t")):
        path = path.replace(raw, word)
    return path


def unescaped(text: bytes) -> bytes:
    """The path that ``escaped`` was given."""
    pieces = text.split(b"\\\\")
    for word, raw in ((b"\\n", b"\n"), (b"\\r", b"\r"), (b"\\t", b"\t")):
        pieces = [piece.replace(word, raw) for piece in pieces]
    return b"\\".join(pieces)


# --- what is noted -----------------------------------------------------------------------------------


def _note_session(directory: bytes, migrations: list[bytes]) -> None:
    """So that the agent can end what it has admitted. The process keeps its number when it becomes another program."""
    content = b"\n".join([start_of(os.getpid()), *migrations]) + b"\n"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(directory + b"/sessions/%d" % os.getpid(), flags, 0o600)
        os.write(descriptor, content)
        os.close(descriptor)
    except OSError as error:
        raise RefusedError(f"the session cannot be noted: {error.strerror}") from error


def start_of(pid: int) -> bytes:
    """When a process began, in ticks since the boot: tells it from a later one of the same number. b"" if it has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return b""
    return b"" if fields[0] in (b"Z", b"X") else fields[19]


def _record(directory: bytes, verdict: bytes, peer: bytes, asked: bytes, why: bytes) -> None:
    """One line into this host's list and the system's journal. What cannot be noted does not change the verdict."""
    client = os.environb.get(b"SSH_CONNECTION", b"").partition(b" ")[0]
    line = (
        f'{{"at":{time.time():.3f},"verdict":"{_shown(verdict)}","peer":"{_shown(peer)}","client":"{_shown(client)}",'
        f'"asked":"{_shown(asked)}","{"migration" if verdict == b"admitted" else "reason"}":"{_shown(why)}"}}\n'
    ).encode()
    for note in (_append, _tell_journal):
        try:
            note(directory, verdict, line)
        except OSError:
            continue


def _append(directory: bytes, verdict: bytes, line: bytes) -> None:
    file = directory + b"/" + verdict
    guard = os.open(directory + b"/root", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(guard, fcntl.LOCK_EX)
        try:
            if os.stat(file).st_size > MAX_RECORD_BYTES:
                os.rename(file, file + b".1")
        except FileNotFoundError:
            pass
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        os.write(descriptor, line)
        os.close(descriptor)
    finally:
        os.close(guard)


def _tell_journal(_directory: bytes, verdict: bytes, line: bytes) -> None:
    if not os.path.exists("/dev/log"):
        return
    import socket  # noqa: PLC0415 - not needed where nothing listens

    priority = 10 * 8 + (6 if verdict == b"admitted" else 4)  # authpriv, info or warning
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        sender.sendto(b"<%d>cargo-gate[%d]: %s" % (priority, os.getpid(), line.rstrip()), "/dev/log")


def _shown(raw: bytes) -> str:
    """Bytes of the peer's for a line of text: nothing that ends a string or a line, or that a terminal obeys."""
    text = raw.decode("utf-8", "replace")
    clean = "".join(c if c.isprintable() and c not in '"\\' else f"\\\\x{ord(c):02x}" for c in text)
    return clean if len(clean) <= MAX_RECORDED_CHARACTERS else clean[:MAX_RECORDED_CHARACTERS] + "…"


def _valid_peer(name: bytes) -> bool:
    plain = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789.-")
    return 0 < len(name) <= MAX_NAME_BYTES and frozenset(name) <= plain and name[:1] not in (b".", b"-")


def _say(line: bytes) -> None:
    try:
        os.write(2, line + b"\n")
    except OSError:
        return
