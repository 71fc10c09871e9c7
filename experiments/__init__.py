"""One file per experiment: its docstring says what it shows, the command, the cost and the number to expect.

``python -m experiments`` lists them, ``python -m experiments NAME --help`` explains every field. A new experiment is a
file here and a row in ``EXPERIMENTS``. Read ``pretrain.py`` next.
"""

import contextlib
import io
from collections.abc import Sequence
from typing import TypeVar

EXPERIMENTS = {
    "pretrain": "experiments.pretrain:main",
    "recall": "experiments.recall:main",
    "compare": "experiments.compare:main",
    "benchmark": "experiments.benchmark:main",
}
"""Name -> ``module:function``; the function takes the arguments after the name and returns the exit status."""

Config = TypeVar("Config")


def parse(config: type[Config], arguments: Sequence[str], name: str) -> Config:
    """The command line of experiment ``name`` as a ``config``; ``--help`` and unknown flags end the program here.

    Raises:
        UserError: a field's value was refused by the dataclass it belongs to.
    """
    # Here and not above, so that the list of experiments appears at once.
    import tyro

    from hope_jax.errors import UserError

    prog = f"python -m experiments {name}"
    try:  # silently: some versions of tyro print what they refuse even without console outputs
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return tyro.cli(config, args=arguments, prog=prog, console_outputs=False)
    except SystemExit as exit_:
        # tyro frames what a constructor refuses in a box; we want the sentence itself.
        cause: BaseException | None = exit_
        while cause is not None:
            if isinstance(cause, UserError):
                raise cause from None
            cause = cause.__context__
    return tyro.cli(config, args=arguments, prog=prog)
