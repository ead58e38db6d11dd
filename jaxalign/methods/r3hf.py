"""R3HF (RED): a language model aligned by rewards of single tokens, with PPO or leave-one-out.

Li et al., "R3HF: Reward Redistribution for Enhancing Reinforcement Learning from Human Feedback"
(arXiv 2411.08302; "RED" at EMNLP 2025). No code was released. One iteration is

    sample   responses to drawn prompts,
    score    every prefix of them with the reward model, in one forward pass,
    credit   tokens with differences of these scores (eq. 6), mixed with the score at the end
             (eq. 7), less the divergence from the reference policy (eq. 8),
    update   policy and critic on clipped surrogates (Schulman et al. 2017), some epochs.

Without discount the advantages are those of PPO on the score at the end whose critic adds the
prefix's score to what it learns. Leave-one-out (Ahmadian et al. 2024) on the sums of these rewards
is leave-one-out on the scores, so there the token term is all that is new.

Departures, where the paper is silent or at odds with itself:
  - density ratios are to the policy that sampled, not to the reference as its algorithm 1 has it;
  - leave-one-out adds `token_weight` times the tokens' rewards, centred in each response: not
    centred, a group of bad responses would reinforce every token of each;
  - optimizer, epochs, minibatches, value clipping and whitening are common practice;
  - a truncated response is scored at its last token and pays `missing_stop_penalty`.

Dimensions: B responses, K of a prompt, P prompt slots, T response slots, N prompts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from jaxalign.core import state as states
from jaxalign.core import step as steps
from jaxalign.core.state import TrainState
from jaxalign.core.types import Array, LanguageModel, Max, Mean, Params, PyTree, UserError
from jaxalign.data.preferences import Prompts
from jaxalign.models import lora
from jaxalign.models.scalar_head import attach_head
from jaxalign.ops import policy_gradient as pg
from jaxalign.ops import redistribution as rd
from jaxalign.ops import returns
from jaxalign.ops.sampling import Sampling
from jaxalign.rollout import decode
from jaxalign.rollout.decode import Decoded

Credit = Literal["redistributed", "without_first", "sparse", "uniform", "shuffled", "random"]
LORA_RULE = r"block_\d+/.*kernel"
CriticStart = Literal["reward", "policy", "random"]


@dataclasses.dataclass(frozen=True)
class Limits:
    """When a run is ill: (warn, stop) of each metric. Where stop < warn, small numbers are bad."""

    length_growth: tuple[float, float] = (1.5, 2.0)  # mean length / that of the first iteration
    truncated: tuple[float, float] = (0.2, 0.5)  # share of the responses
    positive_share: tuple[float, float] = (0.1, 0.05)  # of the advantages, from either end
    entropy_share: tuple[float, float] = (0.3, 0.1)  # entropy / that of the first iteration
    kl: tuple[float, float] = (20.0, 50.0)  # nats a response
    ratio_error: tuple[float, float] = (2e-5, 1e-4)  # nats a token


@dataclasses.dataclass(frozen=True)
class Config:
    """Defaults are the paper's (its Table 7) where it states them; its symbols in the comments."""

    iterations: int = 120
    rollouts: int = 64  # B, responses an iteration
    group: int = 1  # K, responses to each prompt; 4 in the paper's leave-one-out
    algorithm: Literal["ppo", "rloo"] = "ppo"
    credit: Credit = "redistributed"
    dense_weight: float = 1.0  # beta_c
    token_weight: float = 1.0  # rloo: of the centred token rewards; 0 is plain leave-one-out
    kl_weight: float = 0.02  # beta
    missing_stop_penalty: float = 1.0
    discount: float = 1.0  # gamma
    decay: float = 0.95  # lambda
    whiten: bool = True  # advantages over the whole batch
    clip: float = 0.2  # of the density ratio
    value_clip: float = 0.2
    epochs: int = 2
    minibatches: int = 2  # optimizer steps an epoch
    micro_batches: int = 1  # parts of a minibatch, one in memory at a time
    policy_rate: float = 1e-5
    critic_rate: float = 5e-6
    gradient_clip: float = 1.0  # policy and critic each
    lora_rank: int = 0  # of the policy's adapters; 0 trains all of its weights
    sampling: Sampling = Sampling()
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        whole = ("iterations", "rollouts", "group", "epochs", "minibatches", "micro_batches")
        above = ("clip", "value_clip", "policy_rate", "critic_rate", "gradient_clip")
        self._check(whole, lambda x: x >= 1, "must be at least 1; raise it")
        self._check(above, lambda x: x > 0, "must be positive; try the default")
        weights = ("token_weight", "kl_weight", "missing_stop_penalty", "lora_rank")
        self._check(weights, lambda x: x >= 0, "must not be negative; 0 turns it off")
        shares = ("dense_weight", "discount", "decay")
        self._check(shares, lambda x: 0 <= x <= 1, "must lie in [0, 1]; try the default")
        parts = self.group, self.minibatches * self.micro_batches
        for part, what in zip(parts, ("group", "minibatches * micro_batches"), strict=True):
            if self.rollouts % part:
                raise UserError(
                    f"rollouts = {self.rollouts}: must be a multiple of {what} = {part}; change one"
                )
        if self.algorithm == "rloo" and self.group < 2:
            raise UserError(
                "group = 1: algorithm rloo compares responses to one prompt; give at least 2"
            )
        if self.sampling.temperature == 0:
            raise UserError("temperature = 0: nothing to explore; training needs a positive one")

    def _check(self, names: Sequence[str], holds: Callable[[float], bool], rule: str) -> None:
        for name in names:
            if not holds(value := getattr(self, name)):
                raise UserError(f"{name} = {value}: {rule}")


# (params, ids [B, L], mask [B, L]) -> scores at every token [B, L] f32
Scores = Callable[[Params, Array, Array], Array]
# (params, ids [B, P+T], mask [B, P+T]) -> the true score [B] f32, reported only
Gold = Callable[[PyTree, Array, Array], Array]


class Decoding(NamedTuple):
    """length: T. stop: ids that end a response. pad: what follows. halvings: as in `decode`."""

    length: int
    stop: Sequence[int]
    pad: int
    halvings: int = 0


class Parts(NamedTuple):
    """The functions that an iteration is made of; their parameters are in the state and the task.

    policy: a language model. critic, reward: scores of prefixes. gold: judges.
    """

    policy: LanguageModel
    critic: Scores
    reward: Scores
    gold: Gold
    decoding: Decoding


class Task(NamedTuple):
    """What an iteration reads and never changes; an argument of the compiled code.

    prompts: `[N, P]`, drawn with replacement. reward, gold: parameters of these two.
    """

    prompts: Prompts
    reward: Params
    gold: PyTree


class Extra(NamedTuple):
    """episodes, tokens: `[] i32`, responses and response tokens so far.

    length, entropy: `[] f32`, means of the first iteration, to measure growth and collapse by.
    """

    episodes: Array
    tokens: Array
    length: Array
    entropy: Array


class Samples(NamedTuple):
    """decoded: the responses. scores: `[B, P+T] f32`, the reward model's. gold: `[B] f32`."""

    decoded: Decoded
    scores: Array
    gold: Array


class Batch(NamedTuple):
    """Rows to learn from: ids, mask `[B, P+T]`, the rest `[B, T]`.

    log_density: of the policy that sampled. value: the critic's before the update, and target;
    None without critic.
    """

    ids: Array
    mask: Array
    log_density: Array
    advantage: Array
    value: Array | None = None
    target: Array | None = None


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Adam with a rate and a clipped norm of their own for policy and critic.

    The rates are kept in the optimizer's state: one compiled iteration serves a sweep over them.
    """

    def adam(rate: float) -> optax.GradientTransformation:
        clip = optax.clip_by_global_norm(config.gradient_clip)
        return optax.chain(clip, optax.inject_hyperparams(optax.adam)(rate))

    rates = {"policy": config.policy_rate, "critic": config.critic_rate}
    return optax.partition(
        {name: adam(rate) for name, rate in rates.items()},
        lambda params: {n: "critic" if n == "critic" else "policy" for n in params},
    )


def trainable(config: Config) -> str:
    """Paths that learn, for `core.state.partition`."""
    return "(lora|critic)/.*" if config.lora_rank else ".*"


def policy_of(params: Params) -> Params:
    """The language model's parameters, adapters merged in."""
    return lora.effective({"model": params["policy"], "lora": params.get("lora", {})})


def reference_of(state: TrainState) -> Params:
    """The policy before the first iteration; under adapters it lies frozen below them."""
    return state.slow.get("reference", state.params["policy"])


def set_rates(state: TrainState, policy: float | Array, critic: float | Array) -> TrainState:
    """The state with other learning rates, which may be traced: one for each member of a `vmap`."""
    rates = {"policy": jnp.float32(policy), "critic": jnp.float32(critic)}
    inner = state.opt_state.inner_states
    inner = {name: optax.tree.set(inner[name], learning_rate=rates[name]) for name in inner}
    return state._replace(opt_state=state.opt_state._replace(inner_states=inner))


def critic_params(start: CriticStart, policy: Params, reward: Params, random: Params) -> Params:
    """Where a critic starts: at the reward model with its head, at the policy with a head of zeros,
    or at random.

    policy: of the language model. reward, random: of a scalar model (`models.scalar_head`).
    """
    zero = attach_head(policy, random["head"]["kernel"].shape[0])
    return {"reward": reward, "policy": zero, "random": random}[start]


def init(
    config: Config, policy: Params, critic: Params | None = None, key: Array | None = None
) -> TrainState:
    """The state before the first iteration; the policy as given is the reference.

    params: "policy", with `lora_rank` also "lora" (adapters of every matrix of its blocks), and
    for PPO "critic".

    critic: for PPO; leave-one-out has none. Both are copied, as the state is donated.
    key: of the adapters.
    Raises: UserError where PPO is left without a critic, and where adapters find no matrix.
    """
    params = {"policy": jax.tree.map(jnp.copy, policy)}
    if config.algorithm == "ppo":
        if critic is None:
            raise UserError("algorithm ppo has no critic: give its parameters, or choose rloo")
        params["critic"] = jax.tree.map(jnp.copy, critic)
    slow = {}
    if config.lora_rank:
        key = jax.random.key(0) if key is None else key
        params["lora"] = lora.init_lora(key, policy, config.lora_rank, LORA_RULE)
    else:
        slow["reference"] = jax.tree.map(jnp.copy, policy)
    extra = Extra(*(jnp.zeros((), kind) for kind in (jnp.int32, jnp.int32, float, float)))
    optimizer, which = make_optimizer(config), trainable(config)
    return states.create(params, optimizer, trainable=which, slow=slow, extra=extra)


def sample(
    parts: Parts, config: Config, rows: NamedSharding | None, policy: Params, task: Task, key: Array
) -> Samples:
    """Draws prompts, K consecutive rows of each, and responses to them, scored.

    rows: how responses lie on a mesh.
    """
    prompt_key, decode_key = jax.random.split(key)
    prompts = jax.tree.map(jnp.asarray, task.prompts)
    groups = config.rollouts // config.group
    drawn = jax.random.randint(prompt_key, (groups,), 0, prompts.ids.shape[0])
    ids, mask = (a[jnp.repeat(drawn, config.group)] for a in prompts)
    if rows is not None:
        ids, mask = jax.lax.with_sharding_constraint((ids, mask), rows)
    how: dict[str, Any] = {**parts.decoding._asdict(), "sampling": config.sampling}
    decoded = decode.decode(parts.policy, policy, ids, mask, decode_key, **how)
    scores = parts.reward(task.reward, decoded.ids, decoded.mask)
    return Samples(decoded, scores, parts.gold(task.gold, decoded.ids, decoded.mask))


def credit(config: Config, scores: Array, response: Array, key: Array) -> Array:
    """The response's reward as rewards of its tokens `[B, T]` (eq. 7), by the rule of `config`.

    scores: `[B, P+T] f32`. response: `[B, T] bool`.
    """
    dense = {
        "redistributed": lambda: rd.redistributed(scores, response),
        "without_first": lambda: rd.without_first(scores, response),
        "sparse": lambda: rd.sparse(scores, response),
        "uniform": lambda: rd.uniform(scores, response),
        "shuffled": lambda: rd.shuffled(key, scores, response),
        "random": lambda: rd.random_credit(key, scores, response),
    }[config.credit]()
    return rd.mix(dense, rd.sparse(scores, response), config.dense_weight)


def rloo_advantage(config: Config, reward: Array, token: Array, response: Array) -> Array:
    """`[B, T]`: how much better a response is than others of its group, and a token than others of
    its response.

    reward: `[B, T]`, all that it earns. token: `[B, T]`, the part that is compared within it.
    """
    sequence = returns.leave_one_out(reward.sum(1), config.group)[:, None]
    return sequence * response + config.token_weight * returns.centre(token, response)


def estimate(
    parts: Parts, config: Config, state: TrainState, samples: Samples, key: Array
) -> tuple[Batch, dict[str, Array]]:
    """What each token was worth, and metrics of the samples."""
    decoded = samples.decoded
    ids, mask, response = decoded.ids, decoded.mask, decoded.response
    reference, _ = decode.score(
        parts.policy, reference_of(state), ids, mask, parts.decoding.length, config.sampling
    )
    token = credit(config, samples.scores, response, key)
    reward = token + rd.missing_stop(response, decoded.stopped, config.missing_stop_penalty)
    reward = rd.penalised(reward, decoded.log_density, reference, response, config.kl_weight)
    metrics = {
        "gold": samples.gold.mean(),
        "proxy": rd.final_score(samples.scores, mask).mean(),
        "length": decoded.length.mean(dtype=jnp.float32),
        "truncated": (~decoded.stopped).mean(dtype=jnp.float32),
        "kl": (decoded.log_density - reference).sum(1).mean(),
    }
    value = target = None
    if config.algorithm == "ppo":
        value = rd.prefix_scores(parts.critic(state.params["critic"], ids, mask), response)
        advantage, target = returns.gae(reward, value, response, config.discount, config.decay)
        metrics["explained_variance"] = returns.explained_variance(value, target, response)
    else:
        advantage = rloo_advantage(config, reward, token, response)
    if config.whiten:
        advantage = returns.whiten(advantage, response)
    metrics["positive_share"] = returns.masked_mean(advantage > 0, response)
    within = returns.centre(advantage, response)
    between = (advantage - within) * response
    metrics["token_share"] = jnp.abs(within).sum() / (jnp.abs(between).sum() + returns.TINY)
    return Batch(ids, mask, decoded.log_density, advantage, value, target), metrics


def loss(
    parts: Parts, config: Config, params: Params, batch: Batch, _: Array
) -> tuple[Mean, dict[str, Mean | Max]]:
    """The clipped surrogate a token, and the critic's clipped error where there is one."""
    length = parts.decoding.length
    response = batch.mask[:, -length:]
    density, entropy = decode.score(
        parts.policy, policy_of(params), batch.ids, batch.mask, length, config.sampling
    )
    log_ratio = density - batch.log_density  # 0 off the response, like all that follows
    item = pg.clipped_surrogate(log_ratio, batch.advantage, config.clip)
    clipped = jnp.abs(jnp.expm1(log_ratio)) > config.clip
    tokens = response.sum(dtype=jnp.float32)
    metrics: dict[str, Mean | Max] = {
        "policy_loss": Mean(item.sum(), tokens),
        "entropy": Mean(entropy.sum(), tokens),
        "clipped": Mean(clipped.sum(dtype=jnp.float32), tokens),
        "ratio_error": Max(jnp.abs(log_ratio).max()),
    }
    if batch.value is not None and batch.target is not None:
        value = rd.prefix_scores(parts.critic(params["critic"], batch.ids, batch.mask), response)
        # Policy and critic share no weights, so a coefficient would only scale the critic's rate.
        error = returns.clipped_value_loss(value, batch.value, batch.target, config.value_clip)
        metrics["value_loss"] = Mean(error.sum(), tokens)
        item = item + error
    return Mean(item.sum(), tokens), metrics


def learn(
    parts: Parts,
    config: Config,
    optimizer: optax.GradientTransformation,
    rows: NamedSharding | None,
    state: TrainState,
    batch: Batch,
    key: Array,
) -> tuple[TrainState, dict[str, Array]]:
    """The optimizer steps of an iteration; and what each of them measured, `[steps]` a name."""
    which = trainable(config)

    def objective(params: Params, batch: Batch, key: Array) -> tuple[Mean, dict[str, Mean | Max]]:
        return loss(parts, config, params, batch, key)

    def optimizer_step(state: TrainState, i: Array) -> tuple[TrainState, dict[str, Array]]:
        epoch, part = i // config.minibatches, i % config.minibatches
        order = jax.random.permutation(jax.random.fold_in(key, epoch), config.rollouts)
        index = order.reshape(config.minibatches, config.micro_batches, -1)[part]

        def take(micro: Array) -> Batch:
            part = jax.tree.map(lambda a: a[index[micro]], batch)
            return part if rows is None else jax.lax.with_sharding_constraint(part, rows)

        gradient, seen = steps.accumulate(
            objective, state.params, take, config.micro_batches, key, trainable=which
        )
        learned = {name: part for name, part in gradient.items() if jax.tree.leaves(part)}
        seen |= {f"{name}_gradient_norm": optax.tree.norm(g) for name, g in learned.items()}
        return steps.apply_gradient(state, gradient, optimizer, trainable=which), seen

    return jax.lax.scan(optimizer_step, state, jnp.arange(config.epochs * config.minibatches))


def make_iteration(
    parts: Parts, config: Config, rows: NamedSharding | None = None
) -> Callable[[TrainState, Task, Array], tuple[TrainState, dict[str, Array]]]:
    """A whole iteration as one compiled program `(state, task, key) -> (state, metrics)`.

    The state is donated. Seeds, tasks and learning rates (`set_rates`) may be mapped over.

    rows: how responses lie on a mesh.
    """
    optimizer = make_optimizer(config)

    def iteration(state: TrainState, task: Task, key: Array) -> tuple[TrainState, dict[str, Array]]:
        sample_key, credit_key, learn_key = jax.random.split(key, 3)
        samples = sample(parts, config, rows, policy_of(state.params), task, sample_key)
        batch, metrics = estimate(parts, config, state, samples, credit_key)
        state, log = learn(parts, config, optimizer, rows, state, batch, learn_key)
        # Before the first optimizer step the policy is the one that sampled: this must be 0.
        metrics["ratio_error"] = log.pop("ratio_error")[0]
        # The first epoch sees each response once, the policy hardly moved.
        metrics["entropy"] = log.pop("entropy")[: config.minibatches].mean()
        metrics |= {name: values.mean() for name, values in log.items()}
        return _finish(state, samples.decoded, metrics)

    return jax.jit(iteration, donate_argnums=0)


def _finish(
    state: TrainState, decoded: Decoded, metrics: dict[str, Array]
) -> tuple[TrainState, dict[str, Array]]:
    """Counts the iteration; compares with the first one."""
    old, first = state.extra, state.step == 0
    extra = Extra(
        old.episodes + decoded.length.shape[0],
        old.tokens + decoded.length.sum(),
        jnp.where(first, metrics["length"], old.length),
        jnp.where(first, metrics["entropy"], old.entropy),
    )
    metrics |= {
        "length_growth": metrics["length"] / extra.length,
        "entropy_share": metrics["entropy"] / jnp.maximum(extra.entropy, returns.TINY),
        "episodes": extra.episodes,
        "tokens": extra.tokens,
    }
    return state._replace(step=state.step + 1, extra=extra), metrics


class Alarm(NamedTuple):
    """level: "warn" or "stop". reason: one line."""

    level: Literal["warn", "stop"]
    reason: str


def health(metrics: Mapping[str, float], config: Config) -> list[Alarm]:
    """What is wrong with an iteration, by its metrics as numbers on the host; empty if healthy."""
    alarms = []
    for limit in dataclasses.fields(config.limits):
        name, (warn, stop) = limit.name, getattr(config.limits, limit.name)
        sign = 1.0 if stop >= warn else -1.0
        value = metrics[name]
        # Almost all advantages positive is as bad as almost none.
        tested = min(value, 1 - value) if name == "positive_share" else value
        if sign * tested > sign * warn:
            level = "stop" if sign * tested > sign * stop else "warn"
            bound = stop if level == "stop" else warn
            alarms.append(Alarm(level, f"{name} = {value:.3g}: beyond {bound:g} ({level})"))
    return alarms
