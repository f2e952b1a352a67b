"""Imports without what their libraries bring along and the daemons never use: a sixth of an idle agent's memory.

Two ways, for as long as a ``with`` block imports the library. What it can do without, by its own account, is ``absent``; what
it wants to have imported but does not touch, is ``postponed``: a stand-in, which loads the real module as soon as
somebody asks it for anything. Neither hides a module that is loaded already, nor lasts longer than the block, so whoever
imports one of them elsewhere gets the real one.

It must never be used for a module that Cargo itself needs, whatever the moment: loading one takes milliseconds. Nor for one
that the standard library does without: what is loaded in the block stays as it was made there, so that without ``ssl`` the
whole process would have an ``http.client`` that knows no HTTPS.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def absent(*names: str) -> Iterator[None]:
    """``import`` of one of ``names`` raises ImportError here."""
    hidden = [name for name in names if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextmanager
def postponed(*names: str) -> Iterator[None]:
    """``import`` of one of ``names`` gives a stand-in here."""
    stand_ins = {name: _StandIn(name) for name in names if name not in sys.modules}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, stand_in in stand_ins.items():
            if sys.modules.get(name) is stand_in:
                del sys.modules[name]


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)
