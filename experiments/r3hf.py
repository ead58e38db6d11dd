"""R3HF: rewards of single tokens against rewards at the end, with controls.

    python -m experiments.r3hf [synthetic | text | tiny | claims | nectar | tldr | saferlhf]

A run fine-tunes a policy, trains a reward model on preferences, and then each arm aligns the policy
with as many responses; it leaves a folder an arm, the numbers of all of them, and a report.
"""

from __future__ import annotations

import dataclasses

from experiments import cli, r3hf_claims, report
from experiments.language import Experiment, check, make_lab, run_arms
from experiments.problems import Name, Network, Source
from experiments.r3hf_claims import Claims
from jaxalign.methods import r3hf, reward_model, supervised


def synthetic() -> Experiment:
    """A world with a gold score, on two CPU cores in minutes."""
    return Experiment(rl=small())


def text() -> Experiment:
    """English of Python's help pages, judged by rules."""
    return Experiment(
        source=Source(
            "text",
            response=32,
            noise=1.0,
            demonstrations=8192,
            pairs=8192,
        ),
        arms=("sparse", "redistributed", "calibrated"),
        reward=reward_model.Config(updates=300),
        calibration=reward_model.Config(updates=300),
        rl=small(),
    )


def tiny() -> Experiment:
    """Everything once, in under a minute on one CPU."""
    return Experiment(
        source=Source(
            response=8,
            network=Network(width=16, depth=1, heads=2),
            prompts=64,
            demonstrations=256,
            pairs=256,
        ),
        arms=("sparse", "calibrated"),
        fine_tuning=supervised.Config(updates=20),
        reward=reward_model.Config(updates=20),
        calibration=reward_model.Config(updates=10),
        calibration_responses=64,
        rl=small(iterations=3, rollouts=16),
        evaluate_every=3,
        evaluated=16,
        save_every=1,
        stop_when_ill=False,
    )


def claims() -> Claims:
    """What redistribution gains, with controls, ten seeds: hours on two cores, resumable."""
    return Claims()


def small(**changes: object) -> r3hf.Config:
    """Iterations that a CPU runs in a tenth of a second each; rates fit for small networks."""
    config = r3hf.Config(
        iterations=100, rollouts=64, kl_weight=0.05, policy_rate=1e-3, critic_rate=1e-3
    )
    return dataclasses.replace(config, **changes)


def paper(name: Name, **changes: object) -> Experiment:
    """A real set with the paper's settings: rates 1e-5 and 5e-6, KL .02, beta_c 1.

    Ours, where the paper is silent: 512 prompt and 512 response tokens, 128 responses an iteration,
    one pass over 7,680 of them, two epochs of four minibatches, lambda .95, the critic from the
    reward model, reward models for 2,000 updates at 1e-5.
    """
    return Experiment(
        source=Source(name, prompt=512, response=512, pairs=200_000, demonstrations=100_000),
        arms=("sparse_reward_critic", "redistributed"),
        fine_tuning=supervised.Config(updates=1000, batch=64, micro_batches=8, learning_rate=1e-5),
        reward=reward_model.Config(updates=2000, batch=64, micro_batches=8, learning_rate=1e-5),
        rl=dataclasses.replace(
            r3hf.Config(
                iterations=60,
                rollouts=128,
                minibatches=4,
                micro_batches=4,
                # Rollout and update differ by the rounding of bfloat16's products.
                limits=r3hf.Limits(ratio_error=(0.5, 2.0)),
            ),
            **changes,
        ),
    )


def nectar() -> Experiment:
    """Question answering; needs --source.data and --source.model."""
    return paper("nectar")


def tldr() -> Experiment:
    """Summaries; needs --source.data and --source.model (beta_c is .5 for LLaMA-3 in the paper)."""
    return paper("tldr")


def saferlhf() -> Experiment:
    """Helpful and safe, with a reward and a cost model; needs --source.data and --source.model."""
    return paper("saferlhf")


PRESETS = {
    "synthetic": synthetic,
    "text": text,
    "tiny": tiny,
    "claims": claims,
    "nectar": nectar,
    "tldr": tldr,
    "saferlhf": saferlhf,
}


def run_all(run: cli.Run) -> None:
    """Every seed of the command line, one after the other, then the report."""
    if isinstance(run.config, Claims):
        print(f"tables: {r3hf_claims.run(cli.open_workdir(run), run.config)}")
        return
    check(run.config)
    for each in cli.open_seeds(run):
        lab = make_lab(each.config)
        print(f"the reward model orders {100 * lab.accuracy:.1f} % of held-back pairs as labelled")
        run_arms(lab, each.config, each.workdir, resume=each.resume)
    print(report.table(run.workdir))
    print(f"report: {report.build(run.workdir)}")


if __name__ == "__main__":
    cli.main(run_all, "r3hf", PRESETS, "synthetic")
