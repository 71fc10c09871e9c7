"""The data package on small corpora: what is read, what is held out, in which order, and what is refused."""

import itertools
import json
import shutil
import socket
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tokenizers
from tensorflow_datasets.core.utils import file_utils

from hope_jax.data import (
    ByteTokenizer,
    DataConfig,
    HeldoutBatches,
    JsonTokenizer,
    TrainBatches,
    corpus,
    make_tokenizer,
    open_text,
    text_dataset,
)
from hope_jax.data import tokenizers as our_tokenizers
from hope_jax.data.pipeline import Order
from hope_jax.errors import UserError

TEXT = "def naïve(x):\n\treturn  x + 1  # 東京 🙂\r\n\n\n"
LETTERS = "abcdefghijklmnopqrst"
LENGTH = 16


@pytest.fixture
def folder(tmp_path):
    """Twenty files, each of one letter of its own, so that a window tells which files it comes from."""
    root = tmp_path / "texts"
    for i, letter in enumerate(LETTERS):
        path = root / f"part{i % 3}" / f"{letter}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(letter * (100 + i))
    return root


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A trained byte-level tokenizer with a special token and, as such files have, a truncation."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<|énd|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([TEXT * 20 + "the quick brown fox jumps over the lazy dog\n" * 20], trainer)
    tokenizer.enable_truncation(8)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def open_folder(folder, cache, *, length=LENGTH, tokenizer=None, **config):
    tokenizer = tokenizer or ByteTokenizer()
    return open_text(
        DataConfig(path=(str(folder),), **config), tokenizer, length=length, cache_dir=cache, progress=False
    )


def numbered(count):
    return [np.full(3, i, np.int32) for i in range(count)]


def batches(count=10, batch=3, seed=0, index=0, processes=1, fingerprint="f"):
    return TrainBatches(numbered(count), Order(batch, seed, processes, fingerprint), index)


def rows(iterator, steps):
    return np.concatenate([batch[:, 0] for batch in itertools.islice(iterator, steps)]).tolist()


# ---------------------------------------------------------------- tokenizers


def test_bytes_round_trip_and_ids_are_the_utf8_bytes():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(TEXT).tolist() == list(TEXT.encode())
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.encode(TEXT.encode()).tolist() == tokenizer.encode(TEXT).tolist()
    assert tokenizer.decode([0xC3, ord("a")]) == "\ufffda"


def test_byte_lengths_of_a_byte_level_json_sum_to_the_utf8_length(bpe):
    tokenizer = make_tokenizer(DataConfig(tokenizer=str(bpe)))
    ids = tokenizer.encode(TEXT + "the lazy fox<|énd|>")
    assert tokenizer.vocab_size > 256 and len(ids) < len((TEXT + "the lazy fox").encode())
    assert tokenizer.byte_lengths[ids].sum() == len((TEXT + "the lazy fox<|énd|>").encode())
    assert tokenizer.decode(ids[:-1]) == TEXT + "the lazy fox"


def test_byte_lengths_of_a_byte_fallback_json_sum_to_the_utf8_length(tmp_path):
    symbols = [f"<0x{byte:02X}>" for byte in range(256)] + ["\u2581", "a", "b", "é", "<unk>"]
    model = tokenizers.models.BPE({s: i for i, s in enumerate(symbols)}, [], byte_fallback=True, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.save(str(tmp_path / "t.json"))
    loaded = JsonTokenizer(tmp_path / "t.json")
    assert loaded.byte_lengths[loaded.encode("ab é 東京\n")].sum() == len("ab é 東京\n".encode())


def test_long_texts_get_the_same_ids_as_in_one_piece(bpe, monkeypatch):
    text = "".join(f"{TEXT}the {i} dogs\n\n  jump\n" for i in range(40))
    whole = JsonTokenizer(bpe).encode(text)
    monkeypatch.setattr(our_tokenizers, "PIECE_CHARACTERS", 200)
    assert len(list(our_tokenizers._pieces(text))) > 5
    assert JsonTokenizer(bpe).encode(text).tolist() == whole.tolist()
    assert "".join(our_tokenizers._pieces("x" * 1000)) == "x" * 1000


def test_many_texts_at_once_get_the_ids_of_each(bpe):
    texts = [b"", TEXT.encode(), b"the fox", b""]
    for tokenizer in (ByteTokenizer(), JsonTokenizer(bpe)):
        assert [ids.tolist() for ids in tokenizer.encode_many(texts)] == [tokenizer.encode(t).tolist() for t in texts]


@pytest.mark.parametrize("content, message", [(None, "is not a file"), ("{}", "not a JSON file"), ("[", "not a JSON")])
def test_unusable_tokenizer_files_are_refused(tmp_path, content, message):
    path = tmp_path / "t.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        make_tokenizer(DataConfig(tokenizer=str(path)))


@pytest.mark.parametrize("ids", [[256], [-1], [0.5]])
def test_ids_outside_the_vocabulary_are_refused(ids):
    with pytest.raises(UserError, match="must be integers in 0..255"):
        ByteTokenizer().decode(ids)


# ---------------------------------------------------------------- corpus


def test_a_folder_is_read_recursively_without_hidden_binary_and_empty_files(folder):
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden")
    (folder / "image.png").write_bytes(b"\x89PNG\0\0")
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "empty.txt").write_bytes(b"")
    found = corpus.from_files([str(folder)])
    assert sorted(found.names) == sorted(f"part{i % 3}/{letter}.txt" for i, letter in enumerate(LETTERS))
    assert found.skipped == 3
    assert found.size == sum(100 + i for i in range(20))


def test_files_folders_and_globs_that_overlap_count_each_file_once(folder):
    paths = [str(folder / "part0"), str(folder / "part0" / "a.txt"), str(folder / "*" / "[ab].txt"), str(folder / "**")]
    assert len(corpus.from_files(paths).names) == 20
    assert corpus.from_files([str(folder / "*" / "[abc].txt")]).names == ("part0/a.txt", "part1/b.txt", "part2/c.txt")


def test_default_corpus_is_the_standard_library_of_this_interpreter():
    found = corpus.from_files(())
    library = Path(sysconfig.get_paths()["stdlib"])
    assert found.read(found.names.index("argparse.py")) == (library / "argparse.py").read_bytes()
    assert all(name.endswith(".py") and "site-packages" not in name for name in found.names)
    assert len(found.names) > 200


def test_every_document_is_either_trained_on_or_held_out(folder):
    found = corpus.from_files([str(folder)])
    pieces = corpus.split(found, heldout=0.25, seed=0)
    train, heldout = ({piece.document for piece in part} for part in pieces)
    assert not train & heldout and train | heldout == set(range(20))
    assert 1 <= len(heldout) <= 10
    assert corpus.split(found, 0.25, 0) == pieces
    assert corpus.split(found, 0.25, 1) != pieces
    assert len(corpus.split(found, 1e-9, 0).heldout) == 1
    assert len(corpus.split(found, 1 - 1e-9, 0).train) == 1


def test_the_held_out_choice_follows_names_not_places(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "0.txt").write_text("one more")
    first, second = (corpus.from_files([str(path)]) for path in (folder, tmp_path / "elsewhere"))
    chosen = [{c.names[piece.document] for piece in corpus.split(c, 0.5, 0).heldout} for c in (first, second)]
    assert chosen[1] - {"0.txt"} == chosen[0]


def test_a_single_file_holds_out_its_last_bytes_at_a_character(tmp_path):
    (tmp_path / "one.txt").write_text("é" * 101)
    found = corpus.from_files([str(tmp_path / "one.txt")])
    pieces = corpus.split(found, heldout=0.1, seed=0)
    text = found.read(0)
    train, heldout = (text[p.start : p.stop] for (p,) in pieces)
    assert train + heldout == text
    assert len(heldout.decode()) == 10


@pytest.mark.parametrize(
    "path, message",
    [
        ("missing.txt", "missing.txt' does not exist"),
        ("", "empty string"),
        ("*.md", "matches no file"),
        ("nothing.txt", "nothing.txt' is empty"),
        ("zero.bin", "zero.bin' is binary .byte 2 is NUL"),
        ("latin.txt", "latin.txt' is not UTF-8 .byte 3 is 0xe9"),
        ("folder", "1 files found, none of them non-empty UTF-8 text"),
        ("*.bin", "1 files found, none of them non-empty UTF-8 text"),
    ],
)
def test_paths_without_text_are_refused(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("folder/zero.bin").write_bytes(b"\0")
    Path("zero.bin").write_bytes(b"ab\0")
    Path("nothing.txt").write_bytes(b"")
    Path("latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match=message):
        open_folder(path, tmp_path / "cache")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"heldout": 0.0}, "heldout must lie between 0 and 1"),
        ({"heldout": 1.0}, "heldout must lie between 0 and 1"),
        ({"path": ("a.txt",), "tfds": "lm1b"}, "give only one"),
    ],
)
def test_contradictory_configurations_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**fields)


def test_a_path_given_as_one_string_is_refused():
    with pytest.raises(UserError, match="must be a tuple of strings, got the string 'a.txt'"):
        DataConfig.__post_init__(SimpleNamespace(path="a.txt"))  # not by the constructor: tests check its types


# ---------------------------------------------------------------- windows on disk


def stream(windows):
    """The tokens that windows T apart were cut from."""
    windows = list(windows)
    return np.concatenate([window[:-1] for window in windows] + [windows[-1][-1:]])


@pytest.mark.parametrize("kind", ["bytes", "json"])
def test_windows_hold_every_token_of_the_training_text_in_order(folder, tmp_path, bpe, monkeypatch, kind):
    monkeypatch.setattr(text_dataset, "SHARD_WINDOWS", 7)  # several files
    monkeypatch.setattr(text_dataset, "GROUP_BYTES", 300)
    tokenizer = ByteTokenizer() if kind == "bytes" else JsonTokenizer(bpe)
    data = open_folder(folder, tmp_path / "cache", tokenizer=tokenizer)
    found = corpus.from_files([str(folder)])
    train = corpus.split(found, 0.05, 0).train
    tokens = np.concatenate([tokenizer.encode(found.read(piece.document)) for piece in train])
    assert len(data.train) == (len(tokens) - 1) // LENGTH
    assert all(window.shape == (LENGTH + 1,) and window.dtype == np.int32 for window in data.train)
    np.testing.assert_array_equal(stream(data.train), tokens[: len(data.train) * LENGTH + 1])


def test_held_out_files_never_appear_in_training_windows(folder, tmp_path):
    data = open_folder(folder, tmp_path / "cache", heldout=0.3)
    train, heldout = ({chr(t) for window in part for t in window} for part in (data.train, data.heldout))
    assert not train & heldout
    assert train | heldout == set(LETTERS)


def test_fingerprint_depends_on_content_tokenizer_length_and_split_but_not_on_place(folder, tmp_path, bpe):
    cache = tmp_path / "cache"
    first = open_folder(folder, cache).fingerprint
    shutil.copytree(folder, tmp_path / "copy")
    assert open_folder(tmp_path / "copy", cache).fingerprint == first
    (tmp_path / "copy" / "part0" / "a.txt").write_text("b" + "a" * 99)
    others = [
        open_folder(tmp_path / "copy", cache),
        open_folder(folder, cache, length=LENGTH + 1),
        open_folder(folder, cache, tokenizer=JsonTokenizer(bpe)),
        open_folder(folder, cache, seed=1),
    ]
    assert len({first, *(data.fingerprint for data in others)}) == 5


def test_second_opening_reads_the_cache(folder, tmp_path, monkeypatch):
    first = open_folder(folder, tmp_path / "cache")
    monkeypatch.delattr(text_dataset, "build")
    second = open_folder(folder, tmp_path / "cache")
    np.testing.assert_array_equal(stream(second.train), stream(first.train))


def test_nothing_is_printed_without_progress_and_bars_go_to_stderr(folder, tmp_path, capfd):
    open_folder(folder, tmp_path / "quiet")
    assert capfd.readouterr() == ("", "")
    config = DataConfig(path=(str(folder),))
    open_text(config, ByteTokenizer(), length=LENGTH, cache_dir=tmp_path / "loud", progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "tokenizing" in err and "writing windows" in err


def _empty(dataset):
    shutil.rmtree(dataset)


def _cut_info(dataset):
    info = dataset / "dataset_info.json"
    info.write_text(info.read_text()[:50])


def _cut_records(dataset):
    path = next(dataset.glob("*-train.*"))
    path.write_bytes(path.read_bytes()[:-20])


def _lose_records(dataset):
    next(dataset.glob("*-heldout.*")).unlink()


@pytest.mark.parametrize("damage", [_empty, _cut_info, _cut_records, _lose_records])
def test_an_incomplete_cache_is_built_again(folder, tmp_path, damage):
    first = open_folder(folder, tmp_path / "cache")
    expected = stream(first.train)
    damage(next((tmp_path / "cache").glob("*/text_windows/1.0.0")))
    assert text_dataset.load(tmp_path / "cache" / first.fingerprint) is None
    second = open_folder(folder, tmp_path / "cache")
    np.testing.assert_array_equal(stream(second.train), expected)
    assert len(list(second.heldout)) == len(second.heldout) > 0


def test_an_interrupted_build_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(text_dataset.TextWindows, "_examples", interrupt)
    with pytest.raises(KeyboardInterrupt):
        open_folder(folder, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_dataset_that_another_process_finished_first_is_used(folder, tmp_path):
    data = open_folder(folder, tmp_path / "cache")
    shutil.copytree(tmp_path / "cache" / data.fingerprint, tmp_path / "mine")
    text_dataset._install(tmp_path / "mine", tmp_path / "cache" / data.fingerprint)
    assert (tmp_path / "mine").exists()


def test_a_flipped_byte_in_a_record_is_reported_with_its_folder(tmp_path):
    noise = np.random.default_rng(0).integers(0x80, 0x800, 500)  # does not compress, so its bytes stand in the file
    (tmp_path / "noise.txt").write_text("".join(map(chr, noise)))
    data = open_folder(tmp_path / "noise.txt", tmp_path / "cache")
    path = next((tmp_path / "cache").rglob("*-train.*"))
    content = path.read_bytes()
    where = content.index(bytes(data.train[5].astype(np.uint8)))
    path.write_bytes(content[:where] + bytes([content[where] ^ 1]) + content[where + 1 :])
    data = open_folder(tmp_path / "noise.txt", tmp_path / "cache")
    with pytest.raises(UserError, match=f"{data.fingerprint} is damaged .window 5: .*delete that folder"):
        list(data.train)
    with pytest.raises(UserError, match="is damaged"):
        rows(data.train_batches(batch=4, seed=0), len(data.train) // 4 + 1)


@pytest.mark.parametrize(
    "text, heldout, message",
    [
        ("x" * 10, 0.5, "training text has 5 tokens, one window of length 16 needs 17"),
        ("x" * 100, 0.05, "held-out text has 5 tokens, one window of length 16 needs 17.*--data.heldout"),
    ],
)
def test_text_shorter_than_a_window_is_refused_with_the_numbers(tmp_path, text, heldout, message):
    (tmp_path / "short.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        open_folder(tmp_path / "short.txt", tmp_path / "cache", heldout=heldout)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_text_of_exactly_one_window_is_enough(tmp_path):
    (tmp_path / "short.txt").write_text("x" * (2 * LENGTH + 2))
    data = open_folder(tmp_path / "short.txt", tmp_path / "cache", heldout=0.5)
    assert len(data.train) == len(data.heldout) == 1


def test_length_below_one_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="at least 1 token, got 0"):
        open_folder(folder, tmp_path, length=0)


def test_a_tokenizer_that_loses_text_is_refused(folder, tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    with pytest.raises(UserError, match="bits per byte would be wrong"):
        open_folder(folder, tmp_path / "cache", tokenizer=JsonTokenizer(tmp_path / "words.json"))


def test_a_cache_that_cannot_be_written_is_refused(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the prepared corpus"):
        open_folder(folder, tmp_path / "file" / "cache")


def test_a_full_disk_is_refused_before_anything_is_written(folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match="0 MB are free"):
        open_folder(folder, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


# ---------------------------------------------------------------- training order


def test_every_window_is_seen_once_per_epoch_in_a_new_order():
    seen = np.asarray(rows(batches(count=10, batch=3), 20)).reshape(6, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in seen.tolist())
    assert len({tuple(epoch) for epoch in seen.tolist()}) == 6


def test_the_seed_decides_the_order():
    orders = [rows(batches(count=30, seed=seed), 10) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_two_processes_see_disjoint_halves_whose_union_is_everything():
    first, second = (rows(batches(count=20, batch=5, index=i, processes=2), 2) for i in (0, 1))
    assert not set(first) & set(second)
    assert sorted(first + second) == list(range(20))


@pytest.mark.parametrize("count", [20, 23])
def test_two_processes_share_the_batches_of_one_with_twice_the_batch(count):
    one = rows(batches(count=count, batch=6), 12)
    first, second = (rows(batches(count=count, batch=3, index=i, processes=2), 12) for i in (0, 1))
    assert one[0::2] == first and one[1::2] == second


@pytest.mark.parametrize("steps", [0, 2, 3, 7], ids=["start", "mid-epoch", "over the epoch's end", "third epoch"])
def test_resuming_from_json_continues_exactly(steps):
    original = batches(count=10, batch=3)
    rows(original, steps) if steps else None
    state = json.loads(json.dumps(original.get_state()))
    expected = rows(original, 8)
    resumed = batches(count=10, batch=3)
    rows(resumed, 5)
    resumed.set_state(state)
    assert rows(resumed, 8) == expected


def test_reading_ahead_does_not_move_the_saved_position():
    original = batches(count=10, batch=2)
    first = rows(original, 1)
    state = original.get_state()
    resumed = batches(count=10, batch=2)
    resumed.set_state(state)
    assert first + rows(resumed, 4) == rows(batches(count=10, batch=2), 5)


@pytest.mark.parametrize(
    "other, name",
    [({"batch": 2}, "batch 3"), ({"seed": 1}, "seed 0"), ({"processes": 2}, "process_count 1"),
     ({"fingerprint": "g"}, "fingerprint f")],
)  # fmt: skip
def test_a_position_of_another_run_is_refused(other, name):
    with pytest.raises(UserError, match=f"belongs to {name}, this run has"):
        batches(**other).set_state(batches().get_state())


def test_something_that_is_no_position_is_refused():
    with pytest.raises(UserError, match="no data position"):
        batches().set_state({"next_index": 3})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"batch": -2}, "batch must be at least 1, got -2"),
        ({"batch": 11}, "batch of 11 is larger than the 10 windows"),
        ({"batch": 6, "processes": 2}, "batch of 6 is larger than the 5 windows that each of 2 processes"),
        ({"index": 2, "processes": 2}, "process_index must be in"),
        ({"processes": 0}, "process_index must be in"),
        ({"seed": -1}, "seed must be in"),
    ],
)
def test_batches_that_cannot_be_made_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        batches(**arguments)


def test_a_tokenized_folder_trains_and_resumes_end_to_end(folder, tmp_path):
    data = open_folder(folder, tmp_path / "cache")
    original = data.train_batches(batch=4, seed=3)
    for _ in range(len(data.train) // 4 - 1):  # the next batch but one crosses into the second epoch
        next(original)
    state = json.loads(json.dumps(original.get_state()))
    resumed = open_folder(folder, tmp_path / "cache").train_batches(batch=4, seed=3)
    resumed.set_state(state)
    for _ in range(3):
        np.testing.assert_array_equal(next(resumed), next(original))


# ---------------------------------------------------------------- held-out batches


def test_heldout_batches_are_the_same_each_time_and_in_order():
    evaluation = HeldoutBatches(numbered(11), batch=3, limit=None)
    assert rows(iter(evaluation), 99) == rows(iter(evaluation), 99) == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert len(evaluation) == len(list(evaluation)) == 3


def test_a_limit_spreads_the_batches_over_the_whole_split():
    evaluation = HeldoutBatches(numbered(100), batch=2, limit=5)
    assert rows(iter(evaluation), 99) == list(range(0, 100, 10))


def test_fewer_windows_than_a_batch_make_one_smaller_batch():
    assert [batch.shape for batch in HeldoutBatches(numbered(3), batch=8, limit=4)] == [(3, 3)]


@pytest.mark.parametrize("arguments", [{"batch": 0, "limit": None}, {"batch": 1, "limit": 0}])
def test_empty_heldout_batches_are_refused(arguments):
    with pytest.raises(UserError, match="must be at least 1"):
        HeldoutBatches(numbered(3), **arguments)


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
