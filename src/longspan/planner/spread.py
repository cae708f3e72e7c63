"""Sequences into groups that are there already: all evenly, or one group after the other.

Both take sequences longest first. They are the search's innermost loops.
"""

import heapq
from bisect import bisect_right
from itertools import chain, repeat

import numpy as np

from longspan.planner.prices import Floats, Ints
from longspan.planner.teams import Team

__all__ = ["fill", "spread"]

_ALIKE = 4  # for so many groups of one line it is worth while to make a list of what each adds
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
    lines = [_line(team) for team in teams]
    later = chain(lines[_ALIKE:], repeat(None))
    for team, own, following in zip(teams, lines, later, strict=False):
        if not rest:
            break
        fixed, token_s, pair_s, ring = own
        room = team.price.most_tokens - team.tokens
        place = bisect_right(sizes, room)
        if ring is not None or own not in (line, following):
            while place and (place := _in_time(own, team, sizes, squares, place, end_s)):
                place -= 1
                team.add(rest.pop(place), sizes.pop(place), squares.pop(place))
                place = bisect_right(sizes, team.price.most_tokens - team.tokens)
            line = None
            continue
        if own != line:
            more = [token_s * n + pair_s * q for n, q in zip(sizes, squares, strict=True)]
            line = own
        # Time and memory only shrink, so that no longer one than the last one fits.
        taken, seen = team.items, team.pairs
        spare = end_s - (fixed + token_s * team.tokens + pair_s * seen)
        while place := bisect_right(more, spare, 0, place):
            place -= 1
            spare -= more.pop(place)
            room -= sizes.pop(place)
            seen += squares.pop(place)
            taken.append(rest.pop(place))
            place = bisect_right(sizes, room, 0, place)
        team.tokens, team.pairs = team.price.most_tokens - room, seen
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
    held, seen = [team.tokens for team in teams], [team.pairs for team in teams]
    rooms = [team.price.most_tokens for team in teams]
    heap = [
        (max(team.seconds / limit_s, team.tokens / team.price.most_tokens), place)
        for place, team in enumerate(teams)
    ]
    heapq.heapify(heap)
    for item, size, square in given:
        aside: list[tuple[float, int]] = []
        while heap and held[heap[0][1]] + size > rooms[heap[0][1]]:
            aside.append(heapq.heappop(heap))
        if heap:
            place = heap[0][1]
            teams[place].items.append(item)
            held[place] = took = held[place] + size
            seen[place] = pairs_taken = seen[place] + square
            full = _seconds(lines[place], took, pairs_taken) / limit_s
            heapq.heapreplace(heap, (max(full, took / rooms[place]), place))
        else:
            left.append(item)
        for one in aside:
            heapq.heappush(heap, one)
    for team, tokens_taken, pairs_taken in zip(teams, held, seen, strict=True):
        team.tokens, team.pairs = tokens_taken, pairs_taken
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
