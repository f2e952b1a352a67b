"""The other process of the ``bus`` case: follows all histories, reads what is new, and says when it had it.

Prints ``ready``, then, when its input ends, a JSON list of [uuid of the event, monotonic time].
"""

from __future__ import annotations

import json
import sys
import threading
import time

from events.connecting import connect
from events.schema import Event
from events.settings import EtcdSettings
from events.store import Changes


def main(endpoint: str) -> None:
    """See the module."""
    store = connect(EtcdSettings(endpoints=(endpoint,)))
    stop = threading.Event()
    newest: dict[str, Event] = {}
    seen: list[tuple[str, float]] = []

    def until_told() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=until_told, daemon=True).start()
    with store.follow(store.keys.migrations, stop=stop, contents=False) as follower:
        follower.poll(10)
        print("ready", flush=True)
        for item in follower:
            if not isinstance(item, Changes):
                continue
            for change in item.changes:
                place = store.keys.parse(change.key)
                if place is not None and place.kind == "head":
                    migration = place.parts[0]
                    for event in store.read(migration, after=newest.get(migration)):
                        newest[migration] = event
                        seen.append((event.uuid, time.monotonic()))
    store.close()
    json.dump(seen, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
