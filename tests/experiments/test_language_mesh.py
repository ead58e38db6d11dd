"""Real language models on a mesh: every network lies by its rules, and numbers stay as they are."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from experiments import language
from experiments import r3hf as presets
from experiments.problems import Source
from jaxalign.core import mesh as meshes
from jaxalign.methods import reward_model, supervised
from jaxalign.models import folders, gpt2, llama
from jaxalign.models.scalar_head import attach_head
from tests.experiments.test_language import write_tokenizer
from tpu import programs

SIZES = {
    "llama": llama.Config(10, 16, 32, 1, 2, 1, 8, 24),
    "gpt2": gpt2.Config(vocabulary=10, width=16, depth=1, heads=2, inner=32, context=24),
}
UPDATES = {"updates": 2, "batch": 8}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Nectar's preset on small folders, of policy and reward model; `(policy, reward="", ...)`."""
    answers = [{"answer": "red sea", "rank": 1.0}, {"answer": "blue", "rank": 2.0}]
    row = {"prompt": "\n\nHuman: name a sea\n\nAssistant: ", "answers": answers}
    root = tmp_path_factory.mktemp("folders")
    (root / "data").mkdir()
    (root / "data" / "train.jsonl").write_text((json.dumps(row) + "\n") * 24)
    for name, sizes in SIZES.items():
        params = folders.build(sizes).init(jax.random.key(0))
        folders.save(root / name, sizes, params)
        scored = attach_head(params, sizes.width, jax.random.key(1))
        folders.save_reward(root / f"reward-{name}", sizes, scored)
        write_tokenizer(root / name)
        write_tokenizer(root / f"reward-{name}")

    def make(policy, reward="", **source):
        given = {"reward_model": str(root / f"reward-{reward}")} if reward else {}
        paths = {"data": str(root / "data"), "model": str(root / policy), **given}
        return dataclasses.replace(
            presets.nectar(),
            source=Source("nectar", prompt=16, response=4, **paths, **source),
            fine_tuning=supervised.Config(**UPDATES),
            reward=reward_model.Config(**UPDATES),
            calibration=reward_model.Config(**UPDATES),
            calibration_responses=16,
            rl=presets.small(iterations=2, rollouts=16, minibatches=1, epochs=1),
            evaluate_every=2,
            evaluated=8,
            stop_when_ill=False,
            mesh="data=2,fsdp=4",
        )

    return make


@pytest.fixture(scope="module")
def mixed(real):
    """A policy like Llama, a reward model like GPT-2, and its calibrated copy."""
    config = dataclasses.replace(real("llama", "gpt2"), arms=("calibrated",))
    return config, language.make_lab(config)


def assert_by_rules(tree, mesh, rules):
    """Every leaf where its rule says, and some of them in parts."""
    where = meshes.shardings(tree, mesh, rules)
    lie = jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), tree, where)
    wrong = [path for path, right in jax.tree_util.tree_leaves_with_path(lie) if not right]
    assert not wrong
    assert any(not a.sharding.is_fully_replicated for a in jax.tree.leaves(tree))


def test_each_network_is_read_to_where_its_own_rules_say(mixed):
    _, lab = mixed
    assert_by_rules(lab.policy, lab.mesh, llama.RULES)
    for params in (lab.reward, lab.calibrated):
        assert_by_rules(params, lab.mesh, gpt2.RULES)
    assert lab.policy["block_0"]["gate"]["kernel"].sharding.spec == P("fsdp", None)
    assert lab.reward["model"]["token"]["embedding"].sharding.spec == P(None, "fsdp")
    task = language.make_task(lab, "calibrated")
    assert_by_rules(task.reward, lab.mesh, gpt2.RULES)
    assert task.prompts.ids.sharding.is_fully_replicated


@pytest.mark.parametrize("policy", SIZES)
def test_no_part_of_the_state_is_made_whole_on_one_device(policy, real):
    config = dataclasses.replace(real(policy, policy), arms=("sparse_reward_critic",))
    lab = language.make_lab(config)
    state = language.start_state(lab, config, "sparse_reward_critic")
    matrices = [a for a in jax.tree.leaves(state) if a.ndim == 2 and a.shape[1] > 1]
    assert len(matrices) > 20 and {len(a.devices()) for a in matrices} == {8}
    where = meshes.shardings(state, lab.mesh, lab.problem.rules)
    moved = [
        a
        for a, there in zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True)
        if a.ndim == 2 and a.shape[1] > 1 and not a.sharding.is_equivalent_to(there, a.ndim)
    ]
    assert not moved


def test_the_plan_is_of_what_the_run_has(mixed):
    config, lab = mixed
    planned = programs.language_lab(config, lab.mesh)
    for name in ("policy", "reward", "calibrated"):
        same = jax.tree.map(
            lambda a, b: (
                (a.shape, a.dtype) == (b.shape, b.dtype)
                and a.sharding.is_equivalent_to(b.sharding, a.ndim)
            ),
            getattr(lab, name),
            getattr(planned, name),
        )
        assert all(jax.tree.leaves(same)), name
    ids, mask = jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool)
    for model in (lab.problem.model, planned.problem.model):
        assert jax.eval_shape(model.hidden, lab.policy, ids, mask).dtype == jnp.bfloat16
        gradient = jax.make_jaxpr(
            jax.grad(lambda p, m=model: m.hidden(p, ids, mask).sum().astype(float))
        )
        assert "remat" in str(gradient(lab.policy)) or "checkpoint" in str(gradient(lab.policy))


def test_a_run_on_a_mesh_has_the_numbers_of_one_device(real, tmp_path, monkeypatch):
    config = dataclasses.replace(
        real("llama", dtype="float32"), arms=("redistributed",), mesh="fsdp=-1"
    )
    found, make_mesh = {}, meshes.make_mesh
    for count in (8, 1):
        monkeypatch.setenv("JAXALIGN_CACHE", str(tmp_path / f"cache-{count}"))
        devices = jax.devices()[:count]
        monkeypatch.setattr(meshes, "make_mesh", lambda sizes, d=devices: make_mesh(sizes, d))
        lab = language.make_lab(config)
        if count == 8:
            assert_by_rules(lab.reward, lab.mesh, llama.RULES)  # trained
        folder = tmp_path / f"run-{count}"
        found[count] = language.train_arm(lab, config, "redistributed", folder, resume=False)
        # Preferences say nothing of the bias: Adam makes whole steps of its gradient's rounding.
        bias = float(lab.reward["head"]["bias"][0])
        moved = {n: found[count][n] - bias for n in ("proxy", "heldout/proxy")}
        found[count] |= {**moved, "seconds": 0.0}
    assert found[8].keys() == found[1].keys() and found[8]["policy_gradient_norm"] > 0
    for name, value in found[1].items():
        np.testing.assert_allclose(found[8][name], value, rtol=2e-4, atol=1e-5, err_msg=name)
