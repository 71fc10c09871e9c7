"""The comparison on text: equal tuning on text that is not reported, finished runs, table and curves from the file."""

import math
from pathlib import Path

import pytest
from test_cli import mistake
from test_experiments import lines

from experiments import compare
from experiments.__main__ import main
from hope_jax import train as training
from hope_jax.cli import plots
from hope_jax.cli.results import Results
from hope_jax.data import DataConfig, make_tokenizer, open_text
from hope_jax.errors import UserError
from hope_jax.levels import Level
from hope_jax.models import ARCHITECTURES, MODELS, Size
from hope_jax.train import OptimizerConfig

FLAGS = "--rows deltanet --size nano --seeds 0 --steps 2 --batch 1 --length 32 --eval-batches 1 --data.path a.txt"


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Models that compile in no time, and a text in a folder where results may be left."""
    for name in ("deltanet", "transformer_pp"):
        monkeypatch.setitem(MODELS, f"{name}-nano", ARCHITECTURES[name](Size(16, 1, 2, 256, 32, (Level(32),))))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("".join(f"the cat number {i} sat on the mat. " for i in range(300)))


def configured(**changes):
    """Two rows, two rates and two seeds on a small text."""
    same = {"rows": ("deltanet", "deltanet_without_writes"), "size": "nano", "seeds": (0, 1), "steps": 20, "batch": 2}
    same |= {"length": 32, "eval_every": 10, "eval_batches": 1, "learning_rates": (1e-4, 5e-3), "results": Path("r")}
    same |= {"cache": Path("c"), "optimizer": OptimizerConfig(warmup=2)}
    return compare.CompareConfig(**same | {"data": DataConfig(path=("a.txt",), heldout=0.3)} | changes)


def run(config):
    """The lines on file after that comparison."""
    compare.compare(config, Results(config.results, "compare", config.cache, compare.NEEDED))
    return lines(config.results / "compare.jsonl")


@pytest.mark.slow
def test_every_row_is_tuned_with_the_first_seed_alone_and_no_run_is_done_again(monkeypatch):
    rows = run(configured())
    assert [(row["row"], row["learning_rate"], row["seed"]) for row in rows] == [
        *((row, rate, 0) for row in ("deltanet", "deltanet_without_writes") for rate in (1e-4, 5e-3)),
        *((row, 5e-3, 1) for row in ("deltanet", "deltanet_without_writes")),
    ]
    assert len({(row["parameters"], row["setting"]["fingerprint"]) for row in rows}) == 1
    assert [[tokens for tokens, _ in row["curve"]] for row in rows] == [[0, 10 * 2 * 32, 20 * 2 * 32]] * 6
    assert all(0 < row["bits_per_byte"] < row["start"] and row["tokens_per_second"] > 0 for row in rows)
    # One layer: three tails of 3 x 16 features, a memory of 8 x 8 for each of 2 heads, and the position.
    assert {row["state_bytes"] for row in rows} == {4 * (3 * 3 * 16 + 2 * 8 * 8 + 1)}
    assert all(row["step_bytes"] > 4 * row["parameters"] for row in rows)
    assert all(row["bits_per_byte"] == row["curve"][-1][1] != row["chosen_by"] for row in rows)
    assert len({row["bits_per_byte"] for row in rows}) == 6, "writes, rates and seeds must make a difference"
    monkeypatch.setattr(compare, "train", lambda *_: pytest.fail("trained again"))
    assert run(configured(seeds=(0,))) == rows and run(configured()) == rows
    said = compare.table(rows)
    assert said[1] == "equal tuning: each row was tried at rates 0.0001, 0.005 with one seed, judged on other text"
    assert [line.split()[2] for line in said[3:]] == ["0.005", "0.005"]
    drawn = compare.draw(configured(), rows)
    assert drawn is not None and drawn.read_bytes()[:4] == b"\x89PNG"


def test_the_text_that_chooses_a_rate_is_not_the_text_that_is_reported():
    config = configured()
    text = open_text(config.data, make_tokenizer(config.data), length=32, cache_dir=config.cache)
    choosing, reported = compare.halves(text.heldout_batches(batch=2, limit=4))
    assert len(choosing) == len(reported) == 2
    windows = [{window.tobytes() for batch in part for window in batch} for part in (choosing, reported)]
    assert len(windows[0]) == len(windows[1]) == 4 and not windows[0] & windows[1]
    with pytest.raises(UserError, match="fills one batch, but two are needed"):
        compare.halves(text.heldout_batches(batch=2, limit=1))


def test_a_rate_that_diverges_is_a_line_without_numbers_and_is_never_chosen(monkeypatch):
    fit = training.fit

    def fit_or_diverge(*arguments, label, **options):
        if "rate 0.005" in label:
            error = training.Diverged("too high")
            error.heldout = {0: {"bits_per_byte": 8.0}}
            raise error
        return fit(*arguments, label=label, **options)

    monkeypatch.setattr(compare.training, "fit", fit_or_diverge)
    monkeypatch.setattr(compare, "costs", lambda *_: {})  # compiles the step once more
    low, high = run(configured(rows=("transformer_pp",), seeds=(0,), steps=2))
    assert (high["bits_per_byte"], high["chosen_by"], high["start"], high["curve"]) == (None, None, 8.0, [[0, 8.0]])
    assert low["bits_per_byte"] > 0
    assert compare.table([low, high])[3].split()[2] == "0.0001"
    assert compare.table([high])[3].split()[3] == "-"


def result(bits=2.0, seed=0, rate=1e-3, chosen_by=1.0, *, row="hope", parameters=7, **setting):
    """A JSON line of a comparison."""
    about = {"text": "prose", "fingerprint": "abcdef0123", "size": "tiny", "length": 4, "batch": 2, "steps": 5}
    about |= {"eval_batches": 1, "optimizer.b2": 0.95} | setting
    of_run = {"row": row, "parameters": parameters, "learning_rate": rate, "seed": seed, "chosen_by": chosen_by}
    curve = [[0, 8.0], [40, bits]]
    return {"setting": about, **of_run, "bits_per_byte": bits, "start": 8.0, "tokens_per_second": 100, "curve": curve}


def test_the_table_is_mean_and_sample_deviation_at_the_chosen_rate_and_a_repeated_run_counts_once():
    rows = [result(9.0), result(2.0), result(3.0, seed=1, chosen_by=7.0), result(1.0, rate=2e-3, chosen_by=1.1)]
    _, budget, _, line = compare.table(rows)
    assert line.split() == ["hope", "7", "0.001", "2.5000", "+-", "0.7071", "8.000", "100", "-", "-", "2"]
    assert "0.001, 0.002 with one seed" in budget
    rows.append(result(5.0, row="titans"))
    assert compare.table(rows)[1] == "tuning is not equal yet: hope at 0.001, 0.002; titans at 0.001"
    assert compare.table(rows[-1:])[1] == "no tuning: the learning rate of every row was 0.001"


@pytest.mark.parametrize(
    "changes", [{"fingerprint": "9999"}, {"size": "30m"}, {"optimizer.b2": 0.5}, {"eval_batches": 3}], ids=str
)
def test_other_settings_are_never_averaged_and_their_heading_tells_the_difference(changes):
    table = compare.table([result(1.0), result(3.0, seed=1, **changes)])
    assert [line.split()[3] for line in (table[3], table[7])] == ["1.0000", "3.0000"]
    assert all(f"{name} {value}" in table[4] and f"{name} {value}" not in table[0] for name, value in changes.items())


def test_another_model_of_the_same_name_has_a_line_of_its_own():
    table = compare.table([result(1.0), result(3.0, seed=1, parameters=8)])
    assert [line.split()[1:4:2] for line in table[3:]] == [["7", "1.0000"], ["8", "3.0000"]]


def test_the_curve_is_the_mean_of_the_chosen_rate_of_the_last_setting_of_this_text(monkeypatch):
    rows = [result(7.0, fingerprint="9999"), result(1.0), result(3.0, seed=1), result(9.0, text="code")]
    rows.append(result(8.0, rate=2e-3, chosen_by=2.0))
    drawn = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda figure, *_, **__: drawn.extend(figure.axes[0].lines))
    compare.draw(configured(name="prose", length=4), rows)
    means = {line.get_label(): list(line.get_ydata()) for line in drawn if not line.get_label().startswith("_")}
    assert means == {"hope": [2.0]} and not math.isnan(means["hope"][0])
    assert compare.draw(configured(name="nothing"), rows) is None


@pytest.mark.slow
def test_the_command_compares_and_later_prints_the_table_of_what_is_on_file(capsys, monkeypatch):
    assert main(["compare", *FLAGS.split(), "--learning-rates", "2e-3"]) == 0
    printed = capsys.readouterr().out
    assert "no tuning: the learning rate of every row was 0.002" in printed
    monkeypatch.setattr(compare, "compare", lambda *_: pytest.fail("It trained."))
    assert main(["compare", "--table", "--length", "32"]) == 0
    assert capsys.readouterr().out == printed


def test_mistakes_are_told_in_a_sentence(capfd):
    assert "There is nothing in nowhere/compare.jsonl" in mistake(capfd, ["compare", "--table", "--results", "nowhere"])
    Path("nowhere").mkdir()
    (Path("nowhere") / "compare.jsonl").write_text('{"text": "prose", "step": 3}\n')
    message = mistake(capfd, ["compare", "--table", "--results", "nowhere"])
    assert "Line 1 of nowhere/compare.jsonl has no setting" in message
    with pytest.raises(UserError, match="did you mean 'hope-tiny'"):
        compare.CompareConfig(rows=("hop",))
    with pytest.raises(UserError, match="only memories with a setting rate_max"):
        compare.CompareConfig(rows=("transformer_conv_without_writes",))
