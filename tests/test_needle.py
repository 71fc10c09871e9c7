"""The needle: its text token by token, its haystacks and depths, and a model that finds some of the needles."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from hope_jax import evals
from hope_jax.data import IGNORE, ByteTokenizer, JsonTokenizer, needle, needle_words, noise_haystack, text_haystack
from hope_jax.data.tasks.needle import ADJECTIVES, ANSWER, NEEDLE, NOISE, NOUNS, OPENING, QUESTION
from hope_jax.errors import NotFinite, UserError
from hope_jax.nn.feed_forward.fast import BlockState

SENTENCES = [
    f"Sentence number {i} tells of {word}." for i, word in enumerate(("sun", "moon", "rain", "snow", "ice", "fog"))
]
KEYS = [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS]
PROMPT = re.compile(
    r"A special magic number is hidden within the following text\. Make sure to memorize it\. "
    r"I will quiz you about the number afterwards\.\n"
    r"(?P<before>[^*]*)(?P<blank>[\n ])One of the special magic numbers for (?P<key>[a-z]+-[a-z]+) is: "
    r"(?P<value>\d{7})\.(?P<after>[^*]*)\n"
    r"What is the special magic number for (?P=key) mentioned in the provided text\? "
    r"The special magic number for (?P=key) mentioned in the provided text is"
)


@pytest.fixture
def prose(tmp_path):
    """Two files of sentences, on several lines."""
    folder = tmp_path / "prose"
    folder.mkdir()
    for name, some in (("a.txt", SENTENCES[:4]), ("b.txt", SENTENCES[4:])):
        (folder / name).write_text("\n\n ".join(some) + "\n")
    return (str(folder),)


@pytest.fixture
def haystacks(bpe, llama_like, prose):
    """Haystacks of every kind with every kind of tokenizer."""
    kinds = ByteTokenizer(), JsonTokenizer(bpe), llama_like, needle_words(150, prose)
    return [made for tokenizer in kinds for made in (noise_haystack(tokenizer), text_haystack(tokenizer, prose))]


def parts(haystack, inputs, targets):
    """The prompt of one row taken apart, and its answer."""
    prompt = haystack.tokenizer.decode(inputs[: len(inputs) - ANSWER + 1])
    answer = haystack.tokenizer.decode(targets[targets != IGNORE])
    found = PROMPT.fullmatch(re.sub("\n ", "\n", prompt))  # some tokenizers put a blank in front of every text
    assert found, prompt
    return found.groupdict(), answer.strip()


def test_a_prompt_is_the_sentences_of_the_task_and_the_answer_is_the_number_in_the_needle(haystacks):
    for haystack in haystacks:
        inputs, targets = needle(0, 0, 8, 700, haystack)
        assert inputs.shape == targets.shape == (8, 700) and inputs.dtype == targets.dtype == np.int32
        for row, target in zip(inputs, targets, strict=True):
            found, answer = parts(haystack, row, target)
            assert answer == found["value"]
            at = np.flatnonzero(target != IGNORE)
            assert at[0] == 700 - ANSWER and np.all(np.diff(at) == 1)
            np.testing.assert_array_equal(row[at[1:]], target[at[:-1]])  # what is written is read next
            assert not row[at[-1] + 2 :].any()


def test_the_words_of_the_task_are_tokens_so_that_prompts_are_short(prose):
    tokenizer = needle_words(1000, prose)
    for haystack in (noise_haystack(tokenizer), text_haystack(tokenizer, prose)):
        (row, *_), _ = needle(0, 0, 4, 128, haystack)
        texts = [tokenizer.decode(row[i : i + 1]) for i in range(len(row))]
        letters = [text for text in texts if re.search("[A-Za-z]", text)]
        assert all(len(text.strip()) > 1 for text in letters if text not in (" A", "A", " I", "a"))
    assert tokenizer.decode(tokenizer.encode(" Sentence tells")[1:]) == " tells"
    own = needle_words(1000).vocab_size
    assert own < tokenizer.vocab_size < 1000
    alone, first = needle_words(1000), needle_words(own - 256, prose)
    assert first.fingerprint == alone.fingerprint, "words of the task come first"


def test_noise_is_the_same_line_again_and_again_but_for_the_beginning_of_the_first(haystacks):
    inputs, targets = needle(0, 0, 30, 1000, haystacks[0])
    for row, target in zip(inputs, targets, strict=True):
        found, _ = parts(haystacks[0], row, target)
        assert found["blank"] == "\n"
        lines = (found["before"] + found["after"]).removeprefix("\n").split("\n")
        assert len(lines) > 5 and NOISE.endswith(lines[0]) and set(lines[1:]) <= {NOISE}


def test_prose_is_sentences_of_the_files_in_their_order_from_any_place(haystacks):
    firsts = set()
    for row, target in zip(*needle(0, 0, 30, 1000, haystacks[1]), strict=True):
        found, _ = parts(haystacks[1], row, target)
        cut, *sentences = re.split(r"(?<=\.) ", (found["before"] + found["after"]).strip())
        numbers = [SENTENCES.index(sentence) for sentence in sentences]
        assert found["blank"] == " " and len(numbers) > 10
        assert np.all(np.diff(numbers) % 6 == 1) and SENTENCES[numbers[0] - 1].endswith(cut)
        assert not found["after"] or found["after"].startswith(" Sentence")
        firsts.add(numbers[0])
    assert firsts == set(range(6))


def test_needles_lie_at_every_depth_alike_and_keys_and_values_are_drawn_alike(haystacks):
    examples = [parts(haystacks[0], *row)[0] for row in zip(*needle(3, 1, 800, 4000, haystacks[0]), strict=True)]
    depths = np.array([len(found["before"]) / len(found["before"] + found["after"]) for found in examples])
    assert depths.min() < 0.03 and depths.max() == 1
    np.testing.assert_allclose(np.histogram(depths, 5, (0, 1))[0] / 800, 0.2, atol=0.045)
    values = np.array([int(found["value"]) for found in examples])
    assert len(set(values)) > 795 and abs(values.mean() / 5.5e6 - 1) < 0.05
    used_words = zip(*(found["key"].split("-") for found in examples), strict=True)
    for used, listed in zip(used_words, (ADJECTIVES, NOUNS), strict=True):
        assert set(used) == set(listed) and len(listed) == len(set(listed)) == 64


def test_a_batch_is_a_function_of_seed_and_index(haystacks):
    def batch(*numbers):
        return needle(*numbers, 2, 600, haystacks[1])[0].tolist()

    assert batch(0, 7) == batch(0, 7)
    assert batch(0, 7) != batch(0, 8) and batch(0, 7) != batch(1, 7) and batch(0, 7) != batch(7, 0)


class Oracle:
    """A model that writes a text it has by heart, whatever it reads: right only if its state counts every token."""

    config = SimpleNamespace(vocab_size=300)

    def init_state(self, params, batch, capacity):
        """No token was read."""
        return BlockState(jnp.zeros((), jnp.int32), ())

    def apply(self, variables, tokens, state, count=None):
        """Logits and state."""
        at = state.mixer + jnp.arange(tokens.shape[1])
        text = jnp.take(variables["params"], at, axis=1, mode="clip")
        read = tokens.shape[1] if count is None else count
        return jax.nn.one_hot(text, 300), state._replace(mixer=state.mixer + read)


def test_the_share_of_needles_that_are_found_is_counted_after_reading_in_pieces():
    haystack, model = noise_haystack(ByteTokenizer()), Oracle()
    inputs, targets = needle(5, 0, 4, 700, haystack)
    targets[1, -1], targets[2, -1] = ord("x"), 299  # a wrong digit, and an id that the tokenizer does not have
    right = evals.needle.answered(model, targets, haystack.tokenizer, inputs, needle(5, 0, 4, 700, haystack)[1])
    np.testing.assert_array_equal(right, [True, False, False, True])
    assert evals.needle.found(model, targets, haystack, 700, batches=1, batch=4, seed=5) == 0.5
    assert evals.needle.found(model, targets, haystack, 700, batches=2, batch=4, seed=5) == 0.25


def test_shares_at_many_lengths_fill_their_batches_and_a_model_that_breaks_down_has_none(monkeypatch):
    asked = []

    def found(model, params, haystack, length, *, batches, batch, seed):
        asked.append((length, batches, batch, seed))
        if length > 2000:
            raise NotFinite("broken")
        return 0.5

    monkeypatch.setattr(evals.needle, "found", found)
    haystack, lengths = noise_haystack(ByteTokenizer()), [500, 1000, 2000, 3000]
    shares = evals.needle.found_at("model", {}, haystack, lengths, needles=3, tokens=2000, seed=7)
    assert shares == [0.5, 0.5, 0.5, None]
    assert asked == [(500, 1, 3, 7), (1000, 2, 2, 7), (2000, 3, 1, 7), (3000, 3, 1, 7)]
    with pytest.raises(UserError, match="needles is 0; give a whole number"):
        evals.needle.found_at("model", {}, haystack, lengths, needles=0, tokens=2000, seed=7)


def test_impossible_needles_are_refused(tmp_path):
    haystack = noise_haystack(ByteTokenizer())
    with pytest.raises(UserError, match=r"length is 300; question and answer alone need \d+ tokens: give clearly more"):
        needle(0, 0, 1, 300, haystack)
    most = haystack.around  # in bytes every letter of a key counts
    for seed in range(5):
        with pytest.raises(UserError, match=f"alone need {most} tokens"):
            needle(seed, 0, 1, most, haystack)
    assert needle(0, 0, 300, most + 1, haystack)[0].shape == (300, most + 1)
    assert most == max(len(OPENING + f"\n{NEEDLE}{QUESTION}".format(key=key, value=10**6)) for key in KEYS) + ANSWER - 1
    for name, numbers in (("seed", (-1, 0, 1)), ("index", (0, -1, 1)), ("batch", (0, 0, 0))):
        with pytest.raises(UserError, match=f"{name} is -?[01]; give a whole number of at least"):
            needle(*numbers, 700, haystack)
    with pytest.raises(UserError, match="corpus path 'no such file' does not exist"):
        text_haystack(ByteTokenizer(), ("no such file",))
    (tmp_path / "blank.txt").write_text(" \n ")
    with pytest.raises(UserError, match=r"no words in .*blank.txt: give files with text"):
        text_haystack(ByteTokenizer(), (str(tmp_path / "blank.txt"),))
    letters = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "?": 1}, [], unk_token="?"))
    letters.save(str(tmp_path / "letters.json"))
    with pytest.raises(
        UserError, match="this tokenizer writes 0123456789 as .*: give one that has all digits, or none"
    ):
        noise_haystack(JsonTokenizer(tmp_path / "letters.json"))
    small = SimpleNamespace(config=SimpleNamespace(vocab_size=64))
    with pytest.raises(UserError, match="the model has 64 token ids and the tokenizer 256: give the model's own"):
        evals.needle.found(small, {}, haystack, 700, batches=1, batch=1, seed=0)
    targets = np.full((2, 8), IGNORE, np.int32)
    for row, at, said in ((0, 3, "row 1 of the targets has no answer"), (1, 5, r"begin at the positions \[3, 5\]")):
        targets[row, at] = 0
        with pytest.raises(UserError, match=said):
            evals.needle.answered(Oracle(), {}, ByteTokenizer(), np.zeros((2, 8), np.int32), targets)
