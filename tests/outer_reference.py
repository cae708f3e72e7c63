"""A small model, its data, and Streaming DiLoCo written down plainly, all sites in one process."""

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longspan.outer.compress import codec
from longspan.outer.fragments import Fragment
from longspan.schedule.outer import Send, fragments


class Tiny(nn.Module):
    """An embedding, five layers, a head."""

    def __init__(
        self, layers: int = 5, width: int = 12, dtype: torch.dtype = torch.float64
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, width, dtype=dtype)
        self.layers = nn.ModuleList(nn.Linear(width, width, dtype=dtype) for _ in range(layers))
        self.head = nn.Linear(width, 17, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return nn.functional.cross_entropy(self.head(x), (tokens * 5 + 3) % 17)


_SEEDING = threading.Lock()


def tiny(**sizes: Any) -> Tiny:
    """The same at every call, also from several threads."""
    with _SEEDING:
        torch.manual_seed(0)
        return Tiny(**sizes)


def batch(site: int, step: int) -> Tensor:
    return torch.randint(17, (6,), generator=torch.Generator().manual_seed(1000 * site + step))


def inner_step(model: nn.Module, optimizer: torch.optim.Optimizer, site: int, step: int) -> float:
    loss = model(batch(site, step))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def together(sites: int, work: Callable[[int], Any]) -> list[Any]:
    """Run ``work(site)`` in a thread a site; the first error, if any, is raised."""
    results: list[Any] = [None] * sites
    errors: list[BaseException] = []

    def run(site: int) -> None:
        try:
            results[site] = work(site)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(site,)) for site in range(sites)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def reference(
    model: nn.Module,
    pieces: Sequence[Fragment],
    units: int,
    *,
    every: int,
    delay: int,
    mix: float,
    outer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    name: str,
    inner: Callable[[nn.Module], torch.optim.Optimizer],
    speeds: Sequence[int],
    tokens: Sequence[float],
    feedback: bool,
    lost: Sequence[int] = (),
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Global and local parameters after ``units`` of time, in each of which site m does
    ``speeds[m]`` inner steps of ``tokens[m]`` tokens; ``every`` and ``delay`` are in units."""
    models = [copy.deepcopy(model) for _ in speeds]
    optimizers = [inner(m) for m in models]
    theta = {n: nn.Parameter(p.detach().clone()) for n, p in model.named_parameters()}
    outers = [outer([theta[n] for n in piece.parameters]) for piece in pieces]
    count, turn = len(pieces), 0
    seen = [[0.0] * count for _ in speeds]
    kept: list[list[Any]] = [[0.0] * count for _ in speeds]
    flying: dict[tuple[int, int], Any] = {}
    for unit in range(1, units + 1):
        for site, speed in enumerate(speeds):
            for step in range((unit - 1) * speed + 1, unit * speed + 1):
                inner_step(models[site], optimizers[site], site, step)
                seen[site] = [had + tokens[site] for had in seen[site]]

        def send(k: int, now: int) -> None:
            nonlocal turn
            weights = [seen[site][k] for site in range(len(speeds))]
            mean: Any = 0.0
            rests = []
            for site, site_model in enumerate(models):
                own = dict(site_model.named_parameters())
                delta = torch.cat(
                    [(theta[n] - own[n]).detach().ravel() for n in pieces[k].parameters]
                )
                delta = delta + kept[site][k]
                codes = torch.zeros(
                    codec(name).wire_bytes(len(delta), delta.dtype), dtype=torch.uint8
                )
                codec(name).encode(delta, codes)
                decoded = torch.empty_like(delta)
                codec(name).decode(codes, decoded)
                mean = mean + weights[site] / sum(weights) * decoded
                rests.append(delta - decoded)
            if turn not in lost:
                flying[k, now] = (mean, weights, rests)
            turn += 1

        def merge(k: int, sent: int) -> None:
            if (k, sent) not in flying:
                return
            mean, weights, rests = flying.pop((k, sent))
            at = 0
            for n in pieces[k].parameters:
                theta[n].grad = mean[at : at + theta[n].numel()].view_as(theta[n])
                at += theta[n].numel()
            outers[k].step()
            for site, site_model in enumerate(models):
                own = dict(site_model.named_parameters())
                for n in pieces[k].parameters:
                    own[n].data = mix * own[n].data + (1 - mix) * theta[n].data
                seen[site][k] -= weights[site]
                if feedback:
                    kept[site][k] = rests[site]

        for event in fragments(unit, count, every, delay):
            if isinstance(event, Send):
                send(event.fragment, unit)
            else:
                merge(event.fragment, event.sent)
    return (
        {n: p.detach() for n, p in theta.items()},
        [{n: p.detach() for n, p in m.named_parameters()} for m in models],
    )
