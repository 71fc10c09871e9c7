"""Small image sets in memory: scikit-learn's digits (nothing to download), MNIST files in a folder, any of TFDS."""

import gzip
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from hope_jax import train as training
from hope_jax.data.tfds_source import open_tfds, records
from hope_jax.errors import UserError

IDX_TYPE = 0x08
"""Unsigned bytes, the one type of MNIST's files."""


class Split(NamedTuple):
    """Images [N,height,width,C], float32, and labels [N], int32."""

    images: np.ndarray
    labels: np.ndarray


class ImageSet(NamedTuple):
    """What to train on, what to choose settings by, and what to report."""

    name: str
    train: Split
    validation: Split
    test: Split
    classes: int


def digits() -> ImageSet:
    """1,797 handwritten digits of 8 x 8 pixels; a fixed fifth is the test set."""
    from sklearn.datasets import load_digits  # here: only this set needs it

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images.reshape(-1, 8, 8, 1)[order], labels[order]
    cut = len(labels) // 5
    return _image_set("digits", Split(images[cut:], labels[cut:]), Split(images[:cut], labels[:cut]))


def mnist(folder: Path) -> ImageSet:
    """MNIST, or a set of its form, from its four idx files, packed or not.

    Raises:
      UserError: a file is missing or is no idx file of bytes.
    """
    parts = {part: Split(_idx(folder, f"{part}-images-idx3-ubyte"), _idx(folder, f"{part}-labels-idx1-ubyte"))
             for part in ("train", "t10k")}  # fmt: skip
    for part, (images, labels) in parts.items():
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise UserError(f"{folder}: {part} has images {images.shape} and labels {labels.shape}; expected one each.")
    train, test = (Split(images[..., None], labels) for images, labels in parts.values())
    return _image_set(folder.name, train, test)


def _idx(folder: Path, name: str) -> np.ndarray:
    """The array of one idx file: two zero bytes, type, number of axes, their big-endian sizes, the values."""
    found = [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
    if not found:
        raise UserError(f"There is no {name} or {name}.gz in {folder}; give the folder of MNIST's four files.")
    try:
        data = gzip.decompress(found[0].read_bytes()) if found[0].suffix == ".gz" else found[0].read_bytes()
    except (OSError, EOFError) as error:
        raise UserError(f"Cannot read {found[0]}: {error}.") from error
    axes = data[3] if len(data) > 3 else 0
    shape = np.frombuffer(data, ">u4", axes, 4) if len(data) >= 4 + 4 * axes else np.zeros(0)
    if data[:3] != bytes([0, 0, IDX_TYPE]) or len(data) - 4 - 4 * axes != int(np.prod(shape, dtype=np.int64)):
        raise UserError(f"{found[0]} is no idx file of bytes, or it is cut off.")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape.astype(int))


def from_tfds(name: str, size: int | None = None) -> ImageSet:
    """An image classification set of TFDS, read whole: splits ``train`` and ``test`` (else ``validation``).

    Args:
      name: as for ``hope_jax.data.tfds_source.open_tfds``.
      size: pixels of a side to which every image is resized; None: all have one size already.

    Raises:
      UserError: as ``open_tfds``; no labelled images; images of several sizes and no ``size``.
    """
    builder = open_tfds(name)
    present = set(builder.info.splits)
    held = next((split for split in ("test", "validation") if split in present), None)
    if "train" not in present or held is None or not {"image", "label"} <= set(builder.info.features):
        raise UserError(f"dataset {name!r} has splits {sorted(present)}; expected labelled images, train and test.")
    return _image_set(name, *(_read(name, builder, split, size) for split in ("train", held)))


def _read(name: str, builder: object, split: str, size: int | None) -> Split:
    source = records(name, builder, split)
    rows = [source[i] for i in tqdm(range(len(source)), desc=f"reading {name} {split}", mininterval=1.0)]
    images = [_resized(row["image"], size) for row in rows]
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise UserError(f"dataset {name!r} has images of {len(shapes)} sizes; give one for all with --size.")
    return Split(np.stack(images), np.array([row["label"] for row in rows]))


def _resized(image: np.ndarray, size: int | None) -> np.ndarray:
    if size is None:
        return image
    from PIL import Image  # comes with matplotlib

    grey = image.shape[-1] == 1
    shown = Image.fromarray(image[..., 0] if grey else image).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(shown)[..., None] if grey else np.asarray(shown)


def _image_set(name: str, train: Split, test: Split) -> ImageSet:
    """Standardised by the training images; a fixed sixth of them is for validation."""
    mean, deviation = train.images.mean(dtype=np.float64), train.images.std(dtype=np.float64)

    def ready(part: Split) -> Split:
        return Split(((part.images - mean) / deviation).astype(np.float32), part.labels.astype(np.int32))

    order = np.random.default_rng(1).permutation(len(train.labels))
    train = Split(train.images[order], train.labels[order])
    cut = len(order) // 6
    validation, rest = Split(*(x[:cut] for x in train)), Split(*(x[cut:] for x in train))
    classes = int(max(part.labels.max() for part in (train, test))) + 1
    return ImageSet(name, ready(rest), ready(validation), ready(test), classes)


def draws(images: Split, seed: int, batch: int) -> training.ComputedBatches:
    """Batches of images, drawn anew each time."""
    of_batches = jax.random.split(jax.random.key(seed))[1]

    @jax.jit
    def choose(index: Any) -> Any:
        return jax.random.choice(jax.random.fold_in(of_batches, index), len(images.labels), (batch,))

    def make(index: int) -> Split:
        picked = np.asarray(choose(index))
        return Split(*(x[picked] for x in images))

    return training.ComputedBatches(make)
