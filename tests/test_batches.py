"""The order of training and held-out batches, and exact resume."""

import json

import numpy as np
import pytest
from corpora import batches, numbered, open_folder, rows

from hope_jax.data import (
    HeldoutBatches,
)
from hope_jax.errors import UserError

# ---------------------------------------------------------------- training order


def test_every_window_is_seen_once_per_epoch_in_a_new_order():
    seen = np.asarray(rows(batches(count=10, batch=3), 20)).reshape(6, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in seen.tolist())
    assert len({tuple(epoch) for epoch in seen.tolist()}) == 6


def test_batches_of_one_see_every_window_once_per_epoch():
    assert sorted(rows(batches(batch=1), 10)) == list(range(10))


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
        ({"batch": 0}, "batch is 0; give a whole number of at least 1"),
        ({"batch": -2}, "batch is -2; give a whole number of at least 1"),
        ({"batch": 11}, "batch of 11 is larger than the 10 windows"),
        ({"batch": 6, "processes": 2}, "batch of 6 is larger than the 5 windows that each of 2 processes"),
        ({"index": 2, "processes": 2}, "process_index must be in"),
        ({"processes": 0}, "process_count is 0; give a whole number of at least 1"),
        ({"seed": -1}, "seed is -1; give a whole number of at least 0"),
        ({"seed": 2**32}, "seed is 4294967296; give a number below 4294967296"),
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
    with pytest.raises(UserError, match="is 0; give a whole number of at least 1"):
        HeldoutBatches(numbered(3), **arguments)
