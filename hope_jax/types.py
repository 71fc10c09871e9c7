"""The axis legend: one letter per axis, used by signatures, einsums and documents alike.

=====  =======================================================================
B      batch: independent sequences
T      time: tokens of one call
D      model width
H      heads
K      key features (what a linear memory multiplies)
V      value features (what a linear memory returns)
F      hidden features of an MLP
C      tokens of one block or anchor period
L      layers
N      memories of equal shape evaluated together
S      triangular systems inverted together
=====  =======================================================================

Shapes in signatures are jaxtyping strings over these letters, checked under pytest only (see ``setup.cfg``).
"""

from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

Scalar = Float[Array, ""]
Tokens = Int[Array, "B T"]
Logits = Float[Array, "B T vocab"]
Stream = Float[Array, "B T D"]
Count = Int[Array, ""] | None
"""Of the T tokens of a call, the first ``count`` are real and the others padding: no state knows of those, and what is
read there means nothing. None: all are real."""

__all__ = ["Array", "Bool", "Count", "Float", "Int", "Logits", "PRNGKeyArray", "Scalar", "Stream", "Tokens"]
