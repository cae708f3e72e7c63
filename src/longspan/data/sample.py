"""Token lengths of all documents from a few tokenised ones, with the interval they are in.

A document's characters are cheap to count, its tokens are not; tokens per character differ little
between documents of like length. So the documents are cut into strata of equal characters, some of
each are tokenised, the longest all of them, and each other document takes the tokens per character
of one of its stratum. A plain sample would miss the few long documents that hold most tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Estimate", "choose", "estimate"]

_STRATA = 32
_LONGEST_SHARE = 0.25
_REPLICATES = 40
_PERCENTILES = (50, 90, 99, 99.9)
Lengths = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Estimate:
    """``lengths``: of every document in tokens, exact for the ``tokenised`` ones.

    ``intervals``: for "tokens" (their sum) and some percentiles, what a second sample would give
    in 95 of 100 cases.
    """

    lengths: Lengths
    tokenised: int
    intervals: dict[str, tuple[int, int]]


def choose(characters: Lengths, wanted: int, seed: int = 0) -> Lengths:
    """Which of the documents to tokenise, about ``wanted``, in ascending order."""
    if wanted >= len(characters):
        return np.arange(len(characters))
    order = np.argsort(characters, kind="stable")
    longest = round(wanted * _LONGEST_SHARE)
    rest, taken = order[: len(order) - longest], [order[len(order) - longest :]]
    strata = _strata(characters[order])[: len(rest)]
    random = np.random.default_rng(seed)
    each = -(-(wanted - longest) // _STRATA)
    for stratum in np.unique(strata):
        inside = rest[strata == stratum]
        taken.append(random.choice(inside, min(each, len(inside)), replace=False))
    return np.sort(np.concatenate(taken))


def estimate(characters: Lengths, tokens: Mapping[int, int], seed: int = 0) -> Estimate:
    """The tokens of every document, from the ``tokens`` of those that were chosen."""
    known = np.fromiter(tokens.keys(), np.int64, len(tokens))
    lengths = np.zeros(len(characters), np.int64)
    lengths[known] = np.fromiter(tokens.values(), np.int64, len(tokens))
    order = np.argsort(characters, kind="stable")
    strata = np.empty(len(characters), np.int64)
    strata[order] = _strata(characters[order])
    unknown = np.setdiff1d(np.flatnonzero(characters), known)
    if not len(unknown):
        return Estimate(lengths, len(known), {})
    usable = known[characters[known] > 0]
    ratio = lengths[usable] / characters[usable]
    random = np.random.default_rng(seed)
    figures = []
    for replicate in range(_REPLICATES + 1):
        guess = lengths.copy()
        for stratum in np.unique(strata[unknown]):
            ours = unknown[strata[unknown] == stratum]
            pool = ratio[strata[usable] == stratum]
            if replicate:
                pool = random.choice(pool, len(pool))
            guess[ours] = np.maximum(1, np.rint(characters[ours] * random.choice(pool, len(ours))))
        if not replicate:
            best = guess
            continue
        full = guess[guess > 0]
        figures.append([full.sum(), *np.percentile(full, _PERCENTILES, method="inverted_cdf")])
    spread = 1.96 * np.std(figures, axis=0, ddof=1)
    full = best[best > 0]
    middle = [full.sum(), *np.percentile(full, _PERCENTILES, method="inverted_cdf")]
    names = ("tokens", *(f"{p:g}" for p in _PERCENTILES))
    intervals = {
        name: (int(at - off), int(np.ceil(at + off)))
        for name, at, off in zip(names, middle, spread, strict=True)
    }
    return Estimate(best, len(known), intervals)


def _strata(ascending: Lengths) -> Lengths:
    """For documents in ascending length, which of the strata of equal characters each is in."""
    total = np.cumsum(ascending)
    edges = total[-1] * np.arange(1, _STRATA) / _STRATA if len(total) else np.empty(0)
    return np.searchsorted(edges, total, side="right").astype(np.int64)
