"""An iteration of PPO on token rewards with torch and transformers, for `experiments.bench_rlhf`.

The same algorithm as `methods.r3hf` on the same weights, written as one writes it well:
log-densities of the sampled tokens come from the logits that `generate` made, logits exist for
response slots only, no cache is kept in training, and the optimizer is fused. Imported only where
torch is installed.

Dimensions: B responses, P prompt slots, T response slots, L = P + T, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.bench_decode import in_transformers
from jaxalign.core.types import Params, UserError
from jaxalign.methods.r3hf import Config
from jaxalign.models import gpt2
from jaxalign.ops.sampling import Sampling


class Sampled(NamedTuple):
    """ids, mask: `[B, L]`. log_density: `[B, T]`, 0 beyond the end. stopped: `[B] bool`."""

    ids: Tensor
    mask: Tensor
    log_density: Tensor
    stopped: Tensor

    @property
    def response(self) -> Tensor:
        """Which response tokens are real, `[B, T] bool`."""
        return self.mask[:, -self.log_density.shape[1] :]


class Batch(NamedTuple):
    """As `methods.r3hf.Batch`: ids, mask `[B, L]`, the rest `[B, T]`."""

    ids: Tensor
    mask: Tensor
    log_density: Tensor
    advantage: Tensor
    value: Tensor
    target: Tensor


class Scalar(nn.Module):
    """The network of a language model with a scalar head: scores `[B, L]` of all prefixes."""

    def __init__(self, network: gpt2.Config, params: Params) -> None:
        super().__init__()
        self.trunk = in_transformers(network, params["model"]).transformer
        self.head = nn.Linear(network.width, 1)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor(np.asarray(params["head"]["kernel"]).T))
            self.head.bias.copy_(torch.tensor(np.asarray(params["head"]["bias"])))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        out = self.trunk(
            ids, attention_mask=mask.long(), position_ids=positions(mask), use_cache=False
        )
        return self.head(out.last_hidden_state)[..., 0]


def positions(mask: Tensor) -> Tensor:
    """Each token's place among the real ones `[B, L]`."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def last_token(response: Tensor) -> Tensor:
    """`[B, T] bool`, true at the last true place of each row."""
    place = torch.arange(response.shape[1])
    return response & (place == response.sum(1, keepdim=True) - 1)


def advantages(
    reward: Tensor, value: Tensor, response: Tensor, discount: float, decay: float
) -> Tensor:
    """Generalised advantages `[B, T]`, 0 off the response."""
    following = F.pad(value[:, 1:], (0, 1))
    error = reward + discount * following - value
    carried, result = torch.zeros(len(error)), torch.zeros_like(error)
    for t in reversed(range(error.shape[1])):
        carried = torch.where(response[:, t], error[:, t] + discount * decay * carried, 0.0)
        result[:, t] = carried
    return result


def generation(length: int, stop: int, pad: int) -> Any:
    """How `generate` samples: from the whole distribution, keeping the logits."""
    import transformers

    return transformers.GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length,
        eos_token_id=stop,
        pad_token_id=pad,
        return_dict_in_generate=True,
        output_logits=True,
    )


class Iteration:
    """One iteration after the other, on the networks, prompts and configuration of a problem."""

    def __init__(self, problem: Any) -> None:
        """problem: a `bench_rlhf.Problem`."""
        self.check(problem.config)
        self.config, decoding = problem.config, problem.parts.decoding
        self.length, self.stop, self.pad = decoding.length, decoding.stop[0], decoding.pad
        self.how = generation(self.length, self.stop, self.pad)
        params = problem.state.params
        self.policy = in_transformers(problem.network, params["policy"])
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)
        self.reward = Scalar(problem.network, problem.task.reward).requires_grad_(False)
        self.critic = Scalar(problem.network, params["critic"])
        prompts = problem.task.prompts
        self.prompts = torch.tensor(np.asarray(prompts.ids), dtype=torch.long)
        self.prompt_mask = torch.tensor(np.asarray(prompts.mask))
        rates = {self.policy: self.config.policy_rate, self.critic: self.config.critic_rate}
        self.optimizers = {
            net: torch.optim.Adam(net.parameters(), lr=rate, fused=True)
            for net, rate in rates.items()
        }

    @staticmethod
    def check(config: Config) -> None:
        plain = (config.algorithm, config.credit, config.sampling)
        if plain != ("ppo", "redistributed", Sampling()):
            raise UserError(
                f"algorithm = {config.algorithm}, credit = {config.credit}: the torch iteration "
                "knows ppo, redistributed and sampling at temperature 1; add --no-torch"
            )

    @torch.no_grad()
    def sample(self) -> Sampled:
        """Draws prompts, and responses to them."""
        config = self.config
        drawn = torch.randint(len(self.prompts), (config.rollouts // config.group,))
        drawn = drawn.repeat_interleave(config.group)
        prompt, mask = self.prompts[drawn], self.prompt_mask[drawn]
        out = self.policy.generate(prompt, attention_mask=mask.long(), generation_config=self.how)
        logits = torch.stack(out.logits, 1)
        missing = self.length - logits.shape[1]  # where all rows have ended early
        ids = F.pad(out.sequences, (0, missing), value=self.pad)
        token = ids[:, -self.length :]
        ends = token == self.stop
        response = ends.cumsum(1) - ends.long() == 0
        density = -F.cross_entropy(
            logits.transpose(1, 2), token[:, : logits.shape[1]], reduction="none"
        )
        density = F.pad(density, (0, missing)).where(response, 0.0)
        return Sampled(ids, torch.cat([mask, response], 1), density, ends.any(1))

    def log_softmax(self, policy: Any, ids: Tensor, mask: Tensor) -> Tensor:
        """Log-probabilities `[B, T, V]` of what follows, at each response slot."""
        out = policy(
            ids,
            attention_mask=mask.long(),
            position_ids=positions(mask),
            use_cache=False,
            logits_to_keep=self.length + 1,
        )
        return out.logits[:, :-1].log_softmax(-1)

    def density(self, log_softmax: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Log-densities `[B, T]` of the response tokens, 0 beyond the end."""
        token = ids[:, -self.length :, None]
        return log_softmax.gather(2, token)[..., 0].where(mask[:, -self.length :], 0.0)

    def values(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The critic's scores of the prefix before each response token `[B, T]`."""
        scores = self.critic(ids, mask)[:, -self.length - 1 : -1]
        return scores.where(mask[:, -self.length :], 0.0)

    @torch.no_grad()
    def estimate(self, sampled: Sampled) -> Batch:
        """What each token was worth."""
        config, (ids, mask, density, stopped) = self.config, sampled
        response, last = sampled.response, last_token(sampled.response)
        reference = self.density(self.log_softmax(self.reference, ids, mask), ids, mask)
        scores = self.reward(ids, mask)
        after, before = scores[:, -self.length :], scores[:, -self.length - 1 : -1]
        dense, final = (after - before).where(response, 0.0), after.where(last, 0.0)
        reward = config.dense_weight * dense + (1 - config.dense_weight) * final
        reward = reward - config.missing_stop_penalty * (last & ~stopped[:, None])
        reward = reward - config.kl_weight * (density - reference)
        value = self.values(ids, mask)
        advantage = advantages(reward, value, response, config.discount, config.decay)
        target = advantage + value
        if config.whiten:
            real = advantage[response]
            scale = real.std(correction=0) + 1e-8
            advantage = ((advantage - real.mean()) / scale).where(response, 0.0)
        return Batch(ids, mask, density, advantage, value, target)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Sums over the tokens of the clipped surrogate and of the critic's clipped error, which
        are minimised, and of what is reported beside them.
        """
        config, response = self.config, batch.mask[:, -self.length :]
        log_softmax = self.log_softmax(self.policy, batch.ids, batch.mask)
        density = self.density(log_softmax, batch.ids, batch.mask)
        ratio = (density - batch.log_density).exp()
        held = ratio.clamp(1 - config.clip, 1 + config.clip)
        surrogate = torch.maximum(-batch.advantage * ratio, -batch.advantage * held)
        value = self.values(batch.ids, batch.mask)
        held = batch.value + (value - batch.value).clamp(-config.value_clip, config.value_clip)
        error = torch.maximum((value - batch.target) ** 2, (held - batch.target) ** 2) / 2
        with torch.no_grad():
            entropy = -(log_softmax.exp() * log_softmax).sum(-1).where(response, 0.0)
            clipped = (ratio - 1).abs() > config.clip
        return {
            "policy_loss": surrogate.sum(),
            "value_loss": error.sum(),
            "entropy": entropy.sum(),
            "clipped": clipped.sum(),
        }

    def learn(self, batch: Batch) -> list[dict[str, Tensor]]:
        """All optimizer steps; what each of them measured, a token."""
        config, log = self.config, []
        for _ in range(config.epochs):
            for part in torch.randperm(config.rollouts).chunk(config.minibatches):
                log.append(self._optimizer_step(Batch(*(a[part] for a in batch))))
        return log

    def _optimizer_step(self, batch: Batch) -> dict[str, Tensor]:
        tokens, seen = batch.mask[:, -self.length :].sum(), {}
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        for micro in torch.arange(len(batch.ids)).chunk(self.config.micro_batches):
            sums = self.loss(Batch(*(a[micro] for a in batch)))
            ((sums["policy_loss"] + sums["value_loss"]) / tokens).backward()
            seen = {name: seen.get(name, 0) + x.detach() / tokens for name, x in sums.items()}
        for net, optimizer in self.optimizers.items():
            clip = self.config.gradient_clip
            nn.utils.clip_grad_norm_(net.parameters(), clip, foreach=True)
            optimizer.step()
        return seen

    def run(self) -> int:
        """One iteration; returns the response tokens."""
        sampled = self.sample()
        self.learn(self.estimate(sampled))
        return int(sampled.response.sum())
