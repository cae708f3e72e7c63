"""The leak probe: proves on the model itself that no token sees what it must not.

One token is changed. Only outputs at or after it, in its own document, and no further on than the
layers' windows reach together, may change; all others must stay the same to the last bit. Routers
of experts keep their first answer meanwhile: an expert that gets another number of tokens rounds
all of them otherwise.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from longspan.comm.mesh import flat_group
from longspan.errors import LeakError
from longspan.layout import Order, positions
from longspan.models.windows import reach

__all__ = ["Probe", "leak_probe"]

# Uneven documents, one of a single token, that don't divide evenly over any number of ranks.
_LENGTHS = (37, 1, 53, 22)


@dataclass(frozen=True)
class Probe:
    """Over all changed tokens and ranks: outputs compared, and those that rightly changed."""

    probes: int
    outputs: int
    changed: int


@torch.no_grad()
def leak_probe(
    model: PreTrainedModel,
    *,
    mesh: DeviceMesh,
    order: Order | str = Order.ZIGZAG,
    lengths: Sequence[int] = _LENGTHS,
    seed: int = 0,
) -> Probe:
    """Probe a patched model with random documents of these lengths, packed, on all ranks.

    The last token of the first document, the first of the last one and one in the middle are
    changed in turn. Raises LeakError, on every rank, if an output changed outside the changed
    token's document, before it or beyond the reach of the model's windows, or if none changed at
    all.
    """
    order, group = Order.of(order), flat_group(mesh)
    device = next(model.parameters()).device
    ends = (0, *accumulate(lengths))
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.vocab_size
    tokens = torch.randint(vocabulary, (ends[-1],), generator=generator)
    own = positions(ends[-1], group.rank(), group.size(), order, ends)
    middle, far = len(lengths) // 2, reach(model.config)

    def outputs(ids: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids[own][None].to(device), cu_seqlens=ends).logits
        return torch.as_tensor(logits[0])

    training = model.training
    model.eval()
    counts = torch.zeros(3, dtype=torch.long)
    probed = (ends[1] - 1, (ends[middle] + ends[middle + 1]) // 2, ends[-2])
    with _same_routes(model):
        clean = outputs(tokens)
        for token in probed:
            ids = tokens.clone()
            ids[token] = (ids[token] + 1) % vocabulary
            changed = (outputs(ids) != clean).any(-1).cpu()
            document = next(i for i, end in enumerate(ends[1:]) if token < end)
            end = ends[document + 1] if far is None else min(ends[document + 1], token + far + 1)
            allowed = (own >= token) & (own < end)
            leaks, rightly = (changed & ~allowed).sum(), (changed & allowed).sum()
            counts += torch.tensor([int(leaks), int(rightly), changed.numel()])
    model.train(training)

    counts = counts.to(device)
    dist.all_reduce(counts, group=group)
    leaks, rightly, compared = counts.tolist()
    if leaks:
        raise LeakError(
            f"{type(model).__name__} leaks: of {compared} outputs {leaks} changed outside the "
            "changed token's document, causal future and windows; training would be silently wrong"
        )
    if not rightly:
        raise LeakError(f"{type(model).__name__}: a changed token changes no output at all")
    return Probe(len(probed), compared, rightly)


@contextmanager
def _same_routes(model: nn.Module) -> Iterator[None]:
    """Routers, as transformers knows them, answer what they answered first."""
    named: list[Any] = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            record = module.can_record_outputs.get("router_logits", [])
            named += record if isinstance(record, list) else [record]
    routers = tuple({getattr(record, "target_class", record) for record in named})
    kept: dict[nn.Module, Any] = {}

    def first_answer(router: nn.Module, _: Any, output: Any) -> Any:
        return kept.setdefault(router, output)

    hooks = [
        module.register_forward_hook(first_answer)
        for module in model.modules()
        if isinstance(module, routers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
