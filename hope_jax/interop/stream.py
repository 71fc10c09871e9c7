"""How the weights of another library's residual stream become ours, exactly.

Models of other libraries with RMSNorms before their parts compute the same function, with two differences:

* **The norms' epsilon.** Ours is EPS, theirs is e. Let our residual stream be y = c x with c^2 = EPS / e. Then
  y / sqrt(mean(y^2) + EPS) = c x / sqrt(c^2 mean(x^2) + c^2 e) = x / sqrt(mean(x^2) + e): every norm gives what theirs
  gives. y = c x holds if all that is added to the stream is c times theirs: the embedding and every output map.
* **The embedding.** Our model multiplies its rows by sqrt(D), so they are stored divided by it. A tied head then has
  c / sqrt(D) times their table, and the last norm's scale makes up for it: sqrt(D) / c times theirs. It is divided by
  ``LOGIT_GAIN``, which our logits are multiplied by.
"""

import math
from collections.abc import Callable

import numpy as np

from hope_jax.interop.tensors import HEAD, Part
from hope_jax.nn.config import ModelConfig
from hope_jax.nn.language_model import LOGIT_GAIN
from hope_jax.nn.layers import EPS


def stream_factor(eps: float, ours: float = EPS) -> float:
    """c, by which everything that is added to the residual stream is multiplied; ``eps`` is theirs."""
    return math.sqrt(ours / eps)


def ends(config: ModelConfig, eps: float, embedding: str, norm: str) -> list[Part]:
    """Embedding, last norm and head; ``embedding`` and ``norm`` are the names of the tensors."""
    table, root, factor = (config.vocab_size, config.width), math.sqrt(config.width), stream_factor(eps)
    last = root / factor if config.tied else 1.0
    head = [] if config.tied else [Part("head", [HEAD], table)]
    return [
        Part("embedding", [embedding], table, np.asarray, factor / root),
        Part("norm/scale", [norm], (config.width,), factor=last / LOGIT_GAIN),
        *head,
    ]


def swiglu(layer: Callable[[str], list[str]], norm: str, width: int, hidden: int, eps: float) -> list[Part]:
    """A gated feed-forward part. ``layer(name)``: the names of a tensor by layer; ``norm``: that of the norm before."""
    place, up = "blocks/feed_forward", (hidden, width)
    return [
        Part(f"{place}/norm/scale", layer(norm), (width,)),
        Part(f"{place}/gate/kernel", layer("mlp.gate_proj.weight"), up),
        Part(f"{place}/up/kernel", layer("mlp.up_proj.weight"), up),
        Part(f"{place}/down/kernel", layer("mlp.down_proj.weight"), (width, hidden), factor=stream_factor(eps)),
    ]
