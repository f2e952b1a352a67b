"""What a person may safely do when a host of a migration is dead, for every place that a migration can be at.

Nobody here decides that a host is dead; a person does, and reads what follows from it. Stands beside ``waiting.py``, whose
answer it completes. Pure: a function of the folded history.
"""

from __future__ import annotations

from coordinator.lifecycle import Lifecycle


def if_source_is_dead(state: Lifecycle) -> str:
    """What is safe when the source does not come back, or not soon; empty once the source does not matter any more."""
    if state.request is None or state.state in ("rejected", "aborted", "finalise", "finalised"):
        return ""
    source, target = state.request.source, state.request.target
    if state.abortable and not state.source_stopped:
        return (
            f"nothing is lost: the container and all of its data are on the disks of {source}, and come back with it; "
            f"what {target} has is incomplete, do not start anything from it. `abort` is safe, and is finished when "
            f"{source} is back"
        )
    if state.state == "aborting" and state.restored:
        return f"the container lives on {source}, and comes back with it"
    if state.state == "aborting":
        return (
            f"all data of the container is on the disks of {source}: bring {source} back, then the container runs there "
            f"again by itself. What {target} has is incomplete, do not start anything from it"
        )
    if state.abortable:
        return (
            f"the container is down, and all of its data is on the disks of {source}: bring {source} back, then it goes "
            f"on by itself, and `abort` runs the container there again. What {target} has is incomplete, do not start "
            "anything from it"
        )
    if state.state in ("claimed", "fill", "verify"):
        return (
            f"the container lives on {target}; what it reads and has not arrived yet waits for {source}. Keep the disks "
            f"of {source} and bring it back, then the rest comes by itself. `rollback` is not possible without {source}"
        )
    if state.state in ("release", "completed"):
        return (
            f"nothing is missing: everything was compared and is on {target}, and {source} may stay off; only a "
            "`rollback` would need it"
        )
    if state.state == "rolling_back":
        return (
            f"{source} has to take the container back: bring it back. The container's newest data is on {target}: keep "
            f"the disks of {target}"
        )
    return f"the container lives on {source} again and has to come back with it"


def if_target_is_dead(state: Lifecycle) -> str:
    """What is safe when the target does not come back, or not soon; empty once the target does not matter any more."""
    if state.request is None or state.state in ("rejected", "aborted", "rolled_back"):
        return ""
    source, target = state.request.source, state.request.target
    if state.abortable:
        where = "starts the container there again at once" if state.source_stopped else "leaves it running there"
        return (
            f"nothing was claimed, so nothing runs on {target} and all data is on {source}: `abort` is safe and {where}; "
            f"{target} cleans up when it is back"
        )
    if state.state == "aborting":
        return f"the container is safe on {source}; only the cleaning of {target} waits until it is back"
    if state.state == "rolling_back" and (state.target_stopped or state.carried_back or state.asserted_off):
        if state.carried_back or state.asserted_off:
            return f"{source} goes on without it; {target} cleans up when it is back"
        return (
            f"the container is down; what it wrote is on the disks of {target}: bring it back, then that is carried to "
            f"{source}. {_vouching(source, target)}"
        )
    if state.reversible or state.state == "rolling_back":
        return (
            f"the container and what it wrote since the cut-over are on the disks of {target}: bring it back, then it "
            f"goes on by itself. {_vouching(source, target)}"
        )
    return (
        f"the container and its data are on the disks of {target} alone, the copy on {source} is gone: bring {target} "
        "back, or restore from a backup"
    )


def _vouching(source: str, target: str) -> str:
    return (
        f"If it never comes back: make sure that {target} is off and stays off, then `cargoctl rollback ID "
        f"--discard-target-writes --target-off YOUR-NAME` runs the container on {source} as it was at the cut-over, "
        "without what was written since"
    )
