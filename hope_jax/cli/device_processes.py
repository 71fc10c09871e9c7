"""The environment of the processes of ``gpu_check``, and whether their JAX sees the card of this machine."""

import os
import subprocess
import sys
from pathlib import Path

import jax

from hope_jax.errors import UserError

CARD = Path("/dev/nvidia0")  # exists where the driver of an NVIDIA card is installed
GRAPHS = "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL"
"""The flag by which XLA records loops as CUDA graphs, too: the host then starts a loop and not each instruction."""


def variables(part: str) -> list[str]:
    """The beginning of the command of a part. XLA reads its flags when JAX starts, so they are set before it does."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {GRAPHS}".strip()
    return ["env", f"XLA_FLAGS={flags}"] if part == "graphs" else []


def check_card() -> None:
    """Raise UserError where there is a card that this JAX cannot use.

    A short process is asked: JAX, once it has started, keeps the memory of the card until its process ends.
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
