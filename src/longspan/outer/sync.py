"""OuterSync: keeps the parameters of several sites together by a message now and then.

Streaming DiLoCo (arXiv 2501.18512, algorithm 2). Every site trains by itself; fragment by
fragment it sends how far it has come, Δ = θ - local parameters, where θ is what the sites last
agreed on, and some steps later an outer optimizer moves θ by the mean of the sites' Δ, and the
local parameters are drawn towards θ.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from longspan.errors import ConfigError, ExchangeError, ModelError
from longspan.outer.average import Average, Work
from longspan.outer.compress import CodecName
from longspan.outer.compress import codec as codec_of
from longspan.outer.elastic import ElasticAverage
from longspan.outer.fragments import Fragment
from longspan.outer.held import Held, MakeOptimizer
from longspan.outer.message import HEADER_BYTES, Header, check_headers, read_header, write_header
from longspan.outer.reunite import Standing, reunite
from longspan.schedule.outer import Merge, Send
from longspan.schedule.outer import fragments as due

__all__ = ["OuterFigures", "OuterSync"]


@dataclass
class OuterFigures:
    """What synchronising has cost and found after one inner step, on this rank.

    ``wait_s``: for exchanges that weren't back in time, and for sites to come together.
    ``cosine``: the mean over pairs of sites of the cosine between their outer gradients, one value
    a merge. ``lost``: exchanges that failed. ``stop``: a site wishes to, and all hear of it in the
    same merge. ``sites``: with how many, itself among them, a site exchanges from now on, if that
    is new; ``ahead``: inner steps that it was behind them, and has not done.
    """

    sent_bytes: int = 0
    wait_s: float = 0.0
    cosine: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    stop: bool = False
    sites: int = 0
    ahead: int = 0


@dataclass
class _Flight:
    """A fragment on its way: this site's share of it, and the mean once it is known."""

    tokens: float
    work: Work | None = None
    mean: Tensor | None = None
    rest: Tensor | None = None  # what the codes leave out of Δ, for error feedback
    cosine: float = 1.0
    stop: bool = False


class OuterSync:
    """``step()`` after each inner optimizer step; all sites make theirs with the same settings.

    module: its parameters are alike at all sites at the start, and sharded alike if they are.
    average: hands messages to the other sites (``outer/average.py``).
    fragments: every parameter in one, as ``outer/fragments.py`` splits them.
    sync_every: inner steps from one exchange of a fragment to its next; sites of different
    speed each have their own, and their own ``delay``: inner steps until it is merged.
    mix: share of the local parameters that is kept in a merge (the paper's α).
    outer_lr, momentum: of SGD with Nesterov's momentum, unless ``optimizer`` makes another one.
    codec: what Δ is sent as (``outer/compress.py``); error_feedback: what the codes leave out is
    added to the fragment's next Δ.
    weight: tokens that this site trains on in an inner step; its share in the mean.
    device: where θ and the outer optimizer's state are kept; none: where the parameters are.

    Raises ConfigError for settings that can't be.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        average: Average,
        fragments: Sequence[Fragment],
        sync_every: int = 100,
        delay: int = 1,
        mix: float = 0.5,
        outer_lr: float = 0.4,
        momentum: float = 0.9,
        codec: CodecName | str = "e3m0",
        error_feedback: bool = False,
        weight: float = 1.0,
        optimizer: MakeOptimizer | None = None,
        device: torch.device | None = None,
    ) -> None:
        if not 0 <= mix <= 1:
            raise ConfigError(f"mix is {mix}: the share of local parameters kept is 0 to 1")
        if not weight > 0:
            raise ConfigError(f"weight is {weight}: tokens of an inner step are more than 0")
        due(1, len(fragments), sync_every, delay)  # refuses what can't be

        def nesterov(leaves: Any) -> torch.optim.Optimizer:
            return torch.optim.SGD(leaves, lr=outer_lr, momentum=momentum, nesterov=momentum > 0)

        self.every, self.delay, self._mix = sync_every, delay, mix
        self._module, self._average, self._weight = module, average, weight
        self._codec, self._codec_name = codec_of(codec), codec
        self._held = [Held(piece, optimizer or nesterov, device) for piece in fragments]
        self._error_feedback = error_feedback
        self._rest: dict[int, Tensor] = {}
        self._flying: dict[int, _Flight] = {}
        self._step = self._turn = self._generation = 0
        self._stop = False
        self._rounds = [0] * len(fragments)
        self._tokens = [0.0] * len(fragments)

    @torch.no_grad()
    def step(self, tokens: float | None = None, stop: bool = False) -> OuterFigures:
        """What is due after an inner step, trained on ``tokens`` (``weight``, if not said).

        ``stop``: tell the other sites that this one wishes to stop.

        Raises ModelError if an outer gradient isn't finite, DivergenceError if the sites have
        drifted apart, UnreachableError if sites that come and go don't reach this one. An exchange
        that fails leaves its fragment as it was, until its next turn.
        """
        figures = OuterFigures()
        self._tokens = [had + (self._weight if tokens is None else tokens) for had in self._tokens]
        self._stop = self._stop or stop
        start = time.perf_counter()
        self._regroup(figures)
        figures.wait_s += time.perf_counter() - start
        self._step += 1
        for event in due(self._step, len(self._held), self.every, self.delay):
            match event:
                case Send(place):
                    self._send(place, figures)
                case Merge(place):
                    self._merge(place, figures)
        return figures

    @contextmanager
    def global_parameters(self) -> Iterator[None]:
        """The model with the global parameters, which are those to evaluate and to export."""
        copies = [held.flat.clone() for held in self._held]
        self._swap(copies)
        try:
            yield
        finally:
            self._swap(copies)

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on bit for bit; waits for what is in flight.

        ``progress`` is plain values, the rest tensors by ``what.parameter``, sharded as the
        parameters are: θ, the outer optimizer's state, means not merged yet, and what error
        feedback has kept.
        """
        self._land_all()
        flying = {
            str(place): {"tokens": flight.tokens, "cosine": flight.cosine}
            for place, flight in self._flying.items()
        }
        state: dict[str, Any] = {
            "progress": {
                "step": self._step,
                "turn": self._turn,
                "rounds": list(self._rounds),
                "tokens": list(self._tokens),
                "flying": flying,
            }
        }
        for place, held in enumerate(self._held):
            found = {"theta": held.flat, "rest": self._rest.get(place)}
            if flight := self._flying.get(place):
                found |= {"mean": flight.mean, "next_rest": flight.rest}
            for what, flat in found.items():
                if flat is not None:
                    state |= {f"{what}.{n}": t for n, t in held.sharded(flat).items()}
            state |= {f"optimizer.{n}": t for n, t in held.optimizer_state().items()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict()`` gave; the model's own parameters are not in it.

        Raises ConfigError if it is of other fragments.
        """
        progress = state["progress"]
        if len(progress["rounds"]) != len(self._held):
            raise ConfigError(
                f"the outer state is of {len(progress['rounds'])} fragments, "
                f"not {len(self._held)}: keep the outer settings"
            )
        self._land_all()  # an exchange that is given up would break the next ones
        self._step, self._turn = progress["step"], progress["turn"]
        self._rounds, self._tokens = list(progress["rounds"]), list(progress["tokens"])
        self._flying.clear()
        self._rest.clear()
        for place, held in enumerate(self._held):
            held.load(_under(state, "theta."), _under(state, "optimizer."))
            if (rest := held.flat_of(_under(state, "rest."))) is not None:
                self._rest[place] = rest
            if about := progress["flying"].get(str(place)):
                self._flying[place] = _Flight(
                    tokens=about["tokens"],
                    cosine=about["cosine"],
                    mean=held.flat_of(_under(state, "mean.")),
                    rest=held.flat_of(_under(state, "next_rest.")),
                )

    def places(self, sizes: dict[str, Sequence[int]]) -> dict[str, Tensor]:
        """Empty tensors, sharded as they are to be, to read a saved ``state_dict()`` into.

        ``sizes``: of its tensors as they are whole.
        """
        owner = {name: held for held in self._held for name in held.parameters}
        found = {}
        for name, size in sizes.items():
            parts = 2 if name.startswith("optimizer.") else 1  # optimizer.key.parameter
            parameter = name.split(".", parts)[-1]
            found[name] = owner[parameter].empty(parameter, size)
        return found

    def _regroup(self, figures: OuterFigures) -> None:
        """Take part in a new generation of sites, if there is one."""
        average = self._average
        if not isinstance(average, ElasticAverage):
            return
        try:
            if (peers := average.regrouped(self._generation)) is None:
                return
            self._flying.clear()
            words = ""
            standing = Standing(self._generation, self._step, self.every, self._turn)
            try:
                standing, received = reunite(peers, self._held, standing, self._rounds, self._mix)
            except ExchangeError as error:
                words = str(error)
            average.agree(words, apart=True)
        except ExchangeError as error:
            figures.lost.append(f"a new generation of sites: {error}")
            return
        for place in received:
            self._tokens[place] = 0.0  # what is learnt from here on counts
            self._rest.pop(place, None)
        figures.sites, figures.ahead = peers.sites, standing.step - self._step
        self._generation, self._step, self._turn = peers.number, standing.step, standing.turn

    def _send(self, place: int, figures: OuterFigures) -> None:
        held, turn = self._held[place], self._turn
        self._turn += 1
        if isinstance(self._average, ElasticAverage) and self._average.apart:
            return
        delta = held.outer_gradient()
        if (rest := self._rest.get(place)) is not None:
            delta += rest
        size = self._codec.wire_bytes(delta.numel(), delta.dtype)
        message = torch.empty(HEADER_BYTES + size, dtype=torch.uint8)
        codes = message[HEADER_BYTES:].to(delta.device)
        if not self._codec.encode(delta, codes):
            raise ModelError(self._not_finite(held, delta))
        if delta.device.type != "cpu":
            message[HEADER_BYTES:] = codes
        tokens = self._tokens[place]
        header = Header(
            *(self._codec_name, turn, place, self._rounds[place], delta.numel()),
            *(held.checksum(), tokens, self._stop),
        )
        write_header(message, header)
        if self._error_feedback:
            kept = torch.empty_like(delta)
            self._codec.decode(codes, kept)
            rest = delta.sub_(kept)
        self._flying[place] = _Flight(tokens, self._average(message, turn), rest=rest)
        figures.sent_bytes += message.numel()

    def _land_all(self) -> None:
        for place in list(self._flying):
            self._land(place, OuterFigures())

    def _land(self, place: int, figures: OuterFigures) -> None:
        """Wait for a fragment and average it; if it was lost, forget that it was sent."""
        flight, held = self._flying[place], self._held[place]
        if flight.work is None:
            return
        start = time.perf_counter()
        try:
            messages = flight.work.wait()
        except ExchangeError as error:
            del self._flying[place]
            figures.lost.append(f"fragment '{held.name}' stays as it was: {error}")
            return
        finally:
            figures.wait_s += time.perf_counter() - start
        headers = [read_header(message) for message in messages]
        check_headers(headers, held.name)
        flight.mean, flight.cosine = self._mean(held, messages, [h.tokens for h in headers])
        flight.stop = any(header.stop for header in headers)
        flight.work = None

    def _mean(
        self, held: Held, messages: list[Tensor], tokens: list[float]
    ) -> tuple[Tensor, float]:
        """The sites' Δ weighted by tokens, and how alike their directions are."""
        mean, directions = torch.zeros_like(held.flat), torch.zeros_like(held.flat)
        delta = torch.empty_like(held.flat)
        for message, own in zip(messages, tokens, strict=True):
            self._codec.decode(message[HEADER_BYTES:].to(delta.device), delta)
            mean.add_(delta, alpha=own / sum(tokens))
            norm = torch.linalg.vector_norm(delta)
            directions.addcdiv_(delta, norm.clamp_(min=1e-30))
        # |Σ unit vectors|² = sites + Σ cosines over ordered pairs
        sites = len(messages)
        square = float(torch.linalg.vector_norm(directions)) ** 2
        return mean, (square - sites) / (sites * (sites - 1)) if sites > 1 else 1.0

    def _merge(self, place: int, figures: OuterFigures) -> None:
        if place in self._flying:
            self._land(place, figures)
        flight = self._flying.pop(place, None)
        if flight is None:
            return
        assert flight.mean is not None
        self._held[place].merge(flight.mean, self._mix)
        if flight.rest is not None:
            self._rest[place] = flight.rest
        self._rounds[place] += 1
        self._tokens[place] -= flight.tokens
        figures.cosine.append(flight.cosine)
        figures.stop = figures.stop or flight.stop

    @torch.no_grad()
    def _swap(self, flats: list[Tensor]) -> None:
        self._reshard()
        for held, flat in zip(self._held, flats, strict=True):
            held.swap(flat)

    def _reshard(self) -> None:
        """A forward without backward leaves FSDP2's gathered parameters, which would be stale."""
        for inner in self._module.modules():
            if isinstance(inner, FSDPModule):
                inner.reshard()

    def _not_finite(self, held: Held, delta: Tensor) -> str:
        for name, view in held.views(delta).items():
            if not bool(torch.isfinite(view).all()):
                return (
                    f"{name} holds NaN or Inf after {self._step} steps, so it is not sent to the "
                    "other sites: lower the learning rate, or go on from the last checkpoint"
                )
        return f"the outer gradient of fragment '{held.name}' is too large to be encoded"


def _under(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
