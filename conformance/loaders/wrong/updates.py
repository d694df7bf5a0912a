"""SPEC 5.6 to 5.9 and 6.6: blocks of exact updates, checked and applied weight by weight."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from itertools import pairwise

from common import need

__all__ = ["Updates"]

Wrong = Callable[[str], bool]
FORMS = {"BF16": (16, 7), "F16": (16, 10), "F32": (32, 23)}
BLOCK = 65_536


class Bits:
    """A keyed block as text: bit 0 first in `up`, the highest first in `down`."""

    def __init__(self, data: bytes) -> None:
        self.count = 8 * len(data)
        self.down = format(int.from_bytes(data, "little"), f"0{self.count}b")
        self.up = self.down[::-1]
        self.low = self.taken = 0

    def unary(self, code: str) -> int:
        end = self.up.find("0", self.low, self.count - self.taken)
        need(end >= 0, code)
        start, self.low = self.low, end + 1
        return end - start

    def field(self, bits: int, code: str) -> int:
        need(self.low + self.taken + bits <= self.count, code)
        self.taken += bits
        return int(self.down[self.taken - bits : self.taken] or "0", 2)

    def ahead(self) -> int:
        return int(self.down[self.taken : self.taken + 15].ljust(15, "0"), 2)


class Updates:
    """The blocks of one module: index and data as stored, count weights of dtype."""

    def __init__(self, index: bytes, data: bytes, count: int, dtype: str, wrong: Wrong) -> None:
        self.width, self.mantissa = FORMS[dtype]
        self.entries = [entry for (entry,) in struct.iter_unpack("<I", index)]
        self.data, self.count, self.wrong = data, count, wrong

    def blocks(self) -> Iterator[tuple[int, int, bytes, int]]:
        """First weight, A, bytes, number of weights."""
        at = 0
        step = BLOCK - 1 if self.wrong("blocks-of-65535") else BLOCK
        for b, entry in enumerate(self.entries):
            yield b * step, entry & 255, self.data[at : at + (entry >> 8)], min(BLOCK, self.count - b * BLOCK)
            at += entry >> 8

    def check(self) -> None:
        """The checks that need no base: E307."""
        total = sum(entry >> 8 for entry in self.entries)
        need(total == len(self.data) or self.wrong("lengths-not-summed"), "E307")
        for _, a, data, n in self.blocks():
            raw = n * self.width // 8
            fits = len(data) == raw if a == 255 else len(data) < raw and (a == 0 or len(data) > 0)
            need(fits or self.wrong("lengths-of-blocks-ignored"), "E307")
            if a == 0 and data:
                self.gaps(data, n)
            elif 0 < a < 255:
                self.exceptions(Bits(data), n, "E307")

    def ascend(self, places: list[int], n: int) -> None:
        rising = all(a < b for a, b in pairwise(places))
        need((rising and (not places or places[-1] < n)) or self.wrong("places-not-checked"), "E307")

    def gaps(self, data: bytes, n: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """SPEC 5.8: (place, step) of each move, (place, pattern) of each exception."""
        need(len(data) >= 4, "E307")
        moves, listed = struct.unpack_from("<HH", data)
        size = self.width // 8
        signs = 4 + (2 + size) * listed
        rest = signs + -(-moves // 8)
        need(rest <= len(data), "E307")
        places = [int.from_bytes(data[i : i + 2], "little") for i in range(4, 4 + 2 * listed, 2)]
        new = [int.from_bytes(data[i : i + size], "little") for i in range(4 + 2 * listed, signs, size)]
        down = int.from_bytes(data[signs:rest], "little")
        need(down >> moves == 0 or self.wrong("unused-moves-ignored"), "E307")
        between = self.spaces(data[rest:], moves, wide=moves * 384 < n and not self.wrong("gaps-always-bytes"))
        moved, at = [], -1
        for gap in between:
            at += gap + 1
            moved.append(at)
        self.ascend(places, n)
        self.ascend(moved, n)
        need(not set(moved) & set(places) or self.wrong("moves-as-exceptions"), "E307")
        steps = [-1 if down >> i & 1 and not self.wrong("moves-have-no-sign") else 1 for i in range(moves)]
        return list(zip(moved, steps, strict=True)), list(zip(places, new, strict=True))

    def spaces(self, data: bytes, moves: int, *, wide: bool) -> list[int]:
        if wide:
            need(len(data) == 2 * moves, "E307")
            return [gap for (gap,) in struct.iter_unpack("<H", data)]
        made, gap = [], 0
        for byte in data:
            gap += byte
            if byte < 255 or self.wrong("long-gaps-end-at-255"):
                made.append(gap)
                gap = 0
        need(len(made) == moves and (not data or data[-1] < 255), "E307")
        return made

    def exceptions(self, bits: Bits, n: int, code: str) -> list[tuple[int, int]]:
        made = [(bits.field(16, code), bits.field(self.width, code)) for _ in range(bits.unary(code))]
        self.ascend([place for place, _ in made], n)
        return made

    def stepped(self, pattern: int, step: int) -> int:
        """The pattern `step` above in the order of values, modulo 2^w."""
        top = 1 << (self.width - 1)
        if self.wrong("steps-on-patterns"):
            return (pattern + step) % (2 * top)
        at = pattern ^ (2 * top - 1 if pattern & top else top)
        at += step
        if self.wrong("steps-saturate"):
            at = min(max(at, 0), 2 * top - 1)
        at %= 2 * top
        return at ^ (top if at & top else 2 * top - 1)

    def put(self, new: list[int], exceptions: list[tuple[int, int]]) -> None:
        for place, pattern in exceptions:
            new[place] = new[place] ^ pattern if self.wrong("exceptions-are-xor") else pattern

    def applied(self, raw: bytes) -> bytes:
        """The new covered weights, from the base's: E405 if the bits cannot be read."""
        code = "<H" if self.width == 16 else "<I"
        words = [word for (word,) in struct.iter_unpack(code, raw)]
        made = list(words)
        for first, a, data, n in self.blocks():
            part = words[first : first + n]
            if a == 255:
                part = [word for (word,) in struct.iter_unpack(code, data)]
            elif a:
                part = self.keyed(part, a, data)
            elif data:
                moves, exceptions = self.gaps(data, n)
                for place, step in moves:
                    part[place] = self.stepped(part[place], step)
                self.put(part, exceptions)
            made[first : first + n] = part
        return struct.pack(f"<{len(made)}{code[1]}", *made)

    def keyed(self, old: list[int], a: int, data: bytes) -> list[int]:
        """SPEC 5.9."""
        bits, new = Bits(data), list(old)
        classes: list[list[int]] = [[] for _ in range(16)]
        exceptions = self.exceptions(bits, len(old), "E405")
        if self.wrong("exceptions-before-moves"):
            self.put(new, exceptions)
        exponents = [(word & (1 << (self.width - 1)) - 1) >> self.mantissa for word in old]
        for i, e in enumerate(exponents):
            classes[min(max(e - a + 1, 0), 15)].append(i)
        for i in classes[0]:
            new[i] = self.dense(bits, old[i], a - 1 - exponents[i])
        run = self.run(bits)
        for c in range(1, 16):
            if c > 1 and self.wrong("runs-end-with-class"):
                run = run if not classes[c - 1] else (run >> 15 << 15) + bits.ahead()
            for i in classes[c]:
                if run >= 1 << (15 - c):
                    run -= 1 << (15 - c)
                    continue
                bits.field(c, "E405")
                down = bits.field(1, "E405") and not self.wrong("moves-have-no-sign")
                new[i] = self.stepped(old[i], -1 if down else 1)
                run = self.run(bits)
        spare = bits.up[bits.low : bits.count - bits.taken]
        read = len(spare) < 8 and "1" not in spare and 0 <= run - bits.ahead() < 1 << 15
        need(read or self.wrong("blocks-read-in-part"), "E405")
        if not self.wrong("exceptions-before-moves"):
            self.put(new, exceptions)
        return new

    def run(self, bits: Bits) -> int:
        return (bits.unary("E405") << 15) + bits.ahead()

    def dense(self, bits: Bits, word: int, k: int) -> int:
        q = bits.unary("E405")
        need(q <= 8 or self.wrong("quotients-without-end"), "E405")
        if q == 8 and not self.wrong("quotients-without-end"):
            return bits.field(self.width, "E405")
        if not self.wrong("fields-of-any-width"):
            k = min(k, self.mantissa + 1)
        z = (q << k) + bits.field(k, "E405")
        return self.stepped(word, -(z + 1) // 2 if z & 1 else z // 2)
