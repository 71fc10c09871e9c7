"""What a compiled program computes and sends; loops count as often as they run.

XLA's own ``cost_analysis`` counts the body of a loop once, but a training step is mostly loops: over layers, chunks
and pieces. Here FLOPs of products and convolutions, and collectives, are summed over all computations that the program
calls. Read ``compile.py`` next.
"""

import functools
import math
import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from hope_jax.train.hlo import Computation, Instruction, numbers, parse, rounds, size, sizes
from hope_jax.train.moved import moved

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
CALLED = ("calls", "to_apply", "body", "condition", "called_computations")
STARTED, ENDED = "AsyncCollectiveStart", "AsyncCollectiveDone"
# Custom calls of TPU programs that compute nothing.
MARKS = ("AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "GatherScatterIndicesBitpacked", "Sharding")
MARKS += (STARTED, ENDED)
# How TPU programs name two kinds of computations: those that take a part of an all-reduce, which makes it a
# reduce-scatter; and those that continue, beside other work, a collective that another computation has started.
SCATTERS, GOES_ON = "all-reduce-scatter", "async_collective_fusion"
# Instructions that hold others, and those that start nothing.
HOLDERS = ("call", "while", "conditional", "async-start")
IDLE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "domain")
ENDS = ("-done", "-update")  # counted where it started; dynamic-update-slice does not end so
BRANCHES = ("branch_computations", "true_computation", "false_computation")


@dataclass(frozen=True)
class Work:
    """What a computation does on one device.

    Attributes:
      flops: of products and convolutions, 2 m n k each.
      collectives: how often each kind runs.
      sent: bytes that the device hands to each kind.
      looped, nested: how often each kind runs inside a loop, and inside a loop in a loop. In a step without slices of
        batches that is between two blocks, and between two chunks of a memory.
      calls: custom calls by target, such as kernels; their arithmetic is not counted.
      unknown: loops whose number of rounds is not in the program; they count once.
      rounds: of all loops; those of an inner loop count in each round of the outer one.
      launches: instructions that run one by one, such as fusions and kernels, without those that return one number.
      moved: bytes that these read and write, see ``moved.py``.
    """

    flops: int = 0
    collectives: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    looped: Counter[str] = field(default_factory=Counter)
    nested: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    unknown: int = 0
    rounds: int = 0
    launches: int = 0
    moved: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(*map(operator.add, self._numbers, other._numbers))

    @property
    def _numbers(self) -> tuple[Any, ...]:
        return tuple(getattr(self, each.name) for each in fields(self))

    def times(self, count: int) -> "Work":
        """This work ``count`` times; a loop of unknown length in it still counts once."""

        def scaled(number: Any) -> Any:
            return Counter({k: count * n for k, n in number.items()}) if isinstance(number, Counter) else count * number

        return replace(Work(*map(scaled, self._numbers)), unknown=self.unknown)

    def in_loop(self, count: int | None) -> "Work":
        """The work of a loop that does this in each of ``count`` rounds; None: their number is not known."""
        once = replace(self, looped=self.collectives, nested=self.looped)
        return once + Work(unknown=1, rounds=1) if count is None else once.times(count) + Work(rounds=count)


def work(text: str) -> Work:
    """What one device does when it runs a program, given as optimized HLO text, once."""
    computations, entry = parse(text)

    @functools.cache
    def of(name: str) -> Work:
        here = computations[name]
        found = sum((_of_instruction(each, here, computations, of) for each in here.lines.values()), Work())
        if name.startswith(GOES_ON) or ENDED in map(_target, here.lines.values()):
            return replace(found, collectives=Counter(), sent=Counter())  # counted where it started
        return _scattered(found) if name.startswith(SCATTERS) else found

    return of(entry)


def _scattered(found: Work) -> Work:
    """The same work with its all-reduces as reduce-scatters."""
    collectives, sent = (Counter({"reduce-scatter": each["all-reduce"]}) for each in (found.collectives, found.sent))
    return replace(found, collectives=collectives, sent=sent)


def _of_instruction(
    each: Instruction, here: Computation, computations: Mapping[str, Computation], of: Callable[[str], Work]
) -> Work:
    found = _computed(each, here, computations, of)
    if each.opcode in HOLDERS:
        return found
    runs = each.opcode not in IDLE and not each.opcode.endswith(ENDS) and _target(each) not in MARKS
    if not runs or size(each.kind) <= 8:
        return replace(found, launches=0, moved=0)
    return replace(found, launches=1, moved=moved(each, here, computations))


def _computed(
    each: Instruction, here: Computation, computations: Mapping[str, Computation], of: Callable[[str], Work]
) -> Work:
    kind = each.opcode.removesuffix("-start")
    if kind in COLLECTIVES:  # the computation that it adds up with does not count
        return Work(collectives=Counter([kind]), sent=Counter({kind: sum(map(size, here.kinds(each)))}))
    if kind in ("dot", "convolution"):
        return Work((_product if kind == "dot" else _convolution)(each, here))
    if kind == "conditional":
        return max(map(of, each.named(*BRANCHES)), key=_amount)
    if kind.endswith(ENDS):
        return Work()
    inside = sum(map(of, each.named(*CALLED)), Work())
    if kind == "while":
        return inside.in_loop(rounds(each, here, computations))
    target = _target(each)
    return inside + Work(calls=Counter([target])) if target and target not in MARKS else inside


def _target(each: Instruction) -> str:
    """The target of a custom call; empty for other instructions."""
    return each.attribute("custom_call_target", '"[^"]+"').strip('"')


def _amount(work: Work) -> tuple[int, int]:
    return work.flops, sum(work.sent.values())


def _product(each: Instruction, here: Computation) -> int:
    left, axes = sizes(here.kinds(each)[0]), numbers(each.attribute("lhs_contracting_dims"))
    return 2 * math.prod(sizes(each.kind)) * math.prod(left[axis] for axis in axes)


def _convolution(each: Instruction, here: Computation) -> int:
    """FLOPs as XLA counts them: products with padding, or with the space between dilated entries, do not count.

    TPU programs have products in this form; where these come in batches, the convolution is dilated.
    """
    labels = each.attribute("dim_labels").replace("->", "_").split("_")
    arrays = [*map(sizes, here.kinds(each)), sizes(each.kind)]
    read, kernel, written = (dict(zip(names, axes, strict=True)) for names, axes in zip(labels, arrays, strict=True))
    window = dict(entry.split("=") for entry in each.attribute("window").strip("{}").split())
    count = 2 * kernel["i"] * written["f"] * written["b"]
    for axis in filter(str.isdigit, read):
        along = {name: tuple(numbers(value.split("x")[int(axis)])) for name, value in window.items()}
        count *= _meetings(read[axis], written[axis], **along)
    return count


@functools.cache
def _meetings(
    read: int, written: int, *, size=(1,), stride=(1,), pad=(0, 0), lhs_dilate=(1,), rhs_dilate=(1,), rhs_reversal=(0,)
) -> int:
    """Pairs of an entry of the result and one of the kernel, along one axis, that meet an entry of the input."""
    del rhs_reversal  # does not change the number
    spots = (at * stride[0] + tap * rhs_dilate[0] - pad[0] for at in range(written) for tap in range(size[0]))
    return sum(spot % lhs_dilate[0] == 0 and 0 <= spot // lhs_dilate[0] < read for spot in spots)
