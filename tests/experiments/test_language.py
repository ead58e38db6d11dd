"""The R3HF experiment: its arms, its gate, real preference sets from folders, claims and tables."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import language, problems, r3hf_claims, r3hf_tables
from experiments import r3hf as presets
from experiments.language import ARMS, Health
from experiments.problems import Source
from jaxalign.core import metrics
from jaxalign.core.types import UserError
from jaxalign.models import folders, gpt2
from jaxalign.models.scalar_head import attach_head

TINY = presets.tiny()


@pytest.fixture(scope="module")
def lab():
    return language.make_lab(dataclasses.replace(TINY, arms=tuple(ARMS)))


def test_every_arm_starts_from_the_same_policy(lab):
    for arm in ARMS:
        state = language.start_state(lab, TINY, arm)
        jax.tree.map(np.testing.assert_array_equal, state.params["policy"], lab.policy)
        assert ("critic" in state.params) == (not arm.startswith("rloo"))


def test_critics_start_where_their_arm_says(lab):
    def head(arm):
        return language.start_state(lab, TINY, arm).params["critic"]["head"]["kernel"]

    assert not np.any(head("sparse"))
    np.testing.assert_array_equal(head("sparse_reward_critic"), lab.reward["head"]["kernel"])
    calibrated = lab.calibrated["head"]["kernel"]
    np.testing.assert_array_equal(head("sparse_calibrated_critic"), calibrated)
    assert np.any(calibrated != lab.reward["head"]["kernel"])


def test_rewards_of_two_models_add_up(lab):
    problem = lab.problem._replace(cost_pairs=lab.problem.pairs, cost_weight=-0.5)
    ids, mask = (jnp.asarray(a[:4]) for a in lab.problem.test_pairs.chosen)
    both = problems.combine(problem, lab.scalar.scores)
    seen = both({"reward": lab.reward, "cost": lab.calibrated}, ids, mask)
    reward, cost = (lab.scalar.scores(p, ids, mask) for p in (lab.reward, lab.calibrated))
    np.testing.assert_allclose(seen, 0.5 * (reward - 0.5 * cost), rtol=1e-5)
    assert problems.combine(lab.problem, lab.scalar.scores) is lab.scalar.scores


HEALTHY = {
    "length_growth": 1.0,
    "truncated": 0.0,
    "positive_share": 0.5,
    "entropy_share": 1.0,
    "kl": 1.0,
    "ratio_error": 0.0,
}


def test_an_ill_run_stops_with_the_reason_or_says_it_once(capsys):
    ill = {**HEALTHY, "length_growth": 3.0}
    with pytest.raises(UserError, match=r"iteration 7: length_growth = 3.*--no-stop-when-ill"):
        Health(TINY.rl, stop=True).write(7, ill)
    gate = Health(TINY.rl, stop=False)
    for step in (1, 2):
        gate.write(step, ill)
    gate.write(3, HEALTHY)
    gate.write(0, {"heldout/gold": 1.0})
    assert capsys.readouterr().out.count("length_growth") == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: dataclasses.replace(TINY, arms=("dense",)), "arms: 'dense'"),
        (lambda: presets.nectar(), "--source.data"),
        (lambda: dataclasses.replace(TINY, source=Source(response=4)), "response 4"),
        (lambda: dataclasses.replace(TINY, mesh="data=3"), "mesh data=3"),
        (lambda: dataclasses.replace(TINY, rl=presets.small(rollouts=12)), "rl.rollouts"),
        (lambda: Source(prompts=0), "prompts = 0"),
    ],
)
def test_bad_configurations_are_refused_in_one_line(config, message):
    with pytest.raises(UserError, match=message) as error:
        language.check(config())
    assert "\n" not in str(error.value)


# --- real sets, from folders in their layout ------------------------------------------------------


def write_tokenizer(folder, last="sea"):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", "Human", "Assistant", ":", "name", "red", "blue", last]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **named).save_pretrained(folder)


@pytest.fixture
def real(tmp_path):
    """A small SafeRLHF folder and a small GPT-2 folder, and the preset for them."""
    data, model = tmp_path / "data", tmp_path / "model"
    data.mkdir()
    row = {
        "prompt": "name a sea",
        "response_0": "red sea",
        "response_1": "blue",
        "better_response_id": 0,
        "safer_response_id": 1,
    }
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(24)))
    sizes = gpt2.Config(vocabulary=10, width=16, depth=1, heads=2, inner=32, context=48)
    folders.save(model, sizes, gpt2.gpt2(sizes).init(jax.random.key(0)))
    write_tokenizer(model)
    given = Source("saferlhf", prompt=16, response=8, data=str(data), model=str(model))
    small = {n: getattr(TINY, n) for n in ("fine_tuning", "reward", "evaluated", "rl")}
    return dataclasses.replace(presets.saferlhf(), source=given, stop_when_ill=False, **small)


@pytest.fixture
def nectar(tmp_path):
    """A small Nectar folder."""
    folder = tmp_path / "nectar"
    folder.mkdir()
    answers = [{"answer": "red sea", "rank": 1.0}, {"answer": "blue", "rank": 2.0}]
    row = {"prompt": "\n\nHuman: name a sea\n\nAssistant: ", "answers": answers}
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(24)))
    return str(folder)


def test_a_real_set_runs_with_a_model_from_a_folder(real, tmp_path):
    """Two reward models; adapters of the policy, which the folder that is left has merged in."""
    real = dataclasses.replace(real, rl=dataclasses.replace(real.rl, lora_rank=2))
    language.check(real)
    lab = language.make_lab(real)
    assert set(lab.reward) == {"reward", "cost"}
    numbers = language.train_arm(lab, real, "redistributed", tmp_path / "arm", resume=False)
    assert numbers["episodes"] == 3 * real.rl.rollouts and np.isfinite(numbers["proxy"])
    config = folders.read_config(tmp_path / "arm" / "policy")
    assert config == folders.read_config(real.source.model)
    _, merged = folders.load(tmp_path / "arm" / "policy")
    change = jax.tree.map(lambda a, b: float(abs(a - b).max()), merged, lab.policy)
    assert change["block_0"]["up"]["kernel"] > 0 == change["token"]["embedding"]
    assert (tmp_path / "arm" / "policy" / "tokenizer.json").exists()
    shown = json.loads((tmp_path / "arm" / "samples-after.json").read_text())["samples"][0]
    assert shown["prompt"] == ["Human", ":", "name", "<unk>", "sea", "Assistant", ":"]
    assert len(shown["response"]) == len(shown["reward"])


def with_reward_model(real, folder, **sizes):
    """The preset with a reward model from a folder, on one set of preferences."""
    given = dataclasses.replace(real.source, name="nectar", reward_model=str(folder))
    shape = gpt2.Config(
        10, **{"width": 8, "depth": 1, "heads": 2, "inner": 16, **sizes}, context=48
    )
    body, head = gpt2.gpt2(shape).init(jax.random.key(1)), jax.random.key(2)
    folders.save_reward(folder, shape, attach_head(body, shape.width, head))
    return dataclasses.replace(real, source=given)


def test_a_reward_model_of_another_size_is_read_from_a_folder(real, nectar, tmp_path):
    config = with_reward_model(real, tmp_path / "reward")
    config = dataclasses.replace(config, source=dataclasses.replace(config.source, data=nectar))
    write_tokenizer(tmp_path / "reward")
    lab = language.make_lab(config)
    numbers = language.train_arm(lab, config, "redistributed", tmp_path / "arm", resume=False)
    assert np.isfinite(numbers["proxy"])
    with pytest.raises(UserError, match="starts at the reward model"):
        language.train_arm(lab, config, "sparse_reward_critic", tmp_path / "x", resume=False)


def test_a_reward_model_with_another_tokenizer_is_refused(real, nectar, tmp_path):
    config = with_reward_model(real, tmp_path / "reward")
    config = dataclasses.replace(config, source=dataclasses.replace(config.source, data=nectar))
    write_tokenizer(tmp_path / "reward", last="lake")
    with pytest.raises(UserError, match="its tokenizer is not that of"):
        language.make_lab(config)


# --- presets at their full size -------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["synthetic", "text"])
def test_a_preset_is_one_program_at_full_size(preset):
    """Traced, not run: shapes fit, the state goes in as it comes out."""
    config = presets.PRESETS[preset]()
    small = dataclasses.replace(config.source, demonstrations=8, pairs=8, prompts=8)
    problem = problems.make(small)
    scalar = language.with_scalar_head(problem.model)
    parts = language.r3hf.Parts(
        problem.model, scalar.scores, scalar.scores, problem.gold, problem.decoding
    )
    for arm in ("redistributed", "rloo"):
        rl = language.arm_config(config, arm)
        make = functools.partial(language.r3hf.init, rl)
        key = jax.random.key(0)
        state = jax.eval_shape(lambda k, make=make: make(problem.init(k), scalar.init(k)), key)
        reward = jax.eval_shape(scalar.init, key)
        task = language.r3hf.Task(jax.tree.map(jnp.asarray, problem.prompts), reward, ())
        after, log = jax.eval_shape(language.r3hf.make_iteration(parts, rl), state, task, key)
        described = [jax.tree.map(lambda a: (a.shape, a.dtype), s) for s in (state, after)]
        assert described[0] == described[1] and log["gold"].shape == ()


# --- claims and tables ----------------------------------------------------------------------------


def leave(folder, curve, **last):
    """A finished run's folder."""
    folder.mkdir(parents=True)
    rows = [{"step": i + 1, "gold": g, "seconds": 1.0} for i, g in enumerate(curve)]
    ends = ("gold", "proxy", "kl", "length", "truncated")
    rows[-1] |= {f"heldout/{name}": last.get(name, 0.0) for name in ends}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    metrics.write_json(folder / "result.json", {})


def test_rates_are_those_of_the_largest_area(tmp_path):
    claims = r3hf_claims.Claims(settings=("medium",))
    for job in r3hf_claims.tuning_jobs(tmp_path, claims):
        best = job.rates == (1.5e-3, 5e-4)
        leave(job.directory, [1.0, 3.0] if best else [0.0, 3.5])
    rates = r3hf_claims.chosen_rates(tmp_path, claims)
    assert set(rates) == set(r3hf_claims.MAIN) and set(rates.values()) == {(1.5e-3, 5e-4)}


def test_leave_one_out_has_no_critic_to_tune(tmp_path):
    jobs = list(r3hf_claims.tuning_jobs(tmp_path, r3hf_claims.Claims()))
    count = {arm: sum(job.arm == arm for job in jobs) for arm in ARMS}
    assert {n for arm, n in count.items() if arm.startswith("rloo")} == {2}
    assert {n for arm, n in count.items() if not arm.startswith("rloo")} == {4}
    assert len({job.directory for job in jobs}) == len(jobs)


def test_final_seeds_are_not_those_of_tuning_and_share_the_bases(tmp_path):
    claims = r3hf_claims.Claims(settings=("medium",), repeats=4)
    rates = dict.fromkeys(r3hf_claims.MAIN, r3hf_claims.Rates(1.0, 1.0))
    jobs = list(r3hf_claims.final_jobs(tmp_path, claims, rates, "medium"))
    assert {job.seed for job in jobs} == {0, 1, 2, 3} and {job.base for job in jobs} == {0, 1}
    assert {job.base for job in r3hf_claims.tuning_jobs(tmp_path, claims)} == {2}
    config = r3hf_claims.experiment(jobs[0])
    assert (config.source.response, config.rl.policy_rate) == (64, 1.0)


def test_tables_hold_means_and_paired_differences(tmp_path, monkeypatch):
    monkeypatch.setattr(r3hf_tables, "RESULTS", tmp_path)
    rates = dict.fromkeys(ARMS, r3hf_claims.Rates(1e-3, 1e-4))
    for seed in range(3):
        folder = tmp_path / "short" / f"seed-{seed}"
        leave(folder / "sparse", [seed, seed + 1.0], gold=1.0)
        leave(folder / "redistributed", [seed, seed + 2.0], gold=3.0)
        metrics.write_json(
            folder / "config.json", {"seed": seed, "arms": ["sparse", "redistributed"]}
        )
    path = r3hf_tables.summarise(tmp_path, ["short", "medium"], rates, ["a note"])
    reached, paired = json.loads(path.read_text())["tables"]
    assert [row[0] for row in reached["rows"]] == ["sparse", "redistributed"]
    assert reached["rows"][0][2]["mean"] == pytest.approx(1.5)  # the area
    ((name, area, last, heldout, seeds),) = paired["rows"]
    assert (name, seeds) == ("redistributed - sparse", 3)
    assert (area["mean"], area["low"], area["high"]) == pytest.approx((0.5, 0.5, 0.5))
    assert (last["mean"], heldout["mean"]) == pytest.approx((1.0, 2.0))
