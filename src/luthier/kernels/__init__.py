"""Fused operations: each computes what a few lines of plain PyTorch would, with fewer passes over memory."""
