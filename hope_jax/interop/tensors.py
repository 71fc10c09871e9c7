"""Named tensors of a safetensors checkpoint as parameters: a loader lists the parts, this file opens, checks and reads.

A loader reads ``config.json`` (``fields.py``) and returns a ``Checkpoint``. Read ``llama.py`` for the shortest one.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from hope_jax.errors import UserError, extra
from hope_jax.interop.fields import read_json
from hope_jax.nn.config import ModelConfig
from hope_jax.nn.layers import param_dtype

with extra("train"):
    from safetensors import SafetensorError, safe_open

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD = "lm_head.weight"
FLOATS = ("F64", "F32", "F16", "BF16")


class Part(NamedTuple):
    """One leaf of the parameters: ``factor * arrange(tensor)``, those of the blocks stacked over the layers.

    A stored matrix is [out, in], ours is [in, out].
    """

    path: str
    names: list[str]  # of its tensors, by layer
    shape: tuple[int, ...]  # of a stored tensor
    arrange: Callable[[np.ndarray], np.ndarray] = np.transpose
    factor: float = 1.0


def by_layer(layers: int, place: str, name: str) -> list[str]:
    """``<place>.<i>.<name>`` of every layer i."""
    return [f"{place}.{i}.{name}" for i in range(layers)]


def maps_in_one(names: list[str], width: int, sizes: Mapping[str, int], heads: int = 1) -> Iterator[Part]:
    """Maps of ``width`` features whose rows lie in one matrix, head by head; ``sizes``: map -> its rows of one head."""
    shape, start = (heads * sum(sizes.values()), width), 0
    for path, size in sizes.items():
        yield Part(f"{path}/kernel", names, shape, functools.partial(_rows_of_heads, heads, start, start + size))
        start += size


def _rows_of_heads(heads: int, start: int, stop: int, matrix: np.ndarray) -> np.ndarray:
    """The same rows of every head's share, as [in, out]."""
    return matrix.reshape(heads, -1, matrix.shape[1])[:, start:stop].reshape(-1, matrix.shape[1]).T


def taps(kernel: np.ndarray) -> np.ndarray:
    """[channels, 1, taps] of a depthwise convolution -> [taps, channels]; the last tap is that of the present token."""
    return kernel[:, 0].T


class Tensors:
    """The tensors of a folder by name; only what is read leaves the disk."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack, aliases: Mapping[str, str], prefix: str = ""):
        """Open the files until ``stack`` closes.

        ``aliases``: other names of tensors -> the names used here. ``prefix``: of the names that are wanted; files
        without such tensors may be missing.
        """
        self._files: dict[str, tuple[Any, str]] = {}
        for shard in _shards(folder, prefix):
            opened = _open(folder / shard, stack)
            for stored in (name for name in list(opened.keys()) if name.startswith(prefix)):
                name = aliases.get(stored, stored)
                if name in self._files:
                    raise UserError(f"{folder} has {name} in two files or by two names, one of them in {shard}.")
                self._files[name] = (opened, stored)

    @property
    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._files)

    def read(self, name: str) -> np.ndarray:
        """The tensor, as it is stored."""
        file, stored = self._files[name]
        return file.get_tensor(stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape, as it is stored. Raises UserError where there is no such tensor."""
        if name not in self._files:
            raise UserError(f"The tensor {name} is missing.")
        file, stored = self._files[name]
        return tuple(file.get_slice(stored).get_shape())

    def stored(self, name: str) -> str:
        """The name in the file; where there is no such tensor, the name itself."""
        return self._files[name][1] if name in self._files else name

    def check(self, parts: Iterable[Part]) -> None:
        """UserError unless all tensors of the parts are there, of the right shape and of floats; reads the headers."""
        shapes = {name: part.shape for part in parts for name in part.names}
        if missing := sorted(shapes.keys() - self._files.keys()):
            raise UserError(f"The tensor {missing[0]} is missing ({len(missing)} in all); the model needs it.")
        for name, shape in shapes.items():
            file, stored = self._files[name]
            header = file.get_slice(stored)
            found, kind = tuple(header.get_shape()), header.get_dtype()
            if found != shape:
                raise UserError(f"The tensor {stored} has the shape {list(found)}; the model needs {list(shape)}.")
            if kind not in FLOATS:
                raise UserError(f"The tensor {stored} is of type {kind}; expected one of {', '.join(FLOATS)}.")

    def params(self, parts: Iterable[Part], dtype: DTypeLike) -> dict[str, Any]:
        """The parameters of a model that computes in ``dtype``, as a tree; one tensor is read at a time."""
        wide = np.dtype(param_dtype(dtype))
        flat = {part.path: jnp.asarray(self._leaf(part, wide)) for part in parts}
        return traverse_util.unflatten_dict(flat, sep="/")

    def _leaf(self, part: Part, wide: np.dtype) -> np.ndarray:
        leaf = np.empty(0)
        for i, name in enumerate(part.names):
            tensor = part.arrange(self.read(name))
            if i == 0:
                leaf = np.empty((len(part.names), *tensor.shape), wide)
            leaf[i] = tensor
        leaf *= part.factor
        return leaf if part.path.startswith("blocks/") else leaf[0]


def _shards(folder: Path, prefix: str) -> list[str]:
    """Names of the files with tensors whose names begin so."""
    if (folder / WEIGHTS).exists():
        return [WEIGHTS]
    if not (folder / INDEX).exists():
        raise UserError(f"{folder} has neither {WEIGHTS} nor {INDEX}; other formats are not read, convert them first.")
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise UserError(f"{folder / INDEX} has no weight_map from tensors to files; download it again.")
    return sorted({shard for name, shard in places.items() if name.startswith(prefix)})


def _open(path: Path, stack: contextlib.ExitStack) -> Any:
    if not path.is_file():
        raise UserError(f"{path} is missing, and {INDEX} names it; download it too.")
    try:
        return stack.enter_context(safe_open(path, framework="numpy"))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no whole safetensors file ({error}); download it again.") from error


def _nothing_follows(name: str, tensors: Tensors) -> bool:
    del name, tensors
    return False


class Checkpoint(NamedTuple):
    """What ``config.json`` says: the model, and the tensors that are its parameters.

    ``follows(name, tensors)``: whether a tensor that is none of the parts follows from them, and so may be there.
    ``aliases``: other names that tensors may have -> the names in ``parts``.
    """

    config: ModelConfig
    parts: list[Part]
    follows: Callable[[str, Tensors], bool] = _nothing_follows
    aliases: Mapping[str, str] = {}


Describe = Callable[[Path, DTypeLike], Checkpoint]
"""A loader: from the path of ``config.json`` and the type of activations. UserError for models that are not ours."""


def read_model(folder: str | Path, describe: Describe, dtype: DTypeLike) -> tuple[ModelConfig, dict[str, Any]]:
    """The model of a folder and its parameters, as ``LanguageModel(config).init`` would shape them.

    UserError: ``describe`` raises it, files are missing or unreadable, a tensor is missing, left over, of another shape
    or not of floats, or dtype is none of floats.
    """
    folder = Path(folder)
    check_dtype(dtype)
    checkpoint = describe(folder / "config.json", dtype)
    with contextlib.ExitStack() as stack:
        tensors = Tensors(folder, stack, checkpoint.aliases)
        tensors.check(checkpoint.parts)
        _check_left_over(tensors, checkpoint)
        return checkpoint.config, tensors.params(checkpoint.parts, dtype)


def check_dtype(dtype: DTypeLike) -> None:
    """UserError unless it is a type of floats."""
    try:
        floats = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        floats = False
    if not floats:
        raise UserError(f"dtype is {dtype!r}; expected a type of floats, such as jnp.float32 or jnp.bfloat16.")


def _check_left_over(tensors: Tensors, checkpoint: Checkpoint) -> None:
    """Every tensor is used or follows from the others, as does the head of a tied model if it is the embedding."""
    used = {part.path: part.names for part in checkpoint.parts}
    for name in sorted(tensors.names.difference(*used.values())):
        if name == HEAD and checkpoint.config.tied:
            (embedding,) = used["embedding"]
            if not np.array_equal(tensors.read(HEAD), tensors.read(embedding)):
                why = f"config.json says that the head is tied, and it differs from {embedding}"
                raise UserError(f"The tensor {HEAD} is left over: {why}.")
        elif not checkpoint.follows(name, tensors):
            raise UserError(f"The tensor {tensors.stored(name)} is left over; the model would lack it.")
