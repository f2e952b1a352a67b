"""What can go wrong in the lab, in words for the person at the terminal."""

from __future__ import annotations


class LabError(Exception):
    """The lab could not do what was asked. The text says what to look at next."""


class MissingRequirementError(LabError):
    """The machine lacks something that the lab needs. Nothing was changed."""

    def __init__(self, reasons: list[str]) -> None:
        super().__init__("\n".join(f"- {reason}" for reason in reasons))
        self.reasons = list(reasons)


class CommandFailedError(LabError):
    """A command ended with another exit status than 0."""

    def __init__(self, argv: list[str], returncode: int, stdout: str, stderr: str) -> None:
        said = (stderr.strip() or stdout.strip())[-2000:]
        super().__init__(f"{' '.join(argv)!r} ended with {returncode}" + (f":\n{said}" if said else ""))
        self.argv = argv
        self.returncode = returncode
        self.stdout = stdout
        self.stderr = stderr
