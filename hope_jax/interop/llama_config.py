"""``config.json`` of a Llama checkpoint: the sizes, and a refusal of everything that is not the plain architecture.

Fields that are not there have the format's own defaults. Read ``llama_rope.py`` next.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hope_jax.errors import UserError
from hope_jax.interop.llama_rope import positive, read_rope
from hope_jax.nn.rotary import RopeScaling

# What the model must be: field -> the values that say so; the first is the default, None is a JSON null.
PLAIN = {
    "architectures": (["LlamaForCausalLM"], None),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
}
# fmt: off
READ = {  # fields that decide the model and are read below
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta",
    "rope_scaling", "rope_parameters", "tie_word_embeddings",
}
HARMLESS = {  # fields that change no logits: of training, writing text, classification, and how the files were made
    "initializer_range", "attention_dropout", "pretraining_tp", "use_cache", "torch_dtype", "dtype",
    "gradient_checkpointing", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id",
    "decoder_start_token_id", "tokenizer_class", "prefix", "do_sample", "early_stopping", "num_beams",
    "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_return_sequences",
    "max_length", "min_length", "max_new_tokens", "id2label", "label2id", "problem_type", "task_specific_params",
    "finetuning_task", "output_attentions", "output_hidden_states", "output_scores", "return_dict",
    "return_dict_in_generate", "torchscript", "transformers_version", "model_name", "name_or_path",
    "attn_implementation",
}
# fmt: on


@dataclass(frozen=True)
class Llama:
    """Sizes of a Llama: features D, hidden features, blocks, query heads, key and value heads, ...

    ``eps``: the norms' epsilon. ``tied``: the head is the embedding.
    """

    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab_size: int
    context: int
    eps: float
    rope_base: float
    rope_scaling: RopeScaling | None
    tied: bool

    @property
    def head_size(self) -> int:
        """Features of a head."""
        return self.width // self.heads


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. UserError if the file is missing, no JSON, or holds something else."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is no file; expected a JSON file of a Llama checkpoint.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); expected a Llama checkpoint.") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}; expected an object of named fields.")
    return value


def read_llama(path: Path) -> Llama:
    """The sizes in ``config.json``. UserError, naming the field, for a model that is not a plain Llama."""
    config = read_json(path)
    if config.get("model_type") != "llama":
        raise UserError(f"{path} has model_type={config.get('model_type')!r}; only 'llama' can be read.")
    for field, values in PLAIN.items():
        if (found := config.get(field, values[0])) not in values:
            raise UserError(f"{path} has {field}={found!r}; only {values[0]!r} can be read.")
    _refuse_unknown(path, config)
    heads = _whole(config, "num_attention_heads")
    rope_base, rope_scaling = read_rope(config)
    llama = Llama(
        width=_whole(config, "hidden_size"),
        hidden=_whole(config, "intermediate_size"),
        layers=_whole(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=_whole(config, "num_key_value_heads", heads),
        vocab_size=_whole(config, "vocab_size"),
        context=_whole(config, "max_position_embeddings", 2048),
        eps=positive("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
        rope_base=rope_base,
        rope_scaling=rope_scaling,
        tied=_tied(config),
    )
    _check_heads(llama, config.get("head_dim"))
    return llama


def _refuse_unknown(path: Path, config: dict[str, Any]) -> None:
    """What nobody here has heard of may change the model. Fields that are empty or off change nothing."""
    known = READ | HARMLESS | PLAIN.keys()
    for field, value in config.items():
        if field not in known and not field.startswith("_") and value not in (None, False, "", [], {}):
            raise UserError(
                f"{path} has {field}={value!r}, which this reader does not know; if it does not change what the model "
                "computes, delete it there."
            )


def _check_heads(llama: Llama, head_dim: Any) -> None:
    if llama.width % llama.heads or head_dim not in (None, llama.head_size):
        raise UserError(
            f"config.json has hidden_size={llama.width}, num_attention_heads={llama.heads} and head_dim={head_dim}; "
            "only heads of hidden_size / num_attention_heads features can be read."
        )
    if llama.heads % llama.kv_heads:
        raise UserError(
            f"config.json has num_key_value_heads={llama.kv_heads}, which does not divide num_attention_heads="
            f"{llama.heads}."
        )


def _tied(config: dict[str, Any]) -> bool:
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise UserError(f"config.json has tie_word_embeddings={tied!r}; expected true or false.")
    return tied


def _whole(config: dict[str, Any], field: str, default: int | None = None) -> int:
    value = default if config.get(field) is None else config[field]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"config.json has {field}={value!r}; expected a whole number of at least 1.")
    return value
