"""The picture experiments' presets at their full size, traced and not run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from experiments import b2_diffurl, pictures
from jaxalign.core import mesh as meshes
from jaxalign.methods import b2_diffurl as method
from jaxalign.ops import diffusion


@pytest.mark.parametrize("arm", list(pictures.ARMS))
def test_a_preset_is_one_program_at_full_size(arm):
    """Shapes fit, and the state goes in as it comes out."""
    config = b2_diffurl.PRESETS["sprites"]()
    world = pictures.make_world(config)
    text, net = networks = pictures.make_networks(world, config.network)
    b2, tokens = pictures.ARMS[arm](config.b2), jnp.asarray(world.train.tokens)
    sampler = diffusion.ddim_sampler(pictures.ALPHAS, b2.steps, eta=b2.eta, prediction="v")

    def start(key):
        base = {"text": text.init(key), "net": net.init(key)}
        context = text.apply(base["text"], tokens)
        target = jnp.asarray(world.train.target)
        task = method.Task(sampler, context, context[0], target, world.reward_params)
        return method.init(b2, base["net"], len(tokens), key, pictures.LORA_RULE), task

    state, task = jax.eval_shape(start, jax.random.key(0))
    lab = pictures.Lab(world, networks, {}, meshes.make_mesh())
    after, log = jax.eval_shape(
        pictures.make_stage(lab, config, b2, None), state, task, jax.random.key(1)
    )
    described = [jax.tree.map(lambda a: (a.shape, a.dtype), s) for s in (state, after)]
    assert described[0] == described[1] and log["reward"].shape == ()
