"""20 steps of DDIM through a U-Net with guidance, then decoded: what torch computed."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models import diffusers_folders
from jaxalign.ops import diffusion
from jaxalign.rollout.diffusion import Context, denoise, guided

GOLDEN = Path(__file__).parent / "golden" / "stable_diffusion"


def test_the_end_of_a_trajectory(pipeline):
    """As in tests/parity/test_stable_diffusion_lora.py, where torch was given the same noise."""
    expected = np.load(GOLDEN / "trajectory.npz")
    pipeline("vae_4")
    path = pipeline("unet_1")
    (net, params), (coder, weights) = (
        diffusers_folders.load_unet(path),
        diffusers_folders.load_vae(path),
    )
    sampler = diffusion.ddim_sampler(diffusion.scaled_linear_alphas(), 20)
    context = Context(jnp.asarray(expected["prompt"]), jnp.asarray(expected["null"]))
    predict, x = guided(net.apply, 5.0), jnp.asarray(expected["x"])
    with jax.default_matmul_precision("highest"):
        run = jax.jit(denoise, static_argnums=0)
        last, _, _ = run(predict, params, sampler, x, context, jax.random.key(7))
        pictures = jax.jit(coder.decode)(weights, last)
    for found, name in ((last, "last"), (pictures, "pictures")):
        error = np.abs(found - expected[name]).max() / np.abs(expected[name]).max()
        assert error < 5e-6, name
