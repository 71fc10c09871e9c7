"""Models out of run folders and back: one file, a Llama's folder, and what the command says about saved steps."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from llama_folders import CONFIG, LLAMA3, UNTIED, draw, write
from safetensors.numpy import load_file
from trained_run import mistake

from hope_jax import MODELS, interop
from hope_jax import train as training
from hope_jax.cli.main import main
from hope_jax.errors import UserError
from hope_jax.train.run import TOKENIZER, load_run
from hope_jax.train.saving import save_params

ROWS = {
    "tied": {},
    "untied, own keys": UNTIED | {"num_key_value_heads": 4},
    "as Llama 3.1": {"rope_scaling": LLAMA3},
    "all features slower": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
}


@pytest.fixture
def copied(trained, tmp_path):
    """A run folder with the saved steps 2, of parameters alone, and 4, to be changed."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    save_params(run, 2, load_run(trained).params, {"steps": 2, "devices": 1})
    return run


@pytest.fixture
def theirs(tmp_path):
    """An empty folder."""
    (folder := tmp_path / "theirs").mkdir()
    return folder


def test_an_exported_model_is_imported_bit_for_bit_with_its_tokenizer(trained, tmp_path, capfd):
    file, run = tmp_path / "model.safetensors", tmp_path / "copy"
    assert main(["checkpoint", "export", "--run", str(trained), "--file", str(file)]) == 0
    assert main(["checkpoint", "import", "--run", str(run), "--file", str(file)]) == 0
    theirs, ours = load_run(trained), load_run(run)
    assert ours.step == 4 and ours.model.config == theirs.model.config
    assert ours.tokenizer.fingerprint == theirs.tokenizer.fingerprint
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    assert "step 4 of" in capfd.readouterr().out
    with pytest.raises(UserError, match="holds parameters alone, .* can be used, but not trained on"):
        training.restore(run, 4, training.TrainState.first(ours.params, ()))
    assert "is there already" in mistake(capfd, "checkpoint", "export", "--run", trained, "--file", file)
    assert "holds a run already" in mistake(capfd, "checkpoint", "import", "--run", run, "--file", file)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data[:-3], "is damaged"),
        (lambda data: data[:-3] + bytes(3), "is damaged: .* differs from its digest"),
        (lambda data: b"text", "is no exported model"),
    ],
)
def test_a_file_that_is_none_or_altered_is_refused_and_makes_no_run(trained, tmp_path, capfd, change, said):
    file = tmp_path / "model.safetensors"
    assert main(["checkpoint", "export", "--run", str(trained), "--step", "4", "--file", str(file)]) == 0
    file.write_bytes(change(file.read_bytes()))
    run = tmp_path / "copy"
    sentence = mistake(capfd, "checkpoint", "import", "--run", run, "--file", file)
    assert re.search(said, sentence) and not run.exists()


def test_verify_names_damaged_and_unfinished_steps(copied, capfd):
    command = ["checkpoint", "verify", "--run", str(copied)]
    assert main(command) == 0
    assert [line.split(",")[0] for line in capfd.readouterr().out.splitlines()] == ["step 2: good", "step 4: good"]
    shutil.copytree(copied / "checkpoints" / "2", copied / "checkpoints" / "6")
    (copied / "checkpoints" / "6" / "manifest.json").unlink()
    largest = max((copied / "checkpoints" / "4" / "params").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"!")
    assert main(command) == 2
    said = capfd.readouterr().out.splitlines()
    assert said[0].startswith("step 2: good") and said[2] == "step 6: was not finished, and does not count"
    assert "step 4" in said[1] and "is damaged" in said[1] and largest.name in said[1]
    assert main([*command, "--step", "2"]) == 0
    assert load_run(copied).step == 2 and "It is skipped." in capfd.readouterr().err
    with pytest.raises(UserError, match=f"{largest.name} differs .* Give {copied} alone"):
        load_run(copied / "checkpoints" / "4")
    assert "no saved step 3" in mistake(capfd, *command, "--step", "3")


def test_show_prints_steps_model_parameters_and_shapes(copied, capfd):
    assert main(["checkpoint", "show", "--run", str(copied), "--step", "2"]) == 0
    said, params = capfd.readouterr().out, load_run(copied).params
    rows = dict(line.split(maxsplit=1) for line in said.splitlines()[2:-1])
    assert said.splitlines()[0] == "saved steps: 2 4" and said.splitlines()[1].startswith("step 2: steps 2, devices")
    assert rows["params/embedding"] == f"float32{list(params['embedding'].shape)}" and rows["model.width"] == "32"
    assert f"{training.count_parameters(params):,} parameters" in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["export"], "The flag --file is missing: export needs it."),
        (["verify", "--file", "x"], "--file belongs to export and import; leave it out with verify."),
        (["import", "--file", "x", "--llama"], "--llama belongs to export; leave it out with import."),
        (["import", "--file", "x", "--step", "3"], "--step belongs to verify, show and export"),
        (["show"], "There is no saved step in"),
        (["import", "--file", "/does/not/exist"], "cannot be read (No such file or directory)"),
    ],
)
def test_flags_that_do_not_belong_together_are_one_sentence(tmp_path, capfd, flags, said):
    assert said in mistake(capfd, "checkpoint", *flags, "--run", tmp_path / "run")


@pytest.mark.parametrize("changes", ROWS.values(), ids=ROWS)
def test_a_llama_that_is_read_and_written_has_the_tensors_and_sizes_it_had(tmp_path, theirs, changes):
    stored = CONFIG | {"rms_norm_eps": 1e-6} | changes
    tensors = draw(stored, "F32")
    config, params = interop.load_llama(write(theirs, stored, tensors))
    interop.save_llama(tmp_path / "ours", config, params)
    found = load_file(tmp_path / "ours" / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_allclose(found[name], tensor, rtol=3e-7, err_msg=name)
    assert interop.load_llama(tmp_path / "ours")[0] == config
    with pytest.raises(UserError, match="is there already"):
        interop.save_llama(tmp_path / "ours", config, params)


@pytest.mark.parametrize(
    ("name", "said"),
    [("hope-tiny", "has SelfModifyingConfig and CMSConfig; a Llama"), ("transformer_conv-tiny", "a part that a Llama")],
)
def test_a_model_that_is_no_llama_is_not_written_as_one(tmp_path, name, said):
    with pytest.raises(UserError, match=said):
        interop.save_llama(tmp_path / "folder", MODELS[name], {})
    assert not (tmp_path / "folder").exists()


def test_a_folder_of_hugging_face_becomes_a_run_folder(bpe, tmp_path, theirs, capfd):
    stored = CONFIG | {"vocab_size": 400}
    folder = write(theirs, stored, draw(stored, "F32"))
    command = ["checkpoint", "import", "--run", str(tmp_path / "run"), "--file", str(folder)]
    assert "has no tokenizer.json" in mistake(capfd, *command)
    shutil.copyfile(bpe, folder / TOKENIZER)
    assert main(command) == 0
    found, (config, params) = load_run(tmp_path / "run"), interop.load(folder)
    assert found.step == 0 and found.model.config == config
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    back = ["checkpoint", "export", "--run", str(tmp_path / "run"), "--file", str(tmp_path / "back"), "--llama"]
    assert main(back) == 0
    assert (tmp_path / "back" / TOKENIZER).read_bytes() == bpe.read_bytes()
    assert json.loads((tmp_path / "back" / "config.json").read_text())["hidden_size"] == 32
