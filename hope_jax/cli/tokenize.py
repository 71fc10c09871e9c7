"""Tokenize a text once, in parallel, into a folder that pretrain reads.

    python -m hope_jax tokenize --out tokens --length 2048 --data.path texts --vocabulary 32768
    python -m hope_jax pretrain --run runs/x --length 2048 --data.path tokens --data.tokenizer tokens/tokenizer.json

The folder holds records of length + 1 tokens, in files that each belong to some of the documents. A command that was
stopped goes on with the files that are missing. Texts: files and folders of text, JSON lines (.jsonl), .gz and .zst of
both, or a dataset of TFDS. One file goes to one process, so many files are quicker than one.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hope_jax.cli.checks import at_least
from hope_jax.cli.main import say
from hope_jax.cli.parse import parse
from hope_jax.data import DataConfig, make_tokenizer
from hope_jax.data.text import corpus
from hope_jax.data.text.bpe import MARKS, train_bpe
from hope_jax.data.text.corpus import Corpus
from hope_jax.data.text.shards import PLAN, TOKENIZER, plan_of, shards, write_json
from hope_jax.data.text.text_data import find
from hope_jax.data.text.tokenizing import Work, alone, check_plan, tokenize
from hope_jax.errors import UserError
from hope_jax.storage.digests import write_file


@dataclass(frozen=True)
class TokenizeConfig:
    """Tokenize a text into a folder of records."""

    out: Path  # Folder of the records. The same folder and flags go on where the command was stopped.
    length: int = 2048  # Tokens per sequence, as pretrain will have it.
    processes: int | None = None  # Processes that write; None: as many as there are cores.
    vocabulary: int | None = None
    """Train a byte-level BPE tokenizer of so many tokens on the text first, into OUT/tokenizer.json; 32768 is usual.
    None: tokens are those of --data.tokenizer."""
    sample: int = 1_000_000_000  # Bytes of text that the tokenizer is trained on, spread over all documents.
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        at_least(self, 1, "length", "sample")
        for name, least in (("processes", 1), ("vocabulary", MARKS)):
            if getattr(self, name) is not None:
                at_least(self, least, name)
        if self.vocabulary is not None and self.data.tokenizer is not None:
            raise UserError("Give one of --vocabulary and --data.tokenizer.")


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    run(parse(TokenizeConfig, arguments, "python -m hope_jax tokenize"))
    return 0


def run(flags: TokenizeConfig) -> None:
    """Fill the folder. Raises UserError for anything the caller can mend."""
    found = find(flags.data)
    say(found.left_out or f"{len(found.names):,} documents")
    with alone(flags.out):
        count = _fill(flags, found)
    file = flags.out / TOKENIZER
    chosen = f" --data.tokenizer {file}" if flags.vocabulary or flags.data.tokenizer else ""
    how = f"--data.path {flags.out} --length {flags.length}{chosen}"
    say(f"written: {count} files in {flags.out}; pretrain reads them with {how}")


def _fill(flags: TokenizeConfig, found: Corpus) -> int:
    """Write the files that are missing; returns how many there are then."""
    pieces = corpus.split(found, flags.data.heldout, flags.data.seed)
    file, given = flags.out / TOKENIZER, flags.data.tokenizer
    asked: dict[str, Any] = {}
    if flags.vocabulary is not None:
        given, asked = str(file), {"vocabulary": flags.vocabulary}  # a text may give fewer tokens than that
        if not check_plan(flags.out, asked):
            train_bpe(found, pieces.train, flags.vocabulary, flags.sample, file)
    tokenizer = make_tokenizer(replace(flags.data, tokenizer=given))
    plan, todo = plan_of(found, pieces, tokenizer, flags.length) | asked, shards(found, pieces)
    if not check_plan(flags.out, plan):
        write_json(flags.out / PLAN, plan)
    if flags.data.tokenizer is not None:
        write_file(file, Path(flags.data.tokenizer).expanduser().read_bytes())
    work = Work(flags.out, found, tokenizer, plan["dtype"], flags.length)
    tokenize(work, plan, todo, flags.processes or len(os.sched_getaffinity(0)), progress=True)
    return len(todo)
