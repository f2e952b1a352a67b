"""The whole benchmark at its smallest, on a lab of its own: every case measures something, and the lab goes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchkit.cli import CASES, main
from labkit.spec import base_directory

pytestmark = [pytest.mark.lab, pytest.mark.long, pytest.mark.timeout(900)]


def test_every_case_can_be_measured(tmp_path: Path) -> None:
    subnet = os.environ.get("CARGO_E2E_BENCH_SUBNET", "10.77.20")
    assert main(["--tiny", "--json", str(tmp_path / "figures.json"), "--lab", "bencht", "--subnet", subnet]) == 0
    assert set(json.loads((tmp_path / "figures.json").read_text())) == {case.name for case in CASES}
    assert not (base_directory() / "bencht").exists()
