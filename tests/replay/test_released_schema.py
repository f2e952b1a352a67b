"""A17: what a history may hold is what it was: nothing renamed, removed, retyped or given another default.

``schema-0.1.json`` is the schema as the release of that number has it. Until that release is made, and when a field or an event was
added on purpose, ``python -m tests.replay.test_released_schema`` writes it anew; look at the difference before it is committed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from events import schema
from events.errors import SchemaError
from events.schema import EVENT_TYPES, Data, Stamp, decode_event, next_event
from tests.support.histories import SAMPLES

RECORDED = Path(__file__).with_name("schema-0.1.json")
STAMP = Stamp(uuid="u", at="2030-01-01T00:00:00.000Z", by="coordinator/c1", boot="b", epoch=1)


def described() -> dict[str, Any]:
    """Every structure with its fields, and every event with its author and phase, as plain data."""
    found: dict[str, Any] = {}
    for kind in sorted(Data.__subclasses__(), key=lambda kind: kind.__name__):
        if kind.__module__ == schema.__name__:
            found[kind.__name__] = {field.name: _field(field) for field in msgspec.structs.fields(kind)}
    events = {name: [row.data.__name__, sorted(row.authors), row.phase] for name, row in EVENT_TYPES.items()}
    return {"structures": found, "events": events}


def _field(field: msgspec.structs.FieldInfo) -> dict[str, Any]:
    words = str(field.type).replace("events.schema.", "").replace("typing.", "")
    if field.required:
        return {"type": words}
    default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()  # type: ignore[operator]
    return {"type": words, "default": repr(default)}


def test_nothing_of_the_released_schema_was_taken_away_or_given_another_meaning() -> None:
    """A17: an older history says the same to a newer process."""
    before, now = json.loads(RECORDED.read_text()), described()
    for name, event in before["events"].items():
        assert now["events"].get(name) == event, f"the event {name} is another one now"
    for name, fields in before["structures"].items():
        for field, words in fields.items():
            assert now["structures"].get(name, {}).get(field) == words, f"{name}.{field} is another one now"


def test_what_was_added_to_the_released_schema_is_optional() -> None:
    """A17: histories from before do not have it."""
    before = json.loads(RECORDED.read_text())
    for name, fields in described()["structures"].items():
        for field, words in fields.items():
            if field not in before["structures"].get(name, {}) and name in before["structures"]:
                assert "default" in words, f"{name}.{field} is new and needs a default"


@pytest.mark.parametrize("name", EVENT_TYPES)
def test_an_event_with_a_field_of_tomorrow_is_not_understood(name: str) -> None:
    """A17: it is not read as if the field were not there."""
    text = json.loads(next_event(None, SAMPLES[name], cause=0, stamp=STAMP).raw)
    decode_event(json.dumps(text).encode())
    text["data"]["tomorrow"] = 1
    with pytest.raises(SchemaError, match="tomorrow"):
        decode_event(json.dumps(text).encode())


def test_an_optional_field_that_nobody_set_is_not_written() -> None:
    """A17: so a version that has it can stand beside one that has not. CONTRIBUTING.md asks for this form."""

    class Later(Data, frozen=True, kw_only=True):
        kib: int
        remark: str | msgspec.UnsetType = msgspec.UNSET

    class Today(Data, frozen=True, kw_only=True):
        kib: int

    written = msgspec.json.encode(Later(kib=1))
    assert msgspec.json.decode(written, type=Today) == Today(kib=1)


if __name__ == "__main__":
    RECORDED.write_text(json.dumps(described(), indent=1, sort_keys=True) + "\n")
    print(RECORDED)
