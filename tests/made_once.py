"""What is made once for all the workers of a run."""

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
