"""Tokenizers and the choice of files: what is read, what is held out, what is refused."""

import os
import shutil
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
from corpora import LETTERS, TEXT, open_folder

from hope_jax.data import (
    ByteTokenizer,
    DataConfig,
    JsonTokenizer,
    make_tokenizer,
)
from hope_jax.data.text import corpus
from hope_jax.data.text import tokenizers as our_tokenizers
from hope_jax.errors import UserError

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


@pytest.mark.parametrize("given", [".", "par*"])
def test_a_folder_that_cannot_be_listed_is_refused_and_not_passed_over(folder, monkeypatch, given):
    real = os.scandir

    def scandir(path):
        if Path(path).name == "part1":
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)  # as root, no mode of a folder forbids anything
    with pytest.raises(UserError, match="folder '.*part1' cannot be read: Permission denied"):
        corpus.from_files([str(folder / given)])


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
