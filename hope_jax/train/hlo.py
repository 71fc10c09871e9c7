"""Optimized HLO text, the form of a compiled program: its computations, their instructions, the rounds of its loops.

Read ``work.py`` next: it counts what a program does.
"""

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

# The type of a result is an array, ``f32[2,3]{1,0:T(8,128)}``, or a tuple; ``opcode(operands), attributes`` follow it.
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) (?:\(.*\) -> .*)?\{$")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclass(frozen=True)
class Instruction:
    """One line: the type of its result, its opcode, and the rest, from the operands on (behind their first bracket)."""

    kind: str
    opcode: str
    rest: str

    @functools.cached_property
    def _end(self) -> int:
        """Where the operands end. Types may stand in front of their names, and have brackets of their own."""
        depth, end = 1, 0
        while depth:
            depth += {"(": 1, ")": -1}.get(self.rest[end], 0)
            end += 1
        return end

    @property
    def inside(self) -> str:
        """The text between the brackets: operands, or the value of a constant."""
        return self.rest[: self._end - 1]

    @property
    def operands(self) -> list[str]:
        """The names of the operands."""
        return re.findall(r"%([\w.-]+)", self.inside)

    def attribute(self, name: str, value: str = r"\{[^}]*\}|[^\s,]+") -> str:
        """The text after ``name=`` behind the operands; empty where there is no such attribute."""
        found = re.search(rf"\b{name}=({value})", self.rest[self._end :])
        return found[1] if found else ""

    def named(self, *attributes: str) -> list[str]:
        """The computations that these attributes name."""
        return re.findall(r"[\w.-]+", " ".join(map(self.attribute, attributes)))


@dataclass
class Computation:
    """Instructions by name, and the name of the one that is the result."""

    lines: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    def kinds(self, instruction: Instruction) -> list[str]:
        """The types of the operands of an instruction here."""
        return [self.lines[name].kind for name in instruction.operands]

    def source(self, name: str) -> Instruction:
        """The instruction of that name; for a copy, the instruction that is copied."""
        found = self.lines[name]
        while found.opcode in ("copy", "bitcast", "convert") and found.operands:
            found = self.lines[found.operands[0]]
        return found

    def entry(self, name: str) -> int | None:
        """The index of an instruction that takes an entry of the computation's argument, a tuple; None for others."""
        found = self.source(name)
        if found.opcode != "get-tuple-element" or self.source(found.operands[0]).opcode != "parameter":
            return None
        return int(found.attribute("index"))

    def constant(self, name: str) -> int | None:
        """The value of an integer constant; None for others."""
        found = self.source(name)
        return int(found.inside) if found.opcode == "constant" and found.inside.lstrip("-").isdecimal() else None


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a program by name, and the name of its entry computation."""
    computations: dict[str, Computation] = {}
    entry, here = "", Computation()
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            here = computations.setdefault(head[2], Computation())
            entry = head[2] if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            here.lines[found[2]] = Instruction(*found.groups()[2:])
            here.root = found[2] if found[1] else here.root
    return computations, entry


def rounds(loop: Instruction, here: Computation, computations: Mapping[str, Computation]) -> int | None:
    """How often a ``while`` loop in ``here`` runs, by the compiler's note or by the loop's counter; None: not known."""
    if noted := _TRIPS.search(loop.rest):
        return int(noted[1])
    condition, body = (computations[loop.attribute(name).lstrip("%")] for name in ("condition", "body"))
    test = condition.lines[condition.root]
    start = here.source(loop.operands[0])
    if test.opcode != "compare" or test.attribute("direction") != "LT" or start.opcode != "tuple":
        return None
    counter, limit = test.operands
    first = _before(here, start, condition.entry(counter))
    last = condition.constant(limit)
    last = _before(here, start, condition.entry(limit)) if last is None else last
    step = _step(body, condition.entry(counter))
    return None if first is None or last is None or not step else max(0, -((first - last) // step))


def _before(here: Computation, start: Instruction, entry: int | None) -> int | None:
    """The value of an entry of a loop's state before the loop, if that is a constant."""
    return None if entry is None else here.constant(start.operands[entry])


def _step(body: Computation, counter: int | None) -> int | None:
    """How much a round adds to the counter; None: not known."""
    result = body.lines[body.root]
    if counter is None or result.opcode != "tuple":
        return None
    added = body.source(result.operands[counter])
    if added.opcode != "add" or counter not in map(body.entry, added.operands):
        return None
    return next((value for value in map(body.constant, added.operands) if value is not None), None)


def numbers(text: str) -> list[int]:
    """The whole numbers in a text."""
    return [int(number) for number in re.findall(r"-?\d+", text)]


def sizes(kind: str) -> list[int]:
    """The sizes of the axes of an array."""
    return numbers(_ARRAY.findall(kind)[0][2])


def size(kind: str) -> int:
    """Bytes of an array, or of all arrays of a tuple. ``pred`` has no number in its name; its entries are bytes."""
    arrays = ((name, int(bits or 8), math.prod(numbers(axes))) for name, bits, axes in _ARRAY.findall(kind))
    return sum(entries * bits // 8 for name, bits, entries in arrays if name != "token")
