"""TFDS datasets that are on disk, or that TFDS can download and prepare; and the documents of one as a corpus.

Read text/corpus.py first.
"""

import contextlib
import difflib
import functools
import hashlib
import importlib
import io
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from hope_jax.data.text.corpus import Corpus
from hope_jax.errors import UserError, closest

STORE = "https://storage.googleapis.com"
"""Where TFDS keeps what its own datasets have no address for."""
NETWORK_SECONDS = 5.0
"""How long to look for a dataset's server. TFDS itself would try for minutes before it says anything."""


def documents(name: str) -> Corpus:
    """The documents of a TFDS text dataset, read in place; ``name`` as for ``open_tfds``.

    Takes the training split (else the largest), and the feature called ``text`` (else the first text feature).
    UserError: as ``open_tfds`` and ``records``, or a dataset without text.
    """
    builder = open_tfds(name)
    splits, features = builder.info.splits, dict(builder.info.features)
    texts = [key for key, feature in features.items() if isinstance(feature, tfds.features.Text)]
    if not splits:
        raise UserError(f"dataset {name!r} in {builder.data_dir} has no split: prepare it again")
    if not texts:
        raise UserError(f"dataset {name!r} has no text feature, only {', '.join(features)}: choose a text dataset")
    split = "train" if "train" in splits else max(splits, key=lambda split: splits[split].num_examples)
    feature = "text" if "text" in texts else texts[0]
    source = records(name, builder, split)
    identity = (builder.info.full_name, split, feature, splits[split].num_examples, splits[split].num_bytes)
    return Corpus(
        names=[f"{split}/{i}" for i in range(len(source))],
        read=functools.partial(_text, source, feature),
        digest=hashlib.sha256(repr(identity).encode()).hexdigest(),
        sizes=None,
    )


def _text(source: Any, feature: str, document: int) -> bytes:
    return _to_bytes(source[document][feature])


def _to_bytes(text: str | bytes) -> bytes:
    """TFDS hands out bytes for real data and str for some mocks; broken UTF-8 is repaired, not refused."""
    data = text.encode() if isinstance(text, str) else bytes(text)
    return data.decode("utf-8", errors="replace").encode()


def open_tfds(name: str) -> Any:
    """The builder of a TFDS dataset that is on disk, prepared now if need be.

    ``name``: ``name``, ``name/config``, ``name:version``, or the folder of a prepared dataset. UserError for an unknown
    name, and for what is not on disk and not to be had.
    """
    return _from_folder(name) or _from_name(name)


def records(name: str, builder: Any, split: str) -> Any:
    """The examples of one split, to be indexed. Raises UserError for formats that only TensorFlow reads."""
    try:
        return builder.as_data_source(split=split)
    except (NotImplementedError, ValueError) as error:
        raise UserError(
            f"dataset {name!r} is stored as {builder.info.file_format} in {builder.data_dir}, which cannot be read "
            "without TensorFlow: prepare it with file_format='array_record'"
        ) from error


def prepare(builder: Any) -> None:
    """Prepare a dataset and show progress bars alone: TFDS announces downloads even where there are none."""
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))


def _from_folder(name: str) -> Any:
    folder = Path(name).expanduser()
    found = sorted(folder.rglob("dataset_info.json")) if folder.is_dir() else []
    if len(found) > 1:
        choices = ", ".join(str(path.parent) for path in found)
        raise UserError(f"folder {name!r} holds {len(found)} datasets: give one of {choices}")
    return tfds.builder_from_directory(found[0].parent) if found else None


def _from_name(name: str) -> Any:
    if re.match(r"\w+:[A-Za-z]", name):
        remedy = "prepare it with file_format='array_record' and give its folder"
        raise UserError(f"dataset {name!r} is in a community namespace, which is not supported: {remedy}")
    importlib.import_module("tensorflow_datasets.text")  # TFDS registers its older text datasets only then
    try:
        builder = tfds.builder(name)
    except Exception as error:  # not found, bad config, bad version: each its own type, each a wrong name
        raise UserError(f"TFDS has no dataset {name!r}: {_hint(name, error)}") from error
    if builder.data_path.joinpath("dataset_info.json").exists():
        return builder
    _check_network(name, builder)
    return _prepared(name)


def _hint(name: str, error: Exception) -> str:
    stem = re.split(r"[/:]", name)[0]
    names = tfds.list_builders(with_community_datasets=False)
    near = difflib.get_close_matches(stem, names, n=3, cutoff=0.5)
    if stem in names:
        return " ".join(str(error).split())[:300]
    return closest(stem, near) if near else "tfds.list_builders() lists the names; a folder is fine too"


def _check_network(name: str, builder: Any) -> None:
    """Fails at once when the first file of the dataset has no reachable server."""
    own = type(builder).__module__.startswith("tensorflow_datasets.")
    for url in list(builder.url_infos or ([STORE] if own else []))[:1]:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=NETWORK_SECONDS).close()
        except urllib.error.HTTPError:
            return  # the server answered: let the download say what is wrong
        except OSError as error:
            raise UserError(
                f"dataset {name!r} is not in {builder.data_dir} and its source {url} cannot be reached "
                f"({getattr(error, 'reason', error)}): prepare it where there is a network, by {_command(name)}, and "
                "give its folder or set TFDS_DATA_DIR"
            ) from error


def _command(name: str) -> str:
    """What prepares a dataset in the folder ``data``."""
    builder = f"tfds.builder({name!r}, data_dir='data', file_format='array_record')"
    return f'python -c "import tensorflow_datasets as tfds; {builder}.download_and_prepare()"'


def _prepared(name: str) -> Any:
    builder = tfds.builder(name, file_format="array_record")
    try:
        prepare(builder)
    except ImportError as error:
        raise UserError(
            f"the preparation of dataset {name!r} needs {error.name}, which is not installed: prepare it elsewhere "
            "with file_format='array_record' and give its folder"
        ) from error
    except Exception as error:  # downloads, checksums, manual steps, disk: whatever the dataset's own script meets
        raise UserError(f"dataset {name!r} cannot be prepared: {' '.join(str(error).split())[:300]}") from error
    return builder
