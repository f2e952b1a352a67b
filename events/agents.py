"""The agents' machines as data, for those who may not import the agents: ``cargoctl``, which replays and audits
histories, and the list of failpoints.

The machines themselves are written in ``hostd/source.py`` and ``hostd/target.py``, which stay the place to read and to
change them. ``scripts/docs`` writes what they say into ``events/agent_tables.py``, and a test fails when that copy is
not current; so coordinator and agents need not import each other, and the data cannot drift apart.

Pure: no clock, no randomness, no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from events.machine import Table


class AgentStep(NamedTuple):
    """What a host does in one state of its machine."""

    name: str
    effects: tuple[str, ...]
    reports: bool
    """It ends with an event of the agent's."""
    undo: bool
    """It runs the effects' way back."""


class AgentMachine(NamedTuple):
    """One agent role: its table, and the step of each state that has one."""

    table: Table
    steps: Mapping[str, AgentStep]
    repeated: frozenset[str]
    """Event types that ask for the state's step anew even when they leave the state as it was."""
