"""Write where the container lives now, for whoever follows it: a proxy, a DNS server, a person.

One key, one write, only while the container runs here: two hosts never both say so, because it never runs on both.
It stands in every step that follows the event of the start, so a write that was lost comes with the next one.
"""

from __future__ import annotations

from typing import Any, ClassVar

from events.records import PlacementRecord
from hostd.effects.arrival import our_container
from hostd.effects.base import Context, Effect, Outcome
from hostd.spec import port_bindings


class AnnouncePlacement(Effect):
    """Looks at the container itself, not at the history: what is written was true a moment ago."""

    name: ClassVar[str] = "announce_placement"

    def run(self, context: Context) -> Outcome:
        at_source = context.host == context.view.request.source
        container_id = context.view.source_prepared.container_id if at_source else our_container(context)
        inspected = context.bench.engine.inspect(container_id) if container_id is not None else None
        if inspected is None or not inspected["State"]["Running"]:
            return None
        name = context.view.source_prepared.container_name
        context.bench.place(
            name,
            PlacementRecord(
                container=name,
                container_id=str(inspected["Id"]),
                host=context.host,
                address=context.bench.settings.address,
                networks=_addresses(inspected, "IPAddress"),
                networks_ipv6=_addresses(inspected, "GlobalIPv6Address"),
                ports=port_bindings(inspected),
                migration=context.migration,
            ),
        )
        return None


def _addresses(inspected: dict[str, Any], kind: str) -> dict[str, str]:
    networks = (inspected.get("NetworkSettings") or {}).get("Networks") or {}
    return {name: str(endpoint[kind]) for name, endpoint in networks.items() if (endpoint or {}).get(kind)}
