"""Which dims of a layer can be split over a mesh axis: the one table of it.

The planner offers no other split, and what runs a plan can run every one of them. A dim's name says
what it is to the layer: ``b`` is a tensor's first dim, ``s`` the second of three, ``in`` is summed
over, and so on. What splitting a dim means for the layer's own communication:

==============  ==========  ==================================================================
kind            dim         
==============  ==========  ==================================================================
linear          b, s        the weights' gradients are summed
                out         the input's gradient is summed
                in          the output is summed
embedding       b, s        the weights' gradients are summed
                out         nothing
                vocab       the output is summed
conv            b, out, in  as linear's
attention       b, heads    nothing
norm            b, s        the weights' gradients are summed
batch_norm      b           the statistics are summed, and the weights' gradients
                c           nothing
pool            b, c        nothing
recurrent       b           the weights' gradients are summed
softmax         b, s        nothing
loss            b, s        the loss is summed
                vocab       maxima and sums of exponentials are (a number a token each)
matmul          b, s        of batched products: nothing
join            any         elementwise of several tensors: nothing but for weights
other           b           if every input and the output begin with it
==============  ==========  ==================================================================

Not in the table, because it can't be run: convolutions split in space, recurrence in time,
attention in its sequence (ring attention has a plan of its own), normalised dims.
"""

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["SPLITS"]

SPLITS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "linear": ("b", "s", "out", "in"),
        "embedding": ("b", "s", "out", "vocab"),
        "conv": ("b", "out", "in"),
        "attention": ("b", "heads"),
        "norm": ("b", "s"),
        "batch_norm": ("b", "c"),
        "pool": ("b", "c"),
        "recurrent": ("b",),
        "softmax": ("b", "s"),
        "loss": ("b", "s", "vocab"),
        "matmul": ("b", "s"),
        "join": ("b", "s", "c"),
        "other": ("b",),
    }
)
