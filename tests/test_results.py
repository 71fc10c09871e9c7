"""What experiments write down and count."""

import jax
import jax.numpy as jnp

from experiments import benchmark
from experiments.recall import append
from hope_jax.memory.triangular import solve_unit_lower


def test_operations_counts_a_triangular_solve_as_the_one_product_that_runs():
    solve = jax.make_jaxpr(lambda lower, right, inverse: solve_unit_lower(lower, right, inverse))
    square = jnp.ones((4, 4))
    assert benchmark.operations(solve(square, square, square).jaxpr) == 2 * 4**3


def test_a_row_after_one_that_a_kill_cut_is_a_line_of_its_own(tmp_path):
    (path := tmp_path / "x.jsonl").write_text('{"cut": ')
    append(path, {"step": 1})
    append(path, {"step": 2})
    assert path.read_text().splitlines()[1:] == ['{"step": 1}', '{"step": 2}']
