"""Multi-query associative recall: the definition of the task, position by position."""

import numpy as np
import pytest

from hope_jax.data import IGNORE, mqar
from hope_jax.errors import UserError

SETTINGS = [
    {"length": 64, "pairs": 4},
    {"length": 64, "pairs": 16},  # no empty slot more than needed
    {"length": 128, "pairs": 8, "vocab": 256, "random_non_queries": True},
    {"length": 32, "pairs": 8, "vocab": 18, "power_a": 1.0},  # every key and nearly every value is used
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_each_query_asks_one_key_and_its_target_is_the_value_bound_to_it(setting):
    inputs, targets = mqar(0, 0, batch=32, **setting)
    pairs = setting["pairs"]
    assert inputs.shape == targets.shape == (32, setting["length"])
    for sequence, target in zip(inputs, targets, strict=True):
        bound = dict(zip(sequence[0 : 2 * pairs : 2].tolist(), sequence[1 : 2 * pairs : 2].tolist(), strict=True))
        asked = np.flatnonzero(target != IGNORE)
        assert len(bound) == pairs
        assert sorted(sequence[asked].tolist()) == sorted(bound)
        assert [bound[key] for key in sequence[asked].tolist()] == target[asked].tolist()
        assert (asked >= 2 * pairs).all() and (asked % 2 == 0).all()


@pytest.mark.parametrize("setting", SETTINGS)
def test_keys_and_values_are_distinct_and_from_separate_halves_of_the_vocabulary(setting):
    inputs, _ = mqar(1, 2, batch=64, **setting)
    vocab, pairs = setting.get("vocab", 8192), setting["pairs"]
    keys, values = inputs[:, 0 : 2 * pairs : 2], inputs[:, 1 : 2 * pairs : 2]
    assert all(len(set(row)) == pairs for row in keys.tolist() + values.tolist())
    assert keys.min() >= 1 and keys.max() < vocab // 2 <= values.min() and values.max() < vocab


def test_positions_that_are_neither_context_nor_query_hold_zero_by_default():
    inputs, targets = mqar(0, 0, batch=16, length=64, pairs=4)
    empty = (targets == IGNORE) & (np.arange(64) >= 8)
    assert (inputs[empty] == 0).all()


def test_random_filling_changes_only_the_empty_positions():
    plain, targets = mqar(0, 0, batch=64, length=64, pairs=4, vocab=64)
    filled, filled_targets = mqar(0, 0, batch=64, length=64, pairs=4, vocab=64, random_non_queries=True)
    empty = (targets == IGNORE) & (np.arange(64) >= 8)
    np.testing.assert_array_equal(targets, filled_targets)
    np.testing.assert_array_equal(plain[~empty], filled[~empty])
    assert set(filled[empty].tolist()) == set(range(64))


def test_a_small_power_asks_soon_after_the_context_and_power_one_anywhere():
    def frequencies(power_a):
        _, targets = mqar(0, 0, batch=4000, length=66, pairs=1, power_a=power_a)
        return (targets != IGNORE)[:, 2::2].mean(axis=0)

    expected = np.arange(1, 33) ** (0.01 - 1)
    np.testing.assert_allclose(frequencies(0.01), expected / expected.sum(), atol=0.03)
    np.testing.assert_allclose(frequencies(1.0), 1 / 32, atol=0.015)


def test_keys_and_values_are_uniform_and_independent_of_their_place():
    inputs, _ = mqar(3, 0, batch=6000, length=16, pairs=3, vocab=10)
    for place in range(3):
        np.testing.assert_allclose(np.bincount(inputs[:, 2 * place], minlength=5)[1:5] / 6000, 1 / 4, atol=0.03)
        np.testing.assert_allclose(np.bincount(inputs[:, 2 * place + 1], minlength=10)[5:] / 6000, 1 / 5, atol=0.03)


def test_a_batch_is_a_function_of_seed_and_index():
    def batch(seed, index):
        return mqar(seed, index, batch=4, length=64, pairs=4)[0].tolist()

    assert batch(0, 7) == batch(0, 7)
    assert batch(0, 7) != batch(0, 8) and batch(0, 7) != batch(1, 7) and batch(0, 7) != batch(7, 0)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"length": 63}, "length must be even and at least 4 . pairs = 16, got 63"),
        ({"length": 14}, "length must be even and at least 4 . pairs = 16, got 14"),
        ({"pairs": 0}, "pairs is 0; give a whole number of at least 1"),
        ({"batch": 0}, "batch is 0; give a whole number of at least 1"),
        ({"vocab": 9}, "4 pairs need a vocabulary of at least 10 ids, got 9"),
        ({"seed": -1}, "seed is -1; give a whole number of at least 0"),
        ({"index": -1}, "index is -1; give a whole number of at least 0"),
        ({"power_a": 0.0}, "power_a must be positive"),
        ({"power_a": float("nan")}, "power_a must be positive"),
    ],
)
def test_impossible_tasks_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        mqar(**({"seed": 0, "index": 0, "batch": 8, "length": 64, "pairs": 4} | wrong))
