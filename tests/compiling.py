"""XLA flags of the tests.

A test runs its programs a few times, so most of its time goes into compiling: these flags ask for code that is quick to
make, not quick to run. Operations and types are the same, and so are the tolerances of the tests.
"""

import importlib.metadata

_QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
_ONE_MODULE = "--xla_cpu_parallel_codegen_split_count=1"
# Newer versions have no other emitters, and a flag that XLA does not know ends the process.
_EMITTERS = "--xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else ""
# Eight simulated devices for the sharding tests. ``pretrain`` takes no more than cores, everything else the first one.
_DEVICES = "--xla_force_host_platform_device_count=8"

FLAGS = f"{_DEVICES} {_QUICK} {_ONE_MODULE} {_EMITTERS}"
"""Value of ``XLA_FLAGS``, to be set before JAX is imported."""
