"""The container's writable layer on real parts: what it wrote outside of its mounts moves, works there, and comes back."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import pytest

from events import schema
from hostd.layer import is_whiteout
from hostd.manifest import Entry
from labkit.spec import REPOSITORY
from labkit.waiting import wait_until
from tests.support.fleet import Fleet, differences

pytestmark = [pytest.mark.lab, pytest.mark.timeout(150)]

ENGINES_OWN = (
    b"proc",
    b"sys",
    b"dev",
    b"etc/hostname",
    b"etc/hosts",
    b"etc/resolv.conf",
    b"etc/mtab",
    b".dockerenv",
    b"data",
)
"""What Docker mounts into every container, or makes for it: of each host, not of the container."""
WORK = """
    mkdir -p /work/deep/er && echo one > /work/file && echo two > /work/deep/er/file
    ln /work/file /work/deep/same && ln -s ../file /work/deep/link && mkfifo /work/pipe && mknod /work/null c 1 3
    dd if=/dev/urandom of=/work/large bs=64k count=40 2>/dev/null
    dd if=/dev/zero of=/work/sparse bs=1 count=1 seek=9000000 2>/dev/null
    cp /bin/busybox /work/program && chmod 4755 /work/program
    rm /etc/nsswitch.conf
    rm -rf /var && mkdir /var && echo new > /var/inside
    echo "extra:x:1000:1000::/:/bin/sh" >> /etc/passwd
    chown 999:999 /work/deep && chmod 2770 /work/deep
    printf 'odd' > "$(printf '/work/line\\nbreak \\377')"
    touch -d '2001-02-03 04:05:06' /work/file
"""
MARKS = """if 1:
    import os, sys
    os.setxattr(sys.argv[1] + "/program", "security.capability", bytes.fromhex(sys.argv[2]))
    os.setxattr(sys.argv[1] + "/file", "user.note", b"a note")
    os.setxattr(sys.argv[1] + "/deep", "trusted.kept", b"kept")
"""
CAPABILITY = "0100000200040000000000000000000000000000"
"""cap_net_bind_service=ep, as vfs_cap_data of revision 2."""
ON_THE_TARGET = """
    [ ! -e /etc/nsswitch.conf ] && [ ! -e /var/run ] && [ "$(cat /var/inside)" = new ]
    echo restored > /etc/nsswitch.conf
    rm /etc/group /work/deep/er/file
    rm -rf /work/deep/er && echo "no directory any more" > /work/deep/er
    echo more >> /work/large && mv /work/file /work/renamed && mkdir /work/made && echo x > /work/made/here
    rm -rf /var && mkdir -p /var/log && echo again > /var/log/again
    rm -rf /home 2>/dev/null; mkdir /home
"""
BUSY = """
    [ -e /stopped ] && { trap 'exit 0' TERM; sleep 100000 & wait; }
    trap 'echo last words > /stopped; exit 0' TERM
    mkdir -p /busy
    n=0
    while :; do
        n=$((n + 1))
        echo $n >> /busy/log
        echo $n > /busy/new.$n && rm -f /busy/new.$((n - 3))
        mkdir -p /busy/dir.$((n % 5)) && echo $n > /busy/dir.$((n % 5))/f && mv /busy/dir.$((n % 5)) /busy/moved.$n
        [ $n -gt 2 ] && rm -rf /busy/moved.$((n - 2))
        ln -f /busy/log /busy/linked && rm -f /busy/linked && ln /busy/log /busy/linked
        if [ $((n % 2)) = 0 ]; then rm -f /etc/group; else echo "root:x:0:$n" > /etc/group; fi
        rm -rf /var && mkdir /var && echo $n > /var/n
        sleep 0.02
    done
"""


def layer(fleet: Fleet, host: str, name: str) -> list[Entry]:
    """The writable layer as it lies in the host's store, without its root, whose time a mount moves."""
    upper = fleet.present(host, name).attrs["GraphDriver"]["Data"]["UpperDir"]
    [entries] = fleet.describe(host, upper)
    return [entry for entry in entries if entry.path]


def seen(fleet: Fleet, host: str, name: str) -> list[Entry]:
    """The whole root as the running container sees it, apart from what Docker puts there."""
    [entries] = fleet.describe_seen(host, name, "/bin/..")  # /proc/…/root itself is a link
    return [entry for entry in entries if entry.path and not _is_one_of(entry.path, ENGINES_OWN)]


def _is_one_of(path: bytes, places: Iterable[bytes]) -> bool:
    return any(path == place or path.startswith(place + b"/") for place in places)


def written(fleet: Fleet, name: str, **options: object) -> None:
    """A container on alpha that has written something of every kind into its root."""
    fleet.sleeper(name, **options)
    fleet.execute("alpha", name, WORK)
    pid = fleet.present("alpha", name).attrs["State"]["Pid"]
    fleet.alpha.run(
        [sys.executable, "-c", MARKS, f"/proc/{pid}/root/work", CAPABILITY], env={"PYTHONPATH": str(REPOSITORY)}
    )


def warnings(fleet: Fleet, migration: str) -> str:
    return " ".join(
        line
        for event in fleet.events(migration)
        if isinstance(event.data, schema.SourcePrepared)
        for line in event.data.warnings
    )


def test_what_a_container_wrote_outside_of_its_mounts_moves_with_it_and_comes_back_changed(fleet: Fleet) -> None:
    fleet.volume("alpha", "root-data")
    written(fleet, "root", volumes={"root-data": {"bind": "/data"}})
    before, whole = layer(fleet, "alpha", "root"), seen(fleet, "alpha", "root")
    assert any(map(is_whiteout, before))
    assert any(entry.path == b"var" and dict(entry.xattrs)[b"trusted.overlay.opaque"] == b"y" for entry in before)

    fleet.migrate("root-1", "root")
    assert differences(whole, seen(fleet, "beta", "root")) == []
    assert differences(before, layer(fleet, "beta", "root")) == []
    assert differences(before, layer(fleet, "alpha", "root.cargo-root-1")) == [], "the source's copy was touched"
    assert warnings(fleet, "root-1") == "" or "outside of the mounts" not in warnings(fleet, "root-1")

    fleet.execute("beta", "root", ON_THE_TARGET)
    changed, whole = layer(fleet, "beta", "root"), seen(fleet, "beta", "root")
    fleet.control("root-1", "rollback")
    fleet.wait_end("root-1", "rolled_back")
    assert differences(whole, seen(fleet, "alpha", "root")) == []
    assert differences(changed, layer(fleet, "alpha", "root")) == []
    for host in ("alpha", "beta"):
        fleet.assert_clean(host, "root-1")
    fleet.assert_sound("root-1")


@pytest.mark.parametrize(
    "strategy",
    [
        "hybrid",
        pytest.param("postcopy", marks=pytest.mark.long),
        pytest.param("precopy", marks=pytest.mark.long),
        pytest.param("cold", marks=pytest.mark.long),
        pytest.param("auto", marks=pytest.mark.long),
    ],
)
def test_a_layer_that_is_written_until_the_stop_arrives_as_it_was_then(fleet: Fleet, strategy: str) -> None:
    name = f"busy-{strategy}"
    fleet.run(name, command=["sh", "-c", BUSY])
    wait_until(lambda: fleet.execute("alpha", name, "wc -l < /busy/log") > "2", "it does not write", 15)
    events = fleet.migrate(f"{name}-1", name, strategy=strategy)
    frozen = layer(fleet, "alpha", f"{name}.cargo-{name}-1")
    assert {entry.path for entry in frozen} >= {b"busy/log", b"stopped"}  # the stop may come when `linked` is gone
    assert differences(frozen, layer(fleet, "beta", name)) == []
    digests = next(event.data.digests for event in events if isinstance(event.data, schema.Verified))
    assert list(digests) == ["/"]
    fleet.assert_sound(f"{name}-1")


def test_a_layer_stays_behind_when_the_request_says_so_and_a_person_is_told(fleet: Fleet) -> None:
    """P14: what is not carried is named."""
    written(fleet, "left")
    events = fleet.migrate("left-1", "left", rootfs=False)
    assert "outside of the mounts" in warnings(fleet, "left-1")
    assert layer(fleet, "beta", "left") == []
    prepared = next(event.data for event in events if isinstance(event.data, schema.SourcePrepared))
    assert prepared.mounts == ()


def test_a_start_that_fails_loses_nothing_of_the_layer_that_was_put_into_its_container(fleet: Fleet) -> None:
    """F7: the container is made anew for each start, its writable layer is the same."""
    written(fleet, "ports", ports={"8080/tcp": 8080})
    before = layer(fleet, "alpha", "ports")
    fleet.failpoints("hostd/beta", "target.start_container:before_effect=pause")
    since = fleet.log_size("beta.hostd")
    fleet.request("ports-1", "ports", start="cold")  # one that waits at its gate cannot be looked at
    fleet.wait_step("beta.hostd", "start_container:before_effect", since, 40)
    first = fleet.present("beta", "ports").id
    fleet.beta.run([sys.executable, "-c", TAKE_PORT])
    fleet.failpoints("hostd/beta", "")
    fleet.wait_for("ports-1", "step_failed")
    fleet.beta.run([sys.executable, "-c", GIVE_PORT])
    fleet.wait_end("ports-1", "completed")
    assert fleet.present("beta", "ports").id != first
    assert differences(before, layer(fleet, "beta", "ports")) == []


TAKE_PORT = """if 1:
    import os, socket, sys
    held = socket.create_server(("0.0.0.0", 8080))
    if os.fork() == 0:
        os.setsid()
        open("/tmp/holder", "w").write(str(os.getpid()))
        for descriptor in (0, 1, 2):
            os.close(descriptor)
        import signal
        signal.pause()
"""
GIVE_PORT = """if 1:
    import os, signal
    os.kill(int(open("/tmp/holder").read()), signal.SIGTERM)
    os.unlink("/tmp/holder")
"""
