"""The leak probe: proves on the model itself that no token sees what it must not.

One token is changed. Only outputs at or after it, in its own document, may change; all others
must stay the same to the last bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from longspan.comm.mesh import flat_group
from longspan.errors import LeakError
from longspan.layout import Order, positions

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
    token's document or before it, or if none changed at all.
    """
    order, group = Order.of(order), flat_group(mesh)
    device = next(model.parameters()).device
    ends = (0, *accumulate(lengths))
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.vocab_size
    tokens = torch.randint(vocabulary, (ends[-1],), generator=generator)
    own = positions(ends[-1], group.rank(), group.size(), order)
    middle = len(lengths) // 2

    def outputs(ids: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids[own][None].to(device), cu_seqlens=ends).logits
        return torch.as_tensor(logits[0])

    training = model.training
    model.eval()
    clean = outputs(tokens)
    counts = torch.zeros(3, dtype=torch.long)
    probed = (ends[1] - 1, (ends[middle] + ends[middle + 1]) // 2, ends[-2])
    for token in probed:
        ids = tokens.clone()
        ids[token] = (ids[token] + 1) % vocabulary
        changed = (outputs(ids) != clean).any(-1).cpu()
        document = next(i for i, end in enumerate(ends[1:]) if token < end)
        allowed = (own >= token) & (own < ends[document + 1])
        leaks, rightly = (changed & ~allowed).sum(), (changed & allowed).sum()
        counts += torch.tensor([int(leaks), int(rightly), changed.numel()])
    model.train(training)

    counts = counts.to(device)
    dist.all_reduce(counts, group=group)
    leaks, rightly, compared = counts.tolist()
    if leaks:
        raise LeakError(
            f"{type(model).__name__} leaks: of {compared} outputs {leaks} changed outside the "
            "changed token's document and causal future; training would be silently wrong"
        )
    if not rightly:
        raise LeakError(f"{type(model).__name__}: a changed token changes no output at all")
    return Probe(len(probed), compared, rightly)
