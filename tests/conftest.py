"""Settings of every test: CPU only, no silent broadcasting between ranks, compiled programs kept between runs.

``x64`` gives a test float64, ``key`` a fixed random key. Shapes in signatures are checked (see ``setup.cfg``).
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Eight simulated devices for the sharding tests; everything else runs on the first one.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest


def pytest_configure(config):
    """JAX settings of the whole run."""
    jax.config.update("jax_numpy_rank_promotion", "raise")
    # One folder per worker: JAX does not write cache entries atomically.
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    jax.config.update("jax_compilation_cache_dir", str(config.rootpath / ".pytest_cache" / "jax" / worker))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture
def x64():
    """float64 inside the test: what is exact on paper must be exact to about 1e-12 here."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def key():
    """The random key of the test."""
    return jax.random.key(0)
