"""OGBench's settings of each method for its tasks of states (Park et al. 2025), and its results.

A task's name is ENVIRONMENT-KIND, as in "pointmaze-medium-navigate": what is to be done, and which
data there are to learn it from.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

from jaxalign.core.types import UserError
from jaxalign.methods import crl, gcbc, gciql, gcivl, hiql, qrl
from jaxalign.ops.goals import Goals

METHODS: Mapping[str, types.ModuleType] = {
    "gcbc": gcbc,
    "gcivl": gcivl,
    "gciql": gciql,
    "qrl": qrl,
    "crl": crl,
    "hiql": hiql,
}
TASKS = 5  # that every environment sets
FAMILIES = ("pointmaze", "antmaze", "humanoidmaze", "antsoccer", "cube", "scene", "puzzle")
KINDS = ("navigate", "stitch", "explore", "play", "noisy")

# Weight of cloning in the policies that climb Q, by family or, where data are of a sort of their
# own, by kind.
CLONING: Mapping[str, Mapping[str, float]] = {
    "gciql": {
        "pointmaze": 0.003,
        "antmaze": 0.3,
        "humanoidmaze": 0.1,
        "antsoccer": 0.1,
        "explore": 0.01,
        "play": 1.0,
        "noisy": 0.03,
    },
    "crl": {
        "pointmaze": 0.03,
        "antmaze": 0.1,
        "humanoidmaze": 0.1,
        "antsoccer": 0.3,
        "explore": 0.003,
        "play": 3.0,
        "noisy": 0.1,
    },
    "qrl": {
        "pointmaze": 0.0003,
        "antmaze": 0.003,
        "humanoidmaze": 0.001,
        "antsoccer": 0.003,
        "explore": 0.001,
        "play": 0.3,
        "noisy": 0.03,
    },
}

# Success in %, mean and standard deviation over eight seeds, in the order of METHODS.
PUBLISHED: Mapping[str, tuple[tuple[int, int], ...]] = {
    "pointmaze-medium-navigate": ((9, 6), (63, 6), (53, 8), (82, 5), (29, 7), (79, 5)),
    "pointmaze-large-navigate": ((29, 6), (45, 5), (34, 3), (86, 9), (39, 7), (58, 5)),
    "pointmaze-giant-navigate": ((1, 2), (0, 0), (0, 0), (68, 7), (27, 10), (46, 9)),
    "pointmaze-medium-stitch": ((23, 18), (70, 14), (21, 9), (80, 12), (0, 1), (74, 6)),
    "pointmaze-large-stitch": ((7, 5), (12, 6), (31, 2), (84, 15), (0, 0), (13, 6)),
    "pointmaze-giant-stitch": ((0, 0), (0, 0), (0, 0), (50, 8), (0, 0), (0, 0)),
    "cube-single-play": ((6, 2), (53, 4), (68, 6), (5, 1), (19, 2), (15, 3)),
    "scene-play": ((5, 1), (42, 4), (51, 4), (5, 1), (19, 2), (38, 3)),
}


def split(task: str) -> tuple[str, str]:
    """(family, kind) of a task. Raises: UserError for a name that is none."""
    family, kind = task.split("-")[0], task.split("-")[-1]
    if family not in FAMILIES or kind not in KINDS:
        raise UserError(
            f"task {task!r}: a task is called ENVIRONMENT-KIND, with an environment of "
            f"{', '.join(FAMILIES)} and a kind of {', '.join(KINDS)}; for example "
            "pointmaze-medium-navigate"
        )
    return family, kind


def settings(task: str, **changes: Any) -> dict[str, Any]:
    """The config of each method for a task, by the method's name.

    changes: to fields, where a config has them; "hidden" is the size of all its networks.
    Raises: UserError for a name that is no task's.
    """
    family, kind = split(task)
    configs = {name: method.Config() for name, method in METHODS.items()}
    for name, table in CLONING.items():
        alpha = table.get(kind, table.get(family))
        configs[name] = dataclasses.replace(configs[name], alpha=alpha)
    if kind == "explore":
        configs["hiql"] = dataclasses.replace(configs["hiql"], low_alpha=10.0, high_alpha=10.0)
    hidden = changes.pop("hidden", None)
    if hidden:
        changes |= {"value_hidden": hidden, "actor_hidden": hidden}
    return {
        name: _replaced(config, goals=_goals(config.goals, task), **changes)
        for name, config in configs.items()
    }


def _goals(goals: Goals, task: str) -> Goals:
    family, kind = split(task)
    manipulates = family in ("cube", "scene", "puzzle")
    steps = 100 if family == "humanoidmaze" else 10 if manipulates else 25
    far = family == "humanoidmaze" or "giant" in task
    anywhere = {"stitch": 0.5, "explore": 1.0}.get(kind, 0.0)
    return dataclasses.replace(
        goals, subgoal_steps=steps, discount=0.995 if far else 0.99, actor_random=anywhere
    )


def _replaced(config: Any, **changes: Any) -> Any:
    known = {field.name for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **{k: v for k, v in changes.items() if k in known})
