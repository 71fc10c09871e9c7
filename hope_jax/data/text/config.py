"""Which text to learn from: the one configuration of this package. Read corpus.py next."""

from dataclasses import dataclass

from hope_jax.errors import UserError


@dataclass(frozen=True)
class DataConfig:
    """Text, tokenizer and held-out split. Raises UserError for values outside the ranges given below."""

    path: tuple[str, ...] = ()
    """Text files, folders or globs. Folders are read recursively, links too; hidden files and folders are not read.
    Empty: the Python standard library of this interpreter."""
    tfds: str | None = None
    """Name (or folder) of a TFDS dataset with a text feature, instead of path. Documents play the role of files."""
    tokenizer: str | None = None
    """Path of a JSON file of the `tokenizers` library. None: bytes, 256 tokens."""
    heldout: float = 0.05
    """Fraction of the files, between 0 and 1, that is never trained on. Of a single file, or where one file is most of
    the text: the last bytes of it."""
    seed: int = 0
    """Chooses which files are held out. The order of training windows has its own seed."""

    def __post_init__(self):
        if isinstance(self.path, str):
            raise UserError(f"path must be a tuple of strings, got the string {self.path!r}: write ({self.path!r},)")
        if self.path and self.tfds is not None:
            raise UserError(f"got both path {' '.join(self.path)} and tfds {self.tfds}: give only one of them")
        if not 0 < self.heldout < 1:
            raise UserError(f"heldout must lie between 0 and 1, got {self.heldout}: 0.05 holds out one file in twenty")
