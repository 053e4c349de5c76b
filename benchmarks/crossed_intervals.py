"""Intervals of a score over seeds and panoramas together.

Every seed's model answers about the same panoramas, so the two are crossed random effects. The
variance of the mean is that of the seeds' means plus that of the panoramas' means, less what both
count (two-way analysis of variance without replication); degrees of freedom are Satterthwaite's. A
bootstrap of both would count the interaction of seed and panorama three times (Owen: The pigeonhole
bootstrap, 2007), and one of eight seeds would be too narrow."""

from statistics import NormalDist

from numpy.typing import NDArray


def influence(counts: NDArray) -> NDArray:
    """(seeds, panoramas): F1 of each seed, with each panorama's share in it. A row's mean is the F1
    of that seed's pooled counts, and its variation that of F1 to first order (delta method).

    `counts`: (seeds, panoramas, 3), correct, predicted and reference facts."""
    correct, total = counts[..., 0], counts[..., 1] + counts[..., 2]
    f1 = 2 * correct.sum(axis=1, keepdims=True) / total.sum(axis=1, keepdims=True)
    return f1 + (2 * correct - f1 * total) / total.mean(axis=1, keepdims=True)


def interval(values: NDArray) -> tuple[float, float]:
    """The mean of (seeds, panoramas) values, and half the width of its 95% interval; nan for one
    seed."""
    seeds, panoramas = values.shape
    mean = values.mean()
    if seeds < 2 or panoramas < 2:
        return float(mean), float("nan")
    by_seed, by_panorama = values.mean(axis=1), values.mean(axis=0)
    rest = values - by_seed[:, None] - by_panorama + mean
    freedom = (seeds - 1) * (panoramas - 1)
    of_seeds, of_panoramas = by_seed.var(ddof=1) / seeds, by_panorama.var(ddof=1) / panoramas
    both = (rest**2).sum() / freedom / values.size
    # The estimate of a small effect may be negative.
    variance = max(of_seeds + of_panoramas - both, of_seeds, of_panoramas)
    if variance == 0:
        return float(mean), 0.0
    terms = of_seeds**2 / (seeds - 1) + of_panoramas**2 / (panoramas - 1)
    return float(mean), float(student_quantile(variance**2 / terms) * variance**0.5)


def student_quantile(freedom: float) -> float:
    """The 97.5% quantile of Student's t, by its expansion around the normal distribution's
    (Abramowitz and Stegun, 26.7.5): within 0.1% from 5 degrees of freedom, 3% too small at 2."""
    z = NormalDist().inv_cdf(0.975)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))
