"""Sequences into groups that are there already: all evenly, or one group after the other.

Both take sequences longest first. They are the search's innermost loops.
"""

import heapq
from bisect import bisect_right

import numpy as np

from longspan.planner.prices import Floats, Ints
from longspan.planner.teams import Team

__all__ = ["fill", "spread"]

_SCANNED = 12  # so few groups are all looked at for each sequence


def fill(teams: list[Team], items: Ints, tokens: Ints, pairs: Floats, end_s: float) -> list[int]:
    """Each group in turn takes the longest sequences that it has time and memory for.

    ``tokens`` and ``pairs`` are those of ``items``, which are places in a batch. What is left is
    returned, shortest first.
    """
    end_s *= 1 + 1e-9
    rest: list[int] = items[::-1].tolist()
    sizes, squares = tokens[::-1].tolist(), pairs[::-1].tolist()
    line: _Line | None = None
    more: list[float] = []  # what each of the rest adds to groups of that line
    for team in teams:
        own = _line(team)
        fixed, token_s, pair_s, ring = own
        if own != line and ring is None:
            left = np.array(sizes, dtype=np.float64), np.array(squares)
            more = (token_s * left[0] + pair_s * left[1]).tolist()
        line, room = own, team.price.most_tokens
        while place := bisect_right(sizes, room - team.tokens):
            if ring is None:
                spare = end_s - (fixed + token_s * team.tokens + pair_s * team.pairs)
                place = min(place, bisect_right(more, spare))
            else:
                place = _in_time(own, team, sizes, squares, place, end_s)
            if not place:
                break
            place -= 1
            team.add(rest.pop(place), sizes.pop(place), squares.pop(place))
            if ring is None:
                del more[place]
    return rest


def _in_time(
    line: "_Line", team: Team, sizes: list[int], squares: list[float], most: int, end_s: float
) -> int:
    """How many of the first ``most`` sequences, shortest first, would end in time."""
    low, middle = 0, most - 1  # the longest is asked first: it most often does
    while low < most:
        seconds = _seconds(line, team.tokens + sizes[middle], team.pairs + squares[middle])
        low, most = (middle + 1, most) if seconds <= end_s else (low, middle)
        middle = (low + most) // 2
    return low


def spread(
    teams: list[Team], items: Ints, tokens: Ints, pairs: Floats, limit_s: float
) -> list[int]:
    """Each sequence to the group least full of time and of memory; those that fit none.

    Arguments are ``fill``'s; a group is full of time at ``limit_s``, which it may exceed.
    """
    given = zip(items.tolist(), tokens.tolist(), pairs.tolist(), strict=True)
    lines = [_line(team) for team in teams]
    left: list[int] = []
    if len(teams) <= _SCANNED:
        for item, size, square in given:
            best: Team | None = None
            least = np.inf
            for team, line in zip(teams, lines, strict=True):
                held, room = team.tokens + size, team.price.most_tokens
                if held <= room:
                    full = max(_seconds(line, held, team.pairs + square) / limit_s, held / room)
                    if full < least:
                        best, least = team, full
            if best is None:
                left.append(item)
            else:
                best.add(item, size, square)
        return left
    heap = [
        (max(team.seconds / limit_s, team.tokens / team.price.most_tokens), place)
        for place, team in enumerate(teams)
    ]
    heapq.heapify(heap)
    for item, size, square in given:
        aside: list[tuple[float, int]] = []
        while heap and (team := teams[heap[0][1]]).tokens + size > team.price.most_tokens:
            aside.append(heapq.heappop(heap))
        if heap:
            place = heap[0][1]
            team.add(item, size, square)
            full = _seconds(lines[place], team.tokens, team.pairs) / limit_s
            heapq.heapreplace(heap, (max(full, team.tokens / team.price.most_tokens), place))
        else:
            left.append(item)
        for one in aside:
            heapq.heappush(heap, one)
    return left


_Line = tuple[float, float, float, tuple[float, float, float, float] | None]


def _line(team: Team) -> _Line:
    """A group's seconds: fixed, a token, a pair, by head exchange; and by a ring, if it can."""
    p = team.price
    heads = (
        p.fixed_s + p.heads_fixed_s,
        p.token_s + p.heads_token_s * team.share,
        p.heads_pair_s,
    )
    if p.ring_fixed_s == np.inf:
        return *heads, None
    # What its transfers take from computing it takes in any case.
    fixed, token_s = p.fixed_s + p.ring_fixed_s, p.token_s + p.ring_busy_s
    return *heads, (fixed, token_s, p.ring_pair_s, p.ring_token_s * team.share - p.ring_busy_s)


def _seconds(line: _Line, tokens: int, pairs: float) -> float:
    """``Price.seconds``, for the innermost loop."""
    fixed, token_s, pair_s, ring = line
    heads = fixed + token_s * tokens + pair_s * pairs
    if ring is None:
        return heads
    fixed, token_s, pair_s, sent_s = ring
    behind = max(pair_s * pairs, sent_s * tokens)
    return min(heads, fixed + token_s * tokens + behind)
