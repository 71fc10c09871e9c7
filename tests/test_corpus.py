"""Tokenizers and the choice of files: what is read, what is held out, what is refused."""

import functools
import gzip
import os
import pickle
import shutil
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
from corpora import LETTERS, open_folder

from hope_jax.data import (
    DataConfig,
)
from hope_jax.data.text import corpus, formats
from hope_jax.data.text.files import from_files
from hope_jax.data.text.formats import NotText, text_of
from hope_jax.errors import UserError


def test_a_folder_is_read_recursively_without_hidden_binary_and_empty_files(folder):
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden")
    (folder / "image.png").write_bytes(b"\x89PNG\0\0")
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "empty.txt").write_bytes(b"")
    found = from_files([str(folder)])
    assert sorted(found.names) == sorted(f"part{i % 3}/{letter}.txt" for i, letter in enumerate(LETTERS))
    assert found.left_out.startswith("Left out 3 of 23 files: ")
    assert found.size == sum(100 + i for i in range(20))


def test_files_folders_and_globs_that_overlap_count_each_file_once(folder):
    paths = [str(folder / "part0"), str(folder / "part0" / "a.txt"), str(folder / "*" / "[ab].txt"), str(folder / "**")]
    assert len(from_files(paths).names) == 20
    assert from_files([str(folder / "*" / "[abc].txt")]).names == ("part0/a.txt", "part1/b.txt", "part2/c.txt")


def test_default_corpus_is_the_standard_library_of_this_interpreter():
    found = from_files(())
    library = Path(sysconfig.get_paths()["stdlib"])
    assert found.read(found.names.index("argparse.py")) == (library / "argparse.py").read_bytes()
    assert all(name.endswith(".py") and "site-packages" not in name for name in found.names)
    assert len(found.names) > 200


def test_every_document_is_either_trained_on_or_held_out(folder):
    found = from_files([str(folder)])
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
    first, second = (from_files([str(path)]) for path in (folder, tmp_path / "elsewhere"))
    chosen = [{c.names[piece.document] for piece in corpus.split(c, 0.5, 0).heldout} for c in (first, second)]
    assert chosen[1] - {"0.txt"} == chosen[0]


def test_a_single_file_holds_out_its_last_bytes_at_a_character(tmp_path):
    (tmp_path / "one.txt").write_text("é" * 101)
    found = from_files([str(tmp_path / "one.txt")])
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
        from_files([str(folder / given)])


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


# ---------------------------------------------------------------- JSON lines, compressed files


LINES = b'{"text": "na\\u00efve", "id": 1}\n\n{"id": 2, "text": "two\\nlines"}\n'


packed = functools.partial(gzip.compress, mtime=0)  # without the time, so that all workers name the tests alike


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.txt.gz", packed("é".encode()) + packed(b"b"), "éb"),
        ("a.jsonl", LINES, "naïve\ntwo\nlines\n"),
        ("a.JSONL.GZ", packed(LINES), "naïve\ntwo\nlines\n"),
    ],
)
def test_json_lines_and_compressed_files_are_read_as_their_text(tmp_path, name, data, expected):
    (tmp_path / name).write_bytes(data)
    found = from_files([str(tmp_path)])
    assert found.read(0).decode() == expected and found.size == len(expected.encode())
    assert pickle.loads(pickle.dumps(found)).read(0).decode() == expected, "another process can read it"


def test_files_of_zstd_are_read_where_their_package_is_installed(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(LINES[:31]) + zstandard.compress(LINES[31:]))
    assert from_files([str(tmp_path)]).read(0).decode() == "naïve\ntwo\nlines\n"
    (tmp_path / "a.jsonl.zst").write_bytes(LINES)
    with pytest.raises(UserError, match="is damaged or no zstd"):
        from_files([str(tmp_path / "a.jsonl.zst")])
    text = b"".join(b"line %d\n" % i for i in range(200_000))
    first, second = zstandard.compress(text[:300]), zstandard.compress(text[300:])  # of more than one piece
    assert len(second) > formats.PIECE
    (tmp_path / "b.zst").write_bytes(first + second)
    assert text_of(tmp_path / "b.zst") == text
    for cut in (1, len(first) - 1, len(first) + 1, len(first + second) // 2, len(first + second) - 1):
        (tmp_path / "b.zst").write_bytes((first + second)[:cut])
        with pytest.raises(NotText, match="it ends too early"):
            text_of(tmp_path / "b.zst")


def test_zstd_without_its_package_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.txt.zst").write_bytes(b"x")
    with pytest.raises(UserError, match=r"'zstandard' is not installed.*hope_jax\[zst\]"):
        from_files([str(tmp_path)])


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.gz", b"plain", "damaged or no gzip"),
        ("a.gz", packed(b"text" * 99)[:-9], "damaged or no gzip"),
        ("a.jsonl", b'{"text": "a"}\n{"words": "b"}', "no JSON lines with texts .line 2 has no string 'text'"),
        ("a.jsonl", b'{"text": 3}', "line 1 has no string"),
        ("a.jsonl", b"[1]", "line 1 has no string"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused_by_name_and_left_out_of_a_folder(tmp_path, name, data, said):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=said):
        from_files([str(tmp_path / name)])
    (tmp_path / "b.txt").write_text("text")
    assert from_files([str(tmp_path)]).left_out.startswith("Left out 1 of 2 files: 1 ")


# ---------------------------------------------------------------- what is left out, links, names, pipes


def test_what_is_left_out_is_said_with_files_bytes_and_reasons(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for i in range(10):
        (tmp_path / f"{i}.txt").write_bytes("Zwölf".encode("latin-1"))
    (tmp_path / "b.bin").write_bytes(b"ab\0")
    (tmp_path / "empty").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    found = from_files([str(tmp_path)])
    assert found.left_out == (
        "Left out 14 of 15 files: 1 a broken link (0 bytes), 1 a pipe (0 bytes), 1 binary (3 bytes), 1 empty "
        "(0 bytes), 10 not UTF-8 (50 bytes)."
    )
    assert from_files([str(tmp_path / "a.txt")]).left_out == ""


def test_linked_folders_are_read_like_a_glob_reads_them_and_circles_end(tmp_path):
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "b.txt").write_text("book")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    (tmp_path / "texts" / "linked").symlink_to(tmp_path / "books")
    (tmp_path / "texts" / "again").symlink_to(tmp_path / "books")
    (tmp_path / "books" / "circle").symlink_to(tmp_path / "texts")
    found = from_files([str(tmp_path / "texts")])
    assert found.names == ("a.txt", "again/b.txt")
    assert from_files([str(tmp_path / "texts" / "**" / "*.txt")]).names == found.names


def test_a_file_name_that_is_not_utf8_is_a_name_like_any_other(tmp_path):
    root = tmp_path / "texts"
    root.mkdir()
    Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9.txt")).write_text("x" * 200)
    (root / "b.txt").write_text("y" * 200)
    data = open_folder(root, tmp_path / "cache", heldout=0.5)
    assert {chr(t) for windows in (data.train, data.heldout) for window in windows for t in window} == {"x", "y"}


@pytest.mark.parametrize("kind", ["named pipe", "pipe", "device"])
def test_a_pipe_or_device_is_refused_as_such_at_once(tmp_path, kind):
    os.mkfifo(tmp_path / "pipe")
    reader, writer = os.pipe()
    path = {"named pipe": tmp_path / "pipe", "pipe": f"/dev/fd/{reader}", "device": "/dev/zero"}[kind]
    with pytest.raises(UserError, match="is a device" if kind == "device" else "is a pipe .it can be read only once"):
        from_files([str(path)])
    os.close(reader)
    os.close(writer)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    found = from_files([str(tmp_path)])
    (tmp_path / "a.txt").write_text("texts")
    with pytest.raises(UserError, match="a.txt' has changed since"):
        found.read(0)


@pytest.mark.parametrize("heldout", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("sizes", [(3, 2000), (2000, 3), (1, 2000, 1), (1000, 1000), (5, 5, 5, 9000, 5)], ids=str)
def test_both_parts_get_their_share_of_the_bytes_whatever_the_sizes(sizes, heldout):
    documents = [bytes([97 + i]) * size for i, size in enumerate(sizes)]
    for seed in range(5):
        for known in (sizes, None):
            found = corpus.Corpus([str(i) for i in range(len(sizes))], documents.__getitem__, "", known)
            parts = corpus.split(found, heldout, seed)
            texts = [b"".join(documents[p.document][p.start : p.stop] for p in part) for part in parts]
            assert sorted(b"".join(texts)) == sorted(b"".join(documents)), "every byte is in one part"
            assert len(texts[1]) >= heldout / 4 * sum(sizes) and len(texts[0]) >= (1 - heldout) / 4 * sum(sizes)
