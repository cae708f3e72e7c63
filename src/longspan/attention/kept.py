"""What attention keeps when its layer's activations are recomputed.

Late tokens of a causal sequence are the dear ones: its second half has three quarters of the
pairs. So out and lse of the late tokens are kept, and only the early ones attend again, among
themselves: a smaller ring. Source: sequence-level selective checkpointing, BurstEngine
(arXiv 2509.19836, section 3.2).
"""

from dataclasses import dataclass, replace

from torch import Tensor

from longspan.schedule.ring import Ring, tokens

__all__ = ["Kept", "Late"]


@dataclass(frozen=True)
class Late:
    """Out and lse of a rank's tokens from position ``stop`` on; None: of none."""

    stop: int | None
    out: Tensor
    lse: Tensor


class Kept:
    """Results of one layer's attention, in the order of its calls.

    ``share`` of the tokens, the last ones of the whole sequence by position, are kept: 0 keeps
    nothing, 1 turns no ring again (a head exchange is done again). All are kept, or none, where
    attention isn't causal, as early tokens need late keys there, and where a head exchange leaves
    stripes, as tokens aren't in ascending position there.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._results: list[Late] = []
        self._next = 0

    def rewind(self) -> None:
        """The layer starts again from its first call."""
        self._next = 0

    def recalled(self) -> Late | None:
        """What is known of the call that comes now; None the first time."""
        self._next += 1
        return self._results[self._next - 1] if self._next <= len(self._results) else None

    def keep(self, out: Tensor, lse: Tensor, ring: Ring, rank: int) -> None:
        """Remember the late part of a call's result."""
        stop: int | None = ring.length - int(self.share * ring.length)
        if not (ring.causal and ring.ascending):
            stop = 0 if self.share else None
        early = tokens(replace(ring, stop=stop), rank)
        out, lse = out.detach()[:, :, early:], lse[:, :, early:]
        if early:  # a view would keep the whole
            out, lse = out.clone(), lse.clone()
        self._results.append(Late(stop, out, lse))

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(late.out.nbytes + late.lse.nbytes for late in self._results)
