"""Text that is decoded piece by piece equals text decoded as a whole, wherever the tokens are cut."""

import pytest
import tokenizers

from hope_jax.data import ByteTokenizer, Continuation, JsonTokenizer

TEXT = "Once upon a time, naïve 東京 🙂 "


@pytest.fixture
def llama_like(tmp_path):
    """Tokens hold the blank before a word; the decoder strips the one that every text gets in front."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"Onceupatimï", "▁a", "▁t"]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    model = tokenizers.models.BPE(vocab, [("▁", "a"), ("▁", "t")], byte_fallback=True, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    steps = tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")
    tokenizer.normalizer = tokenizers.normalizers.Sequence(list(steps))
    d = tokenizers.decoders
    tokenizer.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    tokenizer.save(str(tmp_path / "llama.json"))
    return JsonTokenizer(tmp_path / "llama.json")


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
