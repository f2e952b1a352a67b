"""The project's version, as it was installed. pyproject.toml is its only source."""

from __future__ import annotations

import importlib.metadata

DISTRIBUTION = "cargo-migrate"


def version() -> str:
    """Such as ``0.1.0``; ``unknown`` where the sources run without having been installed."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
