"""What all tests share: generated examples are judged by their outcome, never by how long a busy machine took for them."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("cargo", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("cargo")
