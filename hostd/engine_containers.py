"""The adapter's part for containers: look at them, create, start, stop and remove them.

See hostd/engine.py for the rules. Stopping is where data is at stake: what a lost reply leaves open is
looked up, a container is only ever killed by its own stop's grace, and how it ended is reported from
``inspect``, so that the answer is the same after a crash of this process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from events.errors import PermanentError, RefusedError, TransientError
from events.schema import PortBinding
from hostd.docker_json import ContainerView, RowView, view
from hostd.ending import Ending, watch_container
from hostd.engine_calls import ContainerSummary, MissingError, NameTakenError, StopResult
from hostd.engine_images import ImageCalls
from hostd.gate import PLAIN_RUNTIME, RUNTIME
from hostd.image_identity import is_same
from hostd.spec import (
    DEFAULT_STOP_TIMEOUT_SECONDS,
    MIGRATION_LABEL,
    ContainerSpec,
    further_networks,
    to_create_body,
)

UNLIMITED_STOP_SECONDS = 3600.0
"""How long one request waits for a container whose stop timeout is -1; the step is repeated after it."""
LONGEST_GATED_START_SECONDS = 1000.0
"""Somewhat longer than the runtime waits at a gate."""
ENDS_WITH_ITS_NAMESPACE = frozenset({PLAIN_RUNTIME, RUNTIME, "io.containerd.runc.v2"})
"""Runtimes all of whose processes are in the container's pid namespace."""
SIGKILL_EXIT_CODE = 137
"""128 + 9: what Docker reports when a container's first process was killed."""


class ContainerCalls(ImageCalls):
    """Containers of one engine."""

    def inspect(self, name_or_id: str) -> dict[str, Any] | None:
        """Docker's description, or None. A text that is merely the beginning of an id finds nothing.

        Of a container whose end Docker has still to take note of (``stop_early``), after it has.
        """
        if (ending := self.ending.get(name_or_id)) is not None and ending.settle(self.timeout_seconds):
            self.ending.pop(name_or_id, None)
        with contextlib.suppress(MissingError):
            raw = self._json("GET", "/containers/{0}/json", name_or_id, what=f"looking at the container {name_or_id!r}")
            if name_or_id in (raw.get("Id"), str(raw.get("Name", "")).removeprefix("/")):
                return raw
        return None

    def containers(self, *, filters: Mapping[str, Sequence[str]] | None = None) -> list[ContainerSummary]:
        """All containers, running or not, in Docker's order."""
        query = {"all": "1", "filters": msgspec.json.encode(filters or {}).decode()}
        rows = self._json_list("GET", "/containers/json", query=query, what="listing containers")
        return [_summary(row) for row in rows]

    def inspect_all(self, rows: Sequence[ContainerSummary] | None = None) -> list[dict[str, Any]]:
        """The descriptions of all containers, or of ``rows``; one that vanishes meanwhile is left out."""
        # Docker describes a container that waits at its gate only once it has started; it holds nobody up here.
        listed = self.containers() if rows is None else rows
        found = (self.inspect(row.id) for row in listed if row.id not in self.starting)
        return [raw for raw in found if raw is not None]

    def find_by_label(self, label: str, value: str) -> list[ContainerSummary]:
        """Containers that carry exactly this label."""
        return self.containers(filters={"label": [f"{label}={value}"]})

    def containers_using_volume(self, name: str) -> list[ContainerSummary]:
        """Containers, running or not, that mount the volume ``name``."""
        # Docker's filter also matches destinations of mounts, so its answer is filtered again.
        return [row for row in self.containers(filters={"volume": [name]}) if name in row.volumes]

    def pid(self, container_id: str) -> int | None:
        """The first process of the running container, or None."""
        container = self._look(container_id)
        return container.state.pid or None if container is not None and container.state.running else None

    def published_ports(self) -> dict[str, tuple[PortBinding, ...]]:
        """Host ports in use, by name of the running container that has them."""
        return {row.name: row.published for row in self.containers() if row.published}

    def writable_layer_changes(self, container_id: str) -> list[str]:
        """Paths that the container added, changed or deleted outside of its mounts. Raises MissingError."""
        path = "/containers/{0}/changes"
        rows = self._json_list("GET", path, container_id, what="comparing the container with its image")
        return [str(row.get("Path", "")) for row in rows if isinstance(row, dict)]

    # --- acting -----------------------------------------------------------------------------------

    def create(
        self,
        name: str,
        spec: ContainerSpec,
        *,
        labels: Mapping[str, str],
        restart_policy: str = "no",
        restart_max_retries: int = 0,
        places: Mapping[str, str] | None = None,
        image: str | None = None,
        runtime: str = "",
    ) -> str:
        """Create the container of ``spec`` under ``name``, without starting it; returns its id.

        ``labels`` must hold ``cargo.migration``. A container of that name that carries all of ``labels`` is
        ours from an attempt before and is adopted (F6). ``image`` defaults to the name that the spec knows,
        if it means the same image here, and to the id it has here otherwise. ``places``: see to_create_body.
        ``runtime`` takes the place of the spec's.
        Raises RefusedError when somebody else's container has the name, MissingError when the image or a
        network is not here.
        """
        if not labels.get(MIGRATION_LABEL):
            raise PermanentError(f"a container is only created with the label {MIGRATION_LABEL}")
        body = to_create_body(
            spec,
            image=image or self._image_for(spec),
            places=places,
            restart_policy=restart_policy,
            restart_max_retries=restart_max_retries,
            labels=labels,
        )
        if runtime:
            body["HostConfig"]["Runtime"] = runtime
        found = self._own(name, labels)
        if found is None:
            found = self._create(name, body, labels)
        self._connect_networks(found, spec)
        return found

    def _image_for(self, spec: ContainerSpec) -> str:
        named = self.image_inspect(spec.image_reference)
        if named is not None and is_same(named, spec.image_id, spec.image_identity):
            return spec.image_reference
        found = self.image_of(spec.image_id, spec.image_identity, (*spec.image_digests, *spec.image_tags))
        return spec.image_id if found is None else str(found["Id"])

    def _own(self, name: str, labels: Mapping[str, str]) -> str | None:
        """The id of our container ``name``; None when the name is free. Raises RefusedError."""
        raw = self.inspect(name)
        if raw is None:
            return None
        container = view(ContainerView, raw, f"the container {name!r}")
        theirs = container.config.labels or {}
        if all(theirs.get(key) == value for key, value in labels.items()):
            return container.id
        raise RefusedError(
            [
                f"there is a container {name!r} on this host already, and it is not of this migration; "
                "it was not touched, so rename or remove it first"
            ]
        )

    def _create(self, name: str, body: dict[str, Any], labels: Mapping[str, str]) -> str:
        try:
            reply = self._json(
                "POST", "/containers/create", query={"name": name}, body=body,
                what=f"creating the container {name!r}",
            )  # fmt: skip
        except (TransientError, NameTakenError):
            # The reply may be lost, not the request; or an earlier request has taken effect just now.
            found = self._own(name, labels)
            if found is None:
                raise
            return found
        return str(reply["Id"])

    def _connect_networks(self, container_id: str, spec: ContainerSpec) -> None:
        container = self._must(container_id)
        connected = container.network_settings.networks or {}
        for name, endpoint in further_networks(spec).items():
            if name not in connected:
                self._call(
                    "POST", "/networks/{0}/connect", name,
                    body={"Container": container_id, "EndpointConfig": endpoint},
                    what=f"connecting the container to the network {name!r}",
                )  # fmt: skip

    def remove(self, container_id: str, *, volumes: bool = False) -> None:
        """Remove a stopped container, with its anonymous volumes if asked; absent is fine.

        Raises PermanentError while it runs: it is never forced.
        """
        with contextlib.suppress(MissingError):
            self._call(
                "DELETE", "/containers/{0}", container_id,
                query={"v": "1" if volumes else "0", "force": "0"},
                what=f"removing the container {container_id[:12]}",
            )  # fmt: skip

    def try_mounts(self, container_id: str) -> None:
        """Have Docker mount all of a created container's volumes once, as it will when it starts it.

        Asking for a file that is not there does that. Raises RefusedError with the kernel's reason when it fails.
        """
        what = "attaching the container's shared storage"
        query = {"path": f"/.cargo-{container_id[:12]}"}
        try:
            self._call("GET", "/containers/{0}/archive", container_id, query=query, what=what)
        except MissingError:
            return  # the file; everything else was there
        except TransientError as error:
            if "Docker answered" not in str(error):
                raise
            raise RefusedError(
                [
                    f"this host cannot attach the container's shared storage: {error}. See that the share is exported "
                    "to this host, that it can be reached, and that the kernel has its file system (nfsv4, cifs)"
                ]
            ) from error

    def rename(self, container_id: str, name: str) -> None:
        """Give the container another name. Raises RefusedError when the name is taken, MissingError."""
        if self._must(container_id).name == f"/{name}":
            return
        try:
            self._call(
                "POST", "/containers/{0}/rename", container_id, query={"name": name},
                what=f"renaming the container {container_id[:12]} to {name!r}",
            )  # fmt: skip
        except NameTakenError as error:
            raise RefusedError([f"the name {name!r} is taken by another container on this host"]) from error

    def start(self, container_id: str, *, waits: bool = False) -> None:
        """Start the container; one that runs already is fine. ``waits``: at a gate (hostd/gate.py), maybe for long.

        Raises PermanentError when a port is taken: remove the container and create it anew then, because a
        second start may succeed *without* the port (F7); see hostd.spec.missing_ports.
        """
        self._call(
            "POST", "/containers/{0}/start", container_id,
            timeout_seconds=LONGEST_GATED_START_SECONDS if waits else None,
            what=f"starting the container {container_id[:12]}",
        )  # fmt: skip

    def stop(self, container_id: str, timeout_seconds: int | None = None) -> StopResult:
        """Stop the container, and kill it after ``timeout_seconds``; returns how it ended.

        None takes the container's own grace, or Docker's 10 s. Repeating it observes the same end.
        Raises MissingError, or TransientError while it is still running.
        """
        container = self._must(container_id)
        grace = timeout_seconds
        if grace is None:
            own = container.config.stop_timeout
            grace = DEFAULT_STOP_TIMEOUT_SECONDS if own is None else own
        if container.state.running:
            wait = self.timeout_seconds + (grace if grace >= 0 else UNLIMITED_STOP_SECONDS)
            lost = None
            try:
                self._call(
                    "POST", "/containers/{0}/stop", container_id, query={"t": str(grace)},
                    timeout_seconds=wait, what=f"stopping the container {container_id[:12]}",
                )  # fmt: skip
            except TransientError as error:
                lost = error  # what became of the container is looked up, not guessed
            container = self._must(container_id)
            if container.state.running:
                words = f"the container {container_id[:12]} still runs after it was told to stop"
                raise TransientError(f"{words}; it is told again") from lost
        return _stop_result(container)

    def stop_early(self, container_id: str, timeout_seconds: int | None = None) -> StopResult | None:
        """Like ``stop``, but back as soon as none of the container's processes is left and Docker has told of its death.

        None, if it has not cleaned up yet: that goes on. Hears of the death from whoever goes through ``events``.
        Whoever looks at the container afterwards waits for Docker, and ``stop``, repeated, tells how it ended.
        """
        container = self._must(container_id)
        process = None
        # Without a pid namespace of its own, its first process does not end last. Other runtimes than runc may have
        # processes outside of it that still write (a sandbox's file server).
        settings = container.host_config
        if not settings.pid_mode and (settings.runtime or PLAIN_RUNTIME) in ENDS_WITH_ITS_NAMESPACE:
            process = watch_container(container.id, container.state.pid) if container.state.running else None
        if process is None:
            return self.stop(container_id, timeout_seconds)
        ending = self.ending[container_id] = Ending(lambda: self.stop(container_id, timeout_seconds))
        try:
            return None if ending.first(process) else ending.result()
        finally:
            os.close(process)

    def wait_exit(self, container_id: str, timeout_seconds: float) -> StopResult | None:
        """Wait until the container does not run; None when it still does after ``timeout_seconds``."""
        container = self._must(container_id)
        if container.state.running:
            with contextlib.suppress(TransientError):  # the time limit, or a daemon that went away
                self._call(
                    "POST", "/containers/{0}/wait", container_id, query={"condition": "not-running"},
                    timeout_seconds=timeout_seconds, what="waiting for the container's end",
                )  # fmt: skip
            container = self._must(container_id)
        return None if container.state.running else _stop_result(container)

    def set_restart_policy(self, container_id: str, name: str, max_retries: int = 0) -> None:
        """A14: set the restart policy and read it back.

        Raises MissingError; TransientError when the engine shows another one afterwards.
        """
        policy: dict[str, Any] = {"Name": name}
        if name == "on-failure":
            policy["MaximumRetryCount"] = max_retries
        if self._policy(container_id) == (name, max_retries):
            return
        self._call(
            "POST", "/containers/{0}/update", container_id, body={"RestartPolicy": policy},
            what=f"setting the restart policy of {container_id[:12]} to {name!r}",
        )  # fmt: skip
        found = self._policy(container_id)
        if found != (name, policy.get("MaximumRetryCount", 0)):
            raise TransientError(
                f"the restart policy of {container_id[:12]} was set to {name!r}, but Docker shows "
                f"{found[0]!r} with {found[1]} retries; the container was not stopped"
            )

    def _policy(self, container_id: str) -> tuple[str, int]:
        policy = self._must(container_id).host_config.restart_policy
        return (policy.name or "no", policy.maximum_retry_count or 0) if policy is not None else ("no", 0)

    def pause(self, container_id: str) -> None:
        """Freeze the container's processes; one that is paused already is fine."""
        if not self._must(container_id).state.paused:
            self._call("POST", "/containers/{0}/pause", container_id, what="pausing the container")

    def unpause(self, container_id: str) -> None:
        """Let the container's processes go on; one that is not paused is fine."""
        if self._must(container_id).state.paused:
            self._call("POST", "/containers/{0}/unpause", container_id, what="unpausing the container")

    def _look(self, container_id: str) -> ContainerView | None:
        raw = self.inspect(container_id)
        return None if raw is None else view(ContainerView, raw, f"the container {container_id[:12]}")

    def _must(self, container_id: str) -> ContainerView:
        found = self._look(container_id)
        if found is None:
            raise MissingError(f"the container {container_id[:12]} does not exist on this host (any more)")
        return found


def _stop_result(container: ContainerView) -> StopResult:
    state = container.state
    by_signal = container.config.stop_signal or ""
    # Who asked for SIGKILL as the stop signal gets what they asked for: nothing is unclean about that.
    killed = state.exit_code == SIGKILL_EXIT_CODE and by_signal.removeprefix("SIG") not in ("KILL", "9")
    return StopResult(exit_code=state.exit_code, unclean=killed or state.oom_killed, finished_at=state.finished_at)


def _summary(row: Any) -> ContainerSummary:
    found = view(RowView, row, "a container in a list")
    # With links a container has several names; its own has one slash.
    names = [name[1:] for name in found.names or () if name.count("/") == 1]
    return ContainerSummary(
        id=found.id,
        name=names[0] if names else "",
        image=found.image,
        image_id=found.image_id,
        state=found.state,
        labels=found.labels or {},
        volumes=tuple(mount.name for mount in found.mounts or () if mount.name),
        published=tuple(
            PortBinding(
                container_port=f"{port.private_port}/{port.type}", host_ip=port.ip or "", host_port=port.public_port
            )
            for port in found.ports or ()
            if port.public_port
        ),
    )
