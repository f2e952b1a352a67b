"""``cargo-hostd``: the agent, or ``cargo-hostd gate``, which must not wait for the agent's modules to load."""

from __future__ import annotations

import sys


def main() -> int:
    """Returns the exit code."""
    if sys.argv[1:2] == ["gate"]:
        from hostd.ssh_gate import main as gate  # noqa: PLC0415 - see above

        return gate(sys.argv[2:])
    from hostd.main import main as agent  # noqa: PLC0415

    return agent()


if __name__ == "__main__":
    sys.exit(main())
