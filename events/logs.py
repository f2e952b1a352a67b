"""Structured logs: readable on a terminal, one JSON object a line otherwise.

In the journal each line has its level as priority, too (sd-daemon(3)), so that `journalctl -p warning` finds what matters.
Lines about a migration carry ``migration``, ``seq`` and ``host``; secrets never enter a log, because
they never leave the container's specification file.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from events.lean_imports import absent, postponed
from events.settings import LogSettings

# rich is for tracebacks that are not used here, asyncio for logging from coroutines.
with absent("rich"), postponed("asyncio"):
    import structlog


_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}


def _to_journal() -> bool:
    """Whether what is written to standard error goes there: systemd names the stream, which a child may have replaced."""
    try:
        facts = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{facts.st_dev}:{facts.st_ino}"


def _with_priority(_: object, name: str, line: Any) -> str:
    return f"<{_PRIORITIES.get(name, 6)}>{line}"


def configure(settings: LogSettings, **always: str) -> structlog.stdlib.BoundLogger:
    """Set logging up for this process; ``always`` stands on every line (``host``, ``process``)."""
    readable = settings.format == "text" or (settings.format == "auto" and sys.stderr.isatty())
    renderer: structlog.typing.Processor = (
        # Plain: a traceback that shows local variables would show containers' environments.
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
        if readable
        else structlog.processors.JSONRenderer(sort_keys=False)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            renderer,
            *([_with_priority] if _to_journal() else []),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, settings.level.upper())),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    log: structlog.stdlib.BoundLogger = structlog.get_logger(**always)
    return log
