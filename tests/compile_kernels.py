"""Compile the kernels of memories for a TPU that need not be there: launches, loops, temporary memory, seconds.

    pip install 'hope_jax[tpu]'
    python tests/compile_kernels.py                              # one layer of hope-140m, forward and backward, for v5e
    python tests/compile_kernels.py --length 512 --impl chunked  # the same as a loop
    python tests/compile_kernels.py --topology v6e:2x2 --only "of 16"  # those with chunks of 16 tokens for another chip

It prints a line of JSON for each memory. ``test_pallas.py`` runs it where libtpu is installed.
"""

import argparse
import functools
import json
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hope_jax.memory.catalogue import RULES
from hope_jax.nn.mixers.memory import MemoryMixerConfig
from hope_jax.nn.mixers.self_modifying import SelfModifyingConfig
from hope_jax.train.compile import topology


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, number in (("batch", 2), ("length", 2048), ("width", 768), ("heads", 12)):
        parser.add_argument(f"--{name}", type=int, default=number)
    for name, word in (("impl", "pallas"), ("topology", "v5e:2x2"), ("only", "")):
        parser.add_argument(f"--{name}", default=word)
    given = parser.parse_args()
    mixers = {
        **{f"hope, chunks of {c}": SelfModifyingConfig(given.heads, c_memory=c, c_projections=c) for c in (16, 64)},
        "titans, chunks of 16": MemoryMixerConfig(RULES["titans"], given.heads),
    }
    for name, config in mixers.items():
        if given.only not in name:
            continue
        config = type(config)(**{**vars(config), "impl": given.impl})
        row = {"memory": name, "impl": given.impl, "chip": given.topology, **compiled(config, given)}
        print(json.dumps(row), flush=True)


def compiled(config, given):
    """What the compiler says of the gradient of a layer with that mixer."""
    mixer = config.build(given.width, jnp.float32)

    def read(mixer, u):
        return mixer(u, mixer.init_state(*u.shape[:2]))[0]

    u = jax.ShapeDtypeStruct((given.batch, given.length, given.width), jnp.float32)
    params = jax.eval_shape(functools.partial(mixer.init, method=read), jax.random.key(0), u)["params"]

    def loss(params, u):
        return jnp.sum(jnp.square(mixer.apply({"params": params}, u, method=read)))

    mesh = Mesh(np.array(topology(given.topology)[:1]), ("x",))
    place = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (params, u))
    since = time.monotonic()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(jax.grad(loss, (0, 1))).trace(*placed).lower(lowering_platforms=("tpu",))
    program: Any = lowered.compile()
    text = program.as_text()
    return {
        "kernels": len(re.findall('custom_call_target="tpu_custom_call"', text)),
        "loops": len(re.findall(r" while\(", text)),
        "temporary_mb": round(program.memory_analysis().temp_size_in_bytes / 1e6),
        "seconds": round(time.monotonic() - since),
    }


if __name__ == "__main__":
    main()
