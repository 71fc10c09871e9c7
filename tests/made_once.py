"""What is made once: for all the workers of a run, or for all the commands of a file."""

import fcntl
import os


def once(tmp_path_factory, name, make):
    """The folder ``name``, filled by ``make(folder)``: the worker that needs it first does it, others wait for it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            folder.mkdir()
            make(folder)
            (folder / "made").touch()
    return folder


def setups_made_once(make):
    """``text_setup`` whose result, and with it the programs, is the same for the same configuration."""
    setups = {}

    def made(config, steps, byte_lengths, **how):
        key = config, steps, tuple(how.items())
        if key not in setups:
            setups[key] = make(config, steps, byte_lengths, **how)
        return setups[key]

    return made
