"""Rewards that run on the host: an image encoder, a parser, a server, another library's network.

Such a reward is asked in a thread of its own, so the devices go on with what was dispatched to them
meanwhile, and what goes wrong in it ends the run with one line instead of a hang or a traceback.

Of a run on several processes each asks its own reward about the pictures on its own devices, every
picture once; all learn all rewards, and what goes wrong on one ends all.

Dimensions: B pictures asked about at once, H W C a picture.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.core import distributed
from jaxalign.core.types import Array, NonFinite, PyTree, UserError

# (pictures [B, H, W, C] u8, {"prompt": [B], "target": ..., ...}) -> [B] numbers, all of numpy
Score = Callable[[np.ndarray, dict[str, Any]], Any]
Future = futures.Future[np.ndarray]

LOOK = 0.05  # seconds between two looks at the clock while waiting


def to_uint8(pictures: Array | np.ndarray) -> Array:
    """Pictures in [-1, 1] as bytes, `[B, H, W, C] u8`; what lies beyond is cut."""
    return jnp.clip(jnp.round(pictures * 127.5 + 127.5), 0, 255).astype(jnp.uint8)


class HostReward:
    """A reward on the host with a thread that asks it; a context manager that ends the thread.

    name: what the run's errors call it.
    score: gets arrays of its own, which it may change, and is never called twice at a time.
    timeout: seconds that one call of `score` may take; waiting for the pictures does not count.
    """

    def __init__(self, name: str, score: Score, timeout: float = 60.0) -> None:
        if not timeout > 0:
            raise UserError(f"reward {name}: timeout = {timeout}: must be positive; give seconds")
        self.name, self.timeout = name, timeout
        self._score = score
        self._jobs: queue.SimpleQueue[tuple[Future, Array, PyTree] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._begun: float | None = None  # when the running call of `score` began
        self._closed = False

    def submit(self, pictures: Array, batch: PyTree) -> Future:
        """Asks for the rewards of pictures `[B, H, W, C] u8` that may not be computed yet.

        Returns at once, with what `result` takes. batch: what else the reward may know, rows `[B]`.
        Processes submit the same arrays, of the whole mesh, and ask for results, in step.
        """
        assert not self._closed, "submitted to a reward that was closed"
        assert pictures.dtype == np.uint8, f"pictures are {pictures.dtype}: see to_uint8"
        if self._thread is None:
            self._start()
        future: Future = futures.Future()
        self._jobs.put((future, *distributed.lay_by_rows((pictures, batch))))
        return future

    def result(self, future: Future) -> np.ndarray:
        """The rewards `[B] f32` of all pictures, waited for.

        Raises: UserError when the reward raised, timed out or gave another shape, NonFinite when a
            number of it is not finite, on this process or another.
        """
        rewards, wrong = np.zeros(()), None
        try:
            rewards = self._awaited(future)
        except UserError as error:
            wrong = error
        longest = self.timeout + distributed.JOIN_SECONDS  # the pictures may be late, too
        distributed.raise_together(wrong, f"reward {self.name}", longest)
        return distributed.total(rewards)

    def _awaited(self, future: Future) -> np.ndarray:
        """The rewards of this process's pictures among zeros, `[B] f32`."""
        while not future.done():
            futures.wait([future], LOOK)
            # Calls are made in order, so the one that is late is this one or one before it.
            if self._is_late() and not future.done():
                raise UserError(
                    f"reward {self.name}: no answer within {self.timeout:g} seconds; make it "
                    "faster, or give it a longer timeout"
                )
        return future.result()

    def close(self) -> None:
        """Ends the thread. A running call is waited for until its timeout, none is begun."""
        self._closed = True
        self._jobs.put(None)
        while self._thread and self._thread.is_alive() and not self._is_late():
            self._thread.join(LOOK)

    def __enter__(self) -> HostReward:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        # A daemon, so that a hung call does not keep the process from ending. Executors of
        # concurrent.futures wait for their threads at exit.
        self._thread = threading.Thread(target=self._work, name=f"reward {self.name}", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while self._serve(self._jobs.get()):
            pass

    def _serve(self, job: tuple[Future, Array, PyTree] | None) -> bool:
        """Answers one call; whether there may be more."""
        if job is None:
            return False
        future, pictures, batch = job
        if self._closed:
            return future.cancel()
        try:
            future.set_result(self._ask(pictures, batch))
        except BaseException as error:  # whatever it is, it ends the run and not this thread
            future.set_exception(error)
        return True

    def _ask(self, pictures: Array, batch: PyTree) -> np.ndarray:
        numbers, own = distributed.own_rows((pictures, batch))
        rewards = np.zeros(len(pictures), np.float32)
        if len(numbers):
            rewards[numbers] = self._scored(numbers, *jax.tree.map(np.array, own))
        return rewards

    def _scored(self, numbers: np.ndarray, images: np.ndarray, rows: PyTree) -> np.ndarray:
        """The rewards of the pictures with these numbers."""
        self._begun = time.monotonic()
        try:
            with np.errstate(over="ignore"):  # a number too large for f32 is infinite: told below
                rewards = np.asarray(self._score(images, rows), np.float32)
        except UserError as error:  # which says itself what to mend
            raise UserError(f"reward {self.name}: {error}") from error
        except BaseException as error:
            text = (str(error).strip().splitlines() or ["without a word"])[0]
            raise UserError(
                f"reward {self.name}: raised {type(error).__name__}: {text}; mend the reward"
            ) from error
        finally:
            self._begun = None
        self._check(rewards, numbers)
        return rewards

    def _check(self, rewards: np.ndarray, numbers: np.ndarray) -> None:
        pictures = len(numbers)
        if rewards.shape != (pictures,):
            raise UserError(
                f"reward {self.name}: gave shape {rewards.shape} for {pictures} pictures; return "
                f"one number for each, shape ({pictures},)"
            )
        bad = np.flatnonzero(~np.isfinite(rewards))
        if bad.size:
            raise NonFinite(
                f"reward {self.name}: {bad.size} of {pictures} numbers are not finite, first "
                f"{rewards[bad[0]]} in row {numbers[bad[0]]}; mend the reward"
            )

    def _is_late(self) -> bool:
        begun = self._begun
        return begun is not None and time.monotonic() - begun > self.timeout
