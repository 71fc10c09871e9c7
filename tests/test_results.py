"""What experiments write down and count."""

import fcntl
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from hope_jax import train as training
from hope_jax.cli import benchmark
from hope_jax.cli.results import append, open_results
from hope_jax.errors import UserError
from hope_jax.memory.kernels import AUTO


def test_operations_counts_a_triangular_solve_as_the_one_product_that_runs():
    square = jnp.ones((4, 4))
    solve = jax.make_jaxpr(AUTO.solve)(square, jnp.ones(4), square, square)
    assert benchmark.operations(solve.jaxpr) == 2 * 4**3


WHOLE, MORE = {"step": 1}, {"step": 2}
ENDS = {
    "no file": (None, []),
    "nothing": ("", []),
    "a line": ('{"step": 1}\n', [WHOLE]),
    "a line without its end": ('{"step": 1}', [WHOLE]),
    "a line and part of one": ('{"step": 1}\n{"step": 7, "cu', [WHOLE]),
    "part of a line": ('{"st', []),
    "part of a letter": (b'{"step": 1}\n{"\xc3', [WHOLE]),
}


@pytest.mark.parametrize("found, kept", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("torn", ["before opening", "between opening and appending"])
def test_results_are_whole_lines_whatever_a_kill_left_at_the_end(tmp_path, found, kept, torn):
    path = tmp_path / "x.jsonl"
    if torn != "before opening":
        open_results(tmp_path, "x.jsonl")
    if found is not None:
        path.write_bytes(found if isinstance(found, bytes) else found.encode())
    if torn == "before opening":
        assert open_results(tmp_path, "x.jsonl") == path
    assert training.read_rows(path, ("step",)) == kept
    append(path, MORE)
    append(path, WHOLE)
    assert training.read_rows(path, ("step",)) == [*kept, MORE, WHOLE]
    assert path.read_text().endswith("\n")


def test_a_line_that_is_dropped_is_told(tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text('{"step": 1}\n{"step": 2')
    append(tmp_path / "x.jsonl", MORE)
    assert "x.jsonl was cut off and has been removed: b'{\"step\": 2'" in capsys.readouterr().err
    append(tmp_path / "x.jsonl", MORE)
    assert capsys.readouterr().err == ""


def test_a_line_waits_until_the_one_being_written_is_whole(tmp_path):
    """Without the lock the appending thread would take the half line for one left by a kill, and remove it."""
    path = open_results(tmp_path, "x.jsonl")
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write('{"st')
        file.flush()
        other = threading.Thread(target=append, args=(path, MORE), daemon=True)
        other.start()
        other.join(timeout=0.3)
        file.write('ep": 1}\n')
    other.join()
    assert training.read_rows(path, ("step",)) == [WHOLE, MORE]


def test_results_that_cannot_be_written_are_told_in_a_sentence(tmp_path):
    (tmp_path / "taken").write_text("a file, not a folder")
    with pytest.raises(UserError, match="Cannot write .*taken/x.jsonl: .*; choose another --results"):
        open_results(tmp_path / "taken", "x.jsonl")


def test_a_reader_of_the_output_that_has_seen_enough_is_no_mistake(tmp_path):
    shutil.copy(Path(__file__).parent.parent / "experiments" / "results" / "knowledge.jsonl", tmp_path)
    command = shlex.join([sys.executable, "-m", "experiments", "knowledge", "--table", "--results", str(tmp_path)])
    script = f"set -o pipefail; {command} | head -1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 141 and done.stdout.startswith("periods") and not done.stderr
