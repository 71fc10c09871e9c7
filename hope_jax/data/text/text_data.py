"""One call from a configuration to batches: open_text. Read corpus.py next, then windows.py and ../batches.py."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from hope_jax.data.batches import HeldoutBatches, TrainBatches
from hope_jax.data.text import building, corpus, windows
from hope_jax.data.text.corpus import Corpus
from hope_jax.data.text.files import from_files
from hope_jax.data.text.shards import is_tokens, open_mixture
from hope_jax.data.text.tokenizers import Tokenizer, read_tokenizer
from hope_jax.data.text.windows import Mixture, Windows
from hope_jax.data.tfds_source import documents
from hope_jax.errors import UserError, whole


@dataclass(frozen=True)
class DataConfig:
    """Text, tokenizer and held-out split. Raises UserError for values outside the ranges given below."""

    path: tuple[str, ...] = ()
    """Text files, folders or globs; JSON lines (.jsonl, their field "text"), too, and .gz or .zst of both. Folders are
    read recursively, links too; hidden files and folders are not read. Or a folder that the command tokenize has
    written. Empty: the Python standard library of this interpreter."""
    weights: tuple[float, ...] = ()
    """Of several folders that tokenize has written: how often each is trained on, relative to the others, such as 3 1.
    Empty: by their sizes."""
    tfds: str | None = None
    """Name (or folder) of a TFDS dataset with a text feature, instead of path. Documents play the role of files."""
    tokenizer: str | None = None
    """Path of a JSON file of the `tokenizers` library. None: bytes, 256 tokens."""
    heldout: float = 0.05
    """Fraction of the files, between 0 and 1, that is never trained on. Of a single file, or where one file is most of
    the text: the last bytes of it. Of a folder that was tokenized it has been chosen there, and is left out here."""
    seed: int = 0
    """Chooses which files are held out, as heldout does how many. The order of training windows has its own seed."""

    def __post_init__(self):
        if isinstance(self.path, str):
            raise UserError(f"path must be a tuple of strings, got the string {self.path!r}: write ({self.path!r},)")
        if self.path and self.tfds is not None:
            raise UserError(f"got both path {' '.join(self.path)} and tfds {self.tfds}: give only one of them")
        if self.weights and (len(self.weights) != len(self.path) or not is_tokens(self.path)):
            raise UserError(
                f"got {len(self.weights)} weights for {len(self.path)} paths: give one for each of several folders "
                "that the command tokenize has written"
            )
        if not all(0 < weight < math.inf for weight in self.weights):
            raise UserError(f"weights must be above 0, got {self.weights}")
        if not 0 < self.heldout < 1:
            raise UserError(f"heldout must lie between 0 and 1, got {self.heldout}: 0.05 holds out one file in twenty")


def make_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer a configuration names: bytes unless it gives a file. UserError when the file cannot be used."""
    return read_tokenizer(config.tokenizer)


@dataclass(frozen=True)
class TextData:
    """A tokenized corpus, ready to be read.

    train, heldout: windows of T + 1 tokens, int32; they share no document, or no byte where one document was cut.
    fingerprint:    changes when the corpus, the held-out choice, the tokenizer or the length changes.
    left_out:       one sentence: how many files and bytes were left out, and why; empty if none were.
    """

    train: Windows | Mixture
    heldout: Windows | Mixture
    fingerprint: str
    left_out: str

    def train_batches(self, *, batch: int, seed: int, process_index: int = 0, process_count: int = 1) -> TrainBatches:
        """Endless shuffled int32 [B, T + 1]; see ``TrainBatches`` for the numbers, ``batch`` is of one process."""
        share = {"process_index": process_index, "process_count": process_count}
        return TrainBatches(self.train, self.fingerprint, batch=batch, seed=seed, **share)

    def heldout_batches(self, *, batch: int, limit: int | None = None) -> HeldoutBatches:
        """Re-iterable int32 [B, T + 1], at most `limit` of them, evenly spread. UserError when a number is below 1."""
        return HeldoutBatches(self.heldout, batch, limit)


def find(config: DataConfig) -> Corpus:
    """The documents that a configuration names. UserError where there are none."""
    return from_files(config.path) if config.tfds is None else documents(config.tfds)


def _check_unused(config: DataConfig) -> None:
    """UserError for choices that were made when the folder was tokenized."""
    for name in ("heldout", "seed"):
        if getattr(config, name) != getattr(DataConfig, name):
            raise UserError(f"--data.{name} was chosen when {' '.join(config.path)} was tokenized: leave it out here")


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
    length, cache_dir = whole("length", length), Path(cache_dir)
    if is_tokens(config.path):
        _check_unused(config)
        splits, fingerprint = open_mixture(config.path, config.weights, tokenizer, length)
        return TextData(**splits, fingerprint=fingerprint, left_out="")
    found = find(config)
    if progress and found.left_out:
        tqdm.write(found.left_out, file=sys.stderr)
    building.check_place(cache_dir)
    building.clear_unfinished(cache_dir)
    pieces = corpus.split(found, config.heldout, config.seed)
    fingerprint = building.fingerprint(found, pieces, tokenizer, length)
    folder = cache_dir / fingerprint
    splits = windows.load(folder) or building.build(folder, found, pieces, tokenizer, length, progress)
    return TextData(**splits, fingerprint=fingerprint, left_out=found.left_out)
