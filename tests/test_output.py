"""What a command owes its surroundings: any encoding of the terminal, signals while it prepares, a closed output."""

import io
import os
import signal
import sys
from types import SimpleNamespace

import pytest

from hope_jax.cli.main import run, say
from hope_jax.errors import Stopped

pytestmark = pytest.mark.usefixtures("heard")


@pytest.fixture
def command(monkeypatch):
    """``command(work)``: the exit status of a program whose one command does ``work``."""

    def start(work, *flags):
        monkeypatch.setitem(sys.modules, "commands_of_this_test", SimpleNamespace(main=work))
        return run("program", "command", {"go": "commands_of_this_test:main"}, "train", ["go", *flags])

    return start


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_text_that_a_terminal_cannot_show_is_replaced_and_the_command_is_done(command, monkeypatch, encoding):
    """Also half a character and the bytes of a file name that are not UTF-8."""
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding=encoding))
    assert command(lambda flags: say("Zwölf 日本 \ufffd \udcff")) == 0
    shown = raw.getvalue().decode(encoding)
    assert shown.startswith("Zw") and shown.endswith("?\n") and ("日本" in shown) == (encoding == "utf-8")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_before_training_cleans_up_as_ctrl_c_does_and_has_its_own_status(command, tmp_path, number, status):
    unfinished = tmp_path / "unfinished"

    def prepare(flags):
        unfinished.mkdir()
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        finally:
            unfinished.rmdir()

    before = signal.getsignal(number)
    assert command(prepare) == status
    assert not unfinished.exists() and signal.getsignal(number) is before


def test_a_signal_that_nohup_ignores_stays_ignored(command):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert command(lambda flags: signal.raise_signal(signal.SIGHUP)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_work_that_was_stopped_says_how_to_go_on(command, capsys):
    def stop(flags):
        raise Stopped("Stopped at step 3.", signal.SIGTERM)

    assert command(stop, "--run", "a b", "--resume-from", "2") == 143
    said = capsys.readouterr().out
    assert "Stopped at step 3. To go on:" in said and said.strip().endswith("-m program go --run 'a b'")


class Closed(io.TextIOBase):
    """A pipe without a reader."""

    def __init__(self, descriptor):
        self._descriptor = descriptor

    def write(self, text):
        raise BrokenPipeError

    def fileno(self):
        return self._descriptor


def test_a_closed_output_is_no_mistake_of_finished_work_and_ends_other_work(command, monkeypatch, tmp_path):
    with (tmp_path / "pipe").open("wb") as file:
        monkeypatch.setattr("sys.stdout", Closed(file.fileno()))
        assert command(lambda flags: say("written: x")) == 0
        assert command(lambda flags: sys.stdout.write("line 1")) == 141
