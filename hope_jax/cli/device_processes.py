"""What the processes of ``gpu_check`` are told, and whether their JAX sees the card of this machine."""

import os
import subprocess
import sys
from pathlib import Path

import jax

from hope_jax.errors import UserError

CARD = Path("/dev/nvidia0")  # is there where the driver of an NVIDIA card is
GRAPHS = "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL"
"""What makes XLA record loops as CUDA graphs, too, so that the host does not start their instructions one by one."""


def variables(part: str) -> list[str]:
    """What the command of a part begins with: XLA reads its flags as JAX starts, so those of graphs are set before."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {GRAPHS}".strip()
    return ["env", f"XLA_FLAGS={flags}"] if part == "graphs" else []


def check_card() -> None:
    """Raise UserError where there is a card that this JAX cannot use.

    A process that ends is asked: a JAX that has started keeps the memory of the card.
    """
    if CARD.exists():
        ask = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
        _is_cpu(subprocess.run(ask, stdout=subprocess.PIPE, text=True).stdout.strip())


def on_cpu() -> bool:
    """Whether there is no accelerator. Raises UserError where there is a card that this JAX cannot use."""
    return _is_cpu(jax.default_backend())


def _is_cpu(backend: str) -> bool:
    cpu = backend == "cpu"
    if cpu and CARD.exists() and os.environ.get("JAX_PLATFORMS") != "cpu":
        raise UserError(
            'This machine has an NVIDIA card, and JAX does not see it: install "jax[cuda12]" or "jax[cuda13]", as the '
            "driver asks for, or set JAX_PLATFORMS=cpu to check the CPU."
        )
    return cpu


def prepare_processes() -> None:
    """Refuse a card that JAX does not see; tell the processes to fill a card's memory and to compare with the CPU."""
    check_card()
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")  # 0.75 is usual
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and "cpu" not in platforms.split(","):
        os.environ["JAX_PLATFORMS"] = f"{platforms},cpu"
