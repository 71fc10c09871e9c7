"""Small corpora and batches that the data tests share."""

import itertools

import numpy as np

from hope_jax.data import (
    ByteTokenizer,
    DataConfig,
    TrainBatches,
    open_text,
)

TEXT = "def naïve(x):\n\treturn  x + 1  # 東京 🙂\r\n\n\n"
LETTERS = "abcdefghijklmnopqrst"
LENGTH = 16


def open_folder(folder, cache, *, length=LENGTH, tokenizer=None, **config):
    tokenizer = tokenizer or ByteTokenizer()
    return open_text(
        DataConfig(path=(str(folder),), **config), tokenizer, length=length, cache_dir=cache, progress=False
    )


def numbered(count):
    return [np.full(3, i, np.int32) for i in range(count)]


def batches(count=10, batch=3, seed=0, index=0, processes=1, fingerprint="f"):
    share = {"process_index": index, "process_count": processes}
    return TrainBatches(numbered(count), fingerprint, batch=batch, seed=seed, **share)


def rows(iterator, steps):
    return np.concatenate([batch[:, 0] for batch in itertools.islice(iterator, steps)]).tolist()


def stream(windows):
    """The tokens that windows T apart were cut from."""
    windows = list(windows)
    return np.concatenate([window[:-1] for window in windows] + [windows[-1][-1:]])
