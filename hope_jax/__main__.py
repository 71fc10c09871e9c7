"""``python -m hope_jax NAME [FLAGS]``: the commands of ``cli/``."""

import sys

from hope_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
