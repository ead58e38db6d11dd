"""Numbers over seeds: means with intervals, paired differences, the interquartile mean.

Intervals are percentile bootstrap intervals of 95 %, widened for few seeds as T. Hesterberg, "What
Teachers Should Know about the Bootstrap" (2015) ("expanded percentile"): the plain ones
are those of a normal with the variance divided by n, which for 8 seeds cover 90 %. The resampling
has a fixed seed of its own, so the same numbers give the same interval.

Measured coverage for normal numbers: 92 % with 5 seeds, 94 % with 8, 95 % with 20; for exponential
ones 87, 90 and 92 %. With four seeds or fewer an interval ends at the extreme seeds, which cover
the mean 1 - 2^(1-n) of the time for n seeds (75 % for three). It is printed, and means little.

Dimensions: S seeds, ... anything that is treated entry by entry, such as points of a curve.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

CONFIDENCE = 0.95
RESAMPLES = 10_000


class Estimate(NamedTuple):
    """A number over seeds with its interval. For one seed low and high are NaN.

    mean, low, high: `[...]`. seeds: S.
    """

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    seeds: int


def mean_interval(values: ArrayLike) -> Estimate:
    """The mean of `values` `[S, ...]` over seeds, with its 95 % interval.

    An entry that is NaN for some seed is NaN in all.
    """
    values = _by_seed(values)
    weights = _resampling_weights(len(values))
    return _estimate(values.mean(0), weights @ values.reshape(len(values), -1), values.shape)


def paired_difference(values: ArrayLike, reference: ArrayLike) -> Estimate:
    """Mean of `values - reference`, each `[S, ...]` with the same seeds in the same order.

    What a seed does to both cancels, so the interval is that of the comparison itself.

    Raises: ValueError when the shapes differ.
    """
    values, reference = _by_seed(values), _by_seed(reference)
    if values.shape != reference.shape:
        raise ValueError(f"not paired: {values.shape} and {reference.shape}")
    return mean_interval(values - reference)


def iqm(values: ArrayLike) -> np.ndarray:
    """Interquartile mean `[...]` of `values` `[S, ...]`: a quarter (rounded down) cut at each end.

    R. Agarwal et al., "Deep RL at the Edge of the Statistical Precipice" (2021), section 4.3.
    """
    values = _by_seed(values)
    cut = len(values) // 4
    return np.sort(values, axis=0)[cut : len(values) - cut].mean(0)


def iqm_interval(values: ArrayLike) -> Estimate:
    """The interquartile mean of `values` `[S, ...]` with its 95 % interval."""
    values = _by_seed(values)
    flat = values.reshape(len(values), -1)
    picks = _resampled_seeds(len(values))
    draws = np.stack([iqm(column[picks].T) for column in flat.T], axis=1)
    return _estimate(iqm(values), draws, values.shape)


def _by_seed(values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim == 0 or len(array) == 0:
        raise ValueError(f"values of shape {array.shape}: the first axis must be the seeds")
    return array


def _resampled_seeds(seeds: int) -> np.ndarray:
    """`[RESAMPLES, S]`, which seeds each resample draws."""
    return np.random.default_rng(20_240_229).integers(seeds, size=(RESAMPLES, seeds))


def _resampling_weights(seeds: int) -> np.ndarray:
    """`[RESAMPLES, S]`, the weight of each seed in the mean of each resample."""
    picks = _resampled_seeds(seeds)
    counts = np.zeros((RESAMPLES, seeds))
    np.add.at(counts, (np.arange(RESAMPLES)[:, None], picks), 1.0)
    return counts / seeds


def _estimate(mean: np.ndarray, draws: np.ndarray, shape: tuple[int, ...]) -> Estimate:
    """From the statistic of each resample, `[RESAMPLES, entries]`."""
    mean = np.asarray(mean)
    if shape[0] == 1:
        return Estimate(mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan), 1)
    tail = _tail(shape[0])
    # A tail thinner than one resample: no draw is that extreme, the end is the extreme seed.
    low, high = np.quantile(draws, [tail, 1 - tail], axis=0)
    return Estimate(mean, low.reshape(shape[1:]), high.reshape(shape[1:]), shape[0])


def _tail(seeds: int) -> float:
    """The probability to cut off at each end, smaller for fewer seeds."""
    t = special.stdtrit(seeds - 1, (1 - CONFIDENCE) / 2)
    return float(special.ndtr(t * math.sqrt(seeds / (seeds - 1))))
