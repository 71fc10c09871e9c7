"""Tiny random models of other libraries, saved, loaded here and compared: the largest difference of the logits.

    pip install -e '.[train,references]'
    python tests/compare_with_pytorch.py [names of cases]

pytest does not collect this file: PyTorch is large. The status is 1 where a difference is above NEAR.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

from hope_jax.interop import load, load_qwen3_next_layer
from hope_jax.nn.language_model import LanguageModel

NEAR = 1e-4  # of float32, in units of the largest logit
VOCAB, TIME = 64, 70  # more tokens than a chunk has, here and there
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, TIME))
SIZES = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, pad_token_id=0, bos_token_id=0, eos_token_id=0)

Case = Callable[[Path], tuple[Any, Any]]  # empty folder -> our numbers and theirs


def shaken(model: Any) -> Any:
    """The model with every parameter moved from its start: ones and zeros would hide mistakes."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def saved(architecture: str, folder: Path, **fields: Any) -> Any:
    """A random model of transformers, saved in the folder as float32."""
    build = getattr(transformers, f"{architecture}ForCausalLM")
    model = shaken(build(getattr(transformers, f"{architecture}Config")(**SIZES | fields)))
    model.save_pretrained(folder)
    return model


def our_logits(folder: Path) -> Any:
    """Of TOKENS, by the model that ``load`` finds in the folder."""
    config, params = load(folder)
    return jax.jit(LanguageModel(config).apply)({"params": params}, TOKENS)[0]


def of_transformers(architecture: str, **fields: Any) -> Case:
    """The case of a whole model of transformers."""

    def case(folder: Path) -> tuple[Any, Any]:
        model = saved(architecture, folder, **fields)
        return our_logits(folder), model(torch.tensor(TOKENS)).logits

    return case


def qwen3_next_layer(folder: Path) -> tuple[Any, Any]:
    """A linear attention layer alone, on random inputs."""
    experts = dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8)
    attention = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=8)
    heads = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=12, linear_value_head_dim=10)
    model = saved("Qwen3Next", folder, **experts, **attention, **heads)
    u = np.random.default_rng(1).normal(size=(2, TIME, SIZES["hidden_size"])).astype(np.float32)
    mixer, params = load_qwen3_next_layer(folder, 1)
    layer = mixer.build(u.shape[2], jnp.float32)
    ours, _ = jax.jit(layer.apply)({"params": params}, u, layer.init_state(len(u), 0))
    return ours, model.model.layers[1].linear_attn(torch.tensor(u))


def rwkv7(folder: Path) -> tuple[Any, Any]:
    """The model of rwkv7-hf, which is plain PyTorch; the other cases do not need it."""
    import rwkv7_hf  # pyright: ignore[reportMissingImports]

    ranks = dict(decay_low_rank_dim=3, gate_low_rank_dim=5, a_low_rank_dim=4, v_low_rank_dim=2)
    fields = dict(num_heads=4, head_dim=8, intermediate_size=48, **ranks)
    model = shaken(rwkv7_hf.RWKV7ForCausalLM(rwkv7_hf.RWKV7Config(**SIZES | fields)))
    model.save_pretrained(folder)
    return our_logits(folder), model(torch.tensor(TOKENS)).logits


MAMBA2 = dict(num_heads=4, head_dim=16, state_size=12, expand=2, conv_kernel=4, chunk_size=16)
CASES: dict[str, Case] = {
    "llama": of_transformers("Llama", intermediate_size=48, num_attention_heads=4, num_key_value_heads=2),
    "mamba2": of_transformers("Mamba2", n_groups=1, tie_word_embeddings=True, **MAMBA2),
    "mamba2, 2 groups, clipped steps": of_transformers("Mamba2", n_groups=2, time_step_limit=(0.5, 1.0), **MAMBA2),
    "qwen3_next layer": qwen3_next_layer,
    "rwkv7": rwkv7,
}


def main(names: list[str]) -> int:
    """Print one line for each case."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, jax {jax.__version__}"
    print(f"float32, {TIME} tokens; {versions}")
    worst = 0.0
    for name in names or CASES:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            ours, theirs = (np.asarray(numbers) for numbers in CASES[name](Path(folder)))
        difference, size = np.max(np.abs(ours - theirs)), np.max(np.abs(theirs))
        print(f"{name:32} largest difference {difference:.1e}, largest number {size:.1f}")
        worst = max(worst, difference / size)
    return int(not worst < NEAR)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
