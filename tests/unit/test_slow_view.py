"""A view of the source whose connections take their time, on a machine that has much else to do."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hostd import transport
from hostd.transport import Transport

CONNECTING_SECONDS = 20.0


def test_a_new_view_is_given_as_long_as_its_connections_take(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """D14: sshfs opens one more when it is asked; ended before that was there, it was made anew for ever."""
    made: list[object] = []

    def run(command: list[Any], *, timeout_seconds: float, **_: object) -> subprocess.CompletedProcess[bytes] | None:
        if timeout_seconds < CONNECTING_SECONDS:
            return None
        if command[0] == "sshfs":
            made.append(command)
        return subprocess.CompletedProcess(command, 0, b"", b"")

    monkeypatch.setattr(transport, "run", run)
    monkeypatch.setattr(
        transport.mounts, "mount_at", lambda _point: SimpleNamespace(kind="fuse.sshfs") if made else None
    )
    monkeypatch.setattr(Transport, "check", lambda _self, _peer, **_options: None)
    monkeypatch.setattr(Transport, "unmount_remote", lambda *_a, **_k: None)
    monkeypatch.setattr(Transport, "_config_path", lambda *_a, **_k: tmp_path / "config")
    peer = SimpleNamespace(alias="cargo-alpha", host="alpha")
    Transport(tmp_path / "run").mount_remote(cast(Any, peer), "/data", tmp_path / "view")
    assert len(made) == 1
