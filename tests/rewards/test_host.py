"""Host rewards: what they are given, that nobody waits for them, and all that may go wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core.types import NonFinite, UserError
from jaxalign.rewards.host import HostReward, to_uint8

PICTURES = jnp.arange(4 * 2 * 2 * 3, dtype=jnp.uint8).reshape(4, 2, 2, 3)
BATCH = {"prompt": jnp.arange(4), "target": {"shape": jnp.arange(8).reshape(4, 2)}}


def ask(score: Callable, timeout: float = 10.0) -> np.ndarray:
    with HostReward("mine", score, timeout) as reward:
        return reward.result(reward.submit(PICTURES, BATCH))


def complaint(score: Callable, kind: type[Exception] = UserError, timeout: float = 10.0) -> str:
    with pytest.raises(kind) as caught:
        ask(score, timeout)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("reward mine: ")
    return text


# --- what goes in and comes out ------------------------------------------------------------------


def test_bytes_of_pictures_are_rounded_and_cut():
    pictures = jnp.array([-2.0, -1.0, 0.0, 1 / 127.5, 1.0, 3.0])
    np.testing.assert_array_equal(
        to_uint8(pictures), np.array([0, 0, 128, 128, 255, 255], np.uint8)
    )
    every = jnp.arange(256) / 127.5 - 1
    np.testing.assert_array_equal(to_uint8(every), np.arange(256, dtype=np.uint8))


def test_the_reward_gets_numpy_arrays_of_its_own():
    seen = []

    def score(images, batch):
        seen.append((images.copy(), batch))
        images[:] = 0  # allowed
        return np.arange(4)

    rewards = ask(score)
    assert rewards.dtype == np.float32
    np.testing.assert_array_equal(rewards, [0, 1, 2, 3])
    images, batch = seen[0]
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, PICTURES)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(batch))
    np.testing.assert_array_equal(batch["target"]["shape"], BATCH["target"]["shape"])
    assert PICTURES.max() > 0


def test_a_list_will_do():
    np.testing.assert_array_equal(ask(lambda images, batch: [1, True, 0.5, -2]), [1, 1, 0.5, -2])


def test_calls_are_answered_in_order_by_one_thread():
    threads = set()

    def score(images, batch):
        threads.add(threading.current_thread())
        time.sleep(0.01)
        return np.full(len(images), images[0, 0, 0, 0], float)

    with HostReward("mine", score) as reward:
        asked = [reward.submit(PICTURES + i, BATCH) for i in range(5)]
        assert [reward.result(a)[0] for a in asked] == [0, 1, 2, 3, 4]
    assert len(threads) == 1
    assert not threads.pop().is_alive()


def test_submitting_does_not_wait():
    go = threading.Event()

    def score(images, batch):
        assert go.wait(10)
        return np.zeros(4)

    with HostReward("mine", score) as reward:
        asked = [reward.submit(PICTURES, BATCH) for _ in range(2)]
        assert not asked[0].done()
        go.set()
        assert [reward.result(a).shape for a in asked] == [(4,), (4,)]


def test_waiting_for_the_pictures_does_not_count(monkeypatch: pytest.MonkeyPatch):
    fetch = jax.device_get

    def slow(tree):
        time.sleep(0.3)
        return fetch(tree)

    monkeypatch.setattr(jax, "device_get", slow)
    np.testing.assert_array_equal(ask(lambda images, batch: np.ones(4), timeout=0.15), np.ones(4))


def test_float_pictures_are_a_bug():
    with HostReward("mine", lambda images, batch: [0]) as reward, pytest.raises(AssertionError):
        reward.submit(jnp.zeros((1, 2, 2, 1)), {})


# --- what may go wrong ---------------------------------------------------------------------------


def test_a_raising_reward_is_named_with_the_first_line_of_its_error():
    def score(images, batch):
        raise ConnectionError("the server said no\nand much more\nbesides")

    text = complaint(score)
    assert "raised ConnectionError: the server said no;" in text
    assert "much more" not in text


def test_an_error_without_a_word():
    def score(images, batch):
        raise KeyError

    assert "raised KeyError: without a word" in complaint(score)


def test_a_reward_that_ends_its_thread_does_not_hang_the_run():
    assert "raised SystemExit" in complaint(lambda images, batch: sys.exit(7))


def test_the_cause_is_kept():
    with pytest.raises(UserError) as caught:
        ask(lambda images, batch: 1 / 0)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_failed_call_spoils_no_other():
    def score(images, batch):
        if images[0, 0, 0, 0] == 0:
            raise ValueError("zero")
        return np.ones(4)

    with HostReward("mine", score) as reward:
        bad, good = reward.submit(PICTURES, BATCH), reward.submit(PICTURES + 1, BATCH)
        np.testing.assert_array_equal(reward.result(good), np.ones(4))
        with pytest.raises(UserError, match="zero"):
            reward.result(bad)


@pytest.mark.parametrize(
    ("answer", "shape"),
    [(np.zeros(3), "(3,)"), (np.zeros((4, 1)), "(4, 1)"), (0.0, "()"), (None, "()")],
)
def test_a_wrong_shape_is_named_with_the_right_one(answer, shape: str):
    text = complaint(lambda images, batch: answer)
    assert f"gave shape {shape} for 4 pictures; return one number for each, shape (4,)" in text


def test_no_numbers_at_all():
    assert "raised ValueError" in complaint(lambda images, batch: ["good", "bad", "bad", "bad"])


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([1, np.nan, 2, np.inf], "2 of 4 numbers are not finite, first nan in row 1"),
        ([1, 2, 3, -np.inf], "1 of 4 numbers are not finite, first -inf in row 3"),
        ([1e300, 2, 3, 4], "1 of 4 numbers are not finite, first inf in row 0"),
    ],
)
def test_numbers_that_are_not_finite_are_counted(answer: list, said: str):
    assert said in complaint(lambda images, batch: np.array(answer), NonFinite)


def test_a_late_reward_is_told_after_its_time():
    go, began = threading.Event(), time.monotonic()

    def score(images, batch):
        go.wait(30)
        return np.zeros(4)

    try:
        text = complaint(score, timeout=0.2)
    finally:
        go.set()
    assert time.monotonic() - began < 5
    assert "no answer within 0.2 seconds; make it faster, or give it a longer timeout" in text


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan")])
def test_an_impossible_timeout_is_refused(timeout: float):
    with pytest.raises(UserError, match=r"timeout = .*must be positive"):
        HostReward("mine", lambda images, batch: images, timeout)


# --- the end -------------------------------------------------------------------------------------


def test_closing_begins_no_further_call():
    calls, go = [], threading.Event()

    def score(images, batch):
        calls.append(1)
        assert go.wait(10)
        return np.zeros(4)

    reward = HostReward("mine", score)
    asked = [reward.submit(PICTURES, BATCH) for _ in range(3)]
    while not calls:
        time.sleep(0.01)
    threading.Timer(0.2, go.set).start()
    reward.close()
    reward.close()
    assert len(calls) == 1
    assert asked[0].done()
    assert asked[1].cancelled()


def test_closing_what_never_ran():
    HostReward("mine", lambda images, batch: images).close()


HANGS = """
import sys, time
import jax.numpy as jnp
from experiments.cli import exit_codes
from jaxalign.rewards.host import HostReward
reward = HostReward("hung", lambda images, batch: time.sleep(1000), timeout=0.3)
with exit_codes():
    {close}
        reward.result(reward.submit(jnp.zeros((2, 4, 4, 1), jnp.uint8), {{}}))
"""


@pytest.mark.parametrize("close", ["with reward:", "if True:"])
def test_a_hung_reward_does_not_keep_the_process_from_ending(close: str):
    done = subprocess.run(
        [sys.executable, "-c", HANGS.format(close=close)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines() == [
        "error: reward hung: no answer within 0.3 seconds; make it faster, "
        "or give it a longer timeout"
    ]
