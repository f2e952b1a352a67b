"""Makes inputs: a good one, changed a little, as bytes or as the structure that the bytes stand for.

The same seed and number always give the same input, so that an input is named by ``target, seed, number``. Pure.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

Form = Literal["bytes", "json", "msgpack"]
"""What the good inputs are: without structure, or with one that is changed place by place."""

TOKENS = (
    b"\0", b"/", b"..", b"../", b"/../../etc/passwd", b"//", b"\n", b"\r", b"\xff", b"\xed\xa0\x80", b'"', b"\\", b"{", b"[", b"]", b"}",
    b",", b":", b"-", b"--", b"-oProxyCommand=x", b"%n%s", b"0", b"-1", b"9" * 30, b"9" * 5000, b"1e999", b"NaN", b"null", b"true",
    b"[" * 3000, b'{"a":' * 2000, b"\x1b[31m", "\u202e".encode(), "\u0661".encode(), b"\\ud800", b"A" * 300, b"sha256:", b"=kill", b"(", b")", b"@",
)  # fmt: skip
"""What parsers stumble over: ends, quotes, depth, numbers without end, text that is none."""
WORDS = (
    "", "\0", "/", ".", "..", "../..", "../../../../canary", "/etc/passwd", "a/../b", "\ud800", "\ufffd", "\n", " ", "-", "-v", "web", "alpha", "0",
    "-1", "1.5", "inf", "nan", "é", "\u202e", "\u0661", "A" * 300, "B" * 70_000, "10.0.0.1", "::1", "fe80::1%eth0", "0-3,7", "9" * 5000, "sha256:" + "0" * 64,
    "0" * 64, "container:x", "type=none,o=bind", "%2e%2e", "*", "[", "(?", "coordinator/c1", "hostd/alpha", "hostd/beta",
)  # fmt: skip
NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    255,
    256,
    65535,
    65536,
    2**31 - 1,
    2**31,
    2**32,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63) - 1,
    10**400,
)
FRACTIONS = (0.0, -0.0, 0.5, -1.5, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"))
MAX_CHANGES = 4
MAX_INPUT_BYTES = 512 * 1024


def make(seeds: Sequence[bytes], form: Form, rng: random.Random) -> bytes:
    """One input from the good ones."""
    seed = rng.choice(seeds)
    if form != "bytes" and rng.random() < 0.8:
        return _structure(seed, form, rng)
    return _bytes(seed, seeds, rng)


# --- bytes ---------------------------------------------------------------------------------------


def _bytes(seed: bytes, seeds: Sequence[bytes], rng: random.Random) -> bytes:
    raw = bytearray(seed)
    for _ in range(rng.randint(1, MAX_CHANGES)):
        _change(raw, seeds, rng)
    return bytes(raw[:MAX_INPUT_BYTES])


def _change(raw: bytearray, seeds: Sequence[bytes], rng: random.Random) -> None:
    at = rng.randint(0, len(raw))
    length = min(len(raw) - at, rng.choice((1, 2, 4, 16, 200)))
    match rng.randrange(8):
        case 0 if raw:
            raw[at % len(raw)] ^= 1 << rng.randrange(8)
        case 1 if raw:
            raw[at % len(raw)] = rng.randrange(256)
        case 2:
            raw[at:at] = rng.randbytes(rng.choice((1, 3, 20)))
        case 3:
            del raw[at : at + length]
        case 4:
            raw[at:at] = raw[at : at + length] * rng.choice((1, 2, 50))
        case 5:
            raw[at:at] = rng.choice(TOKENS)
        case 6:
            other = rng.choice(seeds)
            raw[at:] = other[rng.randint(0, len(other)) :]
        case 7:
            del raw[at:]


# --- structures ------------------------------------------------------------------------------------


def _structure(seed: bytes, form: Form, rng: random.Random) -> bytes:
    holder = [json.loads(seed) if form == "json" else msgspec.msgpack.decode(seed)]
    for _ in range(rng.randint(1, MAX_CHANGES)):
        _alter(holder, rng)
    return encode(holder[0], form, rng)


def encode(document: Any, form: Form, rng: random.Random) -> bytes:
    """``document`` as bytes, be it sound or not."""
    if form == "msgpack":
        try:
            return msgspec.msgpack.encode(document)
        except (OverflowError, UnicodeEncodeError, TypeError):
            return msgspec.msgpack.encode(None)
    text = json.dumps(document, ensure_ascii=rng.random() < 0.5)
    return text.encode("utf-8", "surrogatepass")


def _alter(holder: list[Any], rng: random.Random) -> None:
    """Change one place, picked by going down at random."""
    container: Any = holder
    while True:
        keys = list(container) if isinstance(container, dict) else list(range(len(container)))
        if not keys:
            break
        key = rng.choice(keys)
        inner = container[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.85:
            container = inner
            continue
        break
    if not container:
        _insert(container, rng)
        return
    match rng.randrange(6):
        case 0 | 1 | 2:
            container[key] = value(rng, isinstance(container[key], bytes))
        case 3 if container is not holder:
            del container[key]
        case 4:
            _insert(container, rng)
        case 5 if isinstance(container, list) and container is not holder:
            other = rng.randrange(len(container))
            container[key], container[other] = container[other], container[key]


def _insert(container: Any, rng: random.Random) -> None:
    if isinstance(container, dict):
        container[rng.choice((*container, "extra", "", "\ud800"))] = value(rng)
    elif len(container) > 1 and rng.random() < 0.5:
        container.insert(rng.randint(0, len(container)), json_copy(rng.choice(container)))
    else:
        container.insert(rng.randint(0, len(container)), value(rng))


def json_copy(part: Any) -> Any:
    """A copy that can be changed by itself."""
    if isinstance(part, dict):
        return {key: json_copy(inner) for key, inner in part.items()}
    return [json_copy(inner) for inner in part] if isinstance(part, list) else part


def value(rng: random.Random, as_bytes: bool = False, depth: int = 0) -> Any:
    """Anything."""
    kind = rng.randrange(10)
    if as_bytes and kind < 8:
        return (
            rng.choice(WORDS).encode("utf-8", "surrogatepass") if kind < 6 else rng.randbytes(rng.choice((1, 32, 256)))
        )
    if kind < 4:
        return rng.choice(WORDS)
    if kind < 6:
        return rng.choice(NUMBERS)
    if kind == 6:
        return rng.choice(FRACTIONS)
    if kind == 7:
        return rng.choice((None, True, False))
    if depth > 2:
        return []
    if kind == 8:
        if rng.random() < 0.02:
            deep: Any = []
            for _ in range(rng.choice((70, 900))):
                deep = [deep]
            return deep
        return [value(rng, depth=depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(WORDS[:30]): value(rng, depth=depth + 1) for _ in range(rng.randrange(4))}
