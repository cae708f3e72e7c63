"""Splits a model into the fragments that are synchronised one after another.

Streaming DiLoCo (arXiv 2501.18512, section 2.2): a fragment is a few of the model's layers. Under
FSDP2 a rank's fragment is its shards of them, so that each rank of a site talks to the same rank
of the other sites, who must be sharded alike.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from longspan.errors import ConfigError, ModelError
from longspan.schedule.outer import strided

__all__ = ["Fragment", "SplitKind", "local", "split"]

SplitKind = Literal["strided", "sequential", "balanced"]


@dataclass(frozen=True)
class Fragment:
    """Parameters that are synchronised together, by their names in the model."""

    name: str
    parameters: dict[str, nn.Parameter]

    @property
    def numel(self) -> int:
        """Numbers on all ranks of a site."""
        return sum(parameter.numel() for parameter in self.parameters.values())


def local(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter: the very storage, not a copy."""
    detached = parameter.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def split(
    module: nn.Module, kind: SplitKind | str = "strided", layers: int = 3
) -> tuple[Fragment, ...]:
    """Every trainable parameter in exactly one fragment; ``layers`` of them to a fragment.

    strided: layer i of n belongs to fragment i mod ⌈n/layers⌉, the paper's choice. sequential:
    neighbours belong together. What is no layer (embeddings, head, last norm) is the last
    fragment. balanced: as many fragments, of about equal size: the largest tensors are dealt
    first, each to the fragment that is smallest by then, as in Decoupled DiLoCo (2604.21428).

    The layers are the ``nn.ModuleList`` that holds most of the parameters. Raises ConfigError for
    another kind or ``layers`` < 1, ModelError if nothing can be trained.
    """
    if kind not in get_args(SplitKind):
        raise ConfigError(f"unknown split {kind!r}: use one of {', '.join(get_args(SplitKind))}")
    if layers < 1:
        raise ConfigError(f"{layers} layers a fragment: at least 1")
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not trained:
        raise ModelError(f"{type(module).__name__} has no parameter that is trained")
    blocks = _layers(trained, module)
    count = -(-len(blocks) // layers)
    outside = {n: p for n, p in trained.items() if not any(n in block for block in blocks)}
    if kind == "balanced":
        return _balanced(trained, count + bool(outside))
    if kind == "strided":
        cut = strided(len(blocks), layers)
    else:
        cut = tuple(
            tuple(range(k * len(blocks) // count, (k + 1) * len(blocks) // count))
            for k in range(count)
        )
    found = [
        Fragment(
            f"layers {', '.join(map(str, places))}",
            {name: p for place in places for name, p in blocks[place].items()},
        )
        for places in cut
    ]
    if outside:
        found.append(Fragment("embeddings and head" if found else "all", outside))
    return tuple(found)


def _layers(trained: dict[str, nn.Parameter], module: nn.Module) -> list[dict[str, nn.Parameter]]:
    """The parameters of each layer that has any."""
    best: list[dict[str, nn.Parameter]] = []
    most = 0
    for path, inner in module.named_modules():
        if not isinstance(inner, nn.ModuleList):
            continue
        prefixes = [f"{path}.{i}." if path else f"{i}." for i in range(len(inner))]
        blocks = [{n: p for n, p in trained.items() if n.startswith(s)} for s in prefixes]
        size = sum(p.numel() for block in blocks for p in block.values())
        if size > most:
            best, most = [block for block in blocks if block], size
    return best


def _balanced(trained: dict[str, nn.Parameter], count: int) -> tuple[Fragment, ...]:
    shares: list[dict[str, nn.Parameter]] = [{} for _ in range(count)]
    sizes = [0] * count
    for name, parameter in sorted(trained.items(), key=lambda item: (-item[1].numel(), item[0])):
        smallest = sizes.index(min(sizes))
        shares[smallest][name] = parameter
        sizes[smallest] += parameter.numel()
    return tuple(Fragment(f"part {k}", share) for k, share in enumerate(shares) if share)
