"""Against `generate` of transformers: the same greedy tokens, and the same truncated distributions.

The weights travel through a Hugging Face folder, as in `experiments.bench_decode`.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import bench_decode
from jaxalign.ops.sampling import DROPPED, Sampling, adjust
from jaxalign.rollout.decode import decode

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

SIZES = dict(depth=2, width=32, heads=4, vocabulary=97, rows=3, prompt=7, length=20)
TINY = dataclasses.replace(bench_decode.decode_against_transformers(), **SIZES)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_greedy_tokens_are_those_of_generate(family, tmp_path):
    problem = bench_decode.make_problem(TINY, family)
    # Weights well away from zero, or nearly equal logits would leave the choice to rounding.
    params = jax.tree.map(lambda w: 6 * w if w.ndim > 1 else w, problem.params)
    bench_decode.folders.save(tmp_path / "model", problem.config, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    mask = np.arange(7)[None] >= np.array([[0], [2], [5]])
    ids = np.where(mask, problem.ids, 0)
    how = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=20, pad_token_id=0, eos_token_id=None
    )
    with torch.inference_mode():
        expected = theirs.generate(
            torch.tensor(ids, dtype=torch.long),
            attention_mask=torch.tensor(mask, dtype=torch.long),
            generation_config=how,
        )
    run = functools.partial(
        decode, problem.model, length=20, sampling=Sampling(temperature=0), stop=(), pad=0
    )
    with jax.default_matmul_precision("highest"):
        decoded = jax.jit(run)(params, ids, mask, jax.random.key(0))
    np.testing.assert_array_equal(decoded.ids, expected.numpy())
    assert len(np.unique(decoded.ids[:, 7:])) > 5


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(top_k=5),
        Sampling(top_p=0.8),
        Sampling(temperature=1.4, top_k=20, top_p=0.6),
    ],
    ids=str,
)
def test_the_distribution_is_that_of_their_processors(sampling):
    x = np.random.default_rng(0).normal(size=(50, 97)).astype(np.float32) * 2
    processors = [transformers.TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        processors.append(transformers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(transformers.TopPLogitsWarper(sampling.top_p))
    expected = torch.tensor(x)
    for processor in processors:
        expected = processor(None, expected)
    ours = adjust(jnp.asarray(x), sampling)
    np.testing.assert_array_equal(ours > DROPPED, torch.isfinite(expected).numpy())
    np.testing.assert_allclose(jax.nn.softmax(ours), torch.softmax(expected, -1), atol=1e-6)
