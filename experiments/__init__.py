"""One file per experiment: its docstring says what it shows, the command, the cost and the number to expect.

``python -m experiments`` lists them, ``python -m experiments NAME --help`` explains every field. A finished run is a
line of ``NAME.jsonl`` in ``--results`` and is not done again; one that was stopped goes on. Tables and figures are made
from the file. A new experiment is a file here and a row in ``EXPERIMENTS``. Read ``recall.py`` next.
"""

EXPERIMENTS = {
    "knowledge": "experiments.knowledge:main",
    "domains": "experiments.domains:main",
    "recall": "experiments.recall:main",
    "compare": "experiments.compare:main",
    "needle": "experiments.needle:main",
    "optimizers_toy": "experiments.optimizers_toy:main",
    "vit_optimizers": "experiments.vit_optimizers:main",
    "context_benchmark": "experiments.context_benchmark:main",
    "optimizer_benchmark": "experiments.optimizer_benchmark:main",
    "kernel_benchmark": "experiments.kernel_benchmark:main",
    "gpu_check": "experiments.gpu_check:main",
}
"""Name -> ``module:function``; the function takes the arguments after the name and returns the exit status."""
