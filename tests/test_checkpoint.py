"""A checkpoint is whole or not there, comes back bit for bit, and says what is wrong with it when it does not."""

import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from saved_steps import filled, like, make_state

from hope_jax import train as training
from hope_jax.config import check_same, flatten
from hope_jax.errors import UserError
from hope_jax.storage.digests import read_sealed, write_sealed
from hope_jax.train import checkpoint
from hope_jax.train.folder import open_run


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run folder with steps 3 and 6, to be looked at only."""
    return filled(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def run(saved, tmp_path):
    """The same, to be changed."""
    return Path(shutil.copytree(saved, tmp_path, dirs_exist_ok=True))


def files_of(run, step):
    """The files of a step that belong to orbax, largest first."""
    folder = run / "checkpoints" / str(step)
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    return sorted(files, key=lambda path: -path.stat().st_size)


def test_a_state_comes_back_bit_for_bit_with_its_dtypes_and_the_data_position(run):
    saved, loaded = make_state(6), training.restore(run, 6, like(make_state(6)))
    assert jax.tree.structure(saved) == jax.tree.structure(loaded)
    for a, b in zip(jax.tree.leaves(saved), jax.tree.leaves(loaded), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert training.read_manifest(run, 6).data == {"position": 6}


NAMES = ("lr [0.1] a*b a? {a,b} 50%", "back\\slash späß 日本", "new\nline $HOME ~", "bytes \udcff")
"""Of folders, with characters that patterns, shells and encodings know."""


def test_every_path_of_a_run_works(tmp_path):
    for name in NAMES:
        run = tmp_path / name
        with open_run(run):
            training.save(run, make_state(6), {"position": 6}, {}, keep=2)
        found = training.restore(run, 6, like(make_state(6)))
        assert np.asarray(found.params["kernel"]).tobytes() == np.asarray(make_state(6).params["kernel"]).tobytes()
        assert training.saved_steps(run) == [6], name


def test_parameters_are_read_without_the_state_of_the_optimizer(run):
    for path in files_of(run, 6):
        if path.is_relative_to(run / "checkpoints" / "6" / "training"):
            path.unlink()
    found = training.restore_params(run, 6, like(make_state(6)).params)
    for a, b in zip(jax.tree.leaves(make_state(6).params), jax.tree.leaves(found), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    with pytest.raises(training.DamagedCheckpoint):
        training.restore(run, 6, like(make_state(6)))


def test_a_flipped_bit_in_any_file_is_found_and_the_file_named(run):
    for path in files_of(run, 6):
        good = path.read_bytes()
        for place in (0, len(good) // 2, max(0, len(good) - 1)):
            bad = bytearray(good or bytes(1))  # one file is empty
            bad[place] ^= 4
            path.write_bytes(bad)
            with pytest.raises(training.DamagedCheckpoint, match=path.name) as caught:
                training.restore(run, 6, like(make_state(6)))
            assert "step 6" in str(caught.value)
        path.write_bytes(good)
    training.restore(run, 6, like(make_state(6)))


@pytest.mark.parametrize("cut", ["half", "empty", "gone"])
def test_a_truncated_or_missing_file_is_found_and_named(run, cut):
    path = files_of(run, 6)[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if cut == "half" else 0])
    if cut == "gone":
        path.unlink()
    with pytest.raises(training.DamagedCheckpoint, match=f"{path.name}.*{'missing' if cut == 'gone' else 'differs'}"):
        training.restore(run, 6, like(make_state(6)))


def test_a_step_under_another_number_and_a_file_that_cannot_be_read_are_found(run):
    folder = run / "checkpoints"
    shutil.copytree(folder / "3", folder / "9")
    with pytest.raises(training.DamagedCheckpoint, match="step 9.*manifest.json was altered"):
        training.restore(run, 9, like(make_state(9)))
    path = files_of(run, 6)[0]
    path.unlink()
    path.mkdir()  # its bytes cannot be read
    with pytest.raises(training.DamagedCheckpoint, match=path.name):
        training.restore(run, 6, like(make_state(6)))


def test_an_altered_manifest_is_found(run):
    path = run / "checkpoints" / "6" / "manifest.json"
    path.write_text(path.read_text().replace('"position": 6', '"position": 5'))
    with pytest.raises(training.DamagedCheckpoint, match=r"manifest\.json"):
        training.read_manifest(run, 6)


def test_numbers_that_change_between_file_and_memory_are_found_and_the_array_named(run, monkeypatch):
    """What file digests cannot see: a reader that returns something else than was saved."""
    wrong = make_state(6).replace(params=make_state(6, extra=1e-6).params)
    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", lambda folder, like: checkpoint.parted(wrong))
    with pytest.raises(training.DamagedCheckpoint, match="params/kernel differs"):
        training.restore(run, 6, like(make_state(6)))


def test_the_latest_good_step_skips_damaged_ones_and_names_them(run, tmp_path_factory, capfd):
    def read(step):
        return int(training.restore(run, step, like(make_state(6))).step)

    assert checkpoint.latest_good(run, read) == 6
    files_of(run, 6)[0].write_bytes(b"")
    assert checkpoint.latest_good(run, read) == 3
    assert "step 6" in (said := capfd.readouterr().err) and said.endswith("differs from its digest. It is skipped.\n")
    files_of(run, 3)[0].write_bytes(b"")
    with pytest.raises(training.DamagedCheckpoint, match=r"step 3 .* No earlier step is good"):
        checkpoint.latest_good(run, read)
    assert checkpoint.latest_good(tmp_path_factory.mktemp("empty"), read) is None


def test_two_hundred_flipped_bits_and_truncations_are_found_and_none_is_loaded(run):
    draw, shapes, found, loaded = np.random.default_rng(0), like(make_state(6)), 0, []
    files = [path for path in [*files_of(run, 6), run / "checkpoints" / "6" / "manifest.json"] if path.stat().st_size]
    for number in range(200):
        path = files[draw.integers(len(files))]
        good = path.read_bytes()
        bad, place = bytearray(good), int(draw.integers(len(good)))
        bad[place] ^= 1 << int(draw.integers(8))
        path.write_bytes(good[:place] if number % 4 == 0 else bad)
        try:
            loaded.append(training.restore(run, 6, shapes))
        except training.DamagedCheckpoint as error:
            found += path.name in str(error)
        path.write_bytes(good)
    assert (found, loaded) == (200, [])
    checkpoint.check(run, 6)


def test_a_step_of_another_layout_is_refused_and_not_called_damaged(run):
    path = run / "checkpoints" / "6" / "manifest.json"
    body = {name: value for name, value in read_sealed(path).items() if name != "layout"}
    write_sealed(path, body)
    with pytest.raises(UserError, match="step 6 in .* has layout 1; this version of hope_jax reads 3") as caught:
        checkpoint.latest_good(run, lambda step: training.read_manifest(run, step))
    assert not isinstance(caught.value, training.DamagedCheckpoint)


def test_a_step_without_a_manifest_was_never_finished_and_is_moved_aside_not_deleted(run):
    (run / "checkpoints" / "6" / "manifest.json").unlink()
    assert training.saved_steps(run) == [3]
    assert checkpoint.set_aside(run, 3) == [run / "set_aside" / "6"]
    assert any((run / "set_aside" / "6").rglob("*"))


def test_setting_steps_aside_twice_keeps_both(run):
    shutil.copytree(run / "checkpoints" / "6", run / "checkpoints" / "9")
    checkpoint.set_aside(run, 6)
    shutil.copytree(run / "checkpoints" / "6", run / "checkpoints" / "9")
    assert checkpoint.set_aside(run, 6) == [run / "set_aside" / "9-1"]
    assert training.saved_steps(run) == [3, 6]


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda s: s.replace(params=s.params | {"half": s.params["half"].astype(jnp.float32)}),
            r"params/half.*bfloat16\[33\].*float32",
        ),
        (
            lambda s: s.replace(params=s.params | {"kernel": jnp.zeros((64, 32))}),
            r"params/kernel.*\[64, 33\].*\[64, 32\]",
        ),
        (lambda s: s.replace(params=s.params | {"new": jnp.zeros(1)}), "params/new is absent there"),
        (lambda s: s.replace(opt_state=()), "training/opt_state/0 is .* absent here"),
    ],
)
def test_a_state_of_another_model_is_refused_with_the_array_named(run, change, message):
    with pytest.raises(UserError, match=message) as caught:
        training.restore(run, 6, like(change(make_state(6))))
    assert not isinstance(caught.value, training.DamagedCheckpoint)


def test_a_run_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot be written"), open_run(tmp_path / "file"):
        pass
    with pytest.raises(UserError, match="cannot be written"), open_run(tmp_path / "file" / "below"):
        pass
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"), open_run(tmp_path / "run"):
        pass


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"thesis\.tex"), open_run(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_second_process_in_the_same_run_folder_is_refused(tmp_path):
    with open_run(tmp_path), pytest.raises(UserError, match="Another process"), open_run(tmp_path):
        pass
    with open_run(tmp_path):
        pass


def test_configurations_are_compared_field_by_field_with_both_values():
    optimizer = training.OptimizerConfig()
    saved = flatten({"optimizer": optimizer, "batch": 4, "levels": ({"every": 1},)})
    now = saved | {"optimizer.clip": 2.0, "batch": 8, "new": True}
    with pytest.raises(UserError) as caught:
        check_same(saved, now, Path("runs/x"))
    for part in ("batch is 4 there and 8 here", "optimizer.clip is 1.0 there and 2.0 here", "new is absent there"):
        assert part in str(caught.value)
    assert "b1" not in str(caught.value)
    check_same(saved, dict(saved), Path("runs/x"))
