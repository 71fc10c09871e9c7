"""Every memory rule by name: rows of SPEC 1.3 and 1.4. A new rule is a new row, and every row is tested by being here.

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
dla                  deep linear attention (ATLAS Eq. 19, 2505.23735): gradient descent on the dot product, MLP memory
yaad                 Miras (2504.13173): MLP memory with a norm, Huber objective
moneta               Miras: the same with the l_p objective, p = 3, and the link W = A / norm_q(A)^(q-2), q = 4
memora               Miras: the same with the l2 objective and the link W = c softmax(Z)
oja                  M_t = (alpha I - eta v v^T) M_{t-1} + eta v k^T: the erase is on the side of the value
===================  =========================================================================================
"""

from dataclasses import replace

from hope_jax.memory import architectures, linked, objectives
from hope_jax.memory.rule import Rule

_linear = Rule(architectures.matrix, gradient_at="running", read="after", learned_start=False)
_titans = Rule(architectures.residual_mlp, read="after", momentum=True, damped=False)
_miras = Rule(architectures.normed_mlp, read="after")
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
    "dla": Rule(architectures.mlp, objective=objectives.dot, read="after"),
    "yaad": replace(_miras, objective=objectives.Huber()),
    "moneta": replace(_miras, objective=objectives.Lp(), link=linked.NormLink()),
    "memora": replace(_miras, link=linked.SoftmaxLink()),
    "oja": replace(_linear, transposed=True),
}
