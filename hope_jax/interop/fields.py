"""Fields of ``config.json``: read, checked, and refused where they would change what a model computes."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hope_jax.errors import UserError

# fmt: off
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


def read_json(path: Path, of: str = "checkpoint") -> dict[str, Any]:
    """The object in a JSON file. UserError if the file is missing, no JSON, or holds something else."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is no file; expected a JSON file of a {of}.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); expected a {of}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}; expected an object of named fields.")
    return value


def check_plain(
    path: Path, config: dict[str, Any], kind: str, plain: Mapping[str, tuple[Any, ...]], read: Collection[str]
) -> None:
    """Raise UserError for a model that is not the plain architecture.

    Args:
      path: of ``config.json``, for messages.
      config: its fields.
      kind: what ``model_type`` must be.
      plain: field -> the values that it may have; the first is the default, None is a JSON null.
      read: other fields that the caller reads. A field that is not known may change the model, and is refused
        unless it is empty or off.
    """
    if config.get("model_type") != kind:
        raise UserError(f"{path} has model_type={config.get('model_type')!r}; only {kind!r} can be read.")
    for field, values in plain.items():
        if (found := config.get(field, values[0])) not in values:
            raise UserError(f"{path} has {field}={found!r}; only {values[0]!r} can be read.")
    known = {"model_type", *read, *HARMLESS, *plain}
    for field, value in config.items():
        if field not in known and not field.startswith("_") and value not in (None, False, "", [], {}):
            raise UserError(
                f"{path} has {field}={value!r}, which this reader does not know; if it does not change what the model "
                "computes, delete it there."
            )


def whole(config: dict[str, Any], field: str, default: int | None = None) -> int:
    """The whole number in a field, at least 1. Raises UserError for others, and where there is none and no default."""
    value = default if config.get(field) is None else config[field]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"config.json has {field}={value!r}; expected a whole number of at least 1.")
    return value


def positive(field: str, value: Any) -> float:
    """The number. UserError unless it is a positive and finite float32: that is what a model computes with."""
    number, limits = isinstance(value, int | float) and not isinstance(value, bool), np.finfo(np.float32)
    if not number or not float(limits.tiny) <= value <= float(limits.max):
        raise UserError(f"config.json has {field}={value!r}; expected a positive number.")
    return float(value)


def yes_or_no(config: dict[str, Any], field: str, default: bool) -> bool:
    """The truth value in a field. Raises UserError for others."""
    value = config.get(field, default)
    if not isinstance(value, bool):
        raise UserError(f"config.json has {field}={value!r}; expected true or false.")
    return value
