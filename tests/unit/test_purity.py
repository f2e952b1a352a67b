"""Pure modules import neither clock, randomness, I/O nor logging; import rules hold."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PURE = [
    "events/schema.py",
    "events/machine.py",
    "events/decision.py",
    "coordinator/lifecycle.py",
    "coordinator/policy.py",
    "coordinator/admission.py",
    "coordinator/controls.py",
    "coordinator/audit.py",
    "coordinator/findings.py",
    "coordinator/invariants.py",
    "coordinator/narrate.py",
    "coordinator/recording.py",
    "coordinator/replay.py",
    "coordinator/waiting.py",
    "events/agents.py",
    "events/agent_tables.py",
    "events/failpoint_names.py",
    "hostd/plan.py",
    "hostd/turn.py",
    "hostd/remainder.py",
    "hostd/remainder.py",
    "hostd/source.py",
    "hostd/ssh_grants.py",
    "hostd/target.py",
]
FORBIDDEN = {
    "os", "io", "sys", "time", "random", "secrets", "uuid", "socket", "subprocess", "threading", "logging",
    "structlog", "pathlib", "tempfile", "shutil", "asyncio", "docker", "etcd3", "inotify_simple", "ctypes",
}  # fmt: skip


@pytest.mark.parametrize("name", PURE)
def test_a_pure_module_touches_nothing_outside(name: str) -> None:
    tree = ast.parse((ROOT / name).read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"open", "print", "input"}
    assert not imported & FORBIDDEN


def test_the_import_rules_hold() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
