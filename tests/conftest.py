"""The whole suite runs offline on eight virtual CPU devices, with strict numerics."""

import importlib.metadata
import os

# Set before jax starts. A test that launches a run inherits these.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Compiles a third faster to code as fast; newer ones do not know it. Runs go without it.
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def _cache_directory(tmp_path_factory: pytest.TempPathFactory):
    """Caches of base models and of compiled programs live and die with the session."""
    cache = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # one cache for all processes
        cache = cache.parent
    patch = pytest.MonkeyPatch()
    patch.setenv("JAXALIGN_CACHE", str(cache / "jaxalign-cache"))
    yield
    patch.undo()
