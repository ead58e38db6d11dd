"""B2-DiffuRL against its neighbours on two picture worlds.

    python -m experiments.b2_diffurl [digits | sprites | tiny | claims]
    python -m experiments.b2_diffurl sd14-template1 --model DIR --rewards.clip DIR

A run trains a base model (cached), or reads Stable Diffusion from a folder, then trains each arm
from it at the same number of reward evaluations, and leaves a folder an arm, the numbers of all of
them, and a report with pictures.
"""

from __future__ import annotations

import dataclasses

from experiments import b2_claims, cli, report, stable_diffusion
from experiments.b2_claims import Claims
from experiments.pictures import Experiment, Network, check, make_lab, run_arms, small
from jaxalign.methods import b2_diffurl, denoising


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


def sd14_template1() -> stable_diffusion.Experiment:
    """Stable Diffusion 1.4, animals that do what people do, as released; needs --model."""
    return stable_diffusion.Experiment()


def sd14_template2() -> stable_diffusion.Experiment:
    """The same on fruits and vegetables in a colour."""
    return stable_diffusion.Experiment(prompts="template2")


def sd14_template3() -> stable_diffusion.Experiment:
    """The same on things somewhere to each other."""
    return stable_diffusion.Experiment(prompts="template3")


def sd14_ddpo() -> stable_diffusion.Experiment:
    """DDPO on the animals: independent paths, every step trained; as many pictures."""
    return stable_diffusion.Experiment(arms=("ddpo",))


def sd_tiny() -> stable_diffusion.Experiment:
    """A pipeline of random weights, made on the spot, all the way in a minute on one CPU."""
    return stable_diffusion.Experiment(
        model=stable_diffusion.RANDOM,
        dtype="float32",
        groups_per_device=4,
        pairs_per_device=8,
        b2=b2_diffurl.Config(
            stages=3, groups=8, branches=(2,), steps=4, suffix_start=2, suffix_stop=3,
            updates=2, epochs=1, lora_rank=4, learning_rate=1e-3,
        ),
        evaluate_every=3,
        evaluate_prompts=3,
        pictures=3,
        save_every=1,
    )  # fmt: skip


PRESETS = {
    "digits": digits,
    "sprites": sprites,
    "tiny": tiny,
    "claims": claims,
    "sd14-template1": sd14_template1,
    "sd14-template2": sd14_template2,
    "sd14-template3": sd14_template3,
    "sd14-ddpo": sd14_ddpo,
    "sd-tiny": sd_tiny,
}


def run_all(run: cli.Run) -> None:
    """Every seed of the command line, one after the other, then the report."""
    if isinstance(run.config, Claims):
        print(f"tables: {b2_claims.run(cli.open_workdir(run), run.config)}")
        return
    if isinstance(run.config, stable_diffusion.Experiment):
        stable_diffusion.run_all(run)
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
