"""Small image sets in memory: scikit-learn's digits (nothing to download), MNIST files in a folder, any of TFDS."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from hope_jax import train as training
from hope_jax.data.idx import read_idx
from hope_jax.data.tfds_source import open_tfds, records
from hope_jax.errors import UserError


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
    order, cut = np.random.default_rng(0).permutation(len(labels)), len(labels) // 5
    images = images.reshape(-1, 8, 8, 1)
    train, test = (Split(images[part], labels[part]) for part in (order[cut:], order[:cut]))
    return _image_set("digits", train, test)


def mnist(folder: Path) -> ImageSet:
    """MNIST, or a set of its form, from its four idx files, packed or not. UserError: one is missing or damaged."""
    parts = []
    for part in ("train", "t10k"):
        images, labels = read_idx(folder, f"{part}-images-idx3-ubyte"), read_idx(folder, f"{part}-labels-idx1-ubyte")
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise UserError(f"{folder}: {part} has images {images.shape} and labels {labels.shape}; expected one each.")
        parts.append(Split(images[..., None], labels))
    return _image_set(folder.name, *parts)


def from_tfds(name: str, size: int | None = None) -> ImageSet:
    """An image classification set of TFDS, read whole: splits ``train`` and ``test`` (else ``validation``).

    ``size``: pixels of a side to which every image is resized; None: all have one size already. UserError: as
    ``open_tfds``; no labelled images; images of several sizes and no ``size``.
    """
    builder = open_tfds(name)
    splits = [split for split in ("train", "test", "validation") if split in builder.info.splits][:2]
    if len(splits) < 2 or splits[0] != "train" or not {"image", "label"} <= set(builder.info.features):
        given = sorted(builder.info.splits)
        raise UserError(f"dataset {name!r} has splits {given}; expected labelled images, train and test.")
    return _image_set(name, *(_read(name, builder, split, size) for split in splits))


def _read(name: str, builder: object, split: str, size: int | None) -> Split:
    source = records(name, builder, split)
    rows = [source[i] for i in tqdm(range(len(source)), desc=f"reading {name} {split}", mininterval=1.0)]
    images = [row["image"] if size is None else _resized(row["image"], size) for row in rows]
    if (sizes := len({image.shape for image in images})) > 1:
        raise UserError(f"dataset {name!r} has images of {sizes} sizes; give one for all with --size.")
    return Split(np.stack(images), np.array([row["label"] for row in rows]))


def _resized(image: np.ndarray, size: int) -> np.ndarray:
    from PIL import Image  # comes with matplotlib

    channels = image.squeeze(2) if image.shape[2] == 1 else image
    resized = Image.fromarray(channels).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(resized).reshape(size, size, -1)


def _image_set(name: str, train: Split, test: Split) -> ImageSet:
    """Standardised by the training images; a fixed sixth of them is for validation."""
    mean, deviation = train.images.mean(dtype=np.float64), train.images.std(dtype=np.float64)

    def ready(part: Split) -> Split:
        return Split(((part.images - mean) / deviation).astype(np.float32), part.labels.astype(np.int32))

    order, cut = np.random.default_rng(1).permutation(len(train.labels)), len(train.labels) // 6
    validation, rest = (Split(*(x[part] for x in train)) for part in (order[:cut], order[cut:]))
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    return ImageSet(name, ready(rest), ready(validation), ready(test), classes)


def draws(images: Split, seed: int, batch: int) -> training.ComputedBatches:
    """Batches of images, drawn anew each time."""
    of_batches = jax.random.split(jax.random.key(seed))[1]

    def make(index: int) -> Split:
        picked = np.asarray(jax.random.choice(jax.random.fold_in(of_batches, index), len(images.labels), (batch,)))
        return Split(*(x[picked] for x in images))

    return training.ComputedBatches(make)
