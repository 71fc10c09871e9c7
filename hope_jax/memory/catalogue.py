"""Every memory rule by name: rows of SPEC 1.3 and 1.4. A new rule is a new row, and a row brings its tests.

===================  =========================================================================================
linear_attention     Eq. 5, 15, 64: M_t = M_{t-1} + v k^T; the feature map of keys and queries is the mixer's
deltanet             Eq. 65: M_t = M_{t-1} (I - eta k k^T) + eta v k^T
gated_deltanet       M_t = alpha M_{t-1} (I - eta k k^T) + eta v k^T: gradient taken after retention
titans_linear        Titans Eq. 13-14, 32-33: S_t = beta S - theta grad at the anchor, M_t = alpha M + S_t
titans               the same with a residual two-layer MLP memory (LMM)
hope_linear          Eq. 88, 93 with a matrix memory: DGD + L2 with self-generated values
hope                 Eq. 88-91: the same with a residual two-layer MLP, DGD on every layer
hope_linear_dot      Eq. 92: as hope_linear with the dot-product objective
hope_dot             as hope with the dot-product objective
===================  =========================================================================================
"""

from dataclasses import replace

from hope_jax.memory import architectures, objectives
from hope_jax.memory.rule import Rule

_linear = Rule(architectures.matrix, gradient_at="running", read="after", learned_start=False)
_titans = Rule(architectures.residual_mlp, read="after", momentum=True, damped=False)
_hope = Rule(architectures.residual_mlp, dgd_scope="per_layer", momentum=True, self_values=True)

RULES: dict[str, Rule] = {
    "linear_attention": replace(_linear, objective=objectives.dot),
    "deltanet": _linear,
    "gated_deltanet": replace(_linear, gradient_at="retained"),
    "titans_linear": replace(_titans, architecture=architectures.matrix),
    "titans": _titans,
    "hope_linear": replace(_hope, architecture=architectures.full_rank_matrix),
    "hope": _hope,
    "hope_linear_dot": replace(_hope, architecture=architectures.full_rank_matrix, objective=objectives.dot),
    "hope_dot": replace(_hope, objective=objectives.dot),
}
