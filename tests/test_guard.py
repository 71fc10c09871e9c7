"""Steps that are not taken: what they change, what is counted, when the run stops."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_fit import HELDOUT, SETUP, LineConfig, fit, points

from hope_jax import train as training
from hope_jax.train.guard import is_sound, usual_norm


def spoiled(add, at):
    """The batches, with so much added to the values of those whose number is in ``at``."""

    def make(index):
        x, y = points(index)
        return x, y + np.float32(add) if index in at else y

    return training.ComputedBatches(make)


def test_steps_without_numbers_change_nothing_and_when_they_go_on_the_last_good_state_is_saved(tmp_path):
    steps = training.Steps(30, eval_every=10, save_every=5, most_skipped=3)
    batches, run = spoiled(np.nan, {5, *range(22, 30)}), training.Run(tmp_path / "run", LineConfig())
    with training.open_run(run.folder):
        with pytest.raises(training.Diverged, match=r"step 27: the last 5 steps were skipped.*since step 22") as caught:
            training.fit(SETUP, batches, HELDOUT, steps, run=run)
        saved = training.restore(run.folder, 27, SETUP.shapes())
    assert list(caught.value.heldout) == [0, 10, 20] and training.saved_steps(run.folder)[-1] == 27
    good = fit(total=21, batches=training.ComputedBatches(lambda index: points(index + (index >= 5))))
    for left, right in ((saved.params, good.params), (saved.opt_state, good.state.opt_state)):
        jax.tree.map(np.testing.assert_array_equal, left, right)


def test_a_rise_that_lasts_becomes_usual_and_the_first_norm_is_forgotten():
    usual, norms = jnp.float32(0), [10.0] + 100 * [1.0] + 100 * [50.0] + [math.nan]
    taken = []
    for norm in map(jnp.float32, norms):
        taken.append(bool(is_sound(norm, norm, usual, 3.0)))
        usual = usual_norm(usual, norm, 3.0)
        if len(taken) == 101:
            assert usual < 1.1
    assert not any(taken[101:120]) and all(taken[160:201]) and not taken[201] and 45 < usual <= 50


def falling(count):
    """A learning rate that is another one for every batch."""
    return 0.1 / (1 + count)


def test_a_gradient_far_longer_than_usual_is_skipped_and_the_schedule_waits_also_in_a_run_that_goes_on(tmp_path):
    plain = dataclasses.replace(SETUP, tx=optax.adam(falling), rate=falling)
    run = training.Run(tmp_path / "run", LineConfig())
    with training.open_run(run.folder) as folder:
        for total, spike in ((5, None), (9, 20.0), (20, 20.0)):  # each goes on from the one before
            setup = dataclasses.replace(plain, spike=spike)
            found = training.fit(setup, spoiled(1e4, {8, 14}), HELDOUT, training.Steps(total), run=run)
    rows = [row for row in training.read_rows(folder / "metrics.jsonl") if row["split"] == "train"]
    norms, usual = [row["gradient_norm"] for row in rows], 0.0
    for at, norm in enumerate(norms):
        assert rows[at]["skipped"] == (usual > 0 and norm > 20 * usual) == (at in (8, 14))
        assert rows[at]["learning_rate"] == pytest.approx(falling(at - (at > 8) - (at > 14)))
        usual = norm if usual == 0 else 0.95 * usual + 0.05 * min(norm, 20 * usual)
    assert float(found.state.usual_norm) == pytest.approx(usual, rel=1e-5) and int(found.state.skipped) == 2
    assert training.read_manifest(folder, 20).about["learning_rate"] == pytest.approx(falling(18))
    clean = (index for index in range(20) if index not in (8, 14))
    good = fit(total=18, setup=plain, batches=training.ComputedBatches(lambda _: points(next(clean))))
    np.testing.assert_allclose(found.params["slope"], good.params["slope"], rtol=1e-6)
