"""Memory or time: what the backward pass keeps, and what it computes a second time. Numbers change by rounding alone.

The memories always compute their chunks a second time (``levels.scan_levels``). Beyond that there are two choices::

    remat = "block"    of every block its input is kept; memory for one block at a time (``LanguageModel.remat``)
    remat_every = N    of every N tokens the state before them is kept; memory for N tokens (``step.next_token_loss``)

Neither is part of what a run is: a run may go on with other ones.
"""

from typing import Literal

import jax

from hope_jax.errors import check_word

Remat = Literal["auto", "none", "block"]
"""auto: "block" on an accelerator where there is no ``remat_every``, else "none"."""


def keeps_block_inputs(remat: Remat, remat_every: int | None, platform: str | None = None) -> bool:
    """Whether of every block the input alone is kept. Raises UserError for an unknown word.

    ``platform``: of the devices that train, as JAX calls it; None: this machine's.
    """
    check_word("remat", remat, Remat)
    platform = jax.default_backend() if platform is None else platform
    return remat == "block" or (remat == "auto" and remat_every is None and platform != "cpu")
