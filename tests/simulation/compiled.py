"""The simulator as a copy that mypyc has compiled: the same seeds give the same digests, in half the time.

Compiled are the model world, the scheduler, the checker and the store beneath them, never the cores that decide
(``coordinator/``, ``hostd/``), which run as they are in production. What mypyc makes is strict: a value that is not of its
annotated type ends a seed as a crash, it does not pass. Defects are never planted here, because what is compiled cannot
be patched. The copy lies in the user's cache, one for each state of the code; deleting it is harmless.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.simulation import world
from tests.simulation.campaign import CODE, ROOT, code_digest

MODULES = (
    "events/following.py",
    "events/history.py",
    "events/keyspace.py",
    "events/memory.py",
    "events/store.py",
    "tests/simulation/agents.py",
    "tests/simulation/invariants.py",
    "tests/simulation/remembered.py",
    "tests/simulation/scheduler.py",
    "tests/simulation/transcript.py",
    "tests/simulation/world.py",
)


def is_compiled() -> bool:
    """Whether this process runs the compiled copy."""
    return not world.__file__.endswith(".py")


def run_compiled(arguments: list[str]) -> None:
    """Go on as ``python -m tests.simulation`` with these arguments in the compiled copy. Does not return."""
    environment = os.environ | {"PYTHONPATH": str(compiled_copy())}
    os.execve(sys.executable, [sys.executable, "-P", "-m", "tests.simulation", *arguments], environment)


def compiled_copy() -> Path:
    """Where the copy lies; made first, which takes minutes, unless it is there. Exits when it cannot be made."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cargo-simulator"
    place = cache / code_digest()
    if place.is_dir():
        return place
    cache.mkdir(parents=True, exist_ok=True)
    print(f"compiling the simulator into {place}: this takes minutes, once", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        copy = Path(folder) / "copy"
        for name in CODE:
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        for name in ("pyproject.toml", "tests/__init__.py"):
            shutil.copy(ROOT / name, copy / name)
        compiler = [sys.executable, "-m", "mypyc", *MODULES]
        done = subprocess.run(compiler, cwd=copy, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(
                "the simulator cannot be compiled here (it needs gcc and python3-dev); it runs without --compiled all "
                f"the same:\n{(done.stdout + done.stderr)[-2000:]}"
            )
        shutil.rmtree(copy / "build")
        copy.rename(place)
    return place
