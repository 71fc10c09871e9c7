"""Types and shapes in signatures are checked in the tests: each kind of mistake is noticed."""

from dataclasses import dataclass

import beartype
import jaxtyping
import numpy as np
import pytest
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float

from hope_jax.data import ByteTokenizer, Haystack

typed = jaxtyping.jaxtyped(typechecker=beartype.beartype)
SQUARE, WIDE = np.zeros((2, 2)), np.zeros((2, 3))


@typed
def transposed(x: Float[np.ndarray, "T D"], same: Float[np.ndarray, "T D"]) -> Float[np.ndarray, "D T"]:
    """The sum, of wrong shape unless x is square."""
    return x + same


@typed
@dataclass(frozen=True)
class Pair:
    """Two arrays of one shape."""

    x: Float[np.ndarray, "T D"]
    y: Float[np.ndarray, "T D"]


def test_what_fits_passes_and_letters_are_free_in_every_call():
    assert transposed(SQUARE, SQUARE).shape == (2, 2)
    assert transposed(np.zeros((3, 3)), np.zeros((3, 3))).shape == (3, 3)
    assert Pair(WIDE, WIDE).x is WIDE


MISTAKES = {
    "rank": lambda: transposed(np.zeros(2), np.zeros(2)),
    "type": lambda: transposed(SQUARE.astype(int), SQUARE),
    "one letter, two sizes": lambda: transposed(SQUARE, WIDE),
    "result": lambda: transposed(WIDE, WIDE),
    "field": lambda: Pair(np.zeros(2), np.zeros(2)),
    "fields, one letter, two sizes": lambda: Pair(SQUARE, WIDE),
    "in the package": lambda: Haystack(ByteTokenizer(), " ", np.zeros((2, 2), np.int32), np.zeros(1, int)),
}


@pytest.mark.parametrize("call", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_noticed(call):
    with pytest.raises(BeartypeCallHintViolation):
        call()


def test_nothing_is_checked_where_it_is_switched_off(untyped):
    assert transposed(WIDE, WIDE).shape == (2, 3)
