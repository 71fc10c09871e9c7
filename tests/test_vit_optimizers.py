"""The ViT and the race of optimizers on it: images from files, patches, tuning, what is on file is not run again."""

import dataclasses
import functools
import gzip
import io
import json
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorflow_datasets as tfds
from drawn import drawn
from PIL import Image
from tensorflow_datasets.core.utils import file_utils

from experiments import vit_optimizers
from experiments.__main__ import main
from experiments.images import digits, draws, from_tfds, mnist
from experiments.vit import ViT, image_loss, matrices, patches
from hope_jax import train as training
from hope_jax.errors import UserError
from hope_jax.optim import MatrixView, matrix_views

TINY = ["--width", "8", "--layers", "1", "--heads", "2", "--patch", "4"]
SHORT = ["--steps", "4", "--evaluate-every", "2", "--warmup", "1", "--batch", "8"]


def write_idx(path, array):
    """An idx file of bytes, packed if it is called so."""
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    data = head + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def folder(tmp_path):
    """Sixty and twelve images of 4 x 4 pixels in MNIST's form, the training images packed."""
    draw, home = np.random.default_rng(0), tmp_path / "small"
    home.mkdir()
    for part, count, end in (("train", 60, ".gz"), ("t10k", 12, "")):
        write_idx(home / f"{part}-images-idx3-ubyte{end}", draw.integers(0, 256, (count, 4, 4)))
        write_idx(home / f"{part}-labels-idx1-ubyte", np.arange(count) % 3)
    return home


def test_idx_files_come_back_standardised_and_split(folder):
    raw = np.random.default_rng(0).integers(0, 256, (60, 4, 4))
    found = mnist(folder)
    assert (len(found.train.labels), len(found.validation.labels), len(found.test.labels)) == (50, 10, 12)
    both = np.concatenate([found.train.images, found.validation.images])
    np.testing.assert_allclose(np.sort(both, axis=None), np.sort((raw - raw.mean()) / raw.std(), axis=None), rtol=1e-5)
    assert found.classes == 3 and found.test.labels.tolist() == [i % 3 for i in range(12)]


@pytest.mark.parametrize("end", [b"", b"12"], ids=["cut off", "too long"])
def test_a_broken_idx_file_is_named(folder, end):
    path = folder / "t10k-labels-idx1-ubyte"
    path.write_bytes((path.read_bytes()[:-1] if not end else path.read_bytes()) + end)
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte is no idx file of bytes, or it is cut off"):
        mnist(folder)


def test_damaged_packing_is_named(folder):
    plain = folder / "t10k-labels-idx1-ubyte"
    packed = bytearray(gzip.compress(plain.read_bytes()))
    packed[10] = 0xFF  # no such kind of block
    plain.unlink()
    plain.with_name(plain.name + ".gz").write_bytes(packed)
    with pytest.raises(UserError, match="Cannot read .*t10k-labels-idx1-ubyte.gz"):
        mnist(folder)


def test_the_digits_are_all_there_and_no_image_is_in_two_parts():
    found = digits()
    parts = (found.train, found.validation, found.test)
    assert [len(part.labels) for part in parts] == [1199, 239, 359] and found.classes == 10
    distinct = [{image.tobytes() for image in part.images} for part in parts]
    assert not (distinct[0] & distinct[2] or distinct[1] & distinct[2] or distinct[0] & distinct[1])


class TinyShapes(tfds.core.GeneratorBasedBuilder):
    """Twelve coloured images that TFDS knows by name, every other one larger."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(num_classes=2),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "test": self._generate_examples()}

    def _generate_examples(self):
        for i in range(12):
            side, file = 4 + 4 * (i % 2), io.BytesIO()
            Image.fromarray(np.full((side, side, 3), 20 * i, np.uint8)).save(file, "PNG")
            yield i, {"image": io.BytesIO(file.getvalue()), "label": i % 2}


def test_a_tfds_set_is_read_and_resized_and_several_sizes_need_one(tmp_path):
    tfds.core.add_data_dir(tmp_path)
    try:
        TinyShapes(data_dir=tmp_path, file_format="array_record").download_and_prepare()
        with pytest.raises(UserError, match="images of 2 sizes; give one for all with --size"):
            from_tfds("tiny_shapes")
        found = from_tfds("tiny_shapes", size=8)
    finally:
        file_utils.clear_registered_data_dirs()
    assert found.test.images.shape == (12, 8, 8, 3)
    values = np.sort(found.test.images[:, 0, 0, 0])  # TFDS shuffles; the grey of image i is 20 i
    np.testing.assert_allclose(np.diff(values), np.diff(values)[0], rtol=1e-4)


def test_patches_are_squares_in_reading_order():
    images = jnp.arange(2 * 4 * 6, dtype=float).reshape(2, 4, 6, 1)
    cut = patches(images, 2)
    assert cut.shape == (2, 6, 4)
    for n, (row, column) in enumerate(np.ndindex(2, 3)):
        expected = images[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(2, 4)
        np.testing.assert_array_equal(cut[:, n], expected)


def test_patches_that_move_with_their_positions_change_nothing_and_without_them_do():
    model = ViT(classes=3, patch=2, width=8, layers=2, heads=2)
    x = np.random.default_rng(0).normal(size=(5, 6, 4)).astype(np.float32)
    params: Any = drawn(functools.partial(model.init, method=ViT.from_patches), x)
    order = np.array([3, 0, 5, 1, 4, 2])

    @jax.jit
    def read(params, x) -> jax.Array:
        return jnp.asarray(model.apply({"params": params}, x, method=ViT.from_patches))

    moved = params | {"position_embedding": params["position_embedding"][order]}
    np.testing.assert_allclose(read(moved, x[:, order]), read(params, x), atol=1e-5)
    assert jnp.abs(read(params, x[:, order]) - read(params, x)).max() > 1e-3


def test_embeddings_and_head_of_the_vit_are_no_matrices():
    model = ViT(classes=3, patch=2, width=8, layers=1, heads=2)
    params = drawn(model.init, jnp.ones((1, 4, 4, 1)))
    views = matrix_views(params, matrices)
    block = views["block_0"]
    attention = block["MultiHeadDotProductAttention_0"]
    assert block["Dense_0"]["kernel"].matrix_shape == (8, 32)
    assert {attention[name]["kernel"].matrix_shape for name in ("query", "key", "value", "out")} == {(8, 8)}
    assert attention["out"]["kernel"].rows == (0, 1), "heads and their features are the inputs of out"
    assert len([view for view in jax.tree.leaves(views, is_leaf=lambda v: isinstance(v, MatrixView)) if view]) == 6
    assert {views["embed"]["kernel"], views["position_embedding"], views["head"]["kernel"]} == {None}


def test_muon_orthogonalises_what_m3_does_and_with_steps_of_one_size():
    model = ViT(classes=3, patch=2, width=8, layers=1, heads=2)
    params = drawn(model.init, jnp.ones((1, 4, 4, 1)))
    draw = np.random.default_rng(0)
    gradients = jax.tree.map(lambda p: jnp.asarray(draw.normal(size=p.shape), p.dtype), params)
    steps = []
    nadamw = optax.adamw(1.0, weight_decay=1e-4, nesterov=True)
    for tx in (*(vit_optimizers.CONTESTANTS[name].make(1.0) for name in ("muon", "adamuon")), nadamw):
        steps.append(jax.jit(tx.update)(gradients, tx.init(params), params)[0])

    def compare(view, muon, adamuon, nadamw):
        if view is None:  # optax's Muon has Nesterov's form everywhere
            return np.testing.assert_allclose(muon, nadamw, rtol=1e-5, atol=1e-6)
        sizes = [float(jnp.sqrt(jnp.mean(step**2))) for step in (muon, adamuon)]
        np.testing.assert_allclose(sizes, 0.2, rtol=0.2)

    jax.tree.map(compare, matrix_views(params, matrices), *steps, is_leaf=lambda v: v is None)


def race(folder, *more):
    """The command on the small images; what is on file afterwards."""
    flags = [*TINY, *SHORT, "--mnist", str(folder), "--results", str(folder / "results")]
    flags += ["--cache", str(folder / "cache"), *more]
    assert main(["vit_optimizers", *flags]) == 0
    return [json.loads(line) for line in (folder / "results" / "vit_optimizers.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_race_tunes_alike_reports_its_seeds_and_does_not_repeat_itself(folder, capsys):
    rows = race(folder, "--optimizers", "sgd_momentum", "adamw", "--seeds", "0")
    for name in ("sgd_momentum", "adamw"):
        mine = [row for row in rows if row["optimizer"] == name]
        assert [row["phase"] for row in mine] == ["sweep"] * 5 + ["final"]
        assert mine[-1]["learning_rate"] == vit_optimizers.best(mine[:5])["learning_rate"]
        assert mine[0]["test_accuracy"] is None and not mine[0]["curve"]["test_loss"]
        assert len(mine[-1]["curve"]["test_loss"]) == 2 and 0 <= mine[-1]["test_accuracy"] <= 1
    assert (folder / "results" / "vit-optimizers-small.png").stat().st_size > 1000
    assert "adamw" in capsys.readouterr().out
    more = race(folder, "--optimizers", "sgd_momentum", "--seeds", "0", "7")
    assert more[: len(rows)] == rows
    assert [(row["phase"], row["seed"]) for row in more[len(rows) :]] == [("final", 7)]


@pytest.mark.parametrize("name", ["adamw", pytest.param("m3", marks=pytest.mark.slow)])
def test_a_run_is_the_optimizer_step_by_step_on_its_batches(folder, name):
    """The training by hand, with the learning rate in the optimizer instead of a factor in its state."""
    config = vit_optimizers.VitOptimizersConfig(
        patch=4, width=8, layers=1, heads=2, steps=4, evaluate_every=2, warmup=1, batch=8
    )
    images, peak = mnist(folder), optax.warmup_cosine_decay_schedule(0.0, 1.0, 1, 4, 0.01)
    about = {"phase": "sweep", "optimizer": name, "learning_rate": 3e-2, "seed": 1}
    model = ViT(3, 4, 8, 1, 2)
    params: Any = drawn(model.init, images.train.images[:1])
    setup = dataclasses.replace(config.setup(name, images), init=lambda key: params)  # drawing them compiles slowly
    with training.open_run(folder / "run") as place:
        found = vit_optimizers.train(config, images, about, setup, training.Run(place, about))
    tx = vit_optimizers.CONTESTANTS[name].make(lambda count: 3e-2 * peak(count + 1))
    state, batches, losses = tx.init(params), draws(images.train, 1, 8), []

    @jax.jit
    def step(params, state, batch, every):
        slopes = jax.grad(lambda params: image_loss(model)(params, batch)[0])(params)
        updates, state = tx.update(slopes, state, params)
        after = optax.apply_updates(params, updates)
        return after, state, image_loss(model)(after, every)[0]

    for _ in range(4):
        params, state, loss = step(params, state, next(batches), images.train)
        losses.append(float(loss))
    np.testing.assert_allclose(found["curve"]["train_loss"], losses[1::2], atol=1e-5)
    assert found["train_loss"] == found["curve"]["train_loss"][-1] and found["test_loss"] is None


def test_batches_are_drawn_anew_from_the_images_and_again_from_the_same_seed(folder):
    images = mnist(folder).train
    first, second = (next(draws(images, seed, 8)) for seed in (1, 2))
    again = draws(images, 1, 8)
    np.testing.assert_array_equal(next(again).images, first.images)
    assert np.any(next(again).images != first.images) and np.any(second.images != first.images)
    known = {image.tobytes(): label for image, label in zip(*images, strict=True)}
    assert [known[image.tobytes()] for image in first.images] == first.labels.tolist()


def test_a_run_that_diverged_is_never_the_best(folder, monkeypatch):
    def diverge(*_, **__):
        error = training.Diverged("too high")
        error.heldout = {0: {"validation/loss": 1.0}, 2: {"validation/loss": 2.0}}
        raise error

    monkeypatch.setattr(training, "fit", diverge)
    config, images = vit_optimizers.VitOptimizersConfig(patch=4), mnist(folder)
    about = {"phase": "sweep", "optimizer": "adamw", "learning_rate": 1.0, "seed": 0}
    monkeypatch.setattr(training, "at_rate", lambda *_: None)
    setup: Any = SimpleNamespace(start=lambda seed: None)
    bad = vit_optimizers.train(config, images, about, setup, None)
    assert bad["curve"]["validation_loss"] == [2.0, 1e9]
    good = {"validation_accuracy": 0.0, "validation_loss": 1.0}
    assert vit_optimizers.best([bad, good, bad]) is good


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--optimizers", "adamv"], "No optimizer is called 'adamv'; did you mean 'adamw'"),
        (["--mnist", "nowhere"], "There is no train-images-idx3-ubyte or train-images-idx3-ubyte.gz in nowhere"),
        (["--tfds", "mnists"], "TFDS has no dataset 'mnists'"),
        (["--patch", "3"], "--patch must divide the images, got 3 for 8 x 8 pixels"),
        (["--steps", "10"], "--steps 10 must be a multiple of --evaluate-every"),
        (["--seeds", "0", "-1"], "seed is -1; give a whole number of at least 0"),
        (["--size", "8"], "--size, at least 1, goes with --tfds"),
        (["--heads", "3"], "--heads must divide --width, got 3 for 64"),
        (["--batch", "5000"], "--batch is 5000; digits has 1199 training images"),
    ],
    ids=str,
)
def test_a_mistake_is_one_sentence(flags, expected, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["vit_optimizers", *flags]) == 2
    said = capsys.readouterr().err.strip()
    assert expected in said and "\n" not in said
