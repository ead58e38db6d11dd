"""Policies judged in the real environments of OGBench, which run in processes of their own.

The five tasks of an environment are each tried a number of times. All tries that are under way take
their steps together: their observations are one batch, so the policy is asked once a step whatever
the number of processes. A try ends with success or at the environment's horizon; it counts as a
success when the environment says so at any step, as in OGBench's own evaluation.

A try depends on the seed, the task and its number only (and on the policy). For that, each has the
three generators that the environments draw from: the environment's own, that of its action space
(a few random steps settle the goal's scene), and NumPy's global one (mazes), which is exchanged as
the environments of a process take turns.

Dimensions: B tries under way, O observation, A action, n tries of a task.
"""

from __future__ import annotations

import difflib
import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from experiments.ogbench_settings import TASKS
from jaxalign.core.types import UserError
from jaxalign.data import ogbench_play

CLOSING = 5.0  # seconds that a process has to end by itself

# (observation [B, O] f32, goal [B, O] f32) -> action [B, A]
Act = Callable[[np.ndarray, np.ndarray], Any]


class Try(NamedTuple):
    """One episode to be played: its task from 1 to 5, its number in the task, and its seed."""

    task: int
    number: int
    seed: int


class View(NamedTuple):
    """What a process shows of its environments before each step; rows are B_w environments.

    observation, goal: `[B_w, O] f32`. Zeros where an environment has nothing left to play.
    ended: the tries that the last step ended, each with its success.
    playing: `[B_w] bool`, whether an environment has a try.
    """

    observation: np.ndarray
    goal: np.ndarray
    ended: list[tuple[Try, bool]]
    playing: np.ndarray


class RealEnvironments:
    """OGBench's environments of one name, ready for tries; a context that ends the processes.

    name: as "pointmaze-medium", "antmaze-large", "cube-single", "scene", "puzzle-3x3".
    workers: processes; as many as there are cores where None.
    each: environments in a process, at most; more make larger batches and fewer of them. One takes
        about 60 MB, and a second to make where there is an arm; none is made that has no try.
    Raises: UserError where the packages are missing, there is no such environment, or it does not
        have states and continuous actions.
    """

    def __init__(self, name: str, workers: int | None = None, each: int = 10) -> None:
        ogbench_play.require_packages(f"environment {name!r}")
        workers = ogbench_play.cores() if workers is None else workers
        if workers < 1 or each < 1:
            raise UserError(f"{workers} workers of {each} environments: give 1 or more of both")
        self.name, self.each = name, each
        context = multiprocessing.get_context("spawn")
        self._links: list[Connection] = []
        self._processes: list[Any] = []
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, name, each), daemon=True)
            process.start()
            theirs.close()  # so that the end of the process is the end of the link
            self._links.append(ours)
            self._processes.append(process)
        try:
            sizes = [self._receive(link) for link in self._links]
        except BaseException:
            self.close()
            raise
        self.action_size: int = sizes[0]

    def evaluate(
        self,
        act: Act,
        episodes: int,
        seed: int,
        progress: Callable[[int], object] | None = None,
    ) -> np.ndarray:
        """Which tries ended well, `[5, episodes] bool`.

        act: gives actions `[B, A]` in [-1, 1] (what lies beyond is cut) for observations and goals
            `[B, O] f32`, B the same at every call, with rows of zeros where no try is left.
        episodes: n, tries of each task.
        seed: of the tries; the same seed starts the same ones.
        progress: called with the count of tries that have ended.
        Raises: UserError for actions of another shape or not finite, or a process that died.
        """
        if episodes < 1 or seed < 0:
            raise UserError(f"{episodes} episodes, seed {seed}: give 1 or more, and a seed from 0")
        tries = list(_tries(episodes, seed))
        for worker, link in enumerate(self._links):
            self._send(link, tries[worker :: len(self._links)])
        success = np.zeros((TASKS, episodes), bool)
        ended = 0
        while True:
            views = [self._receive(link) for link in self._links]
            for done, well in (result for view in views for result in view.ended):
                success[done.task - 1, done.number] = well
                ended += 1
            if progress is not None:
                progress(ended)
            if not any(view.playing.any() for view in views):
                return success
            self._step(act, views)

    def close(self) -> None:
        """Ends the processes."""
        for link, process in zip(self._links, self._processes, strict=True):
            link.close()  # by which a process that waits for actions ends itself
            process.join(CLOSING)
            process.terminate()
            process.join()

    def __enter__(self) -> RealEnvironments:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _step(self, act: Act, views: list[View]) -> None:
        """Asks the policy once, and sends each process its rows of the answer."""
        observation, goal, playing = (
            np.concatenate([getattr(view, field) for view in views])
            for field in ("observation", "goal", "playing")
        )
        action = np.asarray(jax.device_get(act(observation, goal)))
        wanted = (len(observation), self.action_size)
        if action.shape != wanted or not np.isfinite(action[playing]).all():
            kind = "numbers that are not finite" if action.shape == wanted else "another shape"
            raise UserError(
                f"the policy's actions in {self.name} are {kind}, {action.shape}: give finite "
                f"numbers of shape {wanted}"
            )
        ends = np.cumsum([len(view.observation) for view in views])[:-1]
        for link, rows in zip(self._links, np.split(action, ends), strict=True):
            self._send(link, np.clip(rows, -1.0, 1.0))

    def _send(self, link: Connection, message: Any) -> None:
        try:
            link.send(message)
        except OSError:
            self._died(link)

    def _receive(self, link: Connection) -> Any:
        try:
            answer = link.recv()
        except (EOFError, OSError):
            self._died(link)
        if isinstance(answer, UserError):
            raise answer
        return answer

    def _died(self, link: Connection) -> NoReturn:
        process = self._processes[self._links.index(link)]
        process.join()
        raise UserError(
            f"a process with environments of {self.name} died with exit code {process.exitcode}, "
            "as for lack of memory; use fewer workers, or fewer environments in each"
        )


def _tries(episodes: int, seed: int) -> Iterator[Try]:
    """Tries of all tasks; the tasks by turns, as some take longer than others."""
    for number in range(episodes):
        for task in range(1, TASKS + 1):
            words = np.random.SeedSequence((seed, task, number)).generate_state(1)
            yield Try(task, number, int(words[0]))


# ---------------------------------------------------------------- in the processes


class Seat:
    """An environment that plays one try after another."""

    def __init__(self, environment: Any) -> None:
        self.environment = environment
        self.nothing = np.zeros(environment.observation_space.shape, np.float32)
        self.current: Try | None = None
        self.observation = self.goal = self.nothing
        self.generator = np.random.MT19937()

    def start(self, chosen: Try | None) -> None:
        """Sets up the start and the goal of a try; with None there is nothing left to play."""
        self.current = chosen
        if chosen is None:
            self.observation = self.goal = self.nothing
            return
        self._take_turn()
        np.random.seed(chosen.seed)
        self.environment.unwrapped.action_space.seed(chosen.seed)
        observation, info = self.environment.reset(
            seed=chosen.seed, options={"task_id": chosen.task}
        )
        self.observation = observation.astype(np.float32)
        self.goal = info["goal"].astype(np.float32)

    def step(self, action: np.ndarray) -> tuple[Try, bool] | None:
        """Takes a step of the try, if there is one; the try and its success where it ended."""
        if self.current is None:
            return None
        self._take_turn()
        observation, _, terminated, truncated, info = self.environment.step(action)
        self.observation = observation.astype(np.float32)
        # An environment ends at its first success, so the last step's word is that of any step.
        return (self.current, bool(info["success"])) if terminated or truncated else None

    def _take_turn(self) -> None:
        """Makes its generator NumPy's global one, which was another environment's before."""
        np.random.set_bit_generator(self.generator)  # ty: ignore[missing-attribute]


class Stage:
    """The environments of a process, and the tries that wait for one."""

    def __init__(self, name: str, each: int) -> None:
        self.name, self.each = name, each
        self.made = [Seat(_make(name))]
        self.seats = self.made
        self.waiting: Iterator[Try] = iter(())

    def begin(self, tries: list[Try]) -> View:
        """Forgets what was played before, and starts as many tries as there are seats."""
        count = max(1, min(self.each, len(tries)))
        while len(self.made) < count:
            self.made.append(Seat(_make(self.name)))
        self.seats, self.waiting = self.made[:count], iter(tries)
        for seat in self.seats:
            seat.start(next(self.waiting, None))
        return self._view([])

    def step(self, actions: np.ndarray) -> View:
        """Takes a step everywhere; where a try ends by it, the next one starts."""
        ended = []
        for seat, action in zip(self.seats, actions, strict=True):
            if result := seat.step(action):
                ended.append(result)
                seat.start(next(self.waiting, None))
        return self._view(ended)

    def _view(self, ended: list[tuple[Try, bool]]) -> View:
        return View(
            observation=np.stack([seat.observation for seat in self.seats]),
            goal=np.stack([seat.goal for seat in self.seats]),
            ended=ended,
            playing=np.array([seat.current is not None for seat in self.seats]),
        )


def _serve(link: Connection, name: str, each: int) -> None:
    """The life of a process: tells the size of actions, then answers what it is sent with views."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            tempfile.tempdir = folder  # each maze leaves a file behind
            _answer(link, Stage(name, each))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return  # the other side has ended
    except UserError as error:
        link.send(error)
    except Exception as error:
        traceback.print_exc()
        reason = (str(error).strip().splitlines() or ["without a word"])[0]
        link.send(UserError(f"environment {name!r} raised {type(error).__name__}: {reason}"))


def _answer(link: Connection, stage: Stage) -> NoReturn:
    link.send(stage.seats[0].environment.unwrapped.action_space.shape[0])
    while True:
        message = link.recv()
        actions = isinstance(message, np.ndarray)
        link.send(stage.step(message) if actions else stage.begin(message))


def _make(name: str) -> Any:
    """The environment of that name. Raises: UserError if there is none."""
    os.environ.setdefault("MUJOCO_GL", "disabled")  # nothing is drawn, so no display is looked for
    import gymnasium
    import ogbench  # noqa: F401, as it registers the environments

    warnings.filterwarnings("ignore", ".*precision lowered by casting")  # of the action's bounds
    known = [
        key.removesuffix("-v0") for key, spec in gymnasium.registry.items() if _is_taken(key, spec)
    ]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        told = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(known)}"
        raise UserError(f"no environment {name!r} with states and continuous actions: {told}")
    environment = gymnasium.make(f"{name}-v0", disable_env_checker=True)
    _keep_action_space(environment.unwrapped)
    return environment


def _is_taken(key: str, spec: Any) -> bool:
    """Whether it is one of OGBench's goal-conditioned environments with states as observations."""
    others = ("visual-", "online-", "powderworld", "singletask")
    from_ogbench = str(spec.entry_point).startswith("ogbench.")
    return from_ogbench and not any(other in key for other in others)


def _keep_action_space(environment: Any) -> None:
    """Makes the action space one object: the arm's is a new one, unseeded, each time it is read."""
    space, kind = environment.action_space, type(environment)
    if environment.action_space is not space:
        environment.__class__ = type(kind.__name__, (kind,), {"action_space": space})
