"""How many bytes an instruction of a compiled program reads and writes, as far as its text says.

Where a fusion uses only parts of an array, these parts count; where an array is updated in place, the new part counts.
Data that a cache may hold counts as if it came from memory. Read ``work.py`` next: it sums over a program.
"""

from collections.abc import Mapping

from hope_jax.train.hlo import Computation, Instruction, size

PARTS = ("dynamic-slice", "slice", "gather")  # each reads as much of its first operand as it returns
UPDATE = "dynamic-update-slice"
ALIASES = ("bitcast", "reshape")


def moved(each: Instruction, here: Computation, computations: Mapping[str, Computation]) -> int:
    """Bytes that an instruction of ``here`` reads and writes when it runs once."""
    if each.opcode in PARTS:
        return 2 * size(each.kind)
    if each.opcode == UPDATE:
        return 2 * size(here.kinds(each)[1])
    if each.opcode == "fusion":
        inside = computations[each.named("calls")[0]]
        arrays = [name for name, line in inside.lines.items() if line.opcode == "parameter"]
        return _written(inside) + sum(_read(name, inside) for name in arrays)
    if each.opcode.endswith("-start") and each.opcode != "all-reduce-start":  # it returns operands, result and marks
        return size(each.kind.replace("u32[]", ""))
    return size(each.kind) + sum(map(size, here.kinds(each)))


def _written(inside: Computation) -> int:
    """Bytes of a fusion's results; for an array that it updates in place, those of the new part."""
    root = inside.lines[inside.root]
    total = 0
    for name in root.operands if root.opcode == "tuple" else [inside.root]:
        source = inside.source(name)
        total += size(inside.kinds(source)[1] if source.opcode == UPDATE else inside.lines[name].kind)
    return total


def _read(name: str, inside: Computation) -> int:
    """Bytes that a fusion reads of one of its arrays."""
    whole, total = size(inside.lines[name].kind), 0
    for user, line in inside.lines.items():
        if name not in line.operands:
            continue
        if line.opcode in ALIASES:
            total += _read(user, inside)
        elif line.opcode in PARTS and line.operands[0] == name:
            total += size(line.kind)
        elif line.opcode != UPDATE or line.operands[0] != name:
            return whole
    return min(whole, total)
