"""The whole suite runs offline on eight virtual CPU devices, with strict numerics."""

import os

# Set before jax starts. A test that launches a run inherits these.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def _cache_directory(tmp_path_factory: pytest.TempPathFactory):
    """Caches of base models and of compiled programs live and die with the session."""
    cache = tmp_path_factory.mktemp("cache")
    patch = pytest.MonkeyPatch()
    patch.setenv("JAXALIGN_CACHE", str(cache / "jaxalign"))
    yield
    patch.undo()
