"""The whole suite runs offline on eight virtual CPU devices, with strict numerics."""

import importlib.metadata
import os

# Set before jax starts. A test that launches a run inherits these.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# Almost all of the time is compilation of small programs that run once: compile with less care.
# Tests that compute a lot use the fixture `optimised`; `=0` in front of pytest is for all of them.
if importlib.metadata.version("jaxlib").startswith("0.10."):  # newer ones do not know it
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
careless = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
jax.config.update("jax_disable_most_optimizations", careless)  # a plugin may have imported jax


@pytest.fixture(scope="session", autouse=True)
def _cache_directory(tmp_path_factory: pytest.TempPathFactory):
    """Caches of base models and of compiled programs live and die with the session."""
    cache = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # one cache for all processes
        cache = cache.parent
    patch = pytest.MonkeyPatch()
    patch.setenv("JAXALIGN_CACHE", str(cache / "jaxalign-cache"))
    # As runs do; and so a program that several tests compile is compiled once.
    jax.config.update("jax_compilation_cache_dir", str(cache / "jaxalign-cache" / "compiled"))
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    patch.undo()


@pytest.fixture(scope="module")
def optimised():
    """Programs compiled from here on are compiled as in runs: for tests that compute a lot."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
