"""The optimizer, and its learning rate as a function of the step."""

import math

import torch
from torch import nn

from longspan.train.config import Optimizer

__all__ = ["lr_at", "make_optimizer", "set_lr", "steps_done"]


def make_optimizer(model: nn.Module, config: Optimizer) -> torch.optim.AdamW:
    """AdamW, with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    # One call for all parameters: one by one, FSDP2's cost more to dispatch than to compute.
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def lr_at(step: int, steps: int, config: Optimizer, own: int | None = None) -> float:
    """The learning rate of a step, counted from 0: linear warm-up, then a cosine (1608.03983).

    ``own``: steps that the optimizer itself has done, if fewer: a site that joins others in the
    middle warms up, too, as moments of few steps make Adam's first ones far too long.
    """
    warm = step if own is None else min(step, own)
    ramp = config.lr
    if warm < config.warmup_steps:
        ramp = config.lr * (warm + 1) / config.warmup_steps
    done = max(0, step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    share = config.final_lr_share
    falling = share + (1 - share) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return min(ramp, config.lr * falling)


def steps_done(optimizer: torch.optim.Optimizer) -> int:
    """The steps that the optimizer's moments are of; 0 for a new one."""
    first = next(iter(optimizer.state.values()), None)
    return int(first["step"]) if first else 0


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give all of the optimizer's parameters this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
