"""The union: what one data mount of the container stands on while its contents are still arriving.

Per mount, in a stage directory on the file system of the final place::

    upper/tree  what the pre-copy rounds brought, then every write made since      work     overlay's own
    replica     what the background fill brings                                    basis    old versions
    incoming, partial, spare   things in the making                                remote   sshfs or NFS of the source
    lower       replica, else remote (``hostd/lower.py``)                          merged   overlay(upper over lower)
    names, twins, present   what lets the kernel read by itself what is here (``hostd/local_reads.py``)

and ``merged/tree`` is bound onto the place that Docker binds into the container. ``upper/tree`` is opaque, so
every directory the container sees is local; only placeholders (``hostd/placement.py``) read from ``lower``,
where a file's contents move from ``remote`` to ``replica`` without changing name, size or inode number.

What it must never do: change a layer of a mounted union (``present`` grows, see there), mount one upper twice, unmount lazily, or delete
anything that is or may be the only copy of the container's data. Every verb looks first, acts, and looks again.

Flow: ``create`` (prepare) → rsync into ``upper_tree`` (rounds) → ``attach_remote`` → source stops → ``apply`` →
``mount_lower`` → ``mount_merged`` → container starts → rsync of ``fill_list`` into ``replica`` → ``detach_remote``
→ at the end ``unmount_all``, ``fold``, ``remove``. With nothing stale: ``apply``, ``place_plain``, ``put_away``, ``remove``.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from events.errors import PermanentError, RefusedError, TransientError
from hostd import local_reads, mounts, placement
from hostd.beneath import Beneath, empty_directory, exchange, remove_tree
from hostd.fold import fold_tree, may_take_its_place, swap_into_place, swapped, write_durably
from hostd.local_reads import LocalReads
from hostd.lower_process import LowerProcess
from hostd.nfs_client import Export
from hostd.own_file import read_own
from hostd.placement import METACOPY, OPAQUE, REDIRECT, Applied, Giver, Placeholder
from hostd.rootfs import require_unused
from hostd.settings import PATIENCE_SECONDS
from hostd.transport import Peer, Transport, sync_filesystem

if TYPE_CHECKING:
    from hostd.manifest import Entry

_OPTIONS = "upperdir=upper,workdir=work,metacopy=on,redirect_dir=on,index=off,xino=off"
"""Explicit, whatever the distribution's defaults (O8). Relative, because a stage's path may hold any character."""
OVERLAY_OPTIONS = f"lowerdir=lower,{_OPTIONS}"
LOCAL_OPTIONS = f"{local_reads.LAYERS},{_OPTIONS}"
"""Where the kernel reads by itself what has arrived."""
REMOTE_IDLE_SECONDS = 3.0
"""Longer than the lower layer keeps a file of the source open that nobody reads."""
LOOK_AGAIN_SECONDS = 0.01
_DIRECTORIES = (
    "upper",
    "work",
    "replica",
    "incoming",
    "partial",
    "basis",
    "spare",
    "remote",
    "lower",
    "merged",
)


class _Created(msgspec.Struct, frozen=True, array_like=True):
    made_place: bool


class _Record(msgspec.Struct, frozen=True, array_like=True):
    path: bytes
    size: int
    handle_type: int
    handle: bytes


@dataclass(frozen=True)
class UnionState:
    """What is there now, by observation."""

    created: bool
    remote: bool
    """The source's tree is mounted (alive or not)."""
    lower: bool
    merged: bool
    placed: bool
    """The union is bound onto the final place."""
    settled: bool
    """What lies at the final place is a plain directory or file: the tree took its place, or there is no stage."""


class Union:
    """One data mount on the target. Not for several threads at once, except ``fill_list`` and ``state``."""

    def __init__(
        self,
        stage: Path,
        place: Path,
        *,
        single_file: bool = False,
        layer: bool = False,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        """``stage`` is this mount's own directory, on the file system of ``place``, where Docker will look.

        ``single_file``: the mount is one file. Then there is no union, only ``upper_tree``, ``apply`` (metadata)
        and ``place_plain``; the caller pulls the contents again in the stop window. ``layer``: the place is the
        upper directory of a container that has not been started. There is no union either, because overlayfs
        takes no overlay as its upper; the tree takes the directory's place, and may be taken out again.
        ``patience_seconds``: how long a read waits for a source that does not answer, before the container gets an error.
        """
        self.stage = stage.absolute()
        self.place = place.absolute()
        self.single_file = single_file
        self.layer = layer
        identity = hashlib.sha256(os.fsencode(self.stage)).hexdigest()[:16]
        self._overlay_name = f"cargo-union-{identity}"
        self._local = LocalReads(self.stage)
        self._lower = LowerProcess(self.stage, f"cargo-lower-{identity}", patience_seconds=patience_seconds)

    @property
    def federable(self) -> bool:
        """Whether contents may be missing when the tree takes its place."""
        return not (self.single_file or self.layer)

    @property
    def upper_tree(self) -> Path:
        """Where the pre-copy rounds put the tree (or the file)."""
        return self.stage / "upper" / "tree"

    @property
    def replica(self) -> Path:
        """Where the fill puts contents, by atomic rename only."""
        return self.stage / "replica"

    @property
    def incoming(self) -> Path:
        """rsync's --temp-dir."""
        return self.stage / "incoming"

    @property
    def partial(self) -> Path:
        """rsync's --partial-dir."""
        return self.stage / "partial"

    @property
    def basis(self) -> Path:
        """Old versions of stale files: give it to the fill as ``basis`` together with ``reread``."""
        return self.stage / "basis"

    @property
    def remote(self) -> Path:
        """Mount point of the source's tree."""
        return self.stage / "remote"

    @property
    def _placeholders_file(self) -> Path:
        return self.stage / "placeholders"

    @property
    def _swap_journal(self) -> Path:
        return self.stage / "swap.journal"

    @property
    def _fold_journal(self) -> Path:
        return self.stage / "fold.journal"

    @property
    def _standing_mark(self) -> Path:
        return self.stage / "standing"

    # --- before the cut-over -------------------------------------------------------------------

    def create(self) -> None:
        """Make the stage directory, and find out whether this kernel and file system can carry a union.

        Creates the place too, empty, if it does not exist. Raises RefusedError with every reason.
        """
        made_place = False
        if not self.layer and not self.place.exists() and not self.place.is_symlink():
            self.place.parent.mkdir(parents=True, exist_ok=True)
            self.place.touch(mode=0o600) if self.single_file else self.place.mkdir(mode=0o700)
            made_place = True
        marker = self.stage / "created"
        if not marker.exists():
            self._require_suitable_place()
            self.stage.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_durably(marker, msgspec.msgpack.encode(_Created(made_place)))
        self._require_suitable_stage()
        for name in _DIRECTORIES:
            directory = self.stage / name
            if not mounts.is_mounted(directory):
                directory.mkdir(mode=0o700, exist_ok=True)
        if not self.single_file:
            self.upper_tree.mkdir(mode=0o700, exist_ok=True)
            if not self.layer and not mounts.is_mounted(self.stage / "merged"):
                self._try_overlay()
                if self._kernel_reads_by_itself():
                    self._local.prepare()
                self._mark_opaque()

    def attach_remote(
        self,
        transport: Transport,
        peer: Peer,
        tree: bytes | str,
        export: Export | None = None,
        *,
        cancelled: threading.Event | None = None,
    ) -> None:
        """Show the source's tree below the stage, and start what will serve the lower layer.

        By sshfs, or by NFS if the source has an ``export`` of it.

        May run before the source stops: nothing of it is remembered. A view that died is replaced, also under
        the running union, whose readers wait meanwhile. Raises TransientError when the source cannot be reached,
        CancelledError once ``cancelled`` is set.
        """
        if not self.federable:
            raise PermanentError(f"{self.place} gets no union, so there is nothing to attach a remote view to")
        with ThreadPoolExecutor(1) as beside:  # either takes some tenths of a second, and needs nothing of the other
            started = beside.submit(self._start_lower)
            transport.mount_remote(peer, tree, self.remote, export, cancelled=cancelled)
            started.result()
        self._lower.keep()

    def _start_lower(self) -> None:
        if not mounts.is_mounted(self.stage / "merged") and not self._lower.serves():
            self._lower.end()
            self._lower.start()

    def apply(self, entries: Iterable[Entry], *, everything: bool = False, contents: Giver | None = None) -> Applied:
        """Apply the dirty manifest to ``upper_tree`` (``placement.apply``), durably; harmless when repeated.

        ``contents`` may give what then needs no placeholder.

        Placeholders of an earlier application stay, unless this one concerns them: ``postcopy`` lays all of them
        before the stop. Raises PermanentError while the union is mounted: then the tree belongs to the container.
        """
        entries = list(entries)
        earlier = self._placeholders()
        described = not earlier or self._local.vouched(self._placeholders_file)
        self._require_unmounted("the dirty manifest cannot be applied", lower_too=False)
        applied = placement.apply(
            self.upper_tree,
            self.basis,
            entries,
            everything=everything,
            spare=self.stage / "spare",
            layer=self.layer,
            contents=contents,
        )
        holders = [*self._untouched(earlier, applied, entries), *applied.placeholders]
        records = [_Record(p.path, p.size, p.handle_type, p.handle) for p in holders]
        write_durably(self._placeholders_file, msgspec.msgpack.encode(records))
        if self._local.prepared and self._local.describe(applied.placeholders if described else holders):
            self._local.vouch(self._placeholders_file)
        sync_filesystem(self.stage)
        return applied

    # --- mounting ------------------------------------------------------------------------------

    def mount_lower(self) -> None:
        """See that the lower layer is served, with the list that ``apply`` has left. Quick after ``attach_remote``.

        Only once the source is frozen: from here on it is remembered. A union whose server has died is taken down,
        if the container does not run. Raises PermanentError, TransientError.
        """
        self._lower.keep()
        serves = self._lower.serves()
        stands = mounts.is_mounted(self.stage / "merged")
        if serves and (stands or not self._lower.has_looked_elsewhere(self._placeholders_file)):
            return
        if stands:  # on a server that is dead, which nothing but another union on another server mends
            self._unmount_union()
        self._lower.end()
        self._lower.start()
        self._lower.keep()

    def prune(self, entries: Iterable[Entry]) -> int:
        """Before a round that pulls only what a manifest lists: remove what the manifest says is gone.

        Returns the number of paths removed. Raises PermanentError while the union is mounted.
        """
        self._require_unmounted("nothing can be removed from its tree", lower_too=False)
        return placement.prune(self.upper_tree, self.stage / "spare", entries, layer=self.layer)

    def mount_merged(self) -> None:
        """Mount the overlay and bind it onto the place. The container may start afterwards.

        Raises RefusedError, in words, when the kernel or the file system cannot carry it.
        """
        merged = self.stage / "merged"
        if not mounts.is_mounted(merged):
            if mounts.mount_at(self.stage / "lower") is None:
                raise PermanentError(f"the lower layer of {self.place} is not mounted; mount it first")
            self._require_unmounted("it cannot be mounted a second time", lower_too=False)
            self._mark_opaque()
            self._mount_overlay()
        record = mounts.mount_at(merged)
        if record is None or not _metacopy_is_on(record.options):
            mounts.unmount(merged)
            raise RefusedError(
                ["the kernel mounted the union without metacopy, so files would appear empty; it was unmounted again"]
            )
        over = mounts.mount_at(self.place)
        if over is not None and over.source != self._overlay_name.encode():
            raise PermanentError(f"something else is mounted on {self.place}: {os.fsdecode(over.source)}")
        if over is None:
            mounts.bind(merged / "tree", self.place)
        self._standing_mark.touch(mode=0o600)

    def _mount_overlay(self) -> None:
        def mount(options: str) -> None:
            mounts.mount("overlay", self._overlay_name, "merged", options, working_directory=self.stage)

        if self._local.vouched(self._placeholders_file):
            # It was tried in ``create``, perhaps under another kernel. The other way shows the same.
            with contextlib.suppress(PermanentError):
                mount(LOCAL_OPTIONS)
                return
        try:
            mount(OVERLAY_OPTIONS)
        except PermanentError as error:
            raise RefusedError([f"this host cannot mount the union for {self.place}: {error}"]) from error

    def stood(self) -> bool:
        """Whether it stands, or stood when the host went down: nobody has begun to take it down since it was mounted."""
        begun = any(journal.exists() for journal in (self._fold_journal, self._swap_journal))
        return self._standing_mark.exists() and (self.stage / "created").exists() and not begun

    def serves(self) -> bool:
        """Whether the lower layer is served. A union on a dead server shows errors; ``mount_lower`` mends it."""
        return self._lower.serves()

    def keep_served(self) -> bool:
        """See that the lower layer outlives its server (``LowerProcess.keep``). Returns whether it had to be revived."""
        return not self.single_file and self._lower.keep()

    def given_up(self) -> bool:
        """Whether the kernel has ended the lower layer: what was not read before can be read only through another."""
        return self._lower.given_up()

    def state(self) -> UnionState:
        """Look. Never touches the inside of a mount."""
        over = mounts.mount_at(self.place)
        return UnionState(
            created=(self.stage / "created").exists(),
            remote=mounts.is_mounted(self.remote),
            lower=mounts.is_mounted(self.stage / "lower"),
            merged=mounts.is_mounted(self.stage / "merged"),
            placed=over is not None and over.source == self._overlay_name.encode(),
            settled=over is None and (swapped(self.place, self._swap_journal) or not (self.stage / "created").exists()),
        )

    # --- fill ----------------------------------------------------------------------------------

    def fill_list(self) -> list[bytes]:
        """Paths, relative to the source's tree, of contents that are still needed and not in the replica.

        Exact while the container works: a file it has overwritten or removed is no longer listed, one that it
        has renamed or linked is.
        """
        return [holder.path for holder in self.remaining()]

    def remaining(self, among: Iterable[Placeholder] | None = None, *, first_only: bool = False) -> list[Placeholder]:
        """As ``fill_list``, with sizes; only those of ``among`` if given, which costs less than looking at all.

        ``first_only``: one is enough, to learn whether there are any.
        """
        holders = self._placeholders() if among is None else list(among)
        if not holders:
            return []
        needed = []
        with Beneath(self.replica) as contents:
            for holder in holders:
                found = contents.stat(holder.path)
                if found is not None and stat.S_ISREG(found.st_mode) and found.st_size == holder.size:
                    continue
                if placement.still_placeholder(contents.root, holder):
                    needed.append(holder)
                    if first_only:
                        break
        return needed

    def admit(self, among: Iterable[Placeholder] | None = None, *, on_disk: bool = False) -> int:
        """Let the kernel read by itself what has arrived, of ``among`` if given. Returns how many files came to that.

        Also under the running union, and in several threads. ``on_disk``: they have been flushed already.
        """
        return self._local.admit(self._placeholders() if among is None else among, on_disk=on_disk)

    def let_go_of_server(self) -> None:
        """Once everything is admitted: have it read without the lower layer's server from now on, where the kernel can."""
        self._local.let_go_of_server()

    def replica_complete(self) -> bool:
        """Whether everything the container can see has its contents on this host."""
        return not self.fill_list()

    def detach_remote(self) -> None:
        """Unmount the source's tree under the running union. The container notices nothing.

        Files that it has open go on with what is here. Raises PermanentError while contents are missing.
        """
        if not mounts.is_mounted(self.remote):
            return
        if missing := self.fill_list():
            raise PermanentError(
                f"{len(missing)} files of {self.place} still have their contents on the source, for example "
                f"{missing[0]!r}. The link stays; let the fill finish."
            )
        self._let_go_of_remote()

    def _let_go_of_remote(self) -> None:
        """Unmount the source's tree, of which nothing is needed any more, whatever state it is in."""
        deadline = time.monotonic() + REMOTE_IDLE_SECONDS
        while time.monotonic() < deadline:
            try:
                Transport.unmount_remote(self.remote)
            except TransientError:  # a read of it has just ended, or hangs
                time.sleep(LOOK_AGAIN_SECONDS)
            else:
                return
        Transport.unmount_remote(self.remote, dead=True)

    # --- the end -------------------------------------------------------------------------------

    def unmount_all(self) -> None:
        """Take the union down, in order; harmless when it is down. No data is touched.

        Raises TransientError while somebody, for example the container in its own namespace, still uses it.
        """
        self._unmount_union()
        servers = self._lower.processes()
        self._lower.end()
        self._let_go_of_remote()
        self._lower.wait_until_ended(servers)

    def _unmount_union(self) -> None:
        # Before the first of it: a reboot in the middle must not have it mounted while its layers change.
        self._standing_mark.unlink(missing_ok=True)
        over = mounts.mount_at(self.place)
        own = self._overlay_name.encode()
        if over is not None and over.source == own:
            self._refuse_if_held(self._copies())
            mounts.unmount(self.place)
        mounts.unmount(self.stage / "merged")
        self._refuse_if_held(set())

    def require_alone(self, container_id: str) -> None:
        """Before that container is stopped for a fold. Raises TransientError while another one uses the union, too."""
        self._refuse_if_held(self._copies(), besides=container_id)

    def fold(self) -> None:
        """With everything unmounted: make the tree plain and swap it into its place. Harmless when repeated.

        Raises PermanentError, with nothing changed, when contents are missing.
        """
        self._require_unmounted("it cannot be folded")
        if self.layer and not swapped(self.place, self._swap_journal):
            require_unused(self.place)
        elif not swapped(self.place, self._swap_journal) and not self.single_file:
            if self._swap_journal.exists() and not self.upper_tree.exists():
                raise PermanentError(f"the tree of {self.place} has gone from {self.upper_tree}; look there first")
            fold_tree(self.upper_tree, self.replica, self.stage / "spare", self._fold_journal)
        swap_into_place(self.upper_tree, self.place, self._swap_journal)

    def layer_root(self) -> Path | None:
        """A layer: where its tree lies now, at the place or in the stage; None if it went with a removed container."""
        if not self.stage.exists() or swapped(self.place, self._swap_journal):
            return self.place if self.place.is_dir() else None
        return self.upper_tree if may_take_its_place(self.upper_tree, self._swap_journal) else None

    def take_out(self) -> None:
        """A layer: bring what lies at the place back to ``upper_tree``, from where it can take another place.

        For a container that is removed although it was started: what it wrote stays. Harmless when repeated.
        """
        if self.layer and swapped(self.place, self._swap_journal):
            require_unused(self.place)
            exchange(self.upper_tree, self.place)
            sync_filesystem(self.stage)

    def place_plain(self, *, untouched: bool = False) -> None:
        """Everything is here: swap the tree into its place without any union. Harmless when repeated.

        ``untouched``: no container has had it. Then, where it never had a placeholder, it is plain already, and is not looked
        through: that would make an outage as long as there are files, and what has been opened to read the source through
        stays for ``put_away``. Raises PermanentError when contents of files are still elsewhere.
        """
        never_united = untouched and not self.layer and not self.single_file and not self._placeholders()
        if never_united and not self._fold_journal.exists() and self.upper_tree.exists():
            self._require_unmounted("it cannot take its place", lower_too=False)
            with contextlib.suppress(OSError):  # not there any more, when this is repeated
                os.removexattr(self.upper_tree, OPAQUE, follow_symlinks=False)
            swap_into_place(self.upper_tree, self.place, self._swap_journal)
            return
        if not swapped(self.place, self._swap_journal) and self.fill_list():
            raise PermanentError(f"files of {self.place} have their contents on the source: it needs the union")
        if self.federable:
            self.unmount_all()
        self.fold()

    def put_away(self) -> None:
        """Take down what a tree that has taken its place as a plain one does not need. Harmless when repeated.

        Raises TransientError.
        """
        state = self.state()
        if self.federable and state.settled and (state.remote or state.lower):
            self.unmount_all()

    def remove(self, *, abandon: bool = False, place_too: bool = False) -> None:
        """Delete the stage. Refused while anything is mounted below it, or while it holds the only data.

        ``abandon``: the data in it is not wanted (an abort). ``place_too``: also delete the place, if ``create``
        made it and it is still empty.
        """
        if not self.stage.exists():
            return
        self._require_unmounted("its stage cannot be deleted")
        if below := mounts.mounts_below(self.stage):
            raise PermanentError(f"{os.fsdecode(below[0].point)} is still mounted; {self.stage} was not deleted")
        settled = swapped(self.place, self._swap_journal)
        if not settled and not abandon and (self.stage / "created").exists():
            raise PermanentError(f"{self.stage} holds the data of {self.place}, which has not been folded yet")
        marker = self.stage / "created"
        made = marker.exists() and read_own(marker, _Created).made_place
        if place_too and made and not settled:
            self._remove_empty_place()
        # From here on the stage is rubbish, also to whoever finds it after a crash in the middle of this.
        marker.unlink(missing_ok=True)
        try:
            with Beneath(self.stage) as inside:
                for name in (*_DIRECTORIES, *local_reads.DIRECTORIES):
                    remove_tree(inside.root, name.encode(), self.stage / "trash")
                empty_directory(inside.root)
            self.stage.rmdir()
        except OSError as error:
            raise PermanentError(f"{self.stage} could not be deleted completely: {error}") from error

    # --- looking -------------------------------------------------------------------------------

    def _placeholders(self) -> list[Placeholder]:
        if not self._placeholders_file.exists():
            return []
        records = read_own(self._placeholders_file, list[_Record])
        return [Placeholder(r.path, r.size, r.handle_type, r.handle) for r in records]

    def _untouched(self, earlier: list[Placeholder], applied: Applied, entries: list[Entry]) -> list[Placeholder]:
        """Placeholders of earlier applications that are still there. Looks only where ``entries`` changed something."""
        if not earlier:
            return []
        fresh = {holder.path for holder in applied.placeholders}
        touched = {entry.path for entry in entries if entry.kind != "d" or entry.stale}
        kept = []
        with Beneath(self.upper_tree) as tree:
            for holder in earlier:
                if holder.path in fresh:
                    continue
                if not any(path in touched for path in _with_parents(holder.path)) or _is_placeholder(tree, holder):
                    kept.append(holder)
        return kept

    def _mark_opaque(self) -> None:
        os.setxattr(self.upper_tree, OPAQUE, b"y", follow_symlinks=False)

    def _copies(self) -> set[bytes]:
        """Where others have it mounted merely because the host has."""
        return {mounts.resolved(self.place), mounts.resolved(self.stage / "merged")}

    def _refuse_if_held(self, copies: set[bytes], besides: str = "") -> None:
        """Somebody in another mount namespace has the union mounted, other than as a copy of ours or ``besides`` a container."""
        if not self.federable:
            return  # there never was one
        for pid, record in mounts.mounted_elsewhere(self._overlay_name.encode()):
            if record.point not in copies and not (besides and mounts.process_of(pid, besides)):
                raise TransientError(
                    f"the union of {self.place} is still in use at {os.fsdecode(record.point)} by pid {pid} "
                    f"({mounts.process_name(pid)}); stop the container first. Nothing was lost."
                )

    def _require_unmounted(self, consequence: str, *, lower_too: bool = True) -> None:
        points = [self.place, self.stage / "merged"] + ([self.stage / "lower"] if lower_too else [])
        for point in points:
            record = mounts.mount_at(point)
            if record is not None:
                raise PermanentError(f"{point} is still mounted ({os.fsdecode(record.source)}), so {consequence}")
        self._refuse_if_held(set())

    def _require_suitable_place(self) -> None:
        reasons = []
        if self.layer:
            return  # what Docker has made in the layer of a container that never ran is made again at its start
        kind = "file" if self.single_file else "directory"
        if self.place.is_symlink() or self.place.is_file() != self.single_file:
            reasons.append(f"{self.place} is not a plain {kind}")
        elif (not self.single_file and any(self.place.iterdir())) or (
            self.single_file and self.place.stat().st_size > 0
        ):
            reasons.append(f"{self.place} is not empty; the data that lies there is left alone")
        if mounts.is_mounted(self.place):
            reasons.append(f"{self.place} is a mount point, so nothing can be swapped into its place")
        if reasons:
            raise RefusedError(reasons)

    def _require_suitable_stage(self) -> None:
        reasons = [f"{tool} is not installed" for tool in ("sshfs", "rsync") if not shutil.which(tool)]
        over = mounts.mount_at(self.place)
        if over is None and self.stage.lstat().st_dev != self.place.lstat().st_dev:
            reasons.append(f"{self.stage} and {self.place} are on different file systems")
        if reasons:
            raise RefusedError(reasons)

    def _try_overlay(self) -> None:
        """D20: mount a tiny union on this very file system and read a placeholder through it."""
        trial = self.stage / "trial"
        mounts.unmount(trial / "merged")
        with Beneath(self.stage) as inside:
            remove_tree(inside.root, b"trial", self.stage / "trash")
        for name in ("lower", "upper/tree", "work", "merged"):
            (trial / name).mkdir(parents=True)
        (trial / "lower" / "contents").write_bytes(b"here")
        holder = trial / "upper" / "tree" / "holder"
        holder.touch()
        try:
            os.truncate(holder, 4)
            os.setxattr(trial / "upper" / "tree", OPAQUE, b"y")
            os.setxattr(holder, METACOPY, b"")
            os.setxattr(holder, REDIRECT, b"/contents")
            mounts.mount("overlay", self._overlay_name, "merged", OVERLAY_OPTIONS, working_directory=trial)
            seen = (trial / "merged" / "tree" / "holder").read_bytes()
        except (OSError, PermanentError) as error:
            why = f"{error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)
            hint = " (no trusted xattrs)" if isinstance(error, OSError) and error.errno == errno.ENOTSUP else ""
            raise RefusedError([f"the file system of {self.place} cannot carry a union{hint}: {why}"]) from error
        finally:
            mounts.unmount(trial / "merged")
            with Beneath(self.stage) as inside:
                remove_tree(inside.root, b"trial", self.stage / "trash")
        if seen != b"here":
            raise RefusedError(["this kernel's overlayfs does not read a file's contents from below (metacopy)"])

    def _kernel_reads_by_itself(self) -> bool:
        trial = self.stage / "trial"
        trial.mkdir()
        try:
            return local_reads.possible(trial, self._overlay_name, LOCAL_OPTIONS)
        finally:
            with Beneath(self.stage) as inside:
                remove_tree(inside.root, b"trial", self.stage / "trash")

    def _remove_empty_place(self) -> None:
        try:
            if not self.single_file:
                self.place.rmdir()
            elif self.place.stat().st_size == 0:
                self.place.unlink()
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.ENOENT}:
                raise PermanentError(f"{self.place} could not be removed: {error.strerror}") from error


def fold_placeholders(tree: Path, contents: Path, stage: Path, *, layer: bool = False) -> None:
    """Give every placeholder of ``tree`` its data from ``contents``, by renames. Harmless when repeated."""
    fold_tree(tree, contents, stage / "spare", stage / "fold.journal", layer=layer)


def _with_parents(path: bytes) -> Iterator[bytes]:
    """``path`` and every directory above it, the tree itself included."""
    while path:
        yield path
        path = os.path.dirname(path)
    yield b""


def _is_placeholder(tree: Beneath, holder: Placeholder) -> bool:
    seen = tree.stat(holder.path)
    if seen is None or not stat.S_ISREG(seen.st_mode):
        return False
    marks = placement.read_xattrs(*tree.locate(holder.path))
    return METACOPY in marks and marks.get(REDIRECT) == b"/" + holder.path


def _metacopy_is_on(options: bytes) -> bool:
    """Whether an overlay reads contents from below. The kernel shows the option only where it is no default."""
    shown = options.split(b",")
    if b"metacopy=on" in shown or b"metacopy=off" in shown:
        return b"metacopy=on" in shown
    default = Path("/sys/module/overlay/parameters/metacopy")
    return default.exists() and default.read_text().strip() == "Y"
