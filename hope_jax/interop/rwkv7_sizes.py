"""The tensors of an RWKV-7 checkpoint by one set of names, and the sizes that their shapes show.

Sizes are read off the shapes: the authors' own files have no ``config.json``, and how wide the low-rank maps are
follows from no formula.
"""

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hope_jax.errors import UserError
from hope_jax.interop.tensors import Tensors

# A low-rank map -> its letter in the names of tensors; its width in config.json.
LETTERS = {"decay": "w", "rate": "a", "share": "v", "gate": "g"}
FIELDS = {
    "decay": "decay_low_rank_dim",
    "rate": "a_low_rank_dim",
    "share": "v_low_rank_dim",
    "gate": "gate_low_rank_dim",
}
# The authors' names -> those of Hugging Face, which are used here, one replacement after the other.
AUTHORS = "emb.weight"
RENAMED = {
    r"^emb\.": "model.embeddings.",
    r"^ln_out\.": "model.norm.",
    r"^head\.": "lm_head.",
    r"^blocks\.": "model.layers.",
    r"\.ln0\.": ".pre_norm.",
    r"\.ln1\.": ".attn_norm.",
    r"\.ln2\.": ".ffn_norm.",
    r"\.att\.ln_x\.": ".attn.g_norm.",
    r"\.att\.(r|k|v|o)(eceptance|ey|alue|utput)\.": r".attn.\1_proj.",
    r"\.att\.([wavg])0$": r".attn.\1_lora.lora.2.bias",
    r"\.att\.([wavg])1$": r".attn.\1_lora.lora.0.weight",
    r"\.att\.([wavg])2$": r".attn.\1_lora.lora.2.weight",
    r"\.att\.": ".attn.",
}


def aliases_of(folder: Path) -> dict[str, str]:
    """The names in the authors' files -> those used here; empty for files of Hugging Face."""
    with contextlib.ExitStack() as stack:
        names = Tensors(folder, stack, {}).names
    return {name: _renamed(name) for name in names} if AUTHORS in names else {}


def _renamed(name: str) -> str:
    for theirs, ours in RENAMED.items():
        name = re.sub(theirs, ours, name)
    return name


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model. ``ranks``: inner features of its low-rank maps."""

    width: int
    hidden: int
    layers: int
    heads: int
    vocab_size: int
    ranks: dict[str, int]

    def check(self, fields: dict[str, Any]) -> None:
        """Raise UserError where ``config.json`` says otherwise."""
        by_head = fields.get("head_dim") is not None  # then the number of heads is not read, and may be any
        stated = {
            **dict.fromkeys(("hidden_size", "attention_hidden_size"), self.width),
            **({} if by_head else dict.fromkeys(("num_heads", "num_attention_heads"), self.heads)),
            "head_dim": self.width // self.heads,
            "intermediate_size": self.hidden,
            "num_hidden_layers": self.layers,
            "vocab_size": self.vocab_size,
            "value_dim": [self.width] * self.layers if isinstance(fields.get("value_dim"), list) else self.width,
            **{FIELDS[name]: rank for name, rank in self.ranks.items()},
        }
        for field, value in stated.items():
            if fields.get(field) not in (None, value):
                raise UserError(f"config.json has {field}={fields[field]!r}; the tensors have {value}.")


def sizes_of(tensors: Tensors, transposed: bool) -> Sizes:
    """What the shapes show; ``transposed``: low-rank matrices are stored [out, in], as all others are.

    Raises UserError where a tensor is missing or shapes contradict each other.
    """
    vocab_size, width = _matrix(tensors, "model.embeddings.weight")
    heads, head_dim = _matrix(tensors, "model.layers.0.attn.r_k")
    if heads * head_dim != width:
        raise UserError(f"The tensors have {heads} heads of {head_dim} features, but embeddings of {width}.")
    hidden, _ = _matrix(tensors, "model.layers.0.ffn.key.weight")
    layers = 1 + max(int(name.split(".")[2]) for name in tensors.names if re.match(r"model\.layers\.\d+\.", name))
    if layers < 2:
        raise UserError("The tensors have one layer; expected two or more, as the first has no share to read.")
    ranks = {kind: _rank(tensors, layers, kind, transposed) for kind in LETTERS}
    return Sizes(width, hidden, layers, heads, vocab_size, ranks)


def low_rank(layers: int, kind: str, part: str) -> list[str]:
    """Names by layer of a low-rank map's tensor: ``part`` is 0.weight (inwards), 2.weight (outwards) or 2.bias.

    The share of the first layer has no effect and need not be there; that of the second stands in for it.
    """
    places = (max(i, 1) if kind == "share" else i for i in range(layers))
    return [f"model.layers.{i}.attn.{LETTERS[kind]}_lora.lora.{part}" for i in places]


def _matrix(tensors: Tensors, name: str) -> tuple[int, int]:
    """The shape. Raises UserError unless the tensor is there and a matrix."""
    shape = tensors.shape(name)
    if len(shape) != 2:
        raise UserError(f"The tensor {tensors.stored(name)} has the shape {list(shape)}; expected a matrix.")
    return shape[0], shape[1]


def _rank(tensors: Tensors, layers: int, kind: str, transposed: bool) -> int:
    """Inner features of a low-rank map, the same in all layers and at both of its matrices."""
    axes = {"0.weight": 0 if transposed else 1, "2.weight": 1 if transposed else 0}
    found = {name: axis for part, axis in axes.items() for name in low_rank(layers, kind, part)}
    ranks = {name: _matrix(tensors, name)[axis] for name, axis in found.items()}
    (first, rank), *others = ranks.items()
    for name, other in others:
        if other != rank:
            why = f"{tensors.stored(first)} has {rank} and {tensors.stored(name)} has {other}"
            raise UserError(f"The low-rank maps of one kind have different inner features: {why}; give all the same.")
    return rank
