"""Text that is decoded piece by piece equals text decoded as a whole, wherever the tokens are cut."""

import pytest

from hope_jax.data import ByteTokenizer, Continuation, JsonTokenizer

TEXT = "Once upon a time, naïve 東京 🙂 "


@pytest.mark.parametrize("kind", ["bytes", "llama-like", "byte-level"])
def test_pieces_join_to_the_whole_text_wherever_they_are_cut(kind, llama_like, bpe):
    tokenizer = {"bytes": ByteTokenizer(), "llama-like": llama_like, "byte-level": JsonTokenizer(bpe)}[kind]
    ids = tokenizer.encode(TEXT)
    for cut in range(len(ids) + 1):
        continuation = Continuation(tokenizer, ids[:cut])
        begun = tokenizer.decode(ids[:cut]).rstrip("\ufffd")
        assert begun + "".join(continuation.add([token]) for token in ids[cut:]) == TEXT


def test_the_blank_between_prompt_and_continuation_is_kept(llama_like):
    prompt, more = (
        llama_like.encode("Once upon"),
        llama_like.encode("Once upon a time")[len(llama_like.encode("Once upon")) :],
    )
    assert llama_like.decode(more) == "a time", "decoded alone, the blank is lost"
    assert Continuation(llama_like, prompt).add(more) == " a time"


def test_half_a_character_is_shown_when_it_is_whole():
    continuation = Continuation(ByteTokenizer(), b"caf")
    assert [continuation.add([byte]) for byte in "é!".encode()] == ["", "é", "!"]
