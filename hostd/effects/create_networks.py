"""Make the container's user-defined networks that this host lacks; one of the same name that fits is used."""

from __future__ import annotations

from typing import ClassVar

from hostd.effects.arrival import labels
from hostd.effects.base import Context, Effect, Outcome
from hostd.effects.fetch_spec import arriving_spec
from hostd.engine_calls import NameTakenError
from hostd.networks import create_body, differing_subnets, network_names


class CreateNetworks(Effect):
    """Creates them under our labels. ``check_target`` has found out that they can be."""

    name: ClassVar[str] = "create_networks"

    def run(self, context: Context) -> Outcome:
        engine = context.bench.engine
        spec = arriving_spec(context)
        warnings: list[str] = []
        found = engine.networks()
        for name in network_names(spec.networks, spec.network_mode):
            wanted = spec.network_definitions.get(name)
            if name in found:
                warnings += differing_subnets(name, wanted, found[name])
                continue
            body = create_body(name, wanted or {}, spec.networks.get(name), labels(context))
            try:
                engine.network_create(body)
            except NameTakenError:
                # Another migration created it between the look and the act; its addresses are checked as it stands.
                warnings += differing_subnets(name, wanted, engine.networks().get(name, {}))
        return {"warnings": tuple(warnings)}

    def undo(self, context: Context) -> Outcome:
        """Remove those that were created here, unless another container is on them by now."""
        engine = context.bench.engine
        ours = labels(context)
        for name, network in engine.networks().items():
            theirs = network.get("Labels") or {}
            if any(theirs.get(key) != value for key, value in ours.items()):
                continue
            users = [row.name for row in engine.containers(filters={"network": [str(network["Id"])]})]
            if users:
                context.log.info("the network stays, it is in use", network=name, containers=users)
                continue
            engine.network_remove(str(network["Id"]))
        return None
