"""Ratios of pairs: the median and its 95 % interval."""

import random
import statistics

NUM_RESAMPLES = 10_000


def interval(values, seed=0):
    """The percentile bootstrap of the median: (median, lower, upper). Equal input gives equal output."""
    generator = random.Random(seed)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(NUM_RESAMPLES))
    edge = int(0.025 * NUM_RESAMPLES)
    return statistics.median(values), medians[edge], medians[-edge - 1]


def verdict(lower, upper, target):
    """`target` is ("at least", x) or ("at most", x): met where the whole interval is on the right side."""
    if target is None:
        return ""
    kind, limit = target
    if kind == "at least":
        met, missed = lower >= limit, upper < limit
    else:
        met, missed = upper <= limit, lower > limit
    return "met" if met else "missed" if missed else "open"
