"""Everything that reads what another program wrote, by name. ``trees`` needs root and is absent without it."""

from __future__ import annotations

import os

from tests.fuzz import bus, hosts, trust
from tests.fuzz.campaign import Target

TARGETS: dict[str, Target] = {target.name: target for target in (*bus.TARGETS, *hosts.TARGETS, *trust.TARGETS)}
if os.geteuid() == 0:
    from tests.fuzz import trees

    TARGETS |= {target.name: target for target in trees.TARGETS}
