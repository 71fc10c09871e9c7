"""Commands for models of your own: train, teach, ask, watch, measure. ``python -m hope_jax`` lists them.

Each command is a file here and a row of ``COMMANDS``. Read ``pretrain.py`` next.
"""

COMMANDS = {
    "pretrain": "hope_jax.cli.pretrain:main",
    "learn": "hope_jax.cli.learn:main",
    "ask": "hope_jax.cli.ask:main",
    "watch": "hope_jax.cli.watch:main",
    "benchmark": "hope_jax.cli.benchmark:main",
    "kernels": "hope_jax.cli.kernels:main",
    "compile": "hope_jax.cli.compile:main",
    "tokenize": "hope_jax.cli.tokenize:main",
    "checkpoint": "hope_jax.cli.checkpoint:main",
}
"""Name -> ``module:function``; the function takes the arguments after the name and returns the exit status."""
