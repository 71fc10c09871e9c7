"""``python -m experiments NAME [FLAGS]``: the experiments of this folder."""

import sys
from collections.abc import Sequence

from experiments import EXPERIMENTS
from hope_jax.cli.main import run


def main(arguments: Sequence[str]) -> int:
    """Run the experiment that ``arguments`` name; returns the exit status."""
    return run("experiments", "experiment", EXPERIMENTS, "experiments", arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
