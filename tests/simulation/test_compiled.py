"""The compiled copy of the simulator is the same simulator."""

import os
import subprocess
import sys

import pytest

from tests.simulation.compiled import compiled_copy, is_compiled
from tests.simulation.scheduler import run_seed

PROGRAM = """
from tests.simulation.compiled import is_compiled
from tests.simulation.scheduler import run_seed
assert is_compiled()
print([run_seed(seed).digest for seed in range(40, 240)])
"""


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_compiled_copy_gives_the_same_histories_and_transcripts() -> None:
    """P18: for the same seeds, in the same order, line by line."""
    assert not is_compiled()
    environment = os.environ | {"PYTHONPATH": str(compiled_copy())}
    run = subprocess.run([sys.executable, "-P", "-c", PROGRAM], env=environment, capture_output=True, check=True)
    assert run.stdout.decode().strip() == str([run_seed(seed).digest for seed in range(40, 240)])
