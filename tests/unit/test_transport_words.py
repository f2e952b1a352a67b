"""What ssh and rsync say, and what becomes of it. No process is started here."""

from __future__ import annotations

from pathlib import Path

import pytest

from events.errors import PermanentError, TransientError
from hostd.peer import Peer, ssh_config
from hostd.tool_words import (
    AuthenticationError,
    HostKeyError,
    OutputReader,
    Progress,
    only_vanished,
    rsync_error,
    ssh_error,
)

PEER = Peer("alpha", "10.0.0.1", 22, "root", Path("/keys/id"), Path("/keys/known_hosts"))


def test_a_changed_host_key_is_a_security_matter_and_never_retried() -> None:
    """C8: hard stop, whatever else ssh says."""
    error = ssh_error(PEER, "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\r\nHost key verification failed.\r\n")
    assert isinstance(error, HostKeyError)
    assert "SECURITY" in str(error)


def test_an_unknown_host_key_is_not_accepted_either() -> None:
    """C8: an unpinned key is no key."""
    words = "No ED25519 host key is known for alpha and you have requested strict checking.\nHost key verification failed.\n"
    assert isinstance(ssh_error(PEER, words), HostKeyError)


@pytest.mark.parametrize(
    "words",
    [
        "root@10.0.0.1: Permission denied (publickey).\n",
        "Received disconnect from 10.0.0.1: Too many authentication failures\n",
        'Load key "/keys/id": error in libcrypto\nroot@10.0.0.1: Permission denied (publickey).\n',
    ],
)
def test_a_refused_key_is_permanent_and_says_which_key(words: str) -> None:
    """C7: no endless retry with a key that is not accepted."""
    error = ssh_error(PEER, words)
    assert isinstance(error, AuthenticationError)
    assert "/keys/id" in str(error)


@pytest.mark.parametrize(
    "words",
    [
        "ssh: connect to host 10.0.0.1 port 22: Connection refused",
        "ssh: connect to host 10.0.0.1 port 22: No route to host",
        "ssh: connect to host 10.0.0.1 port 22: Connection timed out",
        "kex_exchange_identification: Connection closed by remote host",
        "Connection closed by 10.0.0.1 port 22",
        "",
    ],
)
def test_a_host_that_cannot_be_reached_may_come_back(words: str) -> None:
    """C1, C10: transient."""
    assert isinstance(ssh_error(PEER, words), TransientError)


@pytest.mark.parametrize("code", [10, 12, 30, 35, 255, 14, 15, 16, 19, 20, 21, 22])
def test_broken_streams_and_killed_processes_are_tried_again(code: int) -> None:
    """D3, D6: transient."""
    assert isinstance(
        rsync_error(PEER, code, "rsync: connection unexpectedly closed (0 bytes received so far)"), TransientError
    )


@pytest.mark.parametrize("code", [1, 2, 3, 4, 25, 124, 125, 126, 127])
def test_configuration_errors_are_permanent_and_say_what_is_missing(code: int) -> None:
    """C11, D5, D7, D8: no repetition mends a missing rsync or a protocol that does not fit."""
    error = rsync_error(PEER, code, "bash: rsync: command not found")
    assert isinstance(error, PermanentError)
    assert f"exit {code}" in str(error)


def test_a_full_disk_is_permanent_whatever_the_exit_code() -> None:
    """D4: ENOSPC and its kin come as 11, 12 or 23."""
    for code in (11, 12, 23):
        words = 'rsync: [receiver] write failed on "/x": No space left on device (28)\n'
        assert isinstance(rsync_error(PEER, code, words), PermanentError)


def test_a_partial_transfer_is_a_failure_that_lists_its_files() -> None:
    """D1: 23 is never success; a permanent kind is permanent, another may pass."""
    denied = 'rsync: [sender] send_files failed to open "/data/a": Permission denied (13)\n'
    error = rsync_error(PEER, 23, denied)
    assert isinstance(error, PermanentError)
    assert "/data/a" in str(error)
    # In a tree that changes a device may have taken the file's place, where devices cannot be opened: it is tried again.
    again = rsync_error(PEER, 23, denied, live=True)
    assert (type(again), str(again)) == (TransientError, str(error))
    shut = 'rsync: [receiver] mkstemp "/data/.b" failed: Permission denied (13)\n'
    assert isinstance(rsync_error(PEER, 23, denied + shut, live=True), PermanentError)
    other = 'rsync: [sender] read errors mapping "/data/b": Input/output error (5)\n'
    assert isinstance(rsync_error(PEER, 23, other), TransientError)


def test_files_that_vanish_from_a_stopped_source_are_a_failure() -> None:
    """D2: 24 reaches the judge only when the source was frozen."""
    assert isinstance(rsync_error(PEER, 24, "file has vanished"), PermanentError)


def test_a_host_key_failure_inside_rsync_keeps_its_meaning() -> None:
    """C8: rsync reports 255 or 12 for what ssh refused."""
    assert isinstance(
        rsync_error(PEER, 255, "Host key verification failed.\nrsync: connection unexpectedly closed"), HostKeyError
    )


def test_progress_and_statistics_are_read_from_output_cut_anywhere() -> None:
    output = (
        b"              0   0%    0.00kB/s    0:00:00 (xfr#0, to-chk=0/5)\r"
        b"      1048576  50%   12.34MB/s    0:00:01 (xfr#3, to-chk=1/5)\r\n"
        b"\nNumber of files: 6 (reg: 4, dir: 2)\nNumber of regular files transferred: 4\n"
        b"Literal data: 1000 bytes\nMatched data: 24 bytes\nTotal bytes received: 1234\n\ntotal size is 99  speedup is 1.0"
    )
    for size in (1, 7, 4096):
        seen: list[Progress] = []
        reader = OutputReader(seen.append)
        for start in range(0, len(output), size):
            reader.feed(output[start : start + size])
        result = reader.result(2.0, vanished=False)
        assert seen[-1] == Progress(bytes=1048576, files=3)
        assert (result.bytes_received, result.files, result.literal_bytes, result.matched_bytes) == (1234, 4, 1000, 24)


@pytest.mark.parametrize(
    "wrong",
    [
        {"host": "-oProxyCommand=id"},
        {"host": "a b"},
        {"address": "-oProxyCommand=id"},
        {"address": "10.0.0.1\nProxyCommand id"},
        {"port": 0},
        {"port": 65536},
        {"user": "root;id"},
        {"identity": Path("relative")},
        {"identity": Path('/a"b')},
        {"known_hosts": Path("/a%hb")},
    ],
)
def test_a_peer_that_could_inject_an_ssh_option_is_refused(wrong: dict[str, object]) -> None:
    fields: dict[str, object] = {
        "host": "alpha",
        "address": "10.0.0.1",
        "port": 22,
        "user": "root",
        "identity": Path("/keys/id"),
        "known_hosts": Path("/keys/known_hosts"),
    }
    with pytest.raises(PermanentError, match="Nothing was contacted"):
        Peer(**(fields | wrong))  # type: ignore[arg-type]


def test_the_ssh_settings_pin_the_name_and_never_ask() -> None:
    """C9: the key belongs to the host's name, not to its address."""
    text = ssh_config(PEER, Path("/run/c.sock"))
    for line in ("HostKeyAlias alpha", "StrictHostKeyChecking yes", "BatchMode yes", "GlobalKnownHostsFile /dev/null"):
        assert f"  {line}\n" in text
    assert "StrictHostKeyChecking no" not in text


def test_a_directory_that_becomes_something_else_during_a_round_is_worth_another_attempt() -> None:
    """D11: it is not about the versions of rsync, although the exit code says so."""
    words = "ABORTING due to invalid path from sender: a/b\nrsync error: protocol incompatibility (code 2)"
    assert isinstance(rsync_error(PEER, 2, words), TransientError)
    named = 'rsync: [sender] link_stat "/tree/c/d" failed: Not a directory (20)\nrsync error: protocol incompatibility (code 2)'
    assert isinstance(rsync_error(PEER, 2, named), TransientError)
    assert isinstance(rsync_error(PEER, 2, 'file has vanished: "/tree/c/-g"\n'), TransientError)
    assert isinstance(rsync_error(PEER, 2, "protocol version mismatch -- is your shell clean?"), PermanentError)


GONE = "rsync: [sender] get_acl: sys_acl_get_file(a/b, ACL_TYPE_ACCESS): No such file or directory (2)\n"


@pytest.mark.parametrize(
    ("words", "harmless"),
    [
        (GONE, True),
        (GONE + 'rsync: [sender] link_stat "/v/a/b" failed: Not a directory (20)\n', True),
        (GONE + 'rsync: [sender] send_files failed to open "/v/c": Is a directory (21)\n', True),
        ('rsync: [sender] send_files failed to open "/v/c": Too many levels of symbolic links (40)\n', True),
        ('rsync: [receiver] open "/v/c" failed: Is a directory (21)\n', False),
        ("rsync: [sender] get_acl: sys_acl_get_file(a, ACL_TYPE_DEFAULT): Permission denied (13)\n", True),
        ("rsync: [sender] get_acl: sys_acl_get_file(a, ACL_TYPE_ACCESS): Permission denied (13)\n", False),
        (GONE + 'rsync: [sender] send_files failed to open "/v/c": Permission denied (13)\n', False),
        ('rsync: [sender] change_dir "/v" failed: No such file or directory (2)\n', False),
        ('rsync: [receiver] mkstemp "/here/x" failed: No such file or directory (2)\n', False),
        ("", False),
        (GONE * 1000, False),
    ],
)
def test_only_a_file_that_went_away_under_the_senders_eyes_is_no_failure(words: str, harmless: bool) -> None:
    """D2: and when it cannot be told, it is one."""
    assert only_vanished(words) == harmless


def test_a_file_that_may_not_be_read_is_not_taken_for_a_key_that_is_refused() -> None:
    """C7, D4: both are called "Permission denied", one with the ways of authentication and one with a number."""
    unreadable = rsync_error(PEER, 23, 'rsync: [sender] send_files failed to open "/v/c": Permission denied (13)\n')
    assert type(unreadable) is PermanentError
    assert "/v/c" in str(unreadable)
    refused = rsync_error(PEER, 255, "root@alpha: Permission denied (publickey,password).")
    assert isinstance(refused, AuthenticationError)
