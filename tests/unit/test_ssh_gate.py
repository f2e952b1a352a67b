"""What the gate takes from rsync's command line, and what it makes of a path."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from events.errors import PermanentError
from hostd import ssh_gate
from hostd.ssh_gate import Grant, RefusedError
from hostd.ssh_jail import _ARM64, _X86_64
from hostd.ssh_keys import authorized_line
from hostd.transport import Transport

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBxY0Wmz beta"
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "option",
    [
        b"--log-file=/etc/cron.d/x", b"--remove-source-files", b"--files-from=/etc/shadow", b"--files-from=:/etc/shadow",
        b"--copy-dest=/etc", b"--compare-dest=/etc", b"--link-dest=/etc", b"--temp-dir=/etc", b"--partial-dir=/etc",
        b"--backup-dir=/etc", b"--rsync-path=id", b"--rsh=id", b"-esh", b"-e", b"--write-devices", b"--copy-devices",
        b"-L", b"-k", b"--copy-unsafe-links", b"--exclude-from=/etc/shadow", b"--include-from=/etc/shadow", b"--daemon",
        b"--write-batch=/etc/x", b"--read-batch=/etc/x", b"--only-write-batch=/x", b"--password-file=/etc/shadow",
        b"--early-input=/etc/shadow", b"--config=/x", b"--dparam=log file=/x", b"--chown=0:0", b"--usermap=*:0",
        b"--iconv=.", b"--debug=ALL", b"--stop-after=1", b"--timeout=1 --log-file=/x", b"--timeout=", b"--bwlimit=1k",
        b"--info=NAME0 --log-file=/x", b"--server", b"--sender", b"--", b"--from0=1", b"-M--log-file=/x", b"--backup",
        b"-b", b"-z", b"-se.iLs;id", b"-T", b"-y", b"/etc/", b"",
    ],
)  # fmt: skip
def test_no_option_passes_that_the_transport_does_not_lead_to(option: bytes) -> None:
    """P15: unknown is refused, not passed on; so is what another rsync may invent."""
    with pytest.raises(RefusedError, match="is nothing that a migration needs"):
        ssh_gate._checked_option(option)


@pytest.mark.parametrize(
    ("option", "passed"),
    [
        (b"-slHogDtpAXrcSe.iLsfxCIvu", b"-lHogDtpAXrcSe.iLsfxCIvu"),
        (b"-sWpe31.14LsfxCIvu"[:3] + b"pe.LsfxCIvu", b"-Wpe.LsfxCIvu"),
        (b"--timeout=120", b"--timeout=120"),
        (b"--info=NAME0", b"--info=NAME0"),
        (b"--files-from=-", b"--files-from=-"),
    ],
)
def test_what_the_transport_leads_to_passes_without_what_was_obeyed_already(option: bytes, passed: bytes) -> None:
    assert ssh_gate._checked_option(option) == passed


@given(st.binary(min_size=1, max_size=40).filter(lambda raw: b"\0" not in raw))
def test_a_path_is_the_one_that_the_transport_meant(raw: bytes) -> None:
    class Peer:
        alias = "cargo-alpha"

    written = Transport._remote(None, Peer(), b"/" + raw).partition(b":")[2]  # type: ignore[arg-type]
    assert ssh_gate._literal(written) == b"/" + raw


@given(st.binary(max_size=60))
def test_a_path_survives_being_written_down(raw: bytes) -> None:
    line = ssh_gate.escaped(raw)
    assert ssh_gate.unescaped(line) == raw
    assert len(b"x" + line) == len((b"x" + line).splitlines()[0])
    assert b"\t" not in line


def grant() -> Grant:
    made = Grant()
    made.migration = b"web-7"
    made.trees = [(b"/data", b"/real/data", True, True), (b"/one", b"/real/one", False, False)]
    made.directory = (b"/own", b"/real/own")
    made.names = [b"spec.json", b"stopped-*.manifest"]
    return made


@pytest.mark.parametrize(
    ("path", "holding"),
    [
        (b"/data/", (b"/real/data", b"/data", "tree")),
        (b"/one", (b"/real/one", b"/one", "file")),
        (b"/own/spec.json", (b"/real/own/spec.json", b"/own/spec.json", "file")),
        (b"/own/stopped-0.manifest", (b"/real/own/stopped-0.manifest", b"/own/stopped-0.manifest", "file")),
    ],
)
def test_what_is_admitted_is_found(path: bytes, holding: tuple[bytes, bytes, str]) -> None:
    assert ssh_gate._holding_of([grant()], path, b"beta") == ([holding], [b"web-7"])


@pytest.mark.parametrize(
    "path",
    [
        b"/", b"/data", b"/data/x", b"/data/x/", b"/data//", b"/data/../", b"/data/./", b"/datax/", b"data/", b"", b"/one/",
        b"/own/", b"/own/other", b"/own/stopped-.manifest", b"/own/stopped-x.manifest", b"/own/stopped-0/1.manifest",
        b"/own/stopped-../x.manifest", b"/own/sub/spec.json", b"//own/spec.json", b"/real/data/",
    ],
)  # fmt: skip
def test_nothing_else_is_admitted(path: bytes) -> None:
    with pytest.raises(RefusedError):
        ssh_gate._holding_of([grant()], path, b"beta")


def test_what_is_recorded_ends_no_line_and_commands_no_terminal() -> None:
    shown = ssh_gate._shown(b'a"b\\c\nd\x1b[2J\xff' + b"x" * 1000)
    assert "\n" not in shown and "\x1b" not in shown and '"' not in shown
    assert len(shown) <= ssh_gate.MAX_RECORDED_CHARACTERS + 1


@pytest.mark.parametrize("peer", ["", "..", "a/b", "-x", "A", "a b"])
def test_a_gate_that_was_called_wrongly_admits_nothing(peer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ssh_gate.main(["--peer", peer]) == 2
    assert ssh_gate.main(["--peer", "beta", "--state", "relative"]) == 2
    assert ssh_gate.main(["--peer"]) == 2
    assert ssh_gate.main(["--peer", "beta", "--shell", "yes"]) == 2


def test_the_line_of_authorized_keys_takes_everything_away_and_names_the_peer() -> None:
    line = authorized_line("beta", KEY + "\n", state_dir=Path("/var/lib/cargo"), python="/usr/bin/python3")
    assert line.startswith('restrict,command="/usr/bin/python3 -I -S /')
    assert f'--peer beta --state /var/lib/cargo" {KEY}' in line
    for peer, key in (
        ("beta", "command=x " + KEY),
        ("beta", KEY + "\n" + KEY),
        ("beta", ""),
        ('b" ssh', KEY),
        ("$(id)", KEY),
    ):
        with pytest.raises(PermanentError):
            authorized_line(peer, key, state_dir=Path("/var/lib/cargo"))
    with pytest.raises(PermanentError):
        authorized_line("beta", KEY, state_dir=Path("/var/lib/a b;c"))


def test_the_gate_loads_nothing_but_the_standard_library_and_little_of_that() -> None:
    """It is started for each channel of a connection, and a part of an outage may wait for it."""
    script = (
        "import sys; sys.path.append(sys.argv[1]); import hostd.ssh_gate, hostd.ssh_jail;"
        "print(*sorted(name.partition('.')[0] for name in sys.modules))"
    )
    line = [sys.executable, "-I", "-S", "-c", script, str(ROOT)]
    loaded = set(subprocess.run(line, capture_output=True, text=True, check=True).stdout.split())
    assert not loaded & {"json", "re", "argparse", "subprocess", "pathlib", "socket", "logging", "msgspec", "events"}


def test_the_command_line_offers_the_gate_without_loading_the_agent() -> None:
    script = (
        "import sys; sys.argv = ['cargo-hostd', 'gate', '--peer', 'beta', '--state', '/nonexistent'];"
        "from hostd.cli import main; code = main(); print(code, 'hostd.main' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1 False"
    assert "opens no shell" in done.stderr


def test_the_refused_system_calls_are_those_of_the_kernels_own_list() -> None:
    """A number that is mistyped would refuse something else. Where the headers lie, they are asked."""
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    known = dict(
        line.split()[1:3] for line in (header.read_text() if header.exists() else "").splitlines() if "__NR_" in line
    )
    wrong = {name: number for name, number in _X86_64.items() if known and known.get(f"__NR_{name}") != str(number)}
    assert not wrong
    assert len(set(_ARM64.values())) == len(_ARM64)
    everywhere = {"socket", "mount", "umount2", "pivot_root", "open_by_handle_at", "setns", "unshare", "ptrace", "bpf"}
    assert everywhere <= set(_X86_64) & set(_ARM64)
