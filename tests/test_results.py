"""What experiments write down and count."""

import fcntl
import math
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hope_jax import train as training
from hope_jax.cli.results import Results, aligned, append, heading, open_results, settings, spread
from hope_jax.errors import UserError

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


def test_a_run_that_cannot_be_kept_names_the_flag_of_its_folder(tmp_path):
    (tmp_path / "taken").write_text("a file, not a folder")
    results = Results(tmp_path, "x", tmp_path / "taken")
    with pytest.raises(UserError, match="taken/.* cannot be written .*; choose another --cache"):
        results.complete({"seed": 0}, lambda run: {})


def test_what_several_results_share_is_trained_when_it_is_first_needed_and_kept_until_all_are_on_file(tmp_path):
    results, folders = Results(tmp_path, "x", tmp_path / "cache"), []

    def work(run):
        folders.append(run.folder)
        return len(folders)

    with results.shared({"seed": 0}, work) as found:
        assert not folders and found() == found() == 1
        assert folders[0].exists()
    assert not folders[0].exists()
    with pytest.raises(KeyboardInterrupt), results.shared({"seed": 0}, work) as found:
        found()
        raise KeyboardInterrupt
    assert folders[1].exists() and folders[1] == folders[0]
    with results.shared({"seed": 1}, work) as found:
        pass
    assert len(folders) == 2, "nobody needed it"


def test_settings_are_in_the_order_of_their_last_use_and_a_run_done_again_replaces_the_former_one():
    lines = [{"setting": {"b": b, "a": 0}, "row": row, "seed": 0, "n": n} for n, (b, row) in enumerate(USED)]
    (first, of_first), (last, of_last) = settings(lines, lambda line: line["row"])
    assert (heading(first), heading(last)) == ("b 2, a 0", "b 1, a 0")
    assert {row: of_seed[0]["n"] for row, of_seed in of_first.items()} == {"x": 1}
    assert {row: of_seed[0]["n"] for row, of_seed in of_last.items()} == {"x": 3, "y": 2}


USED = ((1, "x"), (2, "x"), (1, "y"), (1, "x"))


def test_numbers_over_seeds_and_tables_as_text():
    assert spread([0.5, 0.7], ".1%") == "60.0% +- 14.1%"
    assert spread([2.0]) == "2.000" and spread([1.0, math.nan]) == spread([]) == "-"
    assert aligned([("row", "rate"), ("a", 0.25)]) == ["row  rate", "a    0.25"]


def test_what_is_only_read_must_be_there_and_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match="There is nothing in .*r/x.jsonl; run something or name another --results"):
        Results(tmp_path / "r", "x", tmp_path / "cache", only_read=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_reader_of_the_output_that_has_seen_enough_is_no_mistake(tmp_path):
    shutil.copy(Path(__file__).parent.parent / "experiments" / "results" / "knowledge.jsonl", tmp_path)
    command = shlex.join([sys.executable, "-m", "experiments", "knowledge", "--table", "--results", str(tmp_path)])
    script = f"set -o pipefail; {command} | head -1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 141 and done.stdout.startswith("periods") and not done.stderr
