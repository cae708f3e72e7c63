"""Runs the head exchange: from a share of the tokens of all heads to all tokens of some, and back.

Heads come in parts (``schedule/heads.py``), so that one part crosses while another is attended. A
*trip* is all of it one way and home again: queries, keys and values go to heads, and results come
home to tokens; in backward the results' gradients go, and those of queries, keys and values come
home, the last part first. Where several ranks hold the same KV head, its gradients are added up.
Tensors that cross together go as one message to each rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.attention.ring import accumulation_dtype
from longspan.comm.exchange import Announced, Exchange
from longspan.layout import Run

__all__ = ["Dealt", "HeadExchange"]

_Shapes = list[list[tuple[int, int, int, int]]]  # by rank, then by tensor


@dataclass(frozen=True)
class Dealt:
    """How one tensor is dealt: for each part and rank which of its ``heads`` heads.

    ``tokens``: the runs of each rank, and where they lie among those of all ranks
    (``schedule.heads.gathered``).
    """

    heads: int
    shares: tuple[tuple[range, ...], ...]
    tokens: tuple[tuple[Run, ...], ...]

    @cached_property
    def counts(self) -> list[int]:
        """Each rank's number of tokens."""
        return [sum(run.count for run in own) for own in self.tokens]

    @cached_property
    def apart(self) -> bool:
        """Whether no two ranks get the same head."""
        held = sorted((share.start, share.stop) for part in self.shares for share in part if share)
        return all(one[1] <= other[0] for one, other in pairwise(held))

    def outside(self, x: Tensor, part: int) -> list[Tensor]:
        """What each rank gets of a tensor of all heads, as views."""
        return [x[:, share.start : share.stop] for share in self.shares[part]]

    def inside(self, pieces: Sequence[Tensor]) -> Tensor:
        """The tokens of all ranks in order, from each rank's."""
        runs = sorted(
            ((run, piece) for own, piece in zip(self.tokens, pieces, strict=True) for run in own),
            key=lambda one: one[0].start,
        )
        found = [piece[:, :, run.local : run.local + run.count] for run, piece in runs]
        return torch.cat(found, 2) if found else pieces[0]

    def split(self, x: Tensor, pieces: Sequence[Tensor]) -> None:
        """The way back: each rank's tokens into ``pieces``."""
        for own, piece in zip(self.tokens, pieces, strict=True):
            for run in own:
                there = piece[:, :, run.local : run.local + run.count]
                there.copy_(x[:, :, run.start : run.start + run.count])

    def joined(self, pieces: Sequence[Sequence[Tensor]]) -> Tensor:
        """All heads of the tokens here, by part and rank: what comes twice is added up."""
        batch, _, here, dim = pieces[0][0].shape
        like, apart = pieces[0][0], self.apart
        dtype = like.dtype if apart else accumulation_dtype(like.dtype)
        make = like.new_empty if apart else like.new_zeros
        out = make((batch, self.heads, here, dim), dtype=dtype)
        for shares, came in zip(self.shares, pieces, strict=True):
            for share, piece in zip(shares, came, strict=True):
                if apart:
                    out[:, share.start : share.stop] = piece
                else:
                    out[:, share.start : share.stop] += piece
        return out.to(like.dtype)


class _Crossing:
    """One part of several tensors on its way to other ranks."""

    def __init__(
        self, like: Tensor, sent: _Shapes, received: _Shapes, group: dist.ProcessGroup
    ) -> None:
        self._sent, self._shapes = sent, received
        self._received = like.new_empty(sum(_sizes(received)))
        self._announced = Announced(self._received, _sizes(received), group)
        self._exchange: Exchange | None = None
        self._flat: Tensor | None = None

    def leaving(self) -> tuple[Tensor, list[list[Tensor]]]:
        """A buffer for what is to be sent, and the tensors for each rank in it."""
        flat = self._received.new_empty(sum(_sizes(self._sent)))
        return flat, list(_views(flat, self._sent))

    def send(self, flat: Tensor) -> None:
        self._flat = flat  # while it leaves
        self._exchange = self._announced.send(flat, _sizes(self._sent))

    def arrived(self) -> list[list[Tensor]]:
        """For each tensor what came from each rank."""
        assert self._exchange is not None
        self._exchange.arrive()
        return [list(of_one) for of_one in zip(*_views(self._received, self._shapes), strict=True)]

    def finish(self) -> None:
        assert self._exchange is not None
        self._exchange.wait()
        self._flat = None


class _Trip:
    """``there`` go to heads, ``home`` come back, part by part in ``order``.

    ``dims``: head dims of what comes back.
    """

    def __init__(
        self,
        there: Sequence[Dealt],
        home: Sequence[Dealt],
        dims: Sequence[int],
        order: Sequence[int],
        group: dist.ProcessGroup,
    ) -> None:
        self._dealt, self._home_dealt, self._dims = there, home, dims
        self._order, self._group = order, group
        self._there: dict[int, _Crossing] = {}
        self._home: dict[int, _Crossing] = {}

    def start(self, tensors: Sequence[Tensor], certain: bool) -> None:
        """All parts set off, one after another; ``certain``: all will come home."""
        self._like = tensors[0].detach()
        for part in self._order:
            shapes = self._shapes(self._dealt, [x.shape[3] for x in tensors], part)
            self._there[part] = _Crossing(self._like, *shapes, self._group)
        if certain:  # an announcement would queue behind what is sent
            self._announce()
        for part in self._order:
            flat, leaving = self._there[part].leaving()
            for index, (x, dealt) in enumerate(zip(tensors, self._dealt, strict=True)):
                for to, piece in zip(leaving, dealt.outside(x, part), strict=True):
                    to[index].copy_(piece)
            self._there[part].send(flat)

    def _announce(self) -> None:
        """Get ready for what comes home."""
        for part in self._order:
            heads, tokens = self._shapes(self._home_dealt, self._dims, part)
            self._home[part] = _Crossing(self._like, tokens, heads, self._group)

    def take(self, part: int) -> tuple[Tensor, ...]:
        """A part that is there: all tokens of the heads here."""
        came = self._there[part].arrived()
        return tuple(d.inside(pieces) for d, pieces in zip(self._dealt, came, strict=True))

    def settle(self) -> None:
        """Return when all that set off is there."""
        for crossing in self._there.values():
            crossing.finish()

    def give(self, part: int, tensors: Sequence[Tensor]) -> None:
        """A part sets off for home."""
        if not self._home:
            self._announce()
        flat, leaving = self._home[part].leaving()
        of_each = zip(*leaving, strict=True)
        for x, dealt, pieces in zip(tensors, self._home_dealt, of_each, strict=True):
            dealt.split(x, pieces)
        self._home[part].send(flat)

    def finish(self) -> tuple[Tensor, ...]:
        """All that has come home."""
        came = [self._home[part].arrived() for part in sorted(self._home)]
        self.settle()
        for crossing in self._home.values():
            crossing.finish()
        of_each = zip(*came, strict=True)
        return tuple(d.joined(parts) for d, parts in zip(self._home_dealt, of_each, strict=True))

    def _shapes(
        self, dealt: Sequence[Dealt], dims: Sequence[int], part: int
    ) -> tuple[_Shapes, _Shapes]:
        """For each rank what it gets of the tokens here, and what of its tokens is got here."""
        here, batch = self._group.rank(), self._like.shape[0]
        both = list(zip(dealt, dims, strict=True))
        ranks = range(self._group.size())
        outside = [
            [(batch, len(d.shares[part][r]), d.counts[here], dim) for d, dim in both] for r in ranks
        ]
        inside = [
            [(batch, len(d.shares[part][here]), d.counts[r], dim) for d, dim in both] for r in ranks
        ]
        return outside, inside


class HeadExchange:
    """Queries, keys and values to heads, and results back to tokens; differentiable.

    ``set_off(q, k, v)`` with ``(B, H, tokens here, D)``; then for each part ``take(part)`` gives
    ``(B, heads here, all tokens, D)`` of each and ``give(part, out)`` sends the result; ``join()``
    is all of it, ``(B, H, tokens here, D)``. ``kv`` deals keys and values, ``q`` the others.
    """

    def __init__(self, q: Dealt, kv: Dealt, group: dist.ProcessGroup) -> None:
        self._q, self._kv, self._group = q, kv, group
        self._dims: tuple[int, ...] = ()
        self._tokens: list[Tensor] = []
        self.trip: _Trip | None = None

    def set_off(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """All parts are on their way."""
        self._dims = tuple(x.shape[3] for x in (q, k, v))
        self._tokens = list(_SetOff.apply(self, q, k, v))

    def take(self, part: int) -> tuple[Tensor, ...]:
        """Queries, keys and values of a part."""
        found: tuple[Tensor, ...] = _Take.apply(self._tokens[part], self, part)
        return found

    def give(self, part: int, out: Tensor) -> None:
        """The part's result is on its way home."""
        self._tokens[part] = _Give.apply(out, self, part)

    def join(self) -> Tensor:
        """The result."""
        tokens, self._tokens = self._tokens, []  # The graph keeps this object: no circle.
        out: Tensor = _Join.apply(self, *tokens)
        return out

    def forward_trip(self) -> _Trip:
        """Queries, keys and values there, results home."""
        parts = range(len(self._q.shares))
        three = (self._q, self._kv, self._kv)
        return _Trip(three, (self._q,), self._dims[2:], parts, self._group)

    def backward_trip(self) -> _Trip:
        """The results' gradients there, the others' home."""
        parts = range(len(self._q.shares))[::-1]
        three = (self._q, self._kv, self._kv)
        return _Trip((self._q,), three, self._dims, parts, self._group)

    def finish(self) -> tuple[Tensor, ...]:
        """All that has come home; the trip is over."""
        assert self.trip is not None
        trip, self.trip = self.trip, None
        return trip.finish()


class _SetOff(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: HeadExchange, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange, exchange.trip = exchange, exchange.forward_trip()
        exchange.trip.start(tensors, certain=True)
        return tuple(tensors[0].new_empty(0) for _ in exchange._q.shares)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.exchange.finish()


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, exchange: HeadExchange, part: int) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.part = exchange, part
        assert exchange.trip is not None
        return exchange.trip.take(part)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.exchange.trip.give(ctx.part, grads)
        return grads[0].new_empty(0), None, None


class _Give(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, exchange: HeadExchange, part: int) -> Tensor:
        ctx.exchange, ctx.part = exchange, part
        assert exchange.trip is not None
        exchange.trip.give(part, (out,))
        return out.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, token: Tensor) -> tuple[Tensor | None, ...]:
        trip = ctx.exchange.trip
        (dout,) = trip.take(ctx.part)
        if ctx.part == 0:  # the last
            trip.settle()
        return dout, None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: HeadExchange, *tokens: Tensor) -> Tensor:
        ctx.exchange = exchange
        (out,) = exchange.finish()
        # Recomputing stops after the last tensor that was saved: not while parts are on their way.
        ctx.save_for_backward(out.new_empty(0))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        exchange = ctx.exchange
        exchange.trip = exchange.backward_trip()
        exchange.trip.start((dout,), certain=False)  # where only sinks have a gradient nothing is
        token = dout.new_empty(0)
        return None, *[token] * len(exchange._q.shares)


def _sizes(shapes: _Shapes) -> list[int]:
    return [sum(map(prod, of_rank)) for of_rank in shapes]


def _views(flat: Tensor, shapes: _Shapes) -> Iterator[list[Tensor]]:
    sizes = [prod(shape) for of_rank in shapes for shape in of_rank]
    parts = iter(flat.split(sizes))
    for of_rank in shapes:
        yield [next(parts).view(shape) for shape in of_rank]
