"""A function of one head of one sequence, for all of them; on a mesh, each device computes its heads and sequences."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax

from hope_jax.memory.kernels import Impl, cpu
from hope_jax.memory.mesh import SHARE_HEADS, devices_along, of_context, on_each


def over_heads(
    head: Callable[..., Any],
    shared: tuple[Any, ...],
    own: tuple[Any, ...],
    impl: Impl,
    common: tuple[Any, ...] = (),
) -> Any:
    """``head(*common, *shared, *own)`` of every head of every sequence, leaves [B,H,...].

    ``shared`` is what the sequences of a batch share, leaves [H,...], ``own`` what each has, leaves [B,H,...], and
    ``common`` what all heads share: on a mesh ``head`` may use no other array from outside that is differentiated.
    """
    return on_each(functools.partial(_over_heads, head, impl, len(common), len(shared)), shared, own, common=common)


def copies(groups: int, heads: int) -> int:
    """How often to repeat what the heads of a group share, so that on a mesh each device has it for its heads.

    1 without a mesh, and where the devices do not divide the heads of a group.
    """
    times = math.lcm(groups, devices_along(of_context(), SHARE_HEADS)) // groups
    return times if heads // groups % times == 0 else 1


def _over_heads(head: Callable[..., Any], impl: Impl, first: int, count: int, *given: Any) -> Any:
    head, given = functools.partial(head, *given[:first]), given[first:]
    shared, own = given[:count], given[count:]
    if impl == "auto":
        return cpu.batch_and_heads_as_one(head, shared, own)
    return jax.vmap(jax.vmap(head), in_axes=(None,) * count + (0,) * len(own))(*given)
