"""What layers cost: measured once in each form, compiled for a TPU that is not there, compared with float64."""

import importlib.util
import json

import pytest

from experiments.__main__ import main as experiments
from hope_jax.cli import layer_cost
from hope_jax.cli.kernels import KernelsConfig
from hope_jax.cli.main import main
from hope_jax.errors import UserError


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for a TPU needs libtpu")
def test_a_layer_compiles_for_a_tpu_to_a_kernel_forward_and_a_kernel_backward(tmp_path):
    small = "--memories hope titans --impls pallas --batch 1 --lengths 256 --head-sizes 64 --heads 2"
    assert main(f"kernels {small} --compile-for v5e:2x2 --results {tmp_path}".split()) == 0
    found = [json.loads(line) for line in (tmp_path / "kernels.jsonl").read_text().splitlines()]
    assert [(row["kernels"], row["loop_rounds"]) for row in found] == [(2, 0)] * 4, found


def test_shapes_are_measured_once_and_what_fails_is_told(tmp_path, monkeypatch, capsys):
    small = (
        "--memories titans attention --impls auto chunked --batch 1 --lengths 16 --head-sizes 4 --heads 1 --chunks 8"
    )
    flags = f"kernel_benchmark {small} --repeats 1 --results {tmp_path} --cache {tmp_path}".split()
    compiled = layer_cost._compiled

    def refusing(shape, impl, *more):
        if impl == "chunked":
            raise RuntimeError("refused")
        return compiled(shape, impl, *more)

    monkeypatch.setattr(layer_cost, "_compiled", refusing)
    assert experiments(flags) == 0
    shown = capsys.readouterr().out
    assert "failed: titans 8 (chunked), 1 x 16 tokens, heads of 4: RuntimeError: refused" in shown
    monkeypatch.setattr(layer_cost, "_compiled", None)
    assert experiments(flags) == 0 and capsys.readouterr().out == shown
    lines = [json.loads(line) for line in (tmp_path / "kernel_benchmark.jsonl").read_text().splitlines()]
    assert [(line["memory"], line["chunk"], len(line["rows"])) for line in lines] == [
        ("titans", 8, 2),
        ("attention", None, 1),
    ]
    costs = ("forward_ms", "both_ms", "gflops", "gb_per_second", "launches", "moved_mb")
    assert all(line["rows"][0][name] > 0 for line in lines for name in costs)
    with pytest.raises(UserError, match="--lengths must be multiples of --chunks, got 16 for 12"):
        KernelsConfig(lengths=(16,), chunks=(12,))
