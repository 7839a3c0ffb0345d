"""A confidence interval for a mean that holds at every look, however often one looks and whenever one stops."""

import math
from collections.abc import Sequence
from typing import NamedTuple

_PRIOR_VARIANCE = 1.0  # of mean / standard deviation, where the test is sharpest


class Interval(NamedTuple):
    """A mean and its bounds."""

    mean: float
    low: float
    high: float


def always_valid_interval(values: Sequence[float], alpha: float) -> Interval:
    """Covers the mean at all times at once with probability 1 - ``alpha``, for independent Gaussian values of unknown
    variance; unbounded while there are too few.

    It inverts the sequential t-test: the values' Bayes factor for a mean whose ratio to the standard deviation is
    N(0, g), against a mean of m, with the right Haar prior on the standard deviation, is a test martingale under m
    (Hendriksen, de Heide and Grünwald, "Optional Stopping with Bayes Factors", 2021; Wang and Ramdas, "Anytime-valid
    t-tests and confidence sequences for Gaussian means with unknown variance", 2023). By Ville's inequality it ever
    reaches 1 / alpha with probability alpha at most. With G = 1 + n g, v = n - 1 and t of the usual t-test it is
    G**-0.5 * ((1 + t**2 / v) / (1 + t**2 / (v G)))**(n / 2); the interval is every m at which it is below 1 / alpha.
    """
    n = len(values)
    mean = math.fsum(values) / n if n else math.nan
    if n < 2:
        return Interval(mean, -math.inf, math.inf)
    G = 1 + n * _PRIOR_VARIANCE
    limit = (math.sqrt(G) / alpha) ** (2 / n)
    if limit >= G:
        return Interval(mean, -math.inf, math.inf)
    t2 = (n - 1) * (limit - 1) / (1 - limit / G)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    half = math.sqrt(t2 * variance / n)
    return Interval(mean, mean - half, mean + half)
