"""Reading an INI configuration file: what both daemons and cargoctl share.

Every problem of a file is reported at once, in words, with the file's name, section and option.
"""

from __future__ import annotations

import configparser
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from events.errors import CargoError

DEFAULT_CONFIG = Path("config.cfg")


class SettingsError(CargoError):
    """A configuration file cannot be used; the text lists every reason."""


@dataclass(frozen=True)
class EtcdSettings:
    """Where the bus is and how to reach it. Empty ``endpoints``: none configured."""

    endpoints: tuple[str, ...]
    prefix: str = "/cargo"
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None


@dataclass(frozen=True)
class TrustSettings:
    """What makes a process part of a secured fleet. Without ``ca`` it believes the bus."""

    ca: Path | None = None
    """The fleet's authority, whose signature under a member's record is what everything else rests on."""
    signing_key: Path | None = None
    """Of the process's own events; cargoctl has none."""


@dataclass(frozen=True)
class LogSettings:
    """``format``: ``auto`` is readable on a terminal and JSON otherwise."""

    level: str = "info"
    format: str = "auto"


class Reader:
    """One INI file, with every complaint collected until ``finish``."""

    def __init__(self, path: Path, known: Mapping[str, tuple[str, ...]]) -> None:
        self._file = path
        self.problems: list[str] = []
        self._parser = configparser.ConfigParser(interpolation=None)
        try:
            with path.open(encoding="utf-8") as file:
                self._parser.read_file(file)
        except FileNotFoundError:
            raise SettingsError(
                f"there is no configuration file {path}; name one with -c, "
                "a sample with every option explained is in docs/samples/"
            ) from None
        except (OSError, configparser.Error, UnicodeDecodeError) as error:
            raise SettingsError(f"the configuration file {path} cannot be read: {error}") from error
        for section in self._parser.sections():
            if section not in known:
                self.problems.append(f"[{section}] is not a known section (known: {', '.join(known)})")
                continue
            self.problems += [
                f"[{section}] {option} is not a known option (known: {', '.join(known[section])})"
                for option in self._parser.options(section)
                if option not in known[section]
            ]

    def text(self, section: str, option: str, default: str | None = None) -> str:
        """The option's value; a missing one without a default is a problem."""
        value = self._parser.get(section, option, fallback=default)
        if value is None:
            self.problems.append(f"[{section}] {option} is missing")
            return ""
        return value.strip()

    def number(self, section: str, option: str, default: int, *, low: int, high: int) -> int:
        """The option as a whole number within ``low..high``."""
        value = self.text(section, option, str(default))
        if not value.isdecimal() or not low <= int(value) <= high:
            self.problems.append(f"[{section}] {option} = {value!r} is not a number from {low} to {high}")
            return default
        return int(value)

    def path(self, section: str, option: str, default: str | None = None) -> Path | None:
        """The option as an absolute path; None when it is empty."""
        value = self.text(section, option, default)
        if not value:
            return None
        if not value.startswith("/"):
            self.problems.append(f"[{section}] {option} = {value!r} is not an absolute path")
        return Path(value)

    def items(self, section: str, option: str, default: str = "") -> tuple[str, ...]:
        """The option as a list, separated by commas or blanks."""
        return tuple(self.text(section, option, default).replace(",", " ").split())

    def valid(self, section: str, option: str, value: str, rule: Callable[[str], bool], words: str) -> str:
        """``value`` if ``rule`` holds, otherwise a problem in ``words``."""
        if value and not rule(value):
            self.problems.append(f"[{section}] {option} = {value!r} is not {words}")
        return value

    def etcd(self) -> EtcdSettings:
        """The [etcd] section."""
        return EtcdSettings(
            endpoints=self.items("etcd", "endpoints"),
            prefix=self.text("etcd", "prefix", "/cargo").rstrip("/"),
            ca=self.path("etcd", "ca", ""),
            cert=self.path("etcd", "cert", ""),
            key=self.path("etcd", "key", ""),
        )

    def trust(self) -> TrustSettings:
        """The [trust] section."""
        made = TrustSettings(ca=self.path("trust", "ca", ""), signing_key=self.path("trust", "signing_key", ""))
        if made.signing_key is not None and made.ca is None:
            self.problems.append("[trust] signing_key is given without ca: whom to trust is not known")
        return made

    def log(self) -> LogSettings:
        """The [log] section."""
        level = self.text("log", "level", "info").lower()
        form = self.text("log", "format", "auto").lower()
        if level not in {"debug", "info", "warning", "error"}:
            self.problems.append(f"[log] level = {level!r} is none of debug, info, warning, error")
        if form not in {"auto", "json", "text"}:
            self.problems.append(f"[log] format = {form!r} is none of auto, json, text")
        return LogSettings(level=level, format=form)

    def finish(self) -> None:
        """Raise SettingsError if anything was wrong."""
        if self.problems:
            raise SettingsError(f"the configuration file {self._file} has mistakes:\n  " + "\n  ".join(self.problems))


ETCD_OPTIONS = ("endpoints", "prefix", "ca", "cert", "key")
TRUST_OPTIONS = ("ca", "signing_key")
LOG_OPTIONS = ("level", "format")
