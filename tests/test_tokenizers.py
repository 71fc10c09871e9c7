"""Tokenizers: ids and back, bytes per token, the same ids for the same text, what is refused."""

import json
import os

import numpy as np
import pytest
import tokenizers
from corpora import TEXT

from hope_jax.data import ByteTokenizer, DataConfig, JsonTokenizer, WordTokenizer, make_tokenizer
from hope_jax.data.text import tokenizers as our_tokenizers
from hope_jax.errors import UserError


def test_bytes_round_trip_and_ids_are_the_utf8_bytes():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(TEXT).tolist() == list(TEXT.encode())
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.encode(TEXT.encode()).tolist() == tokenizer.encode(TEXT).tolist()
    assert tokenizer.decode([0xC3, ord("a")]) == "\ufffda"


def test_words_are_tokens_with_their_blank_and_everything_else_is_bytes():
    words = our_tokenizers.frequent_words(["the cat, the dog", "x the cow 12"])
    assert words[:2] == [" the", "the"] and set(words[2:]) == {" cat", " dog", " cow"}
    tokenizer = WordTokenizer(words[:2])
    assert tokenizer.vocab_size == 258 and tokenizer.byte_lengths.sum() == 256 + len(" the") + len("the")
    ids = tokenizer.encode("the cat, the 12")
    assert ids.tolist() == [257, *b" cat,", 256, *b" 12"] and ids.dtype == np.int32
    for text in (TEXT, "", "the", "  the thé then a the"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.byte_lengths[tokenizer.encode(text)].sum() == len(text.encode())
    bytes_alone, other = WordTokenizer([]), WordTokenizer([" cat", " the"])
    assert bytes_alone.encode(TEXT).tolist() == list(TEXT.encode())
    assert len({one.fingerprint for one in (tokenizer, bytes_alone, other)}) == 3
    for wrong in ("a", "1", " the cat", "été"):
        with pytest.raises(UserError, match=f"'{wrong}' is no word: give two or more letters of ASCII"):
            WordTokenizer(["the", wrong])


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
    assert len(list(our_tokenizers._pieces(text.encode()))) > 5
    assert JsonTokenizer(bpe).encode(text).tolist() == whole.tolist()
    assert "".join(our_tokenizers._pieces(b"x" * 1000)) == "x" * 1000


def test_many_texts_at_once_get_the_ids_of_each(bpe):
    texts = [b"", TEXT.encode(), b"the fox", b""]
    for tokenizer in (ByteTokenizer(), WordTokenizer([" fox", "the"]), JsonTokenizer(bpe)):
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


def altered(bpe, path, **changes):
    """The tokenizer file of ``bpe`` with other settings."""
    path.write_text(json.dumps(json.loads(bpe.read_text()) | changes))
    return JsonTokenizer(path)


def test_a_tokenizer_file_with_dropout_gives_the_same_ids_each_time(bpe, tmp_path):
    model = json.loads(bpe.read_text())["model"] | {"dropout": 0.5}
    text = "the quick brown fox jumps over the lazy dog\n" * 20
    dropout = altered(bpe, tmp_path / "d.json", model=model)
    assert dropout.encode(text).tolist() == dropout.encode(text).tolist() == JsonTokenizer(bpe).encode(text).tolist()


def test_the_fingerprint_covers_what_decides_the_ids_and_nothing_else(bpe, tmp_path):
    same = JsonTokenizer(bpe).fingerprint
    model = json.loads(bpe.read_text())["model"]
    assert altered(bpe, tmp_path / "1.json", truncation=None).fingerprint == same
    assert altered(bpe, tmp_path / "2.json", model=model | {"dropout": 0.1}).fingerprint == same
    assert altered(bpe, tmp_path / "3.json", model=model | {"merges": model["merges"][:-1]}).fingerprint != same
    assert altered(bpe, tmp_path / "4.json", normalizer={"type": "Lowercase"}).fingerprint != same


def test_a_long_text_gets_one_blank_in_front_and_none_where_it_is_cut(llama_like, monkeypatch):
    text = "a time\nupon a\n\ntime Once" * 20
    whole = llama_like.encode(text)
    monkeypatch.setattr(our_tokenizers, "PIECE_CHARACTERS", 50)
    assert llama_like.encode(text).tolist() == whole.tolist()
    assert llama_like.byte_lengths[whole].sum() == len(text) + 1


def test_a_blank_line_is_encoded_alike_wherever_a_long_text_is_cut(tmp_path, monkeypatch):
    """A pre-tokenizer sees two line ends as one where a text ends, and as two before a word."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=260, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["\n\n"] * 9, trainer)
    tokenizer.save(str(tmp_path / "t.json"))
    ours, text = JsonTokenizer(tmp_path / "t.json"), "ab\ncd\n\nef\n" * 9
    assert 256 in ours.encode("ab\n\n"), "the pair is a token"
    whole = ours.encode(text)
    monkeypatch.setattr(our_tokenizers, "PIECE_CHARACTERS", 17)
    assert ours.encode(text).tolist() == whole.tolist()


@pytest.mark.parametrize("kind", ["bytes", "json"])
def test_text_that_is_not_unicode_is_refused_in_one_sentence(bpe, kind):
    tokenizer = ByteTokenizer() if kind == "bytes" else JsonTokenizer(bpe)
    with pytest.raises(UserError, match="character 3 of the text is .*udce9', a byte that is not UTF-8"):
        tokenizer.encode(b"caf\xe9".decode("utf-8", "surrogateescape"))


def test_bytes_that_are_no_utf8_are_refused_by_a_tokenizer_of_characters(bpe):
    with pytest.raises(UserError, match="byte 3 of the text is 0xe9"):
        JsonTokenizer(bpe).encode(b"caf\xe9")


def test_a_pipe_is_no_tokenizer_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is a pipe"):
        JsonTokenizer(tmp_path / "pipe")


def test_ids_of_several_sequences_are_refused(bpe):
    for tokenizer in (ByteTokenizer(), JsonTokenizer(bpe)):
        with pytest.raises(UserError, match=r"shape \(1, 2\), expected \[T\]"):
            tokenizer.decode(np.zeros((1, 2), int))
