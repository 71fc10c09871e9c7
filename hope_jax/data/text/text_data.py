"""One call from a configuration to batches: open_text. Read corpus.py next, then windows.py and ../batches.py."""

import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from hope_jax.data.batches import HeldoutBatches, Order, TrainBatches
from hope_jax.data.text import building, corpus, tfds_corpus, windows
from hope_jax.data.text.config import DataConfig
from hope_jax.data.text.files import from_files
from hope_jax.data.text.tokenizers import Tokenizer
from hope_jax.data.text.windows import Windows
from hope_jax.errors import UserError, whole


@dataclass(frozen=True)
class TextData:
    """A tokenized corpus, ready to be read.

    train, heldout: windows of T + 1 tokens, int32; they share no document, or no byte where one document was cut.
    fingerprint:    changes when the corpus, the held-out choice, the tokenizer or the length changes.
    skipped:        files of folders and globs that were left out.
    left_out:       one sentence: how many files and bytes were left out, and why; empty if none were.
    """

    train: Windows
    heldout: Windows
    fingerprint: str
    skipped: int
    left_out: str

    def train_batches(self, *, batch: int, seed: int, process_index: int = 0, process_count: int = 1) -> TrainBatches:
        """Endless int32 [B, T + 1], with get_state and set_state.

        Args:
            batch: B, windows per step of this process, at most its share of the windows.
            seed: of the order, in 0 .. 2**32 - 1.
            process_index, process_count: this process takes rows process_index, process_index + process_count, ...

        Raises:
            UserError: a number outside its range.
        """
        order = Order(
            whole("batch", batch), whole("seed", seed, 0), whole("process_count", process_count), self.fingerprint
        )
        return TrainBatches(self.train, order, process_index)

    def heldout_batches(self, *, batch: int, limit: int | None = None) -> HeldoutBatches:
        """Re-iterable int32 [B, T + 1], at most `limit` of them, evenly spread. UserError when a number is below 1."""
        return HeldoutBatches(self.heldout, whole("batch", batch), None if limit is None else whole("limit", limit))


def open_text(
    config: DataConfig, tokenizer: Tokenizer, *, length: int, cache_dir: Path, progress: bool = True
) -> TextData:
    """Finds the corpus, tokenizes it unless that was done before, and checks all that can be checked.

    Args:
        config: which text, and how much of it is held out.
        tokenizer: of make_tokenizer(config).
        length: T, tokens predicted per window, at least 1.
        cache_dir: folder that keeps tokenized corpora; made if needed.
        progress: show on stderr what was left out, and a bar while tokenizing.

    Raises:
        UserError: no such text, too little of it, or nowhere to write.
    """
    length = whole("length", length)
    found = from_files(config.path) if config.tfds is None else tfds_corpus.from_tfds(config.tfds)
    if progress and found.left_out:
        tqdm.write(found.left_out, file=sys.stderr)
    building.check_place(Path(cache_dir))
    building.clear_unfinished(Path(cache_dir))
    pieces = corpus.split(found, config.heldout, config.seed)
    fingerprint = building.fingerprint(found, pieces, tokenizer, length)
    folder = Path(cache_dir) / fingerprint
    splits = windows.load(folder)
    if splits is None:
        building.build(folder, found, pieces, tokenizer, length, progress)
        splits = windows.load(folder)
    if splits is None:
        raise UserError(f"the prepared corpus in {folder} cannot be read back: check the disk and the permissions")
    return TextData(splits["train"], splits["heldout"], fingerprint, found.skipped, found.left_out)
