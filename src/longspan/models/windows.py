"""How far back each layer of a transformers model looks, as its config says."""

from transformers import PreTrainedConfig

__all__ = ["layer_windows", "reach"]


def layer_windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """Each layer's sliding window in tokens, itself among them; None where it sees everything."""
    window = getattr(config, "sliding_window", None) or None
    if not getattr(config, "use_sliding_window", True):
        window = None
    types = getattr(config, "layer_types", None)
    if types is None:
        return (window,) * int(config.num_hidden_layers)
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def reach(config: PreTrainedConfig) -> int | None:
    """How many tokens further on a token can still change an output; None: no limit."""
    windows = [window for window in layer_windows(config) if window]
    if len(windows) < config.num_hidden_layers:
        return None
    return sum(windows) - len(windows)
