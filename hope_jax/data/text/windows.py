"""A corpus as fixed windows of tokens in a TFDS dataset (array_record files, no TensorFlow).

Documents follow one another without a separator; window k of a split holds tokens kT .. kT + T, so each token
is predicted exactly once and the last tokens, fewer than T, are left out. Read building.py next.
"""

import bisect
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.json_format import ParseError
from jaxtyping import Int32

from hope_jax.data.text.corpus import Split
from hope_jax.errors import UserError

SHARD_WINDOWS = 4096
"""Reading one record costs time in proportion to the records of its file: small files keep random reads fast."""
MAX_SHARDS = 256
"""Each file that has been read from stays open."""


class TextWindows(tfds.core.ShardBasedBuilder):
    """TFDS builder of windows cut from flat files of tokens.

    Records are written in order and straight to their shard, so the size of a corpus is bounded by the disk: the
    usual generator-based builder keeps up to 1 GB in memory to shuffle it and needs TensorFlow beyond that.

    Args:
        streams: split name -> file of consecutive tokens of type dtype, one window of them at least.
        length: T; a record is {"tokens": dtype[T + 1]}.
        written: called with 1 after each window.
    """

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded

    def __init__(
        self, *, streams: Mapping[str, Path], dtype: np.dtype, length: int, written: Callable[[int], Any], **kwargs: Any
    ):
        self._streams, self._dtype, self._length, self._written = streams, dtype, length, written
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        tokens = tfds.features.Tensor(shape=(self._length + 1,), dtype=self._dtype, encoding="bytes")
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"tokens": tokens}))

    def _shard_iterators_per_split(self, dl_manager: Any) -> Mapping[str, Sequence[Callable[[], Iterator]]]:
        return {split: self._shards(path) for split, path in self._streams.items()}

    def _shards(self, path: Path) -> list[Callable[[], Iterator]]:
        windows = (path.stat().st_size // self._dtype.itemsize - 1) // self._length
        size = max(SHARD_WINDOWS, math.ceil(windows / MAX_SHARDS))
        starts = range(0, windows, size)
        return [functools.partial(self._examples, path, start, min(start + size, windows)) for start in starts]

    def _examples(self, path: Path, start: int, stop: int) -> Iterator[tuple[int, dict]]:
        tokens = np.asarray(np.memmap(path, self._dtype, mode="r"))
        for window in range(start, stop):
            first = window * self._length
            yield window, {"tokens": tokens[first : first + self._length + 1]}
            self._written(1)


@dataclass(frozen=True)
class Windows(Sequence):
    """The windows of one split, read at random: windows[i] is int32 [T + 1].

    ``remedy``: what to do where one is damaged.
    """

    records: Any
    folder: Path
    remedy: str = "delete that folder, it will be built again"

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Int32[np.ndarray, " window"]:
        """UserError when the record's file is damaged."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        try:
            return self.records[index]["tokens"].astype(np.int32)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"the prepared corpus in {self.folder} is damaged (window {index}: {error}): {self.remedy}"
            ) from error


class Mixture(Sequence):
    """The windows of several sources, one source after another; windows[i] is int32 [T + 1].

    ``weights``: how often each source is read, relative to the others; above 0.
    """

    def __init__(self, sources: Sequence[Sequence], weights: Sequence[float]):
        self.sources, self.weights = tuple(sources), tuple(weights)
        self.ends = tuple(itertools.accumulate(map(len, sources)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Int32[np.ndarray, " window"]:
        """UserError when the record's file is damaged."""
        source = bisect.bisect_right(self.ends, index)
        return self.sources[source][index - (self.ends[source] - len(self.sources[source]))]


def load(folder: Path) -> dict[str, Windows] | None:
    """The windows of each split in the ``data_dir`` of a TextWindows; None where files are missing or cut."""
    try:
        builder: Any = tfds.builder_from_directory(folder / TextWindows.name / str(TextWindows.VERSION))
        splits = builder.info.splits
        sizes = {name: sum(Path(path).stat().st_size for path in splits[name].filepaths) for name in splits}
    except (OSError, ValueError, KeyError, ParseError):
        return None
    if set(splits) != set(Split._fields) or any(sizes[name] != splits[name].num_bytes for name in splits):
        return None
    return {name: Windows(builder.as_data_source(split=name), folder) for name in splits}
