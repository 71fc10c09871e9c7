"""Tokens that are written once: what the shards hold, what a killed command leaves, what pretrain refuses to read."""

import fcntl
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from corpora import LENGTH, stream
from trained_run import mistake

from hope_jax.cli.main import main
from hope_jax.data import ByteTokenizer, DataConfig, JsonTokenizer, open_text
from hope_jax.data.text import building, corpus, shards
from hope_jax.data.text.files import from_files
from hope_jax.errors import UserError


@pytest.fixture
def small(monkeypatch):
    """Shards of about three of the files of ``folder``."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 350)


def tokenize(folder, out, *flags):
    """The command, in one process unless told otherwise."""
    given = ["--out", str(out), "--length", str(LENGTH), "--data.path", str(folder), "--processes", "1", *flags]
    return main(["tokenize", *map(str, given)])


def opened(out, tokenizer=None, length=LENGTH):
    """The tokens as pretrain reads them."""
    config = DataConfig(path=(str(out),))
    return open_text(config, tokenizer or ByteTokenizer(), length=length, cache_dir=out / "unused", progress=False)


def test_the_records_of_a_shard_are_the_tokens_of_its_documents_in_order(folder, tmp_path, small):
    out = tmp_path / "tokens"
    assert tokenize(folder, out, "--data.heldout", "0.3") == 0
    data, found = opened(out), from_files([str(folder)])
    planned = shards.shards(found, corpus.split(found, 0.3, 0))
    windows = {"train": list(data.train), "heldout": list(data.heldout)}
    assert len(planned) > 5
    for shard in planned:
        mine = windows[shard.name.partition("-")[0]]
        text = b"".join(found.read(piece.document)[piece.start : piece.stop] for piece in shard.pieces)
        count = (len(text) - 1) // LENGTH
        part, mine[:] = mine[:count], mine[count:]
        assert bytes(stream(part).astype(np.uint8)) == text[: count * LENGTH + 1]
    assert windows == {"train": [], "heldout": []}
    assert next(data.train_batches(batch=4, seed=0)).shape == (4, LENGTH + 1)
    assert not (out / "unused").exists()


def test_a_trained_tokenizer_is_kept_with_its_tokens_and_asked_for(folder, tmp_path, capfd):
    out = tmp_path / "tokens"
    (folder / "more.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 300)
    assert tokenize(folder, out, "--vocabulary", "300") == 0
    tokenizer = JsonTokenizer(out / "tokenizer.json")
    text = "the lazy dog\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text and len(tokenizer.encode(text)) < len(text) / 2
    assert len(opened(out, tokenizer).train) > 0
    with pytest.raises(UserError, match="made by another tokenizer: give --data.tokenizer .*tokenizer.json"):
        opened(out)
    with pytest.raises(UserError, match="in windows of 16, this run has --length 8: give --length 16"):
        opened(out, tokenizer, 8)
    assert "another length" in mistake(capfd, "tokenize", "--out", out, "--length", 8, "--data.path", folder,
                                       "--vocabulary", 300)  # fmt: skip


def test_flags_of_another_tokenizer_are_refused_and_leave_the_folder_as_it_was(folder, tmp_path, capfd):
    out, plain = tmp_path / "tokens", tmp_path / "bytes"
    (folder / "more.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 30)
    assert tokenize(folder, out, "--vocabulary", 270) == tokenize(folder, plain) == 0
    assert tokenize(folder, out, "--vocabulary", 270) == 0, "the same flags go on"
    kept = (out / "tokenizer.json").read_bytes()
    same = ("--length", LENGTH, "--data.path", folder)
    assert "another vocabulary" in mistake(capfd, "tokenize", "--out", out, *same, "--vocabulary", 400)
    assert (out / "tokenizer.json").read_bytes() == kept
    for flags in (("--vocabulary", 270), ("--data.tokenizer", out / "tokenizer.json")):
        assert "tokens of another" in mistake(capfd, "tokenize", "--out", plain, *same, *flags)
        assert sorted(path.suffix for path in plain.iterdir()) == [".array_record"] * 2 + [".json"] * 2
    with building.locked(plain, fcntl.LOCK_EX):
        flags = ("--out", plain, *same, "--vocabulary", 270)
        assert "another process writes tokens" in mistake(capfd, "tokenize", *flags)


def test_a_folder_of_tokens_is_not_read_as_text_and_its_held_out_part_is_what_it_is(folder, tmp_path, capfd):
    out = tmp_path / "tokens"
    assert tokenize(folder, out, "--data.heldout", "0.3") == 0
    for given in (out, tmp_path, tmp_path / "tok*", out / "*.json"):
        said = mistake(capfd, "tokenize", "--out", tmp_path / "twice", "--data.path", given)
        assert "tokens' holds tokens that the command tokenize has written" in said
    for unused in ({"heldout": 0.3}, {"seed": 1}):
        config = DataConfig(path=(str(out),), **unused)
        with pytest.raises(UserError, match=rf"--data.{next(iter(unused))} was chosen when .* was tokenized"):
            open_text(config, ByteTokenizer(), length=LENGTH, cache_dir=out, progress=False)
    (folder / "plan.json").write_text('{"shards": "of glass"}')
    assert "plan.json" in from_files([str(folder)]).names


def test_what_is_there_is_not_written_again_and_half_a_file_is_not_taken_for_a_whole_one(folder, tmp_path, small):
    out = tmp_path / "tokens"
    assert tokenize(folder, out) == 0
    first, expected = opened(out), stream(opened(out).train)
    names = sorted(path.name for path in out.glob("train-*"))
    kept = {name: (out / name).stat().st_mtime_ns for name in names[1:]}
    (out / names[0]).rename(out / f"{names[0]}.part")
    (out / shards.TOKENS).unlink()
    with pytest.raises(UserError, match="are not finished: run the command tokenize again"):
        opened(out)
    assert tokenize(folder, out) == 0
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept and not list(out.glob("*.part"))
    np.testing.assert_array_equal(stream(opened(out).train), expected)
    assert opened(out).fingerprint == first.fingerprint


def test_missing_and_cut_files_are_named(folder, tmp_path, small, capfd):
    out = tmp_path / "tokens"
    tokenize(folder, out)
    path = out / "train-00001.array_record"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"train-00001.array_record is not as long as it was written"):
        opened(out)
    path.unlink()
    with pytest.raises(UserError, match=r"train-00001.array_record is missing"):
        opened(out)
    (out / shards.TOKENS).write_text("{}")
    with pytest.raises(UserError, match="tokens.json is damaged"):
        opened(out)
    other = folder / "a.txt"
    other.write_text("changed" * 30)
    assert "holds tokens of another text" in mistake(
        capfd, "tokenize", "--out", out, "--length", LENGTH, "--data.path", folder
    )
    assert "holds" in mistake(capfd, "tokenize", "--out", folder, "--length", LENGTH, "--data.path", other)


def test_folders_are_mixed_by_their_weights_and_a_position_goes_on_in_all_of_them(folder, tmp_path):
    outs = [tmp_path / name for name in ("one", "two")]
    for out, part in zip(outs, ("part0", "part1"), strict=True):
        tokenize(folder / part, out)

    def mixed(*weights):
        config = DataConfig(path=tuple(map(str, outs)), weights=weights)
        return open_text(config, ByteTokenizer(), length=LENGTH, cache_dir=tmp_path / "unused", progress=False)

    data, (one, two) = mixed(3.0, 1.0), map(opened, outs)
    assert [len(part) for part in (data.train, data.heldout)] == [
        len(one.train) + len(two.train), len(one.heldout) + len(two.heldout)
    ]  # fmt: skip
    first = {bytes(window) for window in one.train}
    batches = data.train_batches(batch=8, seed=0)
    seen = [next(batches) for _ in range(30)]
    shares = [sum(bytes(window) in first for window in batch) for batch in seen]
    assert set(shares) == {6}, "three of four, in every batch"
    each = [bytes(window) for batch in seen for window in batch if bytes(window) in first][: len(one.train)]
    assert sorted(each) == sorted(bytes(window) for window in one.train), "all are read before one is read again"
    again = data.train_batches(batch=8, seed=0)
    for _ in range(9):
        next(again)
    fresh = data.train_batches(batch=8, seed=0)
    fresh.set_state(json.loads(json.dumps(again.get_state())))
    np.testing.assert_array_equal(next(fresh), seen[9])
    assert len({data.fingerprint, mixed(1.0, 1.0).fingerprint, mixed().fingerprint, one.fingerprint}) == 4
    with pytest.raises(UserError, match="got 1 weights for 2 paths"):
        mixed(1.0)
    with pytest.raises(UserError, match=r"weights must be above 0, got \(0.0, 1.0\)"):
        mixed(0.0, 1.0)


def test_text_of_less_than_a_window_is_refused(tmp_path, capfd):
    (tmp_path / "a.txt").write_text("short")
    given = ["--out", tmp_path / "out", "--length", 16, "--data.path", tmp_path / "a.txt", "--processes", 1]
    assert main(["tokenize", *map(str, given)]) == 2
    assert "the training text has no window of 16 tokens" in capfd.readouterr().err


@pytest.mark.slow
def test_many_processes_that_are_killed_and_go_on_write_what_one_process_writes(tmp_path):
    texts, one, many = (tmp_path / name for name in ("texts", "one", "many"))
    texts.mkdir()
    draw = np.random.default_rng(0)
    for i in range(24):
        (texts / f"{i}.txt").write_bytes(bytes(draw.integers(97, 123, 1_000_000, np.uint8)))
    code = "import sys; from hope_jax.data.text import shards; from hope_jax.cli.main import main\n"
    code += (
        "if __name__ == '__main__':\n  shards.SHARD_BYTES = 1_000_000\n  sys.exit(main(['tokenize', *sys.argv[1:]]))"
    )
    (tmp_path / "run.py").write_text(code)

    def start(out, processes):
        flags = ["--out", out, "--length", 64, "--data.path", texts, "--processes", processes]
        place = Path(__file__).parent.parent
        return subprocess.Popen([sys.executable, tmp_path / "run.py", *map(str, flags)], env={"PYTHONPATH": str(place)})

    assert start(one, 1).wait() == 0
    killed = start(many, 2)
    while len(list(many.glob("*.array_record"))) < 3 and killed.poll() is None:
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    time.sleep(1)  # its processes notice, too
    assert not (many / shards.TOKENS).exists()
    assert start(many, 2).wait() == 0
    left, right = (json.loads((out / shards.TOKENS).read_text()) for out in (one, many))
    assert left == right
    for name in left["files"]:
        assert (one / name).read_bytes() == (many / name).read_bytes()
