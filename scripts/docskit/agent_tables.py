"""Writes ``events/agent_tables.py`` from the agents' own machines; a test compares."""

from __future__ import annotations

from pathlib import Path

from hostd import source, target
from hostd.plan import _REPEATED, Plan

PLACE = Path(__file__).parents[2] / "events" / "agent_tables.py"

_INTRODUCTION = '''\
"""The machines of hostd/source.py and hostd/target.py as data. Written by ``scripts/docs``: change them there, not here.

See ``events/agents.py`` for why this copy exists. Pure: no clock, no randomness, no I/O.
"""

# fmt: off
from events.agents import AgentMachine, AgentStep
from events.machine import Row, Table
'''


def text() -> str:
    """The whole module."""
    parts = [_INTRODUCTION]
    parts += [_machine(plan) for plan in (source.PLAN, target.PLAN)]
    parts.append("AGENTS = {machine.table.name: machine for machine in (SOURCE, TARGET)}\n")
    return "\n".join(parts)


def _machine(plan: Plan) -> str:
    table = plan.table
    lines = [
        f"{plan.role.upper()} = AgentMachine(",
        "    Table(",
        f"        {_quoted(table.name)},",
        *_listed("states", table.states),
        f"        initial={_quoted(table.initial)},",
        "        rows=(",
        *(f"            Row({_quoted(r.event)}, {_tuple(r.states)}, {_quoted(r.next_state)})," for r in table.rows),
        "        ),",
        *_listed("ignored", sorted(table.ignored)),
        *_listed("final", sorted(table.final)),
        "    ),",
        "    {",
    ]
    for state, step in plan.steps.items():
        reports = step.conclude is not None
        words = f"{_quoted(step.name)}, {_tuple(step.effects)}, reports={reports}, undo={step.undo}"
        lines.append(f"        {_quoted(state)}: AgentStep({words}),")
    lines += ["    },", f"    frozenset({_tuple(tuple(sorted(_REPEATED)))}),", ")", ""]
    return "\n".join(lines)


def _listed(name: str, items: object) -> list[str]:
    assert isinstance(items, list | tuple)
    return [f"        {name}=(", *(f"            {_quoted(item)}," for item in items), "        ),"]


def _quoted(word: str) -> str:
    return f'"{word}"'


def _tuple(words: tuple[str, ...]) -> str:
    return "(" + ", ".join(_quoted(word) for word in words) + (",)" if len(words) == 1 else ")")


def main() -> None:
    """Write the module."""
    PLACE.write_text(text())
    print("events/agent_tables.py")


if __name__ == "__main__":
    main()
