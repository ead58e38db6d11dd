"""Language models aligned by preferences, in one run: fine-tuning, reward model, arms of RL.

A run trains a policy on demonstrations, a reward model on preferences and, for the arms that want
it, calibrates the reward model's prefixes; all three are cached. Then every arm starts from the
same policy, sees as many responses as the others, and leaves a folder of its own.

Dimensions: N prompts, B responses, P prompt slots, T response slots, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import problems
from experiments.problems import Problem, Source
from jaxalign.core import distributed, limits
from jaxalign.core import mesh as meshes
from jaxalign.core import metrics as sinks
from jaxalign.core.checkpoint import Checkpoints, cached
from jaxalign.core.loop import Hook, fit
from jaxalign.core.state import TrainState
from jaxalign.core.types import Array, Mean, Params, PyTree, UserError
from jaxalign.data.preferences import Prompts, Responses
from jaxalign.methods import r3hf, reward_model, supervised
from jaxalign.models import folders
from jaxalign.models.scalar_head import ScalarModel, attach_head, with_scalar_head
from jaxalign.ops import redistribution as rd
from jaxalign.ops.sampling import Sampling
from jaxalign.rollout import decode

PAIRS_AT_ONCE = 64  # that are scored: long responses to more of them would not fit in memory


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a run does; every field is a flag of the command line."""

    source: Source = Source()
    arms: tuple[str, ...] = ("sparse", "redistributed", "calibrated", "uniform")
    fine_tuning: supervised.Config = supervised.Config(updates=800, learning_rate=2e-3)
    reward: reward_model.Config = reward_model.Config(updates=1500)
    calibration: reward_model.Config = reward_model.Config(updates=600)
    calibration_responses: int = 4096  # sampled from the fine-tuned policy
    rl: r3hf.Config = r3hf.Config()
    evaluate_every: int = 20  # iterations
    evaluated: int = 256  # held-out prompts
    save_every: int = 40  # iterations
    stop_when_ill: bool = True  # at the stop limits of rl.limits; else only warn
    mesh: str = "data=-1"
    tensorboard: bool = False
    wandb: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        limits.known("arms", self.arms, ARMS)
        for name in ("calibration_responses", "evaluate_every", "evaluated", "save_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least 1")


# --- arms: the same responses, credited in different ways -----------------------------------------


class Arm(NamedTuple):
    """changes: to `Experiment.rl`. calibrated: whether the rewards are the calibrated model's.

    critic: where the critic starts, at this one of the run's scalar models or as `r3hf` says.
    """

    changes: Mapping[str, Any]
    calibrated: bool = False
    critic: Literal["policy", "random", "reward", "calibrated"] = "policy"


ARMS: Mapping[str, Arm] = {
    # the score at the last token, as everywhere
    "sparse": Arm({"credit": "sparse"}),
    # R3HF: differences of prefix scores, and with prefixes calibrated first
    "redistributed": Arm({"credit": "redistributed"}),
    "calibrated": Arm({"credit": "redistributed"}, calibrated=True),
    # half of either (beta_c), and the first token without a reward
    "half": Arm({"credit": "redistributed", "dense_weight": 0.5}),
    "without_first": Arm({"credit": "without_first"}),
    # controls: dense, but not where it was earned
    "uniform": Arm({"credit": "uniform"}),
    "shuffled": Arm({"credit": "shuffled"}),
    "random": Arm({"credit": "random"}),
    # rivals: what the reward model knows of prefixes goes into the critic instead
    "sparse_reward_critic": Arm({"credit": "sparse"}, critic="reward"),
    "sparse_calibrated_critic": Arm({"credit": "sparse"}, critic="calibrated"),
    # without critic: four responses a prompt, their mean as baseline
    "rloo": Arm({"algorithm": "rloo", "group": 4, "token_weight": 0.0}),
    "rloo_redistributed": Arm({"algorithm": "rloo", "group": 4}),
    "rloo_calibrated": Arm({"algorithm": "rloo", "group": 4}, calibrated=True),
}


def arm_config(config: Experiment, arm: str) -> r3hf.Config:
    """The method's configuration for an arm."""
    return dataclasses.replace(config.rl, **ARMS[arm].changes)


# --- what all arms start from ---------------------------------------------------------------------


class Lab(NamedTuple):
    """What all arms of a run share.

    policy: fine-tuned parameters. scalar: the same network with a scalar head, for critics. judge:
    the reward model's network. reward, calibrated: its parameters; None where no arm asks for it.
    accuracy: of the reward model on fresh pairs.
    """

    problem: Problem
    mesh: jax.sharding.Mesh
    policy: Params
    scalar: ScalarModel
    judge: ScalarModel
    reward: Params
    calibrated: Params | None
    accuracy: float


def check(config: Experiment) -> None:
    """Raises UserError for what is wrong with a configuration, before anything is written."""
    problems.check(config.source)
    mesh = meshes.make_mesh(meshes.parse_mesh(config.mesh))
    for arm in config.arms:
        r3 = arm_config(config, arm)
        rows = r3.rollouts // (r3.minibatches * r3.micro_batches)
        meshes.check_divisible("rl.rollouts / (minibatches * micro_batches) =", rows, mesh)
    for name in ("fine_tuning", "reward", "calibration"):
        meshes.check_divisible(f"{name}.batch", getattr(config, name).batch, mesh)


def make_lab(config: Experiment) -> Lab:
    """The lab of a configuration; trains what is not cached."""
    mesh = meshes.make_mesh(meshes.parse_mesh(config.mesh))
    problem = problems.make(config.source, mesh)
    scalar = with_scalar_head(problem.model)
    name: dict[str, Any] = {
        "source": problems.identity(config.source),
        "fine_tuning": _plain(config.fine_tuning),
    }
    tune = functools.partial(fine_tuned, config, problem, mesh)
    if problem.demonstrations is None:
        policy = tune()  # as its folder has it
    else:
        policy = cached("policy", name, tune, abstract_policy(problem, mesh))
    name["reward"] = _plain(config.reward)
    if problem.reward_model:
        judge, reward = problem.reward_model
    else:
        judge = scalar
        prefer = functools.partial(preferring, config, problem, mesh, scalar, policy)
        reward = cached("reward", name, prefer, abstract_reward(problem, scalar, mesh))
    calibrated = None
    if asks_for_calibration(config):
        name |= {"calibration": _plain(config.calibration), "n": config.calibration_responses}
        learn = functools.partial(calibrate, config, problem, mesh, judge, policy, reward)
        calibrated = cached(
            "calibrated", name, learn, meshes.lying(reward, mesh, problem.reward_rules)
        )
    accuracy = pair_accuracy(judge, reward, problem, mesh)
    return Lab(problem, mesh, policy, scalar, judge, reward, calibrated, accuracy)


def asks_for_calibration(config: Experiment) -> bool:
    """Whether an arm needs the calibrated reward model."""
    return any(ARMS[arm].calibrated or ARMS[arm].critic == "calibrated" for arm in config.arms)


def abstract_policy(problem: Problem, mesh: jax.sharding.Mesh) -> PyTree:
    """The policy's parameters as shapes that know where they lie."""
    shapes = jax.eval_shape(lambda: problem.model.init(jax.random.key(0)))
    return meshes.lying(shapes, mesh, problem.rules)


def abstract_reward(problem: Problem, judge: ScalarModel, mesh: jax.sharding.Mesh) -> PyTree:
    """The same for what the rewards are made of, one model or two (`problems.combine`)."""
    shapes = jax.eval_shape(lambda: judge.init(jax.random.key(0)))
    one = meshes.lying(shapes, mesh, problem.reward_rules)
    return one if problem.cost_pairs is None else {"reward": one, "cost": one}


def placed(tree: PyTree, mesh: jax.sharding.Mesh, rules: meshes.Rules) -> PyTree:
    """The tree on the mesh by rules; what lies there already is not copied."""
    return distributed.put(tree, meshes.shardings(tree, mesh, rules))


def staying(step: Any, mesh: jax.sharding.Mesh, rules: meshes.Rules) -> Any:
    """The compiled step `(state, ...) -> (state, ...)`, with the state where it was, by rules.

    Left alone the compiler would choose: then what a plan says of a step holds for the first only.
    """

    def stay(state: TrainState, *given: Any) -> tuple[TrainState, Any]:
        state, others = step(state, *given)
        where = meshes.shardings(state, mesh, rules)
        return jax.lax.with_sharding_constraint(state, where), others

    return jax.jit(stay, donate_argnums=0)


def shared(rows: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
    """Rows dealt out to the devices, or where they do not divide, whole on each."""
    count = len(jax.tree.leaves(rows)[0])
    divides = count % meshes.data_devices(mesh) == 0
    where = meshes.batch_sharding(mesh) if divides else meshes.replicated(mesh)
    return distributed.put(rows, where)


def _plain(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def train(
    title: str,
    state: TrainState,
    step: Any,
    data: PyTree,
    updates: int,
    mesh: jax.sharding.Mesh,
    rules: meshes.Rules,
) -> Params:
    """The parameters after `updates` steps on data that lies whole on each device."""
    data, key = distributed.put((data, jax.random.key(0)), meshes.replicated(mesh))
    state, step = placed(state, mesh, rules), staying(step, mesh, rules)
    shown = ("loss", "accuracy")
    state = fit(
        state, step, lambda i: data, key, steps=updates, title=title, shown=shown, put=_as_is
    )
    return state.params


def _as_is(batch: PyTree) -> PyTree:
    return batch


def fine_tuned(config: Experiment, problem: Problem, mesh: jax.sharding.Mesh) -> Params:
    """The policy that RL starts from."""
    key = jax.random.key(config.source.seed)
    if problem.demonstrations is None:
        return problem.init(key)
    rows = meshes.batch_sharding(mesh)
    step = supervised.make_step(problem.model, config.fine_tuning, problem.decoding.length, rows)
    state = supervised.init(problem.init(key), config.fine_tuning)
    updates = config.fine_tuning.updates
    data, rules = problem.demonstrations, problem.rules
    return train("fine-tuning", state, step, data, updates, mesh, rules)


def preferring(
    config: Experiment,
    problem: Problem,
    mesh: jax.sharding.Mesh,
    scalar: ScalarModel,
    policy: Params,
) -> Params:
    """The reward model, started from the policy; with costs two of them (`problems.combine`)."""
    rows = meshes.batch_sharding(mesh)
    step = reward_model.make_step(scalar.scores, config.reward, rows)
    key = jax.random.key(config.source.seed + 1)
    start = attach_head(policy, problem.model.width, key)
    updates, rules = config.reward.updates, problem.reward_rules

    def one(title: str, pairs: Any) -> Params:
        state = reward_model.init(start, config.reward)
        return train(title, state, step, pairs, updates, mesh, rules)

    reward = one("reward model", problem.pairs)
    if problem.cost_pairs is None:
        return reward
    return {"reward": reward, "cost": one("cost model", problem.cost_pairs)}


def calibrate(
    config: Experiment,
    problem: Problem,
    mesh: jax.sharding.Mesh,
    scalar: ScalarModel,
    policy: Params,
    reward: Params,
) -> Params:
    """The reward model after its prefixes have learned what it says at the end."""
    if problem.cost_pairs is not None:
        raise UserError(
            "arms: calibrated prefixes are for one reward model, this source has two; leave out "
            "the calibrated arms"
        )
    count, at_once = config.calibration_responses, config.rl.rollouts
    data = sampled(problem, policy, count, jax.random.key(17), at_once, mesh)
    rows, length = meshes.batch_sharding(mesh), problem.decoding.length
    step = reward_model.make_calibration_step(scalar.scores, config.calibration, length, rows)
    state = reward_model.init_calibration(reward, config.calibration)
    updates, rules = config.calibration.updates, problem.reward_rules
    return train("calibration", state, step, data, updates, mesh, rules)


def sampled(
    problem: Problem,
    policy: Params,
    count: int,
    key: Array,
    at_once: int,
    mesh: jax.sharding.Mesh,
) -> Responses:
    """Responses of a policy to training prompts. at_once: how many are held in memory."""
    prompt_key, key = jax.random.split(key)
    row = jax.random.randint(prompt_key, (count,), 0, problem.prompts.ids.shape[0])
    ids, mask = (jnp.asarray(a)[row] for a in problem.prompts)
    draw = jax.jit(functools.partial(_decode, problem, Sampling()))
    parts = []
    for first in range(0, count, at_once):
        rows = slice(first, first + at_once)
        prompts = shared((ids[rows], mask[rows]), mesh)
        decoded = draw(policy, *prompts, jax.random.fold_in(key, first))
        parts.append(Responses(decoded.ids, decoded.mask))
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)


def _decode(
    problem: Problem, sampling: Sampling, policy: Params, ids: Array, mask: Array, key: Array
) -> decode.Decoded:
    how: dict[str, Any] = {**problem.decoding._asdict(), "sampling": sampling}
    return decode.decode(problem.model, policy, ids, mask, key, **how)


def pair_accuracy(
    judge: ScalarModel, reward: Params, problem: Problem, mesh: jax.sharding.Mesh
) -> float:
    """Share of held-back pairs that the reward model orders as their labels do."""
    params = reward.get("reward", reward)
    loss = jax.jit(functools.partial(reward_model.preference_loss, judge.scores))
    pairs, key = problem.test_pairs, jax.random.key(0)
    ordered = Mean(jnp.zeros(()), jnp.zeros(()))
    for first in range(0, pairs.chosen.ids.shape[0], PAIRS_AT_ONCE):
        part = jax.tree.map(lambda a, i=first: a[i : i + PAIRS_AT_ONCE], pairs)
        ordered += loss(params, shared(part, mesh), key)[1]["accuracy"]
    return float(ordered.value())


# --- evaluation -----------------------------------------------------------------------------------


class Shown(NamedTuple):
    """What an evaluation looks at: the responses, and the reward model's scores of all prefixes.

    divergence: `[B]`, sampled KL of each response to the fine-tuned policy, in nats.
    """

    decoded: decode.Decoded
    scores: Array
    gold: Array
    divergence: Array


def make_evaluation(
    lab: Lab, config: Experiment, r3: r3hf.Config
) -> Callable[[TrainState], tuple[dict[str, Array], Shown]]:
    """`state -> ({"heldout/gold": ...}, responses)`; the same prompts and keys at every call."""
    problem = lab.problem
    heldout = Prompts(*(jnp.asarray(a)[: config.evaluated] for a in problem.heldout))
    others = (problem.gold_params, jax.random.key(10_000 + config.seed))
    others = distributed.put(others, meshes.replicated(lab.mesh))
    reward = placed(lab.reward, lab.mesh, problem.reward_rules)
    if config.source.name in problems.REAL:
        heldout = shared(heldout, lab.mesh)
    else:  # small, and numbers that are to the bit those of earlier runs
        heldout = distributed.put(heldout, meshes.replicated(lab.mesh))
    given = (heldout, reward, *others)
    score = problems.combine(problem, lab.judge.scores)

    @jax.jit
    def look(policy: Params, reference: Params, given: PyTree) -> tuple[dict[str, Array], Shown]:
        prompts, reward, gold_params, key = given
        seen = _decode(problem, r3.sampling, policy, *prompts, key)
        scores = score(reward, seen.ids, seen.mask)
        length = problem.decoding.length
        theirs, _ = decode.score(problem.model, reference, seen.ids, seen.mask, length, r3.sampling)
        divergence = (seen.log_density - theirs).sum(1)
        gold = problem.gold(gold_params, seen.ids, seen.mask)
        numbers = {
            "gold": gold.mean(),
            "proxy": rd.final_score(scores, seen.mask).mean(),
            "kl": divergence.mean(),
            "length": seen.length.mean(dtype=jnp.float32),
            "truncated": (~seen.stopped).mean(dtype=jnp.float32),
        }
        numbers = {f"heldout/{name}": value for name, value in numbers.items()}
        return numbers, Shown(seen, scores, gold, divergence)

    return lambda state: look(r3hf.policy_of(state.params), r3hf.reference_of(state), given)


class Health:
    """A sink that says what is wrong with an iteration, once for each reason, or stops the run."""

    def __init__(self, config: r3hf.Config, stop: bool) -> None:
        self._config, self._stop = config, stop
        self._said: set[str] = set()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if "ratio_error" not in metrics:  # the row before the first iteration
            return
        for alarm in r3hf.health(metrics, self._config):
            if alarm.level == "stop" and self._stop:
                raise UserError(
                    f"stopped at iteration {step}: {alarm.reason}; lower rl.policy_rate, raise "
                    "rl.kl_weight, or go on all the same with --no-stop-when-ill"
                )
            name = alarm.reason.split(" = ")[0]
            if name not in self._said:
                self._said.add(name)
                print(f"iteration {step}: {alarm.reason}")

    def resume(self, step: int) -> None:
        """Nothing to take back."""

    def close(self) -> None:
        """Nothing to close."""


# --- one arm --------------------------------------------------------------------------------------


def start_state(lab: Lab, config: Experiment, arm: str) -> TrainState:
    """The arm's state before its first iteration."""
    r3, start = arm_config(config, arm), ARMS[arm].critic
    if r3.algorithm == "rloo":
        return r3hf.init(r3, lab.policy)
    if start in ("reward", "calibrated") and not _same_sizes(lab.reward, lab.policy):
        raise UserError(
            f"arms: the critic of {arm} starts at the reward model, which has other sizes than the "
            "policy; leave this arm out"
        )
    scores = lab.calibrated if start == "calibrated" else lab.reward
    draw = jax.random.key(20_000 + config.seed)
    random = (
        random_critic(lab, draw) if start == "random" else jax.eval_shape(lab.scalar.init, draw)
    )
    kind = "reward" if start == "calibrated" else start
    body = attach_head(lab.policy, lab.problem.model.width)["model"]
    return r3hf.init(r3, lab.policy, r3hf.critic_params(kind, body, scores or {}, random))


def random_critic(lab: Lab, key: Array) -> Params:
    """A scalar model of the policy's sizes, drawn where its parameters lie."""
    shapes = jax.eval_shape(lab.scalar.init, key)
    where = meshes.shardings(shapes, lab.mesh, lab.problem.rules)
    return jax.jit(lab.scalar.init, out_shardings=where)(key)


def _same_sizes(reward: Params, policy: Params) -> bool:
    """Whether a reward model's body has the shapes of the policy's."""
    body = attach_head(policy, 1)["model"]
    return jax.tree.map(jnp.shape, reward["model"]) == jax.tree.map(jnp.shape, body)


@functools.cache
def compiled_iteration(
    problem: Problem,
    scalar: ScalarModel,
    judge: ScalarModel,
    r3: r3hf.Config,
    mesh: jax.sharding.Mesh,
) -> Callable[[TrainState, r3hf.Task, Array], tuple[TrainState, dict[str, Array]]]:
    """`r3hf.make_iteration`, once for equal arguments."""
    rows = meshes.batch_sharding(mesh)
    iteration = r3hf.make_iteration(make_parts(problem, scalar, judge), r3, rows)
    return staying(iteration, mesh, problem.rules)


def make_parts(problem: Problem, scalar: ScalarModel, judge: ScalarModel) -> r3hf.Parts:
    """What an iteration is made of."""
    score = problems.combine(problem, judge.scores)
    return r3hf.Parts(problem.model, scalar.scores, score, problem.gold, problem.decoding)


def reward_of(lab: Lab, arm: str) -> Params:
    """The parameters that the arm's rewards are made of."""
    return lab.calibrated if ARMS[arm].calibrated and lab.calibrated else lab.reward


def make_task(lab: Lab, arm: str) -> r3hf.Task:
    """What the arm's iterations read: prompts whole on each device, the reward model by rules."""
    whole = (jax.tree.map(jnp.asarray, lab.problem.prompts), lab.problem.gold_params)
    prompts, gold = distributed.put(whole, meshes.replicated(lab.mesh))
    reward = placed(reward_of(lab, arm), lab.mesh, lab.problem.reward_rules)
    return r3hf.Task(prompts, reward, gold)


def train_arm(
    lab: Lab, config: Experiment, arm: str, directory: Path, *, resume: bool
) -> dict[str, float]:
    """Trains one arm into its folder, and returns the final numbers."""
    r3, problem = arm_config(config, arm), lab.problem
    task = make_task(lab, arm)
    state = r3hf.set_rates(start_state(lab, config, arm), r3.policy_rate, r3.critic_rate)
    state = placed(state, lab.mesh, problem.rules)
    key = distributed.put(jax.random.key(config.seed), meshes.replicated(lab.mesh))
    # The rates live in the optimizer's state: one compiled iteration serves all of a sweep.
    any_rate = dataclasses.replace(r3, policy_rate=1.0, critic_rate=1.0, iterations=1)
    iteration = compiled_iteration(problem, lab.scalar, lab.judge, any_rate, lab.mesh)
    evaluation = make_evaluation(lab, config, r3)

    def measure(state: TrainState, step: int) -> dict[str, Array]:
        numbers, shown = evaluation(state)
        if step in (0, r3.iterations):
            save_samples(lab, shown, directory, "before" if step == 0 else "after")
        return numbers

    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(Checkpoints(directory / "ckpt")) as checkpoints:
        opened = sinks.open_sinks(config, directory, arm)
        state = fit(
            state,
            iteration,
            lambda i: task,
            key,
            steps=r3.iterations,
            checkpoints=checkpoints,
            save_every=config.save_every,
            resume=resume,
            sinks=[Health(r3, config.stop_when_ill), *opened],
            hooks=[Hook(config.evaluate_every, measure)],
            title=arm,
            speed=(r3.rollouts, "responses"),
            shown=("gold", "proxy", "length"),
            put=_as_is,
        )
        for sink in opened:
            sink.close()
    save_policy(lab, config, state, directory / "policy")
    rows = sinks.read_json_lines(directory / "metrics.jsonl")
    result = {name: value for name, value in rows[-1].items() if name != "step"}
    sinks.write_json(directory / "result.json", {"arm": arm, "seed": config.seed, **result})
    return result


def save_policy(lab: Lab, config: Experiment, state: TrainState, path: Path) -> None:
    """The policy as a Hugging Face folder, with the tokenizer of the model that it came from."""
    if distributed.all_agree(path.exists() or not distributed.is_main()):
        return  # a finished arm that is resumed has it
    policy = distributed.fetch(r3hf.policy_of(state.params))
    if distributed.is_main():
        folders.save(path, lab.problem.config, policy, source=config.source.model or None)


def save_samples(lab: Lab, shown: Shown, directory: Path, when: str, count: int = 12) -> None:
    """`samples-WHEN.json`: some held-out prompts, responses, and every token's reward (eq. 6)."""
    decoded, length = shown.decoded, lab.problem.decoding.length
    response = decoded.response
    token = rd.redistributed(shown.scores, response)
    seen = distributed.fetch((decoded.ids, decoded.mask, response, token, shown.gold, shown.scores))
    samples = []
    for ids, mask, real, reward, gold, scores in zip(*(a[:count] for a in seen), strict=True):
        prompt = ids[:-length][mask[:-length]]
        samples.append(
            {
                "prompt": words_of(lab.problem, prompt),
                "response": words_of(lab.problem, ids[-length:][real]),
                "reward": [float(r) for r in reward[real]],
                "score": float(scores[mask][-1]),
                "gold": float(gold),
            }
        )
    sinks.write_json(directory / f"samples-{when}.json", {"samples": samples})


def words_of(problem: Problem, ids: np.ndarray) -> list[str]:
    """Each token as a word of its own."""
    return [problem.words(ids[i : i + 1]) for i in range(len(ids))]


def run_arms(lab: Lab, config: Experiment, directory: Path, *, resume: bool) -> None:
    """All arms of one seed, then `result.json` with "ARM/NUMBER" keys."""
    result: dict[str, float] = {"reward model/accuracy on held-back pairs": lab.accuracy}
    for arm in config.arms:
        numbers = train_arm(lab, config, arm, directory / arm, resume=resume)
        result |= {f"{arm}/{name}": value for name, value in numbers.items()}
    sinks.write_json(directory / "result.json", result)
