"""Blocks of exact updates (SPEC 5.6 to 5.9) and a writer's choice of them (11.3), in Python's integers.

step     new ordinal - old ordinal, modulo 2^w, from -2^(w-1) up
zigzag   2 s, or -2 s - 1 below 0; 1 and 2 are the moves
keyed    unary numbers from bit 0 up, fields from the highest bit down, zeros between
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = [
    "BLOCK",
    "FORMS",
    "Block",
    "Form",
    "best",
    "fastest",
    "gaps",
    "keyed",
    "key",
    "numbers",
    "packed",
    "patterns",
    "steps",
]

BLOCK = 65_536
RAW = 255


class Form(NamedTuple):
    """width: bits of a pattern, w. mantissa: bits below its exponent, m."""

    width: int
    mantissa: int

    def exponent(self, pattern: int) -> int:
        return (pattern & (1 << (self.width - 1)) - 1) >> self.mantissa


FORMS = {"BF16": Form(16, 7), "F16": Form(16, 10), "F32": Form(32, 23)}
Block = tuple[int, bytes]


def ordinal(pattern: int, width: int) -> int:
    """The position of a pattern in the order of all values."""
    top = 1 << (width - 1)
    return pattern ^ (2 * top - 1 if pattern & top else top)


def zigzag(old: int, new: int, width: int) -> int:
    """The zigzag step from one pattern to another."""
    half = 1 << (width - 1)
    step = (ordinal(new, width) - ordinal(old, width) + half) % (2 * half) - half
    return 2 * step if step >= 0 else -2 * step - 1


def steps(old: Sequence[int], new: Sequence[int], form: Form) -> list[int]:
    """The zigzag step of each weight."""
    return [zigzag(a, b, form.width) if a != b else 0 for a, b in zip(old, new, strict=True)]


def patterns(new: Sequence[int], form: Form) -> bytes:
    """The patterns as bytes."""
    return b"".join(value.to_bytes(form.width // 8, "little") for value in new)


def gaps(old: Sequence[int], new: Sequence[int], form: Form) -> bytes | None:
    """A block of gaps (SPEC 5.8); None if it cannot count so many."""
    z = steps(old, new, form)
    moves = [i for i, value in enumerate(z) if value in (1, 2)]
    listed = [i for i, value in enumerate(z) if value > 2]
    if max(len(moves), len(listed)) > 65_535:
        return None
    between = [b - a - 1 for a, b in zip([-1, *moves], moves, strict=False)]
    down = sum(1 << i for i, place in enumerate(moves) if z[place] == 1)
    if len(moves) * 384 < len(z):
        rest = b"".join(gap.to_bytes(2, "little") for gap in between)
    else:
        rest = b"".join(b"\xff" * (gap // 255) + bytes((gap % 255,)) for gap in between)
    counts = (len(moves), len(listed), *listed)
    return (
        b"".join(value.to_bytes(2, "little") for value in counts)
        + patterns([new[i] for i in listed], form)
        + down.to_bytes(-(-len(moves) // 8), "little")
        + rest
    )


def packed(unary: Iterable[int], fields: Iterable[tuple[int, int]], *, between: int | None = None) -> bytes:
    """A keyed block of these numbers; fields as (value, bits). between: the number of zeros; None for the fewest."""
    low = "".join("1" * number + "0" for number in unary)
    high = "".join(format(value, f"0{bits}b") for value, bits in fields if bits)
    zeros = -(len(low) + len(high)) % 8 if between is None else between
    text = high + "0" * zeros + low[::-1]
    return int(text, 2).to_bytes(-(-len(text) // 8), "little")


def class_of(e: int, key: int) -> int:
    return min(max(e - key + 1, 0), 15)


def numbers(old: Sequence[int], new: Sequence[int], form: Form, key: int) -> tuple[list[int], list[tuple[int, int]]]:
    """The unary numbers and the fields of a keyed block (SPEC 5.9)."""
    z = steps(old, new, form)
    exponents = [form.exponent(pattern) for pattern in old]
    members: dict[int, list[int]] = {}
    for i, e in enumerate(exponents):
        members.setdefault(class_of(e, key), []).append(i)
    listed = [i for i, value in enumerate(z) if value > 2 and exponents[i] >= key]
    unary, fields = [len(listed)], []
    for i in listed:
        fields += [(i, 16), (new[i], form.width)]
    for i in members.get(0, ()):
        k = min(key - 1 - exponents[i], form.mantissa + 1)
        q, rest = divmod(z[i], 1 << k)
        unary.append(min(q, 8))
        fields.append((rest, k) if q < 8 else (new[i], form.width))
    run = 0
    for c in range(1, 16):
        for i in members.get(c, ()):
            if z[i] in (1, 2):
                unary.append(run >> 15)
                fields.append(((run % 2**15) >> (15 - c), c))
                fields.append((z[i] & 1, 1))
                run = 0
            else:
                run += 1 << (15 - c)
    return [*unary, -(-run // 2**15)], fields


def keyed(old: Sequence[int], new: Sequence[int], form: Form, key: int) -> bytes:
    """A keyed block (SPEC 5.9) of A = key."""
    return packed(*numbers(old, new, form, key))


def key(old: Sequence[int], new: Sequence[int], form: Form) -> int:
    """The A of least cost (SPEC 11.3); of equals the highest."""
    kinds = Counter(
        (form.exponent(a), value.bit_length(), value in (1, 2))
        for a, value in zip(old, steps(old, new, form), strict=True)
    )
    occurring = [e for e, _, _ in kinds]
    tried = range(max(min(occurring) - 15, 1), min(max(occurring) + form.mantissa + 2, 254) + 1)
    return min(reversed(tried), key=lambda a: cost(kinds, form, a))


def cost(kinds: Counter[tuple[int, int, bool]], form: Form, a: int) -> int:
    total = mass = 0
    for (e, length, moves), count in kinds.items():
        c = class_of(e, a)
        if c == 0:
            k = min(a - 1 - e, form.mantissa + 1)
            t = (3 * 2**length // 4) >> k
            change = 0 if length == 0 else t if t < 8 else 8 + form.width - k
            total += count * (k + 1 + change)
            continue
        if moves:
            total += count * (c + 2)
            continue
        mass += count << (15 - c)
        total += count * (17 + form.width) if length else 0
    return total + (mass >> 15)


def best(old: Sequence[int], new: Sequence[int], form: Form) -> Block:
    """The shortest block (SPEC 11.3) that 5.7 allows."""
    if old == new:
        return 0, b""
    a, raw, spaced = key(old, new, form), patterns(new, form), gaps(old, new, form)
    made = [(a, keyed(old, new, form, a)), *([(0, spaced)] if spaced is not None else [])]
    return min([*(block for block in made if len(block[1]) < len(raw)), (RAW, raw)], key=lambda block: len(block[1]))


def fastest(old: Sequence[int], new: Sequence[int], form: Form) -> Block:
    """The block of a writer that prefers speed (SPEC 11.3)."""
    if old == new:
        return 0, b""
    raw, spaced = patterns(new, form), gaps(old, new, form)
    return (0, spaced) if spaced is not None and 4 * len(spaced) <= 3 * len(raw) else (RAW, raw)
