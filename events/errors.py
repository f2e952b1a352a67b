"""The errors that cross a package boundary, each with what a person needs to know.

Adapters translate a library's exceptions into these exactly once; the service loops handle them
exactly once. Nothing else catches them.
"""

from __future__ import annotations


class CargoError(Exception):
    """Base of every error that this project raises on purpose.

    The text says what happened, what it means for the container and its data, and what to do.
    """


class SchemaError(CargoError):
    """A stored record is not one that this version understands. Nobody may act on its stream."""


class ChainError(SchemaError):
    """A history has a gap, a repeated number or a broken hash chain: it was edited or cut."""


class IllegalEventError(SchemaError):
    """An event is well formed, but its author or the state it arrived in makes it illegal."""


class UntrustedError(SchemaError):
    """An event's author cannot be proven: unsigned, altered, by a stranger, or not one who may write it."""


class ConflictError(CargoError):
    """Somebody else appended first. Fold the stream again and decide again."""


class StoreUnavailableError(CargoError):
    """The store cannot be reached, is out of space or refuses us. Never read as 'no migration'."""


class WrongClusterError(StoreUnavailableError):
    """The store answers, but it is another cluster, or an older one, than the one we worked with."""


class LostLeadershipError(ConflictError):
    """The append was guarded by a leadership key that no longer is ours."""


class TransientError(CargoError):
    """An effect failed in a way that may pass: try again, within a bound."""


class PermanentError(CargoError):
    """An effect failed in a way that no repetition mends: a person or an abort must act."""


class RefusedError(PermanentError):
    """A precondition of the migration does not hold. ``reasons`` lists all of them in words."""

    def __init__(self, reasons: list[str]) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = list(reasons)


class CancelledError(CargoError):
    """The effect was told to stop: an abort, a rollback or a shutdown came in."""
