"""Confidence interval of a share."""

import math

Z = 1.959963984540054  # the standard normal distribution's 97.5 % quantile: 95 % lie within -Z..Z


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % score interval of a share; (0, 1) without trials.

    Unlike the normal approximation it stays within 0..1, and has a width at shares of 0 and 1.
    E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927) 209-212.
    """
    if trials == 0:
        return 0.0, 1.0
    share, extra = successes / trials, Z**2 / trials
    centre = (share + extra / 2) / (1 + extra)
    half = Z * math.sqrt(share * (1 - share) / trials + extra / (4 * trials)) / (1 + extra)
    # The ends are exact at shares of 0 and 1; rounding would leave 1e-17 there.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return low, high
