"""Meshes, and moving tensors between layouts, on torch.distributed."""
