"""What saving in the background costs: blocks of training steps of hope-tiny, with a save in every second one.

    PYTHONPATH=. python tests/cost_of_saving.py 5 4    # steps of a block, blocks of each kind

Reading back and sealing included; a block ends when its step is saved.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from hope_jax import MODELS, LanguageModel
from hope_jax import train as training

BATCH, LENGTH, EVERY = 4, 512, 100  # those of ``pretrain``


def tell(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(steps: int, blocks: int) -> None:
    """Print the seconds of a block without a save, and what a save adds, by the clock and of all threads."""
    model = LanguageModel(MODELS["hope-tiny"])
    loss = training.next_token_loss(model, np.ones(256))
    setup = training.model_setup(model, loss, training.OptimizerConfig(), 10_000, BATCH * LENGTH)
    batch = np.random.default_rng(0).integers(0, 256, (BATCH, LENGTH + 1), np.int32)
    state, found = setup.start(0), {False: [], True: []}

    def block(state, saver):
        since = np.array([time.monotonic(), time.process_time()])
        if saver:
            saver.save(state, {}, {})
        for _ in range(steps):
            state, metrics = setup.step(state, batch)
            jax.block_until_ready(metrics)
        if saver:
            saver.wait()
        return state, np.array([time.monotonic(), time.process_time()]) - since

    with tempfile.TemporaryDirectory() as folder, training.Saver(Path(folder), keep=2) as saver:
        for turn in range(2 * blocks + 2):  # the first of each kind compile
            saves = bool(turn % 2)
            state, seconds = block(state, saver if saves else None)
            if turn > 1:
                found[saves].append(seconds)
                tell(f"{'with' if saves else 'without'} a save: {seconds[0]:.2f} s, {seconds[1]:.2f} s of CPU")
    for kind, without, with_ in zip(("by the clock", "of CPU"), *map(np.transpose, found.values()), strict=True):
        step = statistics.median(without) / steps
        added = statistics.median(with_ - without)
        tell(f"{kind}: step {step:.3f} s, a save adds {added:.2f} s: {added / step / EVERY:.1%} of {EVERY} steps")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
