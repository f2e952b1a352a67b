"""A writer of the ``bus`` case: appends to a history of its own at a steady rate, as one agent does.

Prints ``ready``, waits for a line with the monotonic time to begin at, and prints when it is done, as JSON, for each
event its uuid, and the monotonic times at which the append was called and at which it had returned.
"""

from __future__ import annotations

import json
import sys
import time

from events import schema
from events.connecting import connect
from events.schema import Event
from events.settings import EtcdSettings
from events.stamp import Stamper


def main(endpoint: str, migration: str, rate: float, seconds: float) -> None:
    """See the module."""
    store = connect(EtcdSettings(endpoints=(endpoint,)))
    store.get(store.keys.head(migration))  # connected, as an agent is
    print("ready", flush=True)
    began = float(sys.stdin.readline())
    stamper = Stamper("hostd/alpha")
    previous: Event | None = None
    done: list[tuple[str, float, float]] = []
    for number in range(int(rate * seconds)):
        time.sleep(max(0.0, began + number / rate - time.monotonic()))
        stamp = stamper.stamp(1)
        called = time.monotonic()
        data = schema.StepRecovered(step=f"step {number}")
        previous = store.append(migration, previous, data, cause=0, stamp=stamp, notify=("beta",))
        done.append((stamp.uuid, called, time.monotonic()))
    store.close()
    json.dump(done, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))
