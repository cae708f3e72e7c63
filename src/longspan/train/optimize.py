"""The optimizer, and its learning rate as a function of the step."""

import math

import torch
from torch import nn

from longspan.train.config import Optimizer

__all__ = ["lr_at", "make_optimizer", "set_lr"]


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


def lr_at(step: int, steps: int, config: Optimizer) -> float:
    """The learning rate of a step, counted from 0: linear warm-up, then a cosine (1608.03983)."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    share = config.final_lr_share
    return config.lr * (share + (1 - share) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give all of the optimizer's parameters this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
