"""The adapter's part for volumes and networks. See hostd/engine.py for the rules."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from events.errors import RefusedError
from hostd.docker_json import ContainerView, VolumeView, view
from hostd.engine_calls import Calls, MissingError
from hostd.shared_storage import SharedPlace, volume_problem


class VolumeCalls(Calls):
    """Volumes and networks of one engine."""

    def volumes(self) -> list[dict[str, Any]]:
        """Descriptions of all volumes."""
        found = self._json("GET", "/volumes", what="listing volumes").get("Volumes")
        return [row for row in found or [] if isinstance(row, dict)]

    def volume_inspect(self, name: str) -> dict[str, Any] | None:
        """The description of the volume, or None."""
        try:
            return self._json("GET", "/volumes/{0}", name, what=f"looking at the volume {name!r}")
        except MissingError:
            return None

    def volume_create(
        self, name: str, labels: Mapping[str, str], own_labels: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Create a volume of the local driver with our ``labels``, on top of its own; one that has ours is adopted.

        Raises RefusedError when somebody else's volume has the name: Docker itself would just hand it out.
        """
        what = f"creating the volume {name!r}"
        raw = self.volume_inspect(name)
        if raw is None:
            body = {"Name": name, "Driver": "local", "Labels": {**(own_labels or {}), **labels}}
            raw = self._json("POST", "/volumes/create", body=body, what=what)
        theirs = view(VolumeView, raw, f"the volume {name!r}").labels or {}
        if any(theirs.get(key) != value for key, value in labels.items()):
            raise RefusedError(
                [
                    f"there is a volume {name!r} on this host already, and it is not of this migration; "
                    "it was not touched, so remove or rename it first"
                ]
            )
        return raw

    def volume_attach(self, place: SharedPlace, labels: Mapping[str, str]) -> None:
        """Make a volume that stands for the same share. One that is the same share already is left as it is.

        Raises RefusedError when a volume of that name is another one.
        """
        raw = self.volume_inspect(place.name)
        if raw is None:
            body = {"Name": place.name, "Driver": "local", "DriverOpts": place.options, "Labels": dict(labels)}
            raw = self._json("POST", "/volumes/create", body=body, what=f"creating the volume {place.name!r}")
        existing = view(VolumeView, raw, f"the volume {place.name!r}")
        problem = volume_problem(place, existing.options)
        if problem or existing.driver != "local":
            raise RefusedError(
                [problem or f"there is a volume {place.name!r} of the driver {existing.driver!r} already"]
            )

    def volume_remove(self, name: str) -> None:
        """Remove the volume *and its data*; absent is fine. Raises PermanentError while it is in use."""
        with contextlib.suppress(MissingError):
            self._call("DELETE", "/volumes/{0}", name, what=f"removing the volume {name!r}")

    def volumes_of(self, inspect: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The volumes that an inspected container mounts, by name; vanished ones are left out."""
        container = view(ContainerView, inspect, "the container")
        names = [mount.name for mount in container.mounts or () if mount.type == "volume" and mount.name]
        found = {name: self.volume_inspect(name) for name in names}
        return {name: raw for name, raw in found.items() if raw is not None}

    def networks(self) -> dict[str, dict[str, Any]]:
        """Descriptions of all networks, by name."""
        rows = self._json_list("GET", "/networks", what="listing networks")
        return {str(row["Name"]): row for row in rows if isinstance(row, dict) and "Name" in row}

    def network_inspect(self, name: str) -> dict[str, Any] | None:
        """The description of the network, with the containers that run in it, or None."""
        try:
            return self._json("GET", "/networks/{0}", name, what=f"looking at the network {name!r}")
        except MissingError:
            return None

    def network_create(self, body: Mapping[str, Any]) -> None:
        """Create a network, see hostd.networks.create_body. Raises NameTakenError when there is one of that name."""
        what = f"creating the network {str(body.get('Name'))!r}"
        self._json("POST", "/networks/create", body=body, what=what)

    def network_remove(self, network_id: str) -> None:
        """Remove the network; absent is fine. Raises PermanentError while a running container is in it."""
        with contextlib.suppress(MissingError):
            self._call("DELETE", "/networks/{0}", network_id, what=f"removing the network {network_id[:12]}")
