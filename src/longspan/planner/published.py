"""FlexSP's own price list: constants measured by its authors on 8 nodes of 8 A100-40GB.

A group of d ranks takes α1·Σs²/d + α2·Σs/d + β, and its all-to-alls of 16·L·h·Σs/d bytes go at
v_d (FlexSP, arXiv 2412.01523, section 4.1; numbers of its released code, flexSPCostModel).
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

from longspan.errors import ConfigError, MemoryLimitError
from longspan.planner.prices import Floats, Ints, Pool, Price, Prices

__all__ = ["PUBLISHED", "PublishedModel", "published_prices"]

_GB = 2.0**30
# Gigabytes a second of an all-to-all among so many ranks.
_ALL_TO_ALL = {2: 119.54, 4: 104.07, 8: 96.5, 16: 10.33, 32: 5.94, 64: 4.87}
_STATE_BYTES = 16  # of a parameter: weights, gradients and Adam's state in mixed precision


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """One model's constants: milliseconds for pairs, tokens and a micro-batch, MiB a token.

    ``params`` (in 2^30) are those at 192K; ``position_params`` the more for each further 1K.
    """

    alpha1_ms: float
    alpha2_ms: float
    beta_ms: float
    token_mib: float
    layers: int
    hidden: int
    params: float
    position_params: float

    def params_at(self, longest: int) -> float:
        """Parameters of the model whose position table has ``longest`` entries."""
        return (self.params + self.position_params * (longest / 1000 - 192)) * _GB


PUBLISHED = {
    "7b": PublishedModel(
        5.128e-6, 0.1839576, 629.3563, 4.480441895, 32, 4096, 7.117446899, 3.8147e-3
    ),
    "13b": PublishedModel(
        9.2852e-6, 0.3060189, 1132.5632, 4.220439453, 40, 5120, 13.116054535, 4.7684e-3
    ),
    "30b": PublishedModel(
        15.4262e-6, 0.8035742, 2789.3644, 3.417381836, 60, 6656, 31.525138855, 6.1989e-3
    ),
}


def published_prices(
    name: str,
    world: int = 64,
    *,
    longest: int = 192_000,
    memory_limit: int = 28 << 30,
    powers_of_two: bool = True,
) -> Prices:
    """The prices of "7b", "13b" or "30b", with parameters sharded over all of ``world`` ranks.

    Groups of other sizes than powers of two get the rate of the next power. Raises ConfigError for
    an unknown model or a world whose rates were not published, MemoryLimitError if the model alone
    is too large.
    """
    if name not in PUBLISHED:
        raise ConfigError(f"no published constants of {name!r}: use one of {', '.join(PUBLISHED)}")
    if world < 1 or world > max(_ALL_TO_ALL):
        raise ConfigError(f"{world} ranks: rates are published for 1 to {max(_ALL_TO_ALL)}")
    model = PUBLISHED[name]
    state = model.params_at(longest) * _STATE_BYTES / world
    token_bytes = model.token_mib * 2**20
    most = int((memory_limit - state) / token_bytes)
    if most < 1:
        raise MemoryLimitError(
            f"{name} takes {state / _GB:.1f} GiB on each of {world} ranks before the first token, "
            f"and the limit is {memory_limit / _GB:.1f} GiB: use more ranks"
        )
    sizes = range(1, world + 1)
    if powers_of_two:
        sizes = [size for size in sizes if size & (size - 1) == 0]  # type: ignore[assignment]
    prices = tuple(_price(model, size, most) for size in sizes)
    ranks = (tuple(range(world)),)
    held = partial(_held, state, token_bytes)
    return Prices(ranks, (Pool((0,), 1.0, prices),), _squares, held)


def _held(state: float, token_bytes: float, tokens: int) -> int:
    return int(state + token_bytes * tokens)


def _squares(tokens: Ints) -> Floats:
    return tokens.astype(np.float64) ** 2


def _price(model: PublishedModel, size: int, most: int) -> Price:
    rate = _ALL_TO_ALL.get(1 << (size - 1).bit_length(), np.inf) * _GB
    sent = 16.0 * model.layers * model.hidden / size
    return Price(
        ranks=size,
        most_tokens=most * size,
        fixed_s=model.beta_ms / 1e3,
        token_s=model.alpha2_ms / 1e3 / size,
        heads_fixed_s=0.0,
        heads_pair_s=model.alpha1_ms / 1e3 / size,
        heads_token_s=sent / rate,
        ring_fixed_s=np.inf,
        ring_pair_s=0.0,
        ring_token_s=0.0,
        ring_busy_s=0.0,
        heads_sent=sent if size > 1 else 0.0,
        ring_sent=0.0,
    )
