"""Text from TFDS datasets, offline."""

import socket
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from corpora import LENGTH, stream
from tensorflow_datasets.core.utils import file_utils

from hope_jax.data import (
    ByteTokenizer,
    DataConfig,
    open_text,
)
from hope_jax.errors import UserError

# ---------------------------------------------------------------- TFDS datasets


class TinyVerses(tfds.core.GeneratorBasedBuilder):
    """Forty short texts that TFDS knows by name; would be downloaded from a port where nobody listens."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = {}

    def _info(self):
        features = {"author": tfds.features.Text(), "number": np.int64, "text": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(40):
            yield i, {"author": "nobody", "number": i, "text": f"Verse {i}, with é.\n" * 3}


class TinyNumbers(TinyVerses):
    """The same without text."""

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"number": np.int64}))

    def _generate_examples(self):
        return ((i, {"number": i}) for i in range(3))


@pytest.fixture
def data_dir(tmp_path):
    tfds.core.add_data_dir(tmp_path / "tfds")
    yield tmp_path / "tfds"
    file_utils.clear_registered_data_dirs()


@pytest.fixture
def closed_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    return port


def prepare(builder_class, data_dir):
    builder = builder_class(data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
    return builder.data_path


def open_tfds(name, tmp_path, **config):
    config = DataConfig(tfds=str(name), **config)
    return open_text(config, ByteTokenizer(), length=LENGTH, cache_dir=tmp_path / "cache", progress=False)


@pytest.mark.parametrize("given", ["tiny_verses", "tiny_verses:1.0.0", "version folder", "dataset folder"])
def test_a_prepared_tfds_dataset_is_read_by_name_and_by_folder(data_dir, tmp_path, given):
    path = prepare(TinyVerses, data_dir)
    name = {"version folder": path, "dataset folder": path.parent}.get(given, given)
    data = open_tfds(name, tmp_path, heldout=0.2)
    train, heldout = (bytes(stream(windows).astype(np.uint8)) for windows in (data.train, data.heldout))
    verses = [f"Verse {i}, with é.\n".encode() for i in range(40)]
    assert not [verse for verse in verses if verse in train and verse in heldout]
    assert len([verse for verse in verses if verse in train]) > len([verse for verse in verses if verse in heldout]) > 0
    # Each split leaves out its last tokens, fewer than a window.
    assert len([verse for verse in verses if verse in train or verse in heldout]) >= 38


def test_an_unprepared_tfds_dataset_without_network_is_refused_at_once(data_dir, closed_port, monkeypatch, tmp_path):
    monkeypatch.setattr(TinyVerses, "url_infos", {f"http://127.0.0.1:{closed_port}/verses.txt": None})
    monkeypatch.setattr(TinyVerses, "download_and_prepare", None)  # must not be reached
    with pytest.raises(UserError, match=f"127.0.0.1:{closed_port}/verses.txt cannot be reached"):
        open_tfds("tiny_verses", tmp_path)


@pytest.mark.parametrize("name", ["c4", "lm1b", "pg19", "wiki40b"])
def test_a_named_dataset_without_network_is_refused_with_the_command_that_prepares_it(
    data_dir, monkeypatch, tmp_path, name
):
    def unreachable(request, timeout):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(
        UserError, match=rf"'{name}' is not in .*no network.*by python -c .*builder\('{name}', data_dir"
    ):
        open_tfds(name, tmp_path)


@pytest.mark.parametrize(
    "name, message",
    [
        ("tiny_verse", "no dataset 'tiny_verse': did you mean 'tiny_verses'"),
        ("tiny_verses/no_such_config", "no dataset 'tiny_verses/no_such_config'"),
        ("tiny_verses:9.9.9", "no dataset 'tiny_verses:9.9.9'"),
        ("qqqqqqqqqq", "lists the names"),
        ("somebody:verses", "community namespace"),
    ],
)
def test_wrong_tfds_names_are_refused_with_a_hint(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        open_tfds(name, tmp_path)


def test_a_tfds_dataset_without_text_is_refused(data_dir, tmp_path):
    with pytest.raises(UserError, match="no text feature, only number"):
        open_tfds(prepare(TinyNumbers, data_dir), tmp_path)


def test_a_tfds_dataset_in_tensorflow_format_is_refused(data_dir, tmp_path):
    path = prepare(TinyVerses, data_dir)
    info = Path(path, "dataset_info.json")
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="file_format='array_record'"):
        open_tfds(path, tmp_path)
