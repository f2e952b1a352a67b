"""A container that is started up to its gate while the source still runs, to go on in milliseconds.

Docker's start does everything before the first instruction (network, namespaces, root file system, control groups)
and then waits in the runtime (hostd/gate.py). When the trees are in place they are put into the waiting container
(hostd/graft.py) and the gate is opened. Whatever does not fit, or goes wrong, ends in ``cool``: the gate is shut,
Docker undoes the start, and the container starts cold as if nothing had been.

It must never outlive its process: an agent that starts anew shuts every gate that it finds (``shut_left_gates``).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import structlog

from events.errors import CargoError, TransientError
from hostd.engine import Engine
from hostd.gate import Gate, left_gates
from hostd.graft import Graft, GraftError, OciConfig, graft, read_config, why_not
from hostd.neighbours import announce

GATE_SECONDS = 20.0
"""How long a start may take to come to its gate; a cold one would take as long, and queue behind it."""
SETTLE_SECONDS = 60.0
"""How long Docker may take to undo a start that was refused."""
LOOK_AGAIN_SECONDS = 0.002


class WarmStart:
    """One container's start, under way up to its gate. Only the migration's own thread calls it."""

    def __init__(self, engine: Engine, container_id: str, destinations: Sequence[str]) -> None:
        self._engine = engine
        self.container_id = container_id
        self._destinations = tuple(destinations)
        self._gate = Gate(container_id)
        self._refused = ""
        self._failed: CargoError | None = None
        self._grafting: threading.Thread | None = None
        self._grafted: tuple[Graft, ...] = ()
        self._examined: tuple[int, OciConfig] | None = None
        """The container's first process, and what it was made from; once it waits."""
        self._started = threading.Event()
        self._arrived = threading.Event()

    def begin(self) -> None:
        """Start up to the gate, in the background."""
        self._gate.make()
        self._engine.starting.add(self.container_id)
        threading.Thread(target=self._start, name=f"warm:{self.container_id[:12]}", daemon=True).start()
        threading.Thread(target=self._arrive, name=f"gate:{self.container_id[:12]}", daemon=True).start()

    def arrived(self, timeout_seconds: float) -> bool:
        """Wait, up to so long, until the start has come to its gate or is known not to. Returns whether that is so."""
        return self._arrived.wait(timeout_seconds)

    @property
    def refused(self) -> str:
        """Why it will have to start cold, as far as that is known; "" otherwise."""
        return self._refused

    def prepare(self, grafts: Sequence[Graft]) -> None:
        """Begin to put the trees in, if it waits; the gate stays closed. ``go`` and ``cool`` wait for the end of it."""
        if self._grafting is None and self._arrived.is_set() and not self._refused and self._gate.waiting:
            self._grafted = tuple(grafts)
            self._grafting = threading.Thread(target=self._graft, name=f"graft:{self.container_id[:12]}", daemon=True)
            self._grafting.start()

    def go(self, grafts: Sequence[Graft]) -> str:
        """Put the trees in, unless that has been done, and let the process run. Returns "", or why it has to start cold; then nothing runs.

        Raises what Docker said when it could not start the container after the gate was opened.
        """
        self._arrived.wait(GATE_SECONDS)
        self._end_of_graft()
        if not self._refused and (self._started.is_set() or not self._gate.waiting):
            # A start that Docker has given up (it may have died) must not be let go: nobody would know of the process.
            self._refused = str(self._failed or "the start did not come to its gate in time")
        if not self._refused and self._examined is None:
            self._refused = "the container was not looked at in time"
        if not self._refused and self._grafted != tuple(grafts):
            self._grafted = tuple(grafts)
            self._graft()
        if self._refused:
            self.cool()
            return self._refused
        self._gate.open()
        self._started.wait(self._engine.timeout_seconds)
        self._end()
        if self._failed is not None:
            raise self._failed
        return ""

    def cool(self) -> None:
        """Shut the gate and wait until Docker has undone the start. Raises TransientError when it does not."""
        self._end_of_graft()  # what it works on is a process that is still there
        self._gate.shut()
        deadline = time.monotonic() + SETTLE_SECONDS
        while not self._started.wait(LOOK_AGAIN_SECONDS):
            if time.monotonic() > deadline:
                raise TransientError(
                    f"Docker does not end the start of {self.container_id[:12]}, whose gate is shut: it does not run, "
                    "and it is not started before that"
                )
        self._gate.end_process()
        self._end()

    def _graft(self) -> None:
        assert self._examined is not None
        try:
            graft(self._examined[0], self._grafted, self._examined[1])
        except (GraftError, OSError, ValueError) as error:
            self._refused = str(error)

    def _end_of_graft(self) -> None:
        if self._grafting is not None:
            self._grafting.join()

    def _end(self) -> None:
        self._engine.starting.discard(self.container_id)
        self._gate.remove()

    def _start(self) -> None:
        try:
            self._engine.start(self.container_id, waits=True)
        except CargoError as error:
            self._failed = error
        finally:
            self._started.set()

    def _arrive(self) -> None:
        """Look at the container as soon as it waits: what cannot work is better known before the source stops."""
        deadline = time.monotonic() + GATE_SECONDS
        while not self._gate.waiting:
            if self._started.wait(LOOK_AGAIN_SECONDS) or time.monotonic() > deadline:
                self._refused = "the start did not come to its gate"
                break
        else:
            self._refused = self._examine()
        self._arrived.set()

    def _examine(self) -> str:
        pid_file = self._gate.pid_file
        if pid_file is None:
            return "the runtime did not say where the container's first process is"
        try:
            pid, config = int(pid_file.read_text()), read_config(pid_file.parent)
        except (GraftError, OSError, ValueError) as error:
            return str(error)
        self._examined = pid, config
        announce(pid)  # while the gate is there for certain: whoever goes on may remove it
        return why_not(config, self._destinations)


def settle_gate(engine: Engine, container_id: str) -> bool:
    """Remove what an earlier life left of the container's gate, once Docker has ended the start, and say if any was.

    Raises TransientError.
    """
    gate = Gate(container_id)
    if not gate.directory.is_dir():
        return False
    gate.shut()
    inspected = engine.inspect(container_id) or {}  # answers when the start has ended
    if not (inspected.get("State") or {}).get("Running"):
        gate.end_process()
    gate.remove()
    return True


def shut_left_gates(log: structlog.stdlib.BoundLogger) -> None:
    """At the start of the process: nobody is left who could open these. Docker undoes what waits there."""
    for container_id in left_gates():
        log.warning("a container waited at its gate when the agent ended; it does not run", container=container_id)
        Gate(container_id).shut()
