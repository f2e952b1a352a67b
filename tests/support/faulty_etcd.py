"""EtcdStore that loses replies on request, with the same words as MemoryStore."""

from __future__ import annotations

from collections.abc import Sequence

from events.etcd import EtcdStore
from events.memory import Fault
from events.store import Compare, Delete, NoAnswerError, Outcome, Put


class FaultyEtcdStore(EtcdStore):
    """Everything reaches the real etcd, or does not, as ``fail_next`` says; the caller hears nothing."""

    _faults: tuple[Fault, ...] = ()
    _late: tuple[tuple[Sequence[Compare], Sequence[Put | Delete]], ...] = ()

    def fail_next(self, fault: Fault, *, times: int = 1) -> None:
        """As ``MemoryStore.fail_next``."""
        self._faults += (fault,) * times

    def _transact(self, compares: Sequence[Compare], operations: Sequence[Put | Delete]) -> Outcome:
        late, self._late = self._late, ()
        for pending in late:
            super()._transact(*pending)
        fault, self._faults = (self._faults[0], self._faults[1:]) if self._faults else (None, ())
        if fault == "not_applied":
            raise NoAnswerError("the request was lost")
        if fault == "applied_late":
            self._late = ((compares, operations),)
            raise NoAnswerError("the request is late")
        outcome = super()._transact(compares, operations)
        if fault == "applied_lost":
            raise NoAnswerError("the reply was lost")
        return outcome
