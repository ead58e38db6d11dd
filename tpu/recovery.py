"""What the launcher does next: a state machine without effects.

Given what was seen of the slice and of the run on it, and what has been done so far, `next_action`
says what to do, and `after` what is then to be remembered. Engines see and act: a queued resource
of Cloud TPU (`tpu.queued_resources`) or a JobSet on GKE (`tpu.gke`).

Exit codes are those of `experiments.cli`. 0 is the end. 1 (a bug), 2 (the user can mend it) and 3
(a number was not finite) would come again, so they stop. 42 (stopped by a signal, all saved), 134
(aborted, which is how a process ends whose peer is gone), 137 and 143 (killed) are what a
preemption looks like, so the run starts again with `--resume`.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

from experiments.cli import FINISHED, NON_FINITE, PREEMPTED, USER_ERROR

NO_CAPACITY = 4  # the launcher's own: the slice did not come within the time allowed
BUG, ABORTED = 1, 134
RESTARTABLE = (PREEMPTED, ABORTED, 137, 143)
FOUND_BY_ALL = (USER_ERROR, NON_FINITE)  # every process ends so, none as the echo of another


class Slice(enum.Enum):
    """The machines: nobody can tell, not asked for, on their way, there, or taken away."""

    UNKNOWN = "unknown"
    ABSENT = "absent"
    WAITING = "waiting"
    READY = "ready"
    LOST = "lost"


class Work(enum.Enum):
    """The run: cannot be asked after, not started, going, or ended on every machine."""

    UNKNOWN = "unknown"
    IDLE = "idle"
    RUNNING = "running"
    ENDED = "ended"


class Seen(NamedTuple):
    """What an engine sees at one moment. code: of the run, where it has ended."""

    slice: Slice
    work: Work = Work.UNKNOWN
    code: int = 0


class Past(NamedTuple):
    """What the launcher remembers.

    asked: the slice was asked for since it was last deleted.
    waited: seconds in the queue since then.
    unreached: commands in a row that brought no sign of the run.
    ended: looks in a row at which the run had ended.
    restarts: of the slice or the run, in all.
    streak: the same since the run was last seen going.
    started: the run was started before, so from now on with `--resume`.
    """

    asked: bool = False
    waited: float = 0.0
    unreached: int = 0
    ended: int = 0
    restarts: int = 0
    streak: int = 0
    started: bool = False


class Limits(NamedTuple):
    """How patient the launcher is.

    retries: restarts in all before it gives up.
    wait: seconds in the queue before it gives up.
    poll: seconds between two looks.
    unreached: commands in a row without a sign of the run after which a slice counts as lost.
    grace: seconds that an ended run waits, to see whether its slice is being taken away.
    backoff, longest: seconds before the first restart; each doubles it up to the longest.
    """

    retries: int = 20
    wait: float = 24 * 3600.0
    poll: float = 30.0
    unreached: int = 5
    grace: float = 60.0
    backoff: float = 30.0
    longest: float = 600.0


class Do(enum.Enum):
    """What an engine can be told."""

    CREATE = "create"
    WAIT = "wait"
    START = "start"  # copy, install, run
    RESTART = "restart"  # run again on the machines that are there
    FOLLOW = "follow"
    RECREATE = "recreate"  # delete; the next look finds nothing and creates anew
    FINISH = "finish"


class Action(NamedTuple):
    """One thing to do. seconds: to wait first. code: the launcher's exit code, to finish with."""

    do: Do
    why: str = ""
    seconds: float = 0.0
    code: int = 0


def combine(codes: Sequence[int]) -> int:
    """One exit code for the run, from those of its processes.

    A process that dies takes its peers with it, and they end by 134 or, where a collective fails
    under them, by 1. So 1 is a bug unless a peer was killed or preempted; 2 and 3 count always.
    """
    for code in FOUND_BY_ALL:
        if code in codes:
            return code
    killed = [code for code in codes if code in RESTARTABLE and code != ABORTED]
    others = [code for code in codes if code not in (FINISHED, BUG, *RESTARTABLE)]
    if others:
        return others[0]
    if killed:
        return killed[0]
    return BUG if BUG in codes else max(codes, default=FINISHED)


def next_action(seen: Seen, past: Past, limits: Limits) -> Action:
    """The next thing to do. Depends on its arguments alone."""
    if seen.slice is Slice.UNKNOWN:
        return _unknown(past, limits)
    if seen.slice is Slice.ABSENT and not past.asked:
        return _create(past, limits)
    if seen.slice in (Slice.ABSENT, Slice.LOST):
        return _again(Do.RECREATE, "the slice is gone", past, limits)
    if seen.slice is Slice.WAITING:
        return _wait_in_queue(past, limits)
    if seen.work in (Work.UNKNOWN, Work.IDLE) and past.unreached >= limits.unreached:
        return _again(Do.RECREATE, "the machines do not do as told", past, limits)
    if seen.work is Work.UNKNOWN:
        return Action(Do.WAIT, "the machines do not answer yet", _pause(past.unreached, limits))
    if seen.work is Work.IDLE:
        return Action(Do.START, "copying, installing, starting", _retry_pause(past, limits))
    if seen.work is Work.RUNNING:
        return Action(Do.FOLLOW)
    return _ended(seen.code, past, limits)


def _unknown(past: Past, limits: Limits) -> Action:
    """The engine does not answer. Its machines may be well: nothing is ordered or deleted."""
    if not past.asked:
        return Action(Do.FINISH, "the state of the slice cannot be seen", code=USER_ERROR)
    if past.unreached >= 4 * limits.unreached:
        return Action(Do.FINISH, "the state of the slice can no longer be seen", code=BUG)
    return Action(Do.WAIT, "no answer; asking again", _pause(past.unreached, limits))


def _create(past: Past, limits: Limits) -> Action:
    most = limits.unreached if past.started else 1  # a first order that is refused is a mistake
    if past.unreached >= most:
        return Action(Do.FINISH, "the slice cannot be ordered", code=USER_ERROR)
    return Action(Do.CREATE, "ordering the slice", _retry_pause(past, limits))


def _wait_in_queue(past: Past, limits: Limits) -> Action:
    if past.waited >= limits.wait:
        hours = f"{limits.wait / 3600:g} h"
        return Action(Do.FINISH, f"no slice came within {hours}", code=NO_CAPACITY)
    return Action(Do.WAIT, "waiting for the slice", limits.poll)


def _ended(code: int, past: Past, limits: Limits) -> Action:
    if code == FINISHED:
        return Action(Do.FINISH, "the run has finished")
    if code not in RESTARTABLE:
        return Action(Do.FINISH, f"the run ended with code {code}, not to be retried", code=code)
    if past.ended == 0:
        return Action(Do.WAIT, f"the run ended with code {code}", limits.grace)
    return _again(Do.RESTART, f"the run ended with code {code}", past, limits)


def _again(do: Do, why: str, past: Past, limits: Limits) -> Action:
    """One restart more, or the end where there were too many."""
    if past.restarts >= limits.retries:
        return Action(Do.FINISH, f"{why}, after {past.restarts} restarts", code=PREEMPTED)
    return Action(do, why, _pause(past.streak, limits))


def _retry_pause(past: Past, limits: Limits) -> float:
    return _pause(past.unreached - 1, limits) if past.unreached else 0.0


def _pause(times: int, limits: Limits) -> float:
    return min(limits.backoff * 2.0**times, limits.longest)


def after(action: Action, seen: Seen, past: Past, reached: bool = True) -> Past:
    """What is remembered once the action was taken. reached: its commands went well."""
    alive = seen.work in (Work.RUNNING, Work.ENDED)
    unanswered = seen.slice is Slice.UNKNOWN or (seen.slice is Slice.READY and not alive)
    past = past._replace(
        asked=past.asked or seen.slice in (Slice.WAITING, Slice.READY, Slice.LOST),
        waited=past.waited + action.seconds if seen.slice is Slice.WAITING else past.waited,
        unreached=(0 if alive else past.unreached) + int(unanswered or not reached),
        ended=past.ended + 1 if seen.work is Work.ENDED and action.do is Do.WAIT else 0,
        streak=0 if action.do is Do.FOLLOW else past.streak,
        started=past.started or alive or (action.do is Do.START and reached),
    )
    if action.do in (Do.RECREATE, Do.RESTART):
        past = past._replace(restarts=past.restarts + 1, streak=past.streak + 1)
    if action.do is Do.RECREATE:
        return past._replace(asked=False, waited=0.0, unreached=0, ended=0)
    if action.do is Do.CREATE and reached:
        return past._replace(asked=True, unreached=0)
    return past
