"""Two domains in sequence, tiny: equal parameters, levels that move when they say, table and plot from the file."""

import dataclasses
import json
import math
from typing import Any

import jax
import numpy as np
import pytest
from test_cli import mistake

from experiments import domains
from experiments.__main__ import main
from experiments.two_texts import Learner
from hope_jax import LanguageModel
from hope_jax import train as training
from hope_jax.cli import plots
from hope_jax.cli.results import Results
from hope_jax.data import DataConfig, make_tokenizer, open_text
from hope_jax.errors import UserError
from hope_jax.nn.feed_forward.cms import CMSConfig
from hope_jax.train.optimizer import OptimizerConfig

SMALL = {"width": 16, "layers": 1, "heads": 2, "length": 16, "batch": 2, "steps": 4, "every": (2,), "eval_batches": 1}
SMALL |= {"rows": ("levels_1",)}
FLAGS = "--width 16 --layers 1 --heads 2 --length 16 --batch 2 --steps 4 --every 2 --eval-batches 1 --eval-every 2"
RUN = f"{FLAGS} --results r --cache c --optimizer.warmup 1 --first.path a.txt --second.path b.txt".split()


def write_texts(folder):
    """Two short texts, a.txt and b.txt."""
    (folder / "a.txt").write_text("for i in range(10): print(i)\n" * 200)
    (folder / "b.txt").write_text("The cat sat on the mat, and slept. " * 200)


@pytest.fixture(autouse=True)
def texts(monkeypatch, tmp_path):
    """The texts in the folder where the test runs."""
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The texts learned by a tiny model with one slow level that moves every second batch."""
    write_texts(folder := tmp_path_factory.mktemp("texts"))
    first, second = (DataConfig(path=(str(folder / name),)) for name in ("a.txt", "b.txt"))
    optimizer = OptimizerConfig(warmup=1, final_fraction=1.0)
    return domains.DomainsConfig(**SMALL, first=first, second=second, cache=folder / "cache", optimizer=optimizer)


@pytest.fixture(scope="module")
def learner(config):
    """The programs of that model."""
    tokenizer = make_tokenizer(config.first)
    both = (config.first, config.second)
    texts = [open_text(one, tokenizer, length=config.length, cache_dir=config.cache / "data") for one in both]
    return Learner(config, config.model(1, tokenizer.vocab_size), tokenizer, texts)


def line(row="levels_0", rate=1.0, seed=0, *, first=4.0, second=3.0, setting=()):
    """A JSON line of a run whose loss on the first text was 2 at the switch."""
    same = {"steps": 1, "batch": 2, "length": 8, "first": "abc", **dict(setting)}
    bits = {"first_before": 2.0, "first": first, "forgotten": first - 2.0, "second": second}
    curve = [[0, 8.0, 8.0], [1, 2.0, 5.0], [2, first, second]]
    return {"row": row, "second_rate": rate, "seed": seed, "setting": same, "curve": curve, **bits}


def test_all_rows_have_the_same_parameters_within_one_percent(key):
    config = domains.DomainsConfig()
    counts = []
    for slow in range(4):
        model = LanguageModel(config.model(slow))
        counts.append(training.count_parameters(jax.eval_shape(model.init, key, np.zeros((1, 1), np.int32))))
    assert max(counts) < 1.01 * min(counts) and len(set(counts)) > 1


def test_the_architecture_may_tell_its_period():
    mixer: Any = domains.DomainsConfig(architecture="hope@64").model(1).mixer
    assert mixer.c_memory == 64


def test_slow_levels_have_the_periods_of_every_in_batches():
    config = domains.DomainsConfig()
    rows = [config.model(slow).update_every(config.batch * config.length) for slow in range(4)]
    assert [list(row.values()) for row in rows] == [[1, 1], [1, 1, 4], [1, 1, 4, 16], [1, 1, 4, 16, 64]]
    parts = [config.model(slow).feed_forward for slow in range(4)]
    features = [len(part.levels) * part.hidden for part in parts if isinstance(part, CMSConfig)]
    assert features == [320, 320, 3 * 107, 320]  # the same up to rounding


TOGETHER = pytest.param(False, [True] * 4, marks=pytest.mark.slow)


@pytest.mark.parametrize("periods, moves", [(True, [False, True, False, True]), TOGETHER])
def test_a_slow_level_moves_only_once_per_period_unless_all_move_together(learner, periods, moves):
    state = learner.setups[periods].start(0)
    for number, expected in enumerate(moves):
        before = jax.device_get(state.params)
        state, _ = learner.setups[periods].step(state, batch(number))
        moved = jax.tree.map(lambda x, y: bool((x != y).any()), before, jax.device_get(state.params))
        blocks = moved["blocks"]["feed_forward"]
        assert blocks["level_1"]["up"]["kernel"] == blocks["level_1"]["down"]["kernel"] == expected
        assert blocks["level_0"]["up"]["kernel"] and moved["embedding"]


def batch(seed):
    """A batch of random bytes for the tiny model."""
    return np.random.default_rng(seed).integers(0, 256, (SMALL["batch"], SMALL["length"] + 1)).astype(np.int32)


def test_what_each_part_forgets_is_measured_with_the_others_set_back(learner):
    first = learner.first(0, True, None)
    second = learner.second(first, 0, True, 1.0, None)
    alone = learner.parts(first.params, second.params)["alone"]
    assert set(alone) == {"embedding", "mixer", "level_0", "level_1"}
    mixed = {**first.params, "embedding": second.params["embedding"]}
    measured = learner.setups[True].evaluator(learner._heldout)(mixed)
    assert alone["embedding"] == pytest.approx(measured["first/bits_per_byte"])
    before = second.heldout[0]["first/bits_per_byte"]
    assert len({*alone.values(), before}) == 5, "every part was moved, and makes a difference"


def test_a_lower_rate_on_the_second_text_scales_every_step(learner):
    went, setup = {}, learner.setups[True]
    for rate in (1.0, 0.25):
        state = setup.start(0)
        before = jax.device_get(jax.tree.leaves(state.params))
        after = setup.step(training.at_rate(state, rate), batch(0))[0].params
        pairs = zip(before, jax.device_get(jax.tree.leaves(after)), strict=True)
        went[rate] = np.concatenate([(y - x).ravel() for x, y in pairs])
    np.testing.assert_allclose(went[0.25], went[1.0] / 4, atol=1e-6)
    assert np.abs(went[1.0]).max() > 1e-3


@pytest.mark.slow
def test_every_row_learns_both_texts_from_the_same_state_at_the_switch(config, tmp_path, monkeypatch):
    rows = ("levels_1", "together_1", "later_1")
    config = dataclasses.replace(config, steps=32, rows=rows, second_rates=(1.0, 0.1), seeds=(0,), eval_every=16)
    results = Results(tmp_path / "r", "domains", tmp_path / "c", domains.NEEDED)
    lines = domains.domains(config, results)
    assert [(one["row"], one["second_rate"]) for one in lines] == [(row, rate) for row in rows for rate in (1.0, 0.1)]
    assert [[done for done, *_ in one["curve"]] for one in lines] == [[0, 16, 32, 48, 64]] * 6
    switch = [one["curve"][:3] for one in lines]
    assert switch[0] == switch[1] and switch[2] == switch[3] == switch[4] == switch[5] != switch[0]
    for one in lines:
        start, before, end = (one["curve"][i][1:] for i in (0, 2, 4))
        assert before[0] < start[0] and end[1] < before[1], "each text is learned in its turn"
        assert (one["first_before"], one["first"], one["second"]) == (before[0], *end)
        assert one["forgotten"] == end[0] - before[0]
    fast = lines[0]["moved"]
    assert fast["level_1"] < fast["level_0"] and lines[1]["moved"]["level_0"] < fast["level_0"]
    assert lines[2]["moved"]["level_1"] > lines[4]["moved"]["level_1"]
    monkeypatch.setattr(training, "fit", lambda *_, **__: pytest.fail("trained again"))
    assert domains.domains(config, results) == json.loads(json.dumps(lines))


@pytest.mark.slow
def test_the_command_leaves_lines_a_table_and_a_plot_and_later_prints_them_again(tmp_path, capsys, monkeypatch):
    assert main(["domains", *RUN, "--rows", "levels_0", "levels_1", "--seeds", "0", "1", "--second-rates", "1"]) == 0
    printed = capsys.readouterr().out
    lines = [json.loads(text) for text in (tmp_path / "r" / "domains.jsonl").read_text().splitlines()]
    assert [(one["row"], one["seed"]) for one in lines] == [(f"levels_{k}", seed) for seed in (0, 1) for k in (0, 1)]
    assert len({json.dumps(one["setting"]) for one in lines}) == 1
    assert (tmp_path / "r" / "domains.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr(domains, "domains", lambda *_: pytest.fail("It trained."))
    assert main(["domains", "--table", "--results", "r"]) == 0
    assert capsys.readouterr().out == printed
    assert printed.splitlines()[2].split()[:2] == ["levels_0", "1"]


def test_the_table_is_mean_and_sample_deviation_and_a_run_done_again_replaces_the_former_one():
    lines = [line(first=9.0), line(first=4.0), line(first=5.0, seed=1)]
    (_, _, row) = domains.table(lines)
    assert row.split()[-1] == "2"
    numbers = ["2.000 +- 0.000", "4.500 +- 0.707", "2.500 +- 0.707", "3.000 +- 0.000", "0.000 +- 0.000"]
    assert " ".join(row.split()) == " ".join(["levels_0", "1", *numbers, "2"])


def test_forgetting_is_compared_where_levels_0_of_the_same_seed_learned_as_much():
    mine = line("levels_1", first=3.5, second=3.25)
    half = [line(rate=1.0, first=5.0, second=3.0), line(rate=0.1, first=3.0, second=4.0)]  # 2.5 forgotten at 3.25
    ((_, runs),) = domains.grouped([mine, *half])
    assert domains.more(mine, runs) == pytest.approx(1.5 - 2.5)
    assert math.isnan(domains.more(mine | {"second": 4.5}, runs)) and math.isnan(domains.more(mine | {"seed": 1}, runs))
    assert domains.table([mine | {"second": 4.5}, *half])[2].split()[-2:] == ["-", "1"]


@pytest.mark.parametrize("other", [{"length": 9}, {"first": "another"}, {"optimizer.method.b1": 0.5}], ids=str)
def test_other_settings_have_a_table_of_their_own_and_the_last_one_is_drawn(other, tmp_path, monkeypatch):
    lines = [line(first=3.0), line(first=7.0, seed=1, setting=other)]
    table = domains.table(lines)
    assert len(table) == 6 and all(f"{name} {value}" in table[3] for name, value in other.items())
    drawn = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda figure, *_, **__: drawn.extend(figure.axes))
    domains.draw(domains.DomainsConfig(results=tmp_path), lines)
    first, second, trade = ([list(map(float, one.get_ydata())) for one in ax.lines] for ax in drawn)
    assert first == [[2.0, 7.0]] * 2 and second == [[5.0, 3.0]] * 2 and trade == [[5.0]] * 2


def test_the_plot_has_a_curve_per_row_at_its_highest_rate_and_a_line_through_its_rates(tmp_path, monkeypatch):
    rows = [
        line(row, rate, seed, first=3 + rate + seed)
        for row in ("levels_0", "levels_1")
        for rate in (0.5, 1.0)
        for seed in (0, 1)
    ]
    drawn = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda figure, *_, **__: drawn.extend(figure.axes))
    domains.draw(domains.DomainsConfig(results=tmp_path), rows)
    means = {one.get_label(): list(one.get_ydata()) for one in drawn[0].lines if not one.get_label().startswith("_")}
    assert means == {"levels_0": [2.0, 4.5], "levels_1": [2.0, 4.5]}
    assert list(drawn[0].lines[0].get_xdata()) == [16, 32], "tokens"
    assert list(drawn[2].lines[0].get_ydata()) == [2.0, 2.5]


@pytest.mark.parametrize(
    "flags, expected",
    [
        ([], "The second text has no default; give files of prose"),
        (["--rows", "levels_4"], "No row of --every (4, 16, 64) is called 'levels_4'; did you mean 'levels_"),
        (["--rows", "level"], "No row of --every (4, 16, 64) is called 'level'"),
        (["--every", "4", "16", "--rows", "levels_3"], "No row of --every (4, 16) is called 'levels_3'; did you mean"),
        (["--every", "1", "4", "16"], "--every must ascend from 2 and divide --steps, got (1, 4, 16) for 448."),
        (["--every", "16", "4", "64"], "--every must ascend from 2 and divide --steps"),
        (["--steps", "100"], "--every must ascend from 2 and divide --steps, got (4, 16, 64) for 100."),
        (["--second-rates", "0"], "--second-rates must be greater than 0, got (0.0,)."),
        (["--second-rates"], "Give at least one of each: --rows, --seeds, --second-rates"),
        (["--seeds", "-1"], "seed is -1; give a whole number of at least 0"),
        (["--eval-every", "0"], "--eval-every must be at least 1, got 0."),
        (["--architecture", "transformer_pp"], "transformer_pp has no continuum memory system; take hope, hope"),
        (["--architecture", "hop"], "No architecture is called 'hop'; did you mean 'hope'"),
        (["--first.tokenizer", "x.json"], "--first.tokenizer and --second.tokenizer must be the same"),
        (["--first.path", "nowhere.txt", "--second.path", "b.txt"], "nowhere.txt"),
        (["--table", "--results", "nowhere"], "There is nothing in nowhere/domains.jsonl"),
    ],
    ids=str,
)
def test_a_mistake_is_one_sentence(flags, expected, capfd):
    assert expected in mistake(capfd, ["domains", *flags])


def test_a_damaged_line_and_a_loss_that_diverges_are_told(tmp_path, capfd, monkeypatch):
    no_number = {"first/loss": math.nan, "first/bits_per_byte": math.nan}
    monkeypatch.setattr(training.Setup, "evaluator", lambda *_: lambda params: no_number)
    said = mistake(capfd, ["domains", *RUN, "--rows", "levels_0"])
    assert "the held-out first/loss became nan" in said and "lower --optimizer.learning-rate" in said
    (tmp_path / "r" / "domains.jsonl").write_text('{"row": "levels_0"}\n')
    assert "Line 1 of r/domains.jsonl has no second_rate" in mistake(capfd, ["domains", *RUN, "--rows", "levels_0"])
    with pytest.raises(UserError, match="There is no|nothing"):
        domains.main(["--table", "--results", "elsewhere"])
