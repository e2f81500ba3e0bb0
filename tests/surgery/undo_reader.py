"""A second reader of undo files, written from docs/undo-file.md: integers and fractions, nothing of the program.

It takes minutes for a megabyte, and is there so that the page and the program cannot say different things.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import reference
from blake3 import blake3
from reference import FORMATS, TooLargeError, cast_bits, decode, encode, rounded
from undo_changes import NAMES, Find, deltas_of, patterns_in, stretches_of
from undo_world import Document, Parts, unframe

CODES = {"BF16": 1, "F16": 2, "F32": 3, "F64": 4, "F8_E4M3": 5, "F8_E5M2": 6}


def restore(said: Document, parts: Parts, merged: Parts, dtype: str, find: Find) -> bytes:
    """The bytes of one tensor of the base.

    Args:
        said: What the manifest says of it.
        parts: The parts of the undo file.
        merged: The tensors of the merged checkpoint.
        dtype: Its type, which its file's header says.
        find: Gives the factor of an adapter.
    """
    if said["how"] == "stored":
        return parts[f"stored/{said['key']}"][2]
    there, _, data = merged[said.get("source") or said["key"]]
    if said["how"] == "copy":
        return data
    (fragment,) = said["fragments"]  # nothing here has more than one cut, nor a cut more than one block
    stored = parts[f"undo/{said['key']}"][2]
    assert len(stored) == fragment
    (stream,) = streams_of(stored)
    if said["how"] == "residual":
        return from_residual(stream, dtype, data if there == dtype else None)
    patterns = patterns_in(data, there)
    deltas = [Fraction(0)] * len(patterns)
    work = reference.working(NAMES[dtype], NAMES[there])
    gains: list[int] | None = None
    if said.get("terms"):
        deltas = deltas_of(said["terms"], find, work)
        gains = gains_of(said, parts, len(patterns), work) or stretches_of(said["terms"], find, work)
    else:
        largest = FORMATS[NAMES[there]].largest_pattern
        sign = FORMATS[NAMES[there]].sign
        patterns = [pattern if pattern & (sign - 1) <= largest else 0 for pattern in patterns]
    block = Preimages if gains is None else Gained
    return block(NAMES[dtype], NAMES[there], work, patterns, deltas, gains or []).read(stream, dtype, there)


def gains_of(said: Document, parts: Parts, elements: int, work: str) -> list[int] | None:
    """The pattern of what each element was multiplied by."""
    if not said.get("gains"):
        return None
    dtype, shape, data = parts[f"gains/{said['key']}"]
    assert (NAMES[dtype], blake3(data).hexdigest()) == (work, said["gains"])
    found = patterns_in(data, dtype)
    assert shape == [len(found)]
    inputs = elements // len(found)
    transposed = said["terms"][0].get("transposed", False)
    return found * inputs if transposed else [gain for gain in found for _ in range(inputs)]


def streams_of(fragment: bytes) -> Iterator[bytes]:
    """The streams of a fragment of one block each group."""
    while fragment:
        blocks, frame, heads, tails = struct.unpack("<IIII", fragment[:16])
        assert blocks == 1
        body = fragment[20:]
        assert struct.unpack("<I", fragment[16:20]) == (zlib.crc32(fragment[:16] + body[:frame]),)
        head = unframe(body[:frame])
        assert len(head) == heads
        yield head + body[frame : frame + tails]
        fragment = body[frame + tails :]


def take_header(stream: bytes, form: str) -> tuple[Sequence[int], bytes]:
    """The numbers of a stream's header, and what follows it, under its checksum."""
    size = struct.calcsize(form)
    rest = stream[size + 4 :]
    assert struct.unpack_from("<I", stream, size) == (zlib.crc32(stream[:size] + rest),)
    return struct.unpack_from(form, stream), rest


def place(pattern: int, sign: int) -> int:
    """The place on the line."""
    return pattern if pattern < sign else -1 - (pattern - sign)


def at_place(key: int, sign: int) -> int:
    """The pattern at a place on the line."""
    return key if key >= 0 else sign + (-1 - key)


def from_residual(stream: bytes, dtype: str, candidate: bytes | None) -> bytes:
    """A tensor that was replaced."""
    number = dtype in NAMES
    width = FORMATS[NAMES[dtype]].width // 8 if number else 1
    (version, *said, count), planes = take_header(stream, "<HBBI")
    assert (version, said, len(planes)) == (1, [width, int(number)], width * count)
    sign, everything = 1 << (8 * width - 1), 1 << 8 * width
    found = b""
    for at in range(count):
        folded = sum(planes[plane * count + at] << 8 * plane for plane in range(width))
        step = folded >> 1 if folded % 2 == 0 else -1 - (folded >> 1)
        there = 0 if candidate is None else int.from_bytes(candidate[at * width : (at + 1) * width], "little")
        key = ((place(there, sign) if number else there) + step) % everything
        pattern = at_place(key if key < sign else key - everything, sign) if number else key
        found += pattern.to_bytes(width, "little")
    return found


class Preimages:
    """One block: which values map to what is there."""

    def __init__(
        self, base: str, merged: str, work: str, patterns: list[int], deltas: list[Fraction], gains: list[int]
    ) -> None:
        self.base, self.merged, self.work = base, merged, work
        self.patterns, self.deltas, self.gains = patterns, deltas, gains
        self.sign, self.merged_sign = FORMATS[base].sign, FORMATS[merged].sign
        self.top = FORMATS[base].largest_pattern

    def read(self, stream: bytes, dtype: str, there: str) -> bytes:
        """The base's bytes."""
        (version, kind, elements, *counts), rest = take_header(stream, "<HHIIIII")
        assert (version, kind, elements) == (1, 256 * CODES[dtype] + CODES[there], len(self.patterns))
        found = [self.candidate(at) for at in range(elements)]
        suspects = [at for at in range(elements) if self.suspected(at, found[at])]
        intervals = {at: self.interval(at) for at in suspects}
        bits, exceptions = self._take_apart(rest, counts)
        flags, signs, planes = bits
        indexed = []
        for at in suspects:
            first, spare = intervals[at]
            pair = (first, spare) == (-1, 1)
            near = spare > 1 and first <= 0 and first + spare >= -1
            if pair or (near and next(flags)):
                found[at] = self.sign * next(signs)
            else:
                indexed.append(at)
        self._read_planes(planes, indexed, intervals, found)
        for bits_left in (flags, signs):
            assert not any(bits_left)
        for at, pattern in exceptions:
            found[at] = pattern
        width = self.sign.bit_length() // 8
        return b"".join(pattern.to_bytes(width, "little") for pattern in found)

    def _take_apart(self, rest: bytes, counts: Sequence[int]) -> tuple[tuple[Any, Any, bytes], list[tuple[int, int]]]:
        flags, signs, exceptions, planes = counts
        width = self.sign.bit_length() // 8
        ends = [0, (flags + 7) // 8, (signs + 7) // 8, 4 * exceptions, width * exceptions, planes]
        pieces = []
        for size in ends[1:]:
            pieces.append(rest[:size])
            rest = rest[size:]
        assert not rest
        positions = struct.unpack(f"<{exceptions}I", pieces[2])
        patterns = [int.from_bytes(pieces[3][at : at + width], "little") for at in range(0, len(pieces[3]), width)]
        return (bits_of(pieces[0]), bits_of(pieces[1]), pieces[4]), list(zip(positions, patterns, strict=True))

    def _read_planes(self, planes: bytes, alive: list[int], intervals: Mapping[int, tuple[int, int]], out: Any) -> None:
        index, plane = dict.fromkeys(alive, 0), 0
        alive = [at for at in alive if intervals[at][1]]
        while alive:
            size = (len(alive) + 7) // 8
            for at, bit in zip(alive, bits_of(planes[:size]), strict=False):
                index[at] += bit << plane
            planes, plane = planes[size:], plane + 1
            alive = [at for at in alive if intervals[at][1] >> plane]
        assert not planes
        for at, value in index.items():
            assert value <= intervals[at][1]
            out[at] = at_place(intervals[at][0] + value, self.sign)

    def candidate(self, at: int) -> int:
        """The value that the element most likely was."""
        pattern = encode(self._difference(at), self.base)
        if pattern == 0 and self.deltas[at] == 0 and self.patterns[at] >= self.merged_sign:
            return self.sign
        return pattern

    def _difference(self, at: int) -> Fraction:
        largest = decode(self.top, self.base)
        value = rounded(decode(self.patterns[at], self.merged) - self.deltas[at], self.work)
        return max(-largest, min(value, largest))

    def suspected(self, at: int, candidate: int) -> bool:
        """Whether it is not taken at its word."""
        merged, fraction = self.patterns[at], FORMATS[self.base].fraction_bits
        if self.base != self.merged:
            other = FORMATS[self.merged]
            widest = max(abs(decode(merged, self.merged)), reference.power(other.least_normal))
            return abs(decode(candidate, self.base)) <= widest * reference.power(1 + fraction - other.fraction_bits)
        key = place(candidate, self.sign)
        if self.base == "float64":
            m = place(merged, self.sign)
            return self.reached(at, key - 1) >= m or self.reached(at, key + 1) <= m
        binade = merged & (self.sign - 1) >> fraction << fraction
        if self.sign > 1 << 7:
            binade = max(binade, 1 << fraction)
        dropped = FORMATS[self.work].fraction_bits - fraction
        tie = encode(self._difference(at), self.work) % (1 << dropped) == 1 << (dropped - 1)
        return candidate & (self.sign - 1) <= binade or tie

    def reached(self, at: int, key: int) -> int:
        """The place of what the value at a place merges to; beyond all where that is too large."""
        delta, pattern = self.deltas[at], at_place(key, self.sign)
        try:
            if delta == 0:
                found = cast_bits(pattern, self.base, self.merged) if self.base != self.merged else pattern
            else:
                found = encode(rounded(decode(pattern, self.base) + delta, self.work), self.merged)
        except TooLargeError:
            return self.merged_sign if pattern < self.sign else -self.merged_sign
        return place(found, self.merged_sign)

    def interval(self, at: int) -> tuple[int, int]:
        """First place and number of further places that map to what is there."""
        m = place(self.patterns[at], self.merged_sign)
        first, end = (self._first(at, least) for least in (m, m + 1))
        return first, max(end - first - 1, 0)

    def _first(self, at: int, least: int) -> int:
        low, high = -2 - self.top, self.top + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.reached(at, middle) >= least else (middle, high)
        return high


class Gained(Preimages):
    """One block whose sums were multiplied."""

    def __init__(self, *said: Any) -> None:
        super().__init__(*said)
        # A negative gain gives the results of its opposite with the other sign.
        sign = FORMATS[self.work].sign
        self.patterns = [
            m ^ self.merged_sign if g & sign else m for m, g in zip(self.patterns, self.gains, strict=True)
        ]
        self.gains = [gain & (sign - 1) for gain in self.gains]

    def candidate(self, at: int) -> int:
        return encode(self._difference(at), self.base)

    def _difference(self, at: int) -> Fraction:
        gain, m, largest = decode(self.gains[at], self.work), self.patterns[at], decode(self.top, self.base)
        if gain == 0:
            assert decode(m, self.merged) == 0
            return Fraction(0)
        try:
            value = rounded(rounded(decode(m, self.merged) / gain, self.work) - self.deltas[at], self.work)
        except TooLargeError:
            return -largest if m & self.merged_sign else largest
        return max(-largest, min(value, largest))

    def suspected(self, at: int, candidate: int) -> bool:
        magnitude = candidate & (self.sign - 1)
        return magnitude == 0 or any(self.result(at, candidate + step) == self.patterns[at] for step in (1, -1))

    def result(self, at: int, pattern: int) -> int:
        """The pattern of what a value becomes; drawn in where that is too large."""
        largest = FORMATS[self.merged].largest_pattern + (self.merged_sign if pattern & self.sign else 0)
        if pattern & (self.sign - 1) > self.top:
            return largest if self.gains[at] else 0
        try:
            return self._multiplied(at, pattern)
        except TooLargeError:
            return largest

    def _multiplied(self, at: int, pattern: int) -> int:
        delta = self.deltas[at]
        if delta == 0:
            total = cast_bits(pattern, self.base, self.work)
        else:
            total = encode(decode(pattern, self.base) + delta, self.work)
        product = decode(self.gains[at], self.work) * decode(total, self.work)
        # A zero has the sign of the sum.
        found = encode(product, self.work) if product else total & FORMATS[self.work].sign
        return cast_bits(found, self.work, self.merged)

    def reached(self, at: int, key: int) -> int:
        pattern = at_place(key, self.sign)
        try:
            return place(self._multiplied(at, pattern), self.merged_sign)
        except TooLargeError:
            return self.merged_sign if pattern < self.sign else -self.merged_sign


def bits_of(data: bytes) -> Iterator[int]:
    """The bits of bytes, the lowest first."""
    return (byte >> bit & 1 for byte in data for bit in range(8))
