"""B2-DiffuRL against its neighbours on two picture worlds.

    python -m experiments.b2_diffurl [digits | sprites | tiny | claims]

A run trains a base model (cached), then each arm from it at the same number of reward evaluations,
and leaves a folder an arm, the numbers of all of them, and a report with pictures.
"""

from __future__ import annotations

import dataclasses

from experiments import b2_claims, cli, report
from experiments.b2_claims import Claims
from experiments.pictures import Experiment, Network, check, make_lab, run_arms, small
from jaxalign.methods import denoising


def digits() -> Experiment:
    """Real handwriting: DDPO, B2-DiffuRL and telescoping credit on two CPU cores in minutes."""
    return Experiment(
        world="digits",
        reward="digits",
        b2=small(stages=30),
    )


def sprites() -> Experiment:
    """Procedural pictures with an exact oracle."""
    return Experiment(world="sprites", reward="mixed", b2=small(stages=40))


def tiny() -> Experiment:
    """Everything once, in under a minute on one CPU."""
    return Experiment(
        world="sprites",
        reward="mixed",
        grammar="colour",
        arms=("ddpo", "telescope"),
        network=Network(width=16, depth=1, heads=2),
        base=denoising.Config(updates=20, batch=16),
        b2=dataclasses.replace(
            small(stages=3), groups=8, branches=(2,), steps=4, suffix_start=3, suffix_stop=4
        ),
        evaluate_every=3,
        pictures=2,
        save_every=1,
    )


def claims() -> Claims:
    """The paper's comparisons on both worlds, eight seeds: an hour and more, resumable."""
    return Claims()


PRESETS = {"digits": digits, "sprites": sprites, "tiny": tiny, "claims": claims}


def run_all(run: cli.Run) -> None:
    """Every seed of the command line, one after the other, then the report."""
    if isinstance(run.config, Claims):
        print(f"tables: {b2_claims.run(cli.open_workdir(run), run.config)}")
        return
    check(run.config)
    for each in cli.open_seeds(run):
        lab = make_lab(each.config)
        run_arms(lab, each.config, each.workdir, resume=each.resume)
    for name, share in lab.world.accuracy(lab.world.reward_params).items():
        print(
            f"the reward's reader names {100 * share:.1f} % of the held-out {name} digits rightly"
        )
    print(report.table(run.workdir))
    print(f"report: {report.build(run.workdir)}")


if __name__ == "__main__":
    cli.main(run_all, "b2_diffurl", PRESETS, "digits")
