"""The tokenized windows on disk: complete, cached, rebuilt when damaged."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from corpora import LENGTH, LETTERS, open_folder, rows, stream

from hope_jax.data import (
    ByteTokenizer,
    DataConfig,
    JsonTokenizer,
    open_text,
)
from hope_jax.data.text import building, corpus, windows
from hope_jax.data.text.files import from_files
from hope_jax.errors import UserError

# ---------------------------------------------------------------- windows on disk


@pytest.mark.parametrize("kind", ["bytes", "json"])
def test_windows_hold_every_token_of_the_training_text_in_order(folder, tmp_path, bpe, monkeypatch, kind):
    monkeypatch.setattr(windows, "SHARD_WINDOWS", 7)  # several files
    monkeypatch.setattr(building, "GROUP_BYTES", 300)
    tokenizer = ByteTokenizer() if kind == "bytes" else JsonTokenizer(bpe)
    data = open_folder(folder, tmp_path / "cache", tokenizer=tokenizer)
    found = from_files([str(folder)])
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
    monkeypatch.delattr(building, "build")
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
    assert windows.load(tmp_path / "cache" / first.fingerprint) is None
    second = open_folder(folder, tmp_path / "cache")
    np.testing.assert_array_equal(stream(second.train), expected)
    assert len(list(second.heldout)) == len(second.heldout) > 0


def test_an_interrupted_build_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(windows.TextWindows, "_examples", interrupt)
    with pytest.raises(KeyboardInterrupt):
        open_folder(folder, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_dataset_that_another_process_finished_first_is_used(folder, tmp_path):
    data = open_folder(folder, tmp_path / "cache")
    shutil.copytree(tmp_path / "cache" / data.fingerprint, tmp_path / "mine")
    building._install(tmp_path / "mine", tmp_path / "cache" / data.fingerprint)
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


@pytest.mark.parametrize("length", [0, 2.5, "16", True])
def test_a_length_that_is_no_number_of_tokens_is_refused(folder, tmp_path, untyped, length):
    with pytest.raises(UserError, match=f"length is {length!r}; give a whole number of at least 1"):
        open_folder(folder, tmp_path, length=length)


def test_numbers_of_batches_are_whole(folder, tmp_path, untyped):
    data = open_folder(folder, tmp_path / "cache")
    with pytest.raises(UserError, match="batch is 2.5"):
        data.train_batches(batch=2.5, seed=0)
    with pytest.raises(UserError, match="limit is 0"):
        data.heldout_batches(batch=2, limit=0)


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


# ---------------------------------------------------------------- leftovers, advice, places


def test_what_a_dead_process_left_is_cleared_but_not_what_a_living_one_builds(folder, tmp_path):
    cache = tmp_path / "cache"
    (cache / ".building-dead").mkdir(parents=True)
    (cache / ".building-dead" / "train.tokens").write_bytes(b"x" * 1000)
    with building._unfinished(cache) as mine:
        building.clear_unfinished(cache)
        assert mine.exists() and (cache / ".building-dead").exists(), "somebody is building"
    data = open_folder(folder, cache)
    assert [path.name for path in cache.iterdir()] == [data.fingerprint]


def test_a_killed_process_frees_the_lock(tmp_path):
    code = "import os, signal, sys; from pathlib import Path; from hope_jax.data.text.building import _unfinished\n"
    code += "with _unfinished(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGTERM)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parent.parent)
    assert done.returncode == -signal.SIGTERM and len(list(tmp_path.iterdir())) == 1
    building.clear_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_blanks_in_front_of_many_tiny_files_are_named_as_the_cause(llama_like, tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(50):
        (tmp_path / "texts" / f"{i}.txt").write_text("a time")
    with pytest.raises(UserError, match="puts a blank in front of each of 50 texts.*join the texts"):
        open_folder(tmp_path / "texts", tmp_path / "cache", tokenizer=llama_like)
    (tmp_path / "one.txt").write_text("a time\n" * 50)
    assert len(open_folder(tmp_path / "one.txt", tmp_path / "cache", tokenizer=llama_like, heldout=0.3).train)


@pytest.mark.parametrize(
    ("size", "heldout", "advice"),
    [
        (400, 0.01, "or a larger --data.heldout"),
        (400, 0.99, "or a smaller --data.heldout"),
        (20, 0.5, "or a smaller --length$"),
    ],
)
def test_the_advice_on_a_text_that_is_too_short_helps(tmp_path, size, heldout, advice):
    (tmp_path / "a.txt").write_text("x" * size)
    with pytest.raises(UserError, match=advice):
        open_folder(tmp_path / "a.txt", tmp_path / "cache", heldout=heldout)


@pytest.mark.parametrize("name", ["lr [0.1]", "a*b", "50%", "späß 日本"])
def test_every_place_of_the_cache_works(folder, tmp_path, name):
    cache = tmp_path / name
    first = open_folder(folder, cache)
    np.testing.assert_array_equal(stream(open_folder(folder, cache).train), stream(first.train))


def test_a_place_whose_name_is_not_utf8_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="udce9' has a name that is not UTF-8"):
        open_folder(folder, tmp_path / os.fsdecode(b"caf\xe9"))


def test_what_is_left_out_is_said_on_stderr_with_progress_alone(folder, tmp_path, capfd):
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    assert open_folder(folder, tmp_path / "cache").left_out == "Left out 1 of 21 files: 1 not UTF-8 (4 bytes)."
    assert capfd.readouterr() == ("", "")
    config = DataConfig(path=(str(folder),))
    open_text(config, ByteTokenizer(), length=LENGTH, cache_dir=tmp_path / "cache", progress=True)
    assert "Left out 1 of 21 files: 1 not UTF-8 (4 bytes)." in capfd.readouterr().err
