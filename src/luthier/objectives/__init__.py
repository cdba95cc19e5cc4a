"""Losses and advantages: pure functions of tensors, one file per family."""
