"""P15: a host's key on another host opens what a migration in progress needs, and nothing else. Against a real sshd.

The peer is hostile here: it has the key, speaks rsync and SFTP, and says whatever it likes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog

from events.errors import TransientError
from events.schema import FileRef
from hostd import ssh_jail
from hostd.ssh_gatekeeper import Gatekeeper, _loaded_by
from hostd.ssh_grants import SOURCE_FILES, Admission, AdmittedTree
from hostd.transport import Transport
from tests.support.sshd import Sshd

pytestmark = pytest.mark.root

DEADLINE_SECONDS = 30.0
MIGRATION = "web-7"
ODD = b"tr'ee \\*[x]?\n\xff"
"""The name of a tree: quotes, wildcards, backslashes, a line's end, and what is no UTF-8."""
ABILITIES = b"-slHogDtpAXrSe.iLsfxCIvu"


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Place:
    """alpha, with an agent's gate and a real sshd; beta's key in hostile hands."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.state = directory / "state"
        self.tree = Path(os.fsdecode(os.path.join(os.fsencode(directory), ODD)))
        (self.tree / "below").mkdir(parents=True)
        (self.tree / "file").write_text("data")
        (self.tree / "hidden").write_text("another user's")
        os.chown(self.tree / "hidden", 4321, 4321)
        (self.tree / "hidden").chmod(0)
        self.secret = directory / "secret"
        self.secret.mkdir()
        (self.secret / "file").write_text("nobody's business")
        (self.tree / "out").symlink_to(self.secret)
        (self.tree / "passwords").symlink_to("/etc/shadow")
        self.plain = directory / "plain"
        (self.plain / "below").mkdir(parents=True)
        (self.plain / "file").write_text("data")
        (self.plain / "out").symlink_to(self.secret)
        (self.plain / "passwords").symlink_to("/etc/shadow")
        self.other_tree = directory / "gammas"
        self.other_tree.mkdir()
        self.own = self.state / "migrations" / MIGRATION
        self.own.mkdir(parents=True)
        for name in ("spec.json", "stopped-0.manifest", "stopping", "stopped-x.manifest"):
            (self.own / name).write_text(name)
        self.keeper = Gatekeeper(self.state, structlog.get_logger())
        self.keeper.open()
        self.admit()
        other = Admission("gamma", "source", (AdmittedTree(str(self.other_tree), viewed=True),), SOURCE_FILES)
        self.keeper.settle("db-1", other)
        self.sshd = Sshd(directory / "sshd")
        self.sshd.gate("beta", self.state)
        # Whatever else the host's sshd permits, the key does not.
        self.sshd.start("X11Forwarding yes", "AllowAgentForwarding yes", "GatewayPorts yes", "LogLevel DEBUG1")
        self.transport = Transport(directory / "run")
        self.transport.check(self.sshd.peer)  # every request below is a channel of this connection
        self.config = next((directory / "run").glob("*[0-9a-f].conf"))

    def admit(self, *trees: AdmittedTree) -> None:
        trees = trees or tuple(AdmittedTree(str(tree), viewed=True) for tree in (self.tree, self.plain))
        self.keeper.settle(MIGRATION, Admission("beta", "source", trees, SOURCE_FILES))

    def close(self) -> None:
        self.transport.close()
        self.sshd.stop()

    def ask(
        self, *words: str | bytes, stdin: bytes = b"", options: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[bytes]:
        line = ["ssh", "-F", str(self.config), *options, "--", self.sshd.peer.alias, *words]
        return subprocess.run(line, input=stdin, capture_output=True, timeout=DEADLINE_SECONDS, check=False)

    def ask_rsync(self, *late: bytes, cluster: bytes = ABILITIES) -> subprocess.CompletedProcess[bytes]:
        """As rsync's client does: its arguments by stdin, each ended by NUL, and an empty one."""
        stdin = b"".join(word + b"\0" for word in (b"rsync", *late, b""))
        return self.ask(b"rsync --server --sender " + cluster, stdin=stdin)

    def rsync(self, *words: str | bytes) -> subprocess.CompletedProcess[bytes]:
        """The real client."""
        line = ["rsync", "-e", f'ssh -F "{self.config}"', "--secluded-args", *words]
        return subprocess.run(line, capture_output=True, timeout=DEADLINE_SECONDS, check=False)

    def remote(self, path: bytes | str) -> bytes:
        return self.transport._remote(self.sshd.peer, os.fsencode(path))

    def sftp(self, *commands: str) -> subprocess.CompletedProcess[bytes]:
        line = ["sftp", "-q", "-F", str(self.config), "-b", "-", self.sshd.peer.alias]
        batch = "".join(f"{command}\n" for command in commands)
        return subprocess.run(line, input=batch.encode(), capture_output=True, timeout=DEADLINE_SECONDS, check=False)

    def recorded(self, verdict: str) -> list[dict[str, str]]:
        file = self.state / "gate" / verdict
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def sessions(self) -> list[Path]:
        return list((self.state / "gate/sessions").iterdir())


@contextlib.contextmanager
def made() -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="gate-") as directory:  # pytest's own is too long for ssh's socket
        place = Place(Path(directory))
        try:
            yield place
        finally:
            place.close()


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with made() as place:
        yield place


@pytest.fixture
def lone() -> Iterator[Place]:
    """For tests that change what is admitted."""
    with made() as place:
        yield place


def assert_refused(place: Place, done: subprocess.CompletedProcess[bytes], *, because: str, told: bool = True) -> None:
    """``told``: sshd passes on what a command says, but not what a subsystem says."""
    assert done.returncode != 0
    if told:
        assert b"cargo-gate on " in done.stderr
        assert because.encode() in done.stderr, done.stderr
    last = place.recorded("refused")[-1]
    assert because in last["reason"]
    assert (last["peer"], last["client"]) == ("beta", "127.0.0.1")


# --- what a migration needs ----------------------------------------------------------------------


def test_the_transport_copies_a_tree_with_everything_that_belongs_to_it(place: Place, tmp_path: Path) -> None:
    os.setxattr(place.tree / "file", "trusted.kept", b"1")
    here = tmp_path / "here"
    (tmp_path / "incoming").mkdir()
    here.mkdir()
    place.transport.rsync_pull(
        place.sshd.peer, os.fsencode(place.tree), here, temp_dir=tmp_path / "incoming", expect_entries=1
    )
    assert (here / "hidden").read_text() == "another user's"
    assert (here / "hidden").stat().st_uid == 4321
    assert os.getxattr(here / "file", "trusted.kept") == b"1"
    assert os.readlink(here / "passwords") == "/etc/shadow"
    (place.tree / "file").write_text("newer")
    place.transport.rsync_pull(
        place.sshd.peer,
        os.fsencode(place.tree),
        here,
        temp_dir=tmp_path / "incoming",
        files_from=[b"file", b"gone"],
        live=True,
        reread=True,
        bwlimit_kib=5000,
    )
    assert (here / "file").read_text() == "newer"
    place.transport.rsync_pull(  # asks first what is there, as it could delete something
        place.sshd.peer, os.fsencode(place.tree), here, temp_dir=tmp_path / "incoming", expect_entries=1
    )
    admitted = place.recorded("admitted")
    assert [record["migration"] for record in admitted[-4:]] == [MIGRATION] * 4
    assert admitted[-1]["peer"] == "beta"
    assert "--files-from=-" in admitted[-3]["asked"]


def test_the_transport_fetches_the_files_that_the_agent_made_for_the_peer(place: Place, tmp_path: Path) -> None:
    content = (place.own / "stopped-0.manifest").read_bytes()
    reference = FileRef(
        path=str(place.own / "stopped-0.manifest"), size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest()
    )
    place.transport.fetch(place.sshd.peer, reference, tmp_path / "arrived")
    assert (tmp_path / "arrived").read_bytes() == content


def test_a_tree_is_looked_at_through_sshfs_and_nothing_beside_it(place: Place, tmp_path: Path) -> None:
    view = tmp_path / "view"
    view.mkdir()
    place.transport.mount_remote(place.sshd.peer, os.fsencode(place.tree), view)
    try:
        assert (view / "hidden").read_text() == "another user's"
        assert sorted(os.listdir(view)) == sorted(os.listdir(place.tree))
    finally:
        place.transport.unmount_remote(view, dead=True)


def test_a_mount_of_one_file_is_copied(lone: Place, tmp_path: Path) -> None:
    lone.admit(AdmittedTree(str(lone.secret / "file"), single_file=True))
    lone.transport.rsync_pull(
        lone.sshd.peer, str(lone.secret / "file"), tmp_path / "one", temp_dir=tmp_path, single_file=True
    )
    assert (tmp_path / "one").read_text() == "nobody's business"
    assert_refused(
        lone, lone.sftp("ls /"), because="no migration in progress with beta has a tree to look at", told=False
    )


# --- what is refused -----------------------------------------------------------------------------


def test_there_is_no_shell_and_no_pty(place: Place) -> None:
    assert_refused(place, place.ask(), because="opens no shell")
    done = place.ask(options=("-tt",))
    assert b"PTY allocation request failed" in done.stderr
    assert_refused(place, done, because="opens no shell")


@pytest.mark.parametrize(
    "command",
    [
        "id",
        "sh -c id",
        "cat /etc/shadow",
        "cargo-hostd gate --peer gamma",
        "scp -f /etc/shadow",
        "rsyncd --server --sender",
        "sftp-server; id",
        "internal-sftp -d /",
        "sftp-server\nid",
        "$(id)",
        "\x1b[2J",
    ],
)
def test_commands_that_no_migration_needs_are_refused(place: Place, command: str) -> None:
    assert_refused(place, place.ask(command), because="is nothing that a migration needs")


@pytest.mark.parametrize(
    ("command", "because"),
    [
        ("rsync -a /etc/ /tmp/x", "as the other end of a transfer only"),
        ("rsync --daemon --config=/tmp/x", "as the other end of a transfer only"),
        ("rsync --server --daemon .", "nothing is received here"),
        ("rsync --server -slogDtpre.iLsfxCIvu . /etc/", "nothing is received here"),
        ("rsync --server -slogDtpre.iLsfxCIvu --sender . /etc/", "nothing is received here"),
        ("rsync --server --sender -logDtpre.iLsfxCIvu . /etc/", "must come by --secluded-args"),
        ("rsync --server --sender -logDtpre.iLsfxCIvu . /etc/; id", "must come by --secluded-args"),
    ],
)
def test_rsync_in_any_other_part_is_refused(place: Place, command: str, because: str) -> None:
    assert_refused(place, place.ask(command), because=because)


def test_options_of_rsync_that_no_migration_needs_are_refused(place: Place) -> None:
    tree = os.fsencode(place.plain) + b"/"
    for option in (b"--log-file=/etc/cron.d/x", b"--files-from=/etc/shadow", b"--temp-dir=/etc", b"-L"):
        done = place.ask_rsync(option, b".", tree)
        assert_refused(place, done, because=f"{option.decode()} is nothing that a migration needs")
    assert_refused(place, place.ask_rsync(b".", tree, cluster=b"-sLe.iLsfxCIvu"), because="is nothing that a migration")
    assert not Path("/etc/cron.d/x").exists()


def test_the_real_rsync_cannot_pass_on_what_it_is_told_for_the_other_side(place: Place, tmp_path: Path) -> None:
    tree = place.remote(os.fsencode(place.tree) + b"/")
    log = tmp_path / "written-by-the-other-side"
    done = place.rsync("-a", "-M", f"--log-file={log}", "--", tree, tmp_path / "x")
    assert_refused(place, done, because="--log-file")
    assert not log.exists()
    done = place.rsync("-a", "--remove-source-files", "--", tree, tmp_path / "x")
    assert_refused(place, done, because="--remove-source-files")
    done = place.rsync("-a", f"--files-from={place.sshd.peer.alias}:/etc/shadow", "--", tree, tmp_path / "x")
    assert_refused(place, done, because="--files-from")
    done = place.rsync("-a", "--", f"{tmp_path}/", tree)
    assert_refused(place, done, because="nothing is received here")
    assert sorted(os.listdir(place.tree)) == ["below", "file", "hidden", "out", "passwords"]


def test_paths_beside_the_admitted_tree_are_refused(place: Place) -> None:
    tree = os.fsencode(place.plain)
    for path in (b"/", b"/etc/", tree, tree + b"/below/", tree + b"/out/", tree + b"-more/"):
        assert_refused(place, place.ask_rsync(b".", path), because=f"with beta admits {path.decode()}")
    for path in (tree + b"/../secret/", tree + b"/./", b"etc/", b"~/"):
        assert_refused(place, place.ask_rsync(b".", path), because="is no plain absolute path")
    assert_refused(place, place.ask_rsync(b".", b"/et*/"), because="a path with wildcards is not sent")


def test_another_peers_tree_and_other_files_of_the_migration_are_refused(place: Place) -> None:
    wanted = [
        place.other_tree / "",
        place.own / "stopping",  # the agent's own
        place.own / "stopped-x.manifest",
        place.own / "",
        place.state / "gate/grants/beta" / f"{MIGRATION}.grant",
        place.state / "migrations/db-1/spec.json",
    ]
    for path in wanted:
        end = b"/" if path.is_dir() else b""
        assert_refused(place, place.ask_rsync(b".", os.fsencode(path) + end), because="admits")
    both = place.remote(place.tree).partition(b":")[2] + b"/"
    assert_refused(place, place.ask_rsync(b".", both, b"/etc/"), because="do not end with one path")


def test_arguments_that_never_end_or_are_not_whole_are_refused(place: Place) -> None:
    line = b"rsync --server --sender " + ABILITIES
    assert_refused(place, place.ask(line, stdin=b"rsync\0.\0"), because="ended in the middle")
    assert_refused(place, place.ask(line, stdin=b"\0\0\0"), because="do not end with one path")
    assert_refused(place, place.ask(line, stdin=b"x" * 20_000), because="too long")
    assert_refused(place, place.ask(line, stdin=b"sh\0-c\0.\0id\0\0"), because="do not end with one path")


def test_sftp_reads_the_tree_and_writes_nothing(place: Place, tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.write_text("theirs")
    before = sorted(os.listdir(place.plain))
    assert place.sftp(f"cd {place.plain}", f"get file {tmp_path}/got").returncode == 0
    assert (tmp_path / "got").read_text() == "data"
    attempts = (
        f"put {local} new", f"put {local} file", "rm file", "rename file moved", "mkdir new", "rmdir below",
        "chmod 777 file", "chown 1 file", "ln file linked", "ln -s /etc new",
    )  # fmt: skip
    done = place.sftp(f"cd {place.plain}", *(f"-{attempt}" for attempt in attempts))  # go on after each
    assert done.stderr.count(b"\n") >= len(attempts), done.stderr
    assert sorted(os.listdir(place.plain)) == before
    assert (place.plain / "file").read_text() == "data"
    assert (place.plain / "file").stat().st_mode & 0o777 == 0o644


def test_sftp_shows_nothing_beside_the_trees_and_no_link_leads_out(place: Place, tmp_path: Path) -> None:
    shown = place.sftp("ls -1 /", f"ls -1 {place.directory}").stdout.decode("latin-1")
    assert "/plain" in shown
    assert not [name for name in ("home", "proc", "root", "secret", "state", "gammas") if f"{name}\n" in shown]
    beside = ("/etc/shadow", "/proc/1/environ", "/root/.bashrc", f"{place.secret}/file", f"{place.state}/gate/tools")
    links = (f"{place.plain}/passwords", f"{place.plain}/out/file", f"{place.plain}/../secret/file")
    place.sftp(*(f"-get {path} {tmp_path}/got" for path in (*beside, *links)))
    assert not (tmp_path / "got").exists()
    assert place.sftp(f"get /etc/passwd {tmp_path}/names").returncode == 0
    assert (tmp_path / "names").read_bytes() == ssh_jail.PASSWORD_FILE


# --- forwarding ----------------------------------------------------------------------------------


OWN_CONNECTION = ("-o", "ControlPath=none", "-o", "ClearAllForwardings=no", "-o", "ExitOnForwardFailure=yes")


def test_the_key_forwards_no_port_and_no_socket(place: Place, tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        done = place.ask(options=(*OWN_CONNECTION, "-W", f"127.0.0.1:{port}"))
        assert b"stdio forwarding failed" in done.stderr
        listener.settimeout(0)
        with pytest.raises(BlockingIOError):
            listener.accept()
    for there in ("0", f"{tmp_path}/socket"):
        done = place.ask(options=(*OWN_CONNECTION, "-N", "-R", f"{there}:127.0.0.1:22"))
        assert b"remote port forwarding failed" in done.stderr
    assert not (tmp_path / "socket").exists()


def test_the_key_reaches_no_socket_of_the_hosts(place: Place, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place.directory / "docker.sock"))
        listener.listen()
        here = place.directory / "here.sock"
        line = ["ssh", "-F", str(place.config), *OWN_CONNECTION, "-N", "-L", f"{here}:{place.directory}/docker.sock"]
        with subprocess.Popen([*line, "--", place.sshd.peer.alias], stderr=subprocess.DEVNULL) as client:
            try:
                wait_for(here.exists)
                with socket.socket(socket.AF_UNIX) as caller:
                    caller.connect(str(here))
                    assert caller.recv(1) == b""
            finally:
                client.terminate()
        listener.settimeout(0)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_neither_agent_nor_display_nor_tunnel_is_forwarded(place: Place, tmp_path: Path) -> None:
    agent = subprocess.run(
        ["ssh-agent", "-s", "-a", str(tmp_path / "agent")], capture_output=True, text=True, check=True
    )
    pid = int(agent.stdout.partition("SSH_AGENT_PID=")[2].partition(";")[0])
    try:
        offered = ("-o", "ForwardAgent=yes", "-o", f"IdentityAgent={tmp_path}/agent")
        place.ask("id", options=(*OWN_CONNECTION, *offered))
        line = ["ssh", "-F", str(place.config), *OWN_CONNECTION, "-X", "--", place.sshd.peer.alias, "id"]
        environment = {**os.environ, "DISPLAY": ":77"}
        done = subprocess.run(line, env=environment, capture_output=True, timeout=DEADLINE_SECONDS, check=False)
    finally:
        os.kill(pid, signal.SIGTERM)
    wait_for(lambda: "agent forwarding disabled" in place.sshd.log)
    assert b"X11 forwarding request failed" in done.stderr
    # A tunnel device is the one thing that a key's ``restrict`` leaves to sshd, where it is off unless switched on.
    line = ["/usr/sbin/sshd", "-T", "-f", str(place.sshd.directory / "sshd_config")]
    told = subprocess.run(line, capture_output=True, check=True)
    assert b"permittunnel no" in told.stdout


# --- the confinement itself ----------------------------------------------------------------------


def confined(directory: Path, *program: str, kind: str = ssh_jail.TREE) -> subprocess.CompletedProcess[bytes]:
    """Run busybox as the gate runs rsync, with ``directory/tree``: what an rsync in hostile hands could do."""
    root = directory / "root"
    root.mkdir(exist_ok=True)
    script = (
        "import sys, os; sys.path.insert(0, sys.argv[1])\n"
        "from hostd import ssh_jail as j\n"
        "tree = os.fsencode(sys.argv[3])\n"
        "holdings = [(tree, b'/data', sys.argv[4]), (b'/bin/busybox', b'/bin/busybox', j.TOOL)]\n"
        "j.become(os.fsencode(sys.argv[2]), holdings, [b'/bin/busybox', *map(os.fsencode, sys.argv[5:])],"
        " capabilities=(j.CAP_DAC_READ_SEARCH, j.CAP_SYS_ADMIN))"
    )
    project = str(Path(__file__).parents[2])
    line = ["python3", "-I", "-S", "-c", script, project, str(root), str(directory / "tree"), kind, *program]
    return subprocess.run(line, capture_output=True, timeout=DEADLINE_SECONDS, check=False)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_text("data")
    (tmp_path / "tree/own").symlink_to("/data/file")
    (tmp_path / "tree/outer").symlink_to("/etc/hostname")
    os.mknod(tmp_path / "tree/null", 0o600 | 0o020000, os.makedev(1, 3))
    return tmp_path


def test_what_runs_in_the_confinement_sees_the_tree_and_nothing_else(tree: Path) -> None:
    assert confined(tree, "cat", "/data/file").stdout == b"data"
    assert confined(tree, "cat", "/data/own").stdout == b"data"
    assert confined(tree, "cat", "/data/outer").returncode != 0
    assert set(confined(tree, "ls", "/").stdout.split()) == {b"bin", b"data", b"dev", b"etc"}
    assert confined(tree, "ls", "/data/..", "/etc").stdout.count(b"passwd") == 1
    assert confined(tree, "cat", "/data/null").returncode != 0  # a device of the tree's


@pytest.mark.parametrize(
    "attempt",
    [
        ("touch", "/data/new"),
        ("rm", "/data/file"),
        ("mkdir", "/new"),
        ("mount", "-o", "remount,rw", "/data"),
        ("mount", "-t", "proc", "proc", "/etc"),
        ("umount", "/data"),
        ("chroot", "/data", "/bin/busybox"),
        ("unshare", "-m", "/bin/busybox", "true"),
        ("mknod", "/etc/x", "c", "1", "3"),
        ("wget", "http://127.0.0.1/"),
        ("sh", "-c", "/bin/busybox true & wait $!"),
        ("hostname", "theirs"),
    ],
)
def test_what_runs_in_the_confinement_cannot_get_out_or_write(tree: Path, attempt: tuple[str, ...]) -> None:
    before = socket.gethostname()
    done = confined(tree, *attempt)
    assert done.returncode != 0, done
    assert b"applet not found" not in done.stderr
    assert socket.gethostname() == before
    assert sorted(os.listdir(tree / "tree")) == ["file", "null", "outer", "own"]


def test_a_tree_that_has_become_a_symlink_is_not_followed(lone: Place) -> None:
    place = lone.directory / "swapped" / "tree"
    place.mkdir(parents=True)
    lone.admit(AdmittedTree(str(place), viewed=True))
    place.rmdir()
    place.symlink_to(lone.secret)
    assert_refused(lone, lone.ask_rsync(b".", os.fsencode(place) + b"/"), because="it cannot be confined here")
    place.unlink()
    place.parent.rmdir()
    (lone.secret / "tree").mkdir()
    place.parent.symlink_to(lone.secret)
    assert_refused(lone, lone.ask_rsync(b".", os.fsencode(place) + b"/"), because="it cannot be confined here")


def test_an_agent_that_was_restarted_does_not_follow_a_symlink_that_came_meanwhile(lone: Place) -> None:
    """Of a bind below another bind of the same container, the container owns the place."""
    place = lone.directory / "tree"
    place.mkdir()
    lone.admit(AdmittedTree(str(place)))
    place.rmdir()
    place.symlink_to(lone.secret)
    following = Gatekeeper(lone.state, structlog.get_logger())
    following.open()
    following.settle(MIGRATION, Admission("beta", "source", (AdmittedTree(str(place), viewed=True),), SOURCE_FILES))
    assert_refused(lone, lone.ask_rsync(b".", os.fsencode(place) + b"/"), because="it cannot be confined here")


def test_a_tree_below_a_symlink_of_the_hosts_own_is_served(lone: Place, tmp_path: Path) -> None:
    (lone.directory / "link").symlink_to(lone.secret)
    tree = lone.directory / "link" / "below"
    tree.mkdir()
    (tree / "file").write_text("data")
    lone.admit(AdmittedTree(str(tree)))
    (tmp_path / "here").mkdir()
    lone.transport.rsync_pull(lone.sshd.peer, str(tree), tmp_path / "here", temp_dir=tmp_path)
    assert (tmp_path / "here/file").read_text() == "data"


def test_the_program_has_no_more_rights_than_reading_needs(place: Place) -> None:
    """What an sftp-server that runs shows in /proc: capabilities, seccomp, its own namespaces."""
    line = ["ssh", "-F", str(place.config), "-s", "--", place.sshd.peer.alias, "sftp"]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
        assert client.stdin is not None and client.stdout is not None
        client.stdin.write(b"\0\0\0\5\1\0\0\0\3")  # SSH_FXP_INIT, version 3
        client.stdin.flush()
        assert client.stdout.read(9)[4] == 2  # it answers, so it is the server by now
        pid = next(int(file.name) for file in place.sessions if b"sftp" in comm(int(file.name)))
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        assert int(status["CapEff"], 16) == 1 << ssh_jail.CAP_DAC_READ_SEARCH
        assert int(status["CapBnd"], 16) == 1 << ssh_jail.CAP_DAC_READ_SEARCH
        assert (status["Seccomp"].strip(), status["NoNewPrivs"].strip()) == ("2", "1")
        for kind in ("mnt", "net", "ipc"):
            assert os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")
        mounted = Path(f"/proc/{pid}/mountinfo").read_bytes().splitlines()
        assert all(b" ro," in line for line in mounted), mounted
        client.stdin.close()


# --- what is in progress -------------------------------------------------------------------------


def withdraw(place: Place) -> None:
    place.keeper.settle(MIGRATION, None)


def remove(place: Place) -> None:
    place.keeper.bar(frozenset({"beta"}))
    assert place.keeper.unsettled() == ["db-1"], "gamma's stays"


@pytest.mark.parametrize("end", [withdraw, remove])
def test_withdrawing_ends_what_was_admitted_and_admits_no_more(
    lone: Place, tmp_path: Path, end: Callable[[Place], None]
) -> None:
    """P15: a transfer under way does not outlive the migration's need of it, nor its peer's membership."""
    with (lone.tree / "large").open("wb") as file:
        file.truncate(64 * 1024 * 1024)
    (tmp_path / "here").mkdir()
    problems: list[Exception] = []

    def pull() -> None:
        try:
            lone.transport.rsync_pull(
                lone.sshd.peer, os.fsencode(lone.tree), tmp_path / "here", temp_dir=tmp_path, bwlimit_kib=64
            )
        except TransientError as error:
            problems.append(error)

    thread = threading.Thread(target=pull)
    thread.start()
    wait_for(lambda: any(b"rsync" in comm(int(file.name)) for file in lone.sessions))
    end(lone)
    thread.join(DEADLINE_SECONDS)
    assert len(problems) == 1
    assert not any(comm(int(file.name)) for file in lone.sessions)
    tree = lone.remote(lone.tree).partition(b":")[2] + b"/"
    assert_refused(lone, lone.ask_rsync(b".", tree), because="admits")
    assert_refused(lone, lone.ask_rsync(b".", os.fsencode(lone.own / "spec.json")), because="admits")
    assert_refused(lone, lone.sftp("ls /"), because="has a tree to look at", told=False)


def test_a_host_that_joined_again_is_admitted_again(lone: Place) -> None:
    lone.keeper.bar(frozenset({"beta"}))
    lone.admit()  # whatever its migration calls for
    tree = lone.remote(lone.tree).partition(b":")[2] + b"/"
    assert_refused(lone, lone.ask_rsync(b".", tree), because="admits")
    lone.keeper.bar(frozenset())
    lone.admit()
    assert b"cargo-gate" not in lone.ask_rsync(b".", tree).stderr


def comm(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_bytes()
    return b""


def test_a_transport_that_is_refused_says_whose_gate_refused_it_and_why(lone: Place, tmp_path: Path) -> None:
    lone.keeper.settle(MIGRATION, None)
    with pytest.raises(TransientError, match=r"alpha does not admit this by SSH: no migration in progress with beta"):
        lone.transport.rsync_pull(lone.sshd.peer, os.fsencode(lone.tree), tmp_path / "x", temp_dir=tmp_path)
    (tmp_path / "view").mkdir()
    with pytest.raises(TransientError):
        lone.transport.mount_remote(lone.sshd.peer, os.fsencode(lone.tree), tmp_path / "view")


def test_what_was_admitted_outlives_the_agent_and_is_looked_at_by_the_next_one(lone: Place) -> None:
    """A2: the target goes on reading while the source's agent is away; the next life withdraws what it must."""
    tree = lone.remote(lone.tree).partition(b":")[2] + b"/"
    following = Gatekeeper(lone.state, structlog.get_logger())
    assert b"cargo-gate" not in lone.ask_rsync(b".", tree).stderr
    following.open()
    assert following.unsettled() == ["db-1", MIGRATION]
    following.settle(MIGRATION, None)
    assert following.unsettled() == ["db-1"]
    assert_refused(lone, lone.ask_rsync(b".", tree), because="admits")


@pytest.mark.parametrize("damage", ["foreign", "writable", "cut", "newer", "symlink"])
def test_a_grant_that_is_not_the_agents_or_not_whole_admits_nothing(lone: Place, damage: str) -> None:
    file = lone.state / "gate/grants/beta" / f"{MIGRATION}.grant"
    content = file.read_bytes()
    if damage == "foreign":
        os.chown(file, 4321, 4321)
    elif damage == "writable":
        file.chmod(0o666)
    elif damage == "cut":
        file.write_bytes(content.removesuffix(b"end\n"))
    elif damage == "newer":
        file.write_bytes(content.replace(b"cargo-gate 1", b"cargo-gate 2"))
    else:
        file.rename(lone.directory / "moved")
        file.symlink_to(lone.directory / "moved")
    tree = lone.remote(lone.tree).partition(b":")[2] + b"/"
    assert_refused(lone, lone.ask_rsync(b".", tree), because="this host's agent")


def test_refusals_are_told_by_the_agent_once_and_the_list_stays_small(
    lone: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, dict[str, object]]] = []

    class Log:
        def warning(self, text: str, **fields: object) -> None:
            told.append((text, fields))

    keeper = Gatekeeper(lone.state, Log())  # type: ignore[arg-type]
    keeper.open()
    lone.ask("cat /etc/shadow")
    keeper.look()
    keeper.look()
    assert len(told) == 1
    assert "cat /etc/shadow" in str(told[0][1]["request"])
    list_of_refusals = lone.state / "gate/refused"
    with list_of_refusals.open("ab") as file:
        file.write(b"{}\n" * 100_000)
    lone.ask("id " + "x" * 5000)
    assert list_of_refusals.stat().st_size < 2000
    keeper.look()
    assert len(told) == 2


def test_the_libraries_of_a_program_are_found() -> None:
    assert any(file.endswith(b"libc.so.6") for file in _loaded_by("/usr/bin/rsync"))
    assert _loaded_by("/bin/busybox") == []
