"""Reads the small records that this host keeps on its own disk: journals, lists, marks.

A crash, a full disk or a hand may have damaged one. What it must never do: let a damaged record pass for an absent one, since
what the record vouches for would then be done again, or be forgotten.

Stands below the modules that write such records (``write_durably`` of hostd/fold.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from events.errors import PermanentError

MAX_BYTES = 1024**3
"""The largest is a list of placeholders, some hundred bytes for each of ten million files at most."""
_Kind = TypeVar("_Kind")


def read_own(file: Path, kind: type[_Kind]) -> _Kind:
    """What the MessagePack record ``file``, which is there, holds. Raises PermanentError when it holds anything else."""
    try:
        if (size := file.stat().st_size) > MAX_BYTES:
            raise PermanentError(f"the agent's own record {file} has {size} bytes, which no record has; {_CONSEQUENCE}")
        return msgspec.msgpack.decode(file.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise PermanentError(f"the agent's own record {file} cannot be read ({error}); {_CONSEQUENCE}") from error


_CONSEQUENCE = (
    "nothing was done with the data that it is about, which is as it was. Look whether that disk is whole, and bring the "
    "file back; without it a person has to see where the data is"
)
