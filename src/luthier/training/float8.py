"""What a run in eight bits tells of its scales: a summary each step, and a table of all layers at each evaluation."""

from pathlib import Path

import torch
from torch import Tensor, nn

from luthier.kernels.float8 import ROLES
from luthier.models.float8 import float8_layers
from luthier.training.callbacks import Metrics, MetricsFile

__all__ = ["ScalesFile", "begin_step", "end_step"]


def begin_step(network: nn.Module) -> None:
    """Layers in eight bits note a step's greatest entries from now on."""
    for windows in float8_layers(network).values():
        windows.begin()


def end_step(network: nn.Module) -> dict[str, Tensor]:
    """The step's greatest entries join the windows, whether the optimizer took it or not. Returns, as the loop reads
    metrics, each role's least and greatest scale of any layer in the step, and the greatest share that was cut off.
    """
    layers = list(float8_layers(network).values())
    if not layers:
        return {}
    scales = torch.stack([windows.scales() for windows in layers])
    cut_off = torch.stack([windows.shares_cut_off() for windows in layers]).amax(0)
    for windows in layers:
        windows.end()
    known = ~scales.isnan()
    least, most = torch.where(known, scales, torch.inf).amin(0), torch.where(known, scales, 0.0).amax(0)
    told: dict[str, Tensor] = {}
    for i, role in enumerate(ROLES):
        measured = known[:, i].any().float()  # a sum over so many, of which a mean is read: none is left out
        values = {"scale_min": least[i], "scale_max": most[i], "cut_off": cut_off[i]}
        told |= {f"fp8/{role}_{name}": torch.stack([value, measured]) for name, value in values.items()}
    return told


class ScalesFile:
    """fp8.jsonl: one line a layer, after each evaluation and after the last step: for each role the scale that comes
    next, and of the step before it the greatest entry and the share that was cut off.
    """

    def __init__(self, path: Path, network: nn.Module) -> None:
        self.file, self.network = MetricsFile(path), network

    def on_start(self, step: int, num_steps: int) -> None:
        self.num_steps, self.written = num_steps, 0
        self.file.on_start(step, num_steps)

    def on_metrics(self, metrics: Metrics) -> None:
        step, due = metrics["step"], "eval_loss" in metrics or metrics["step"] == self.num_steps
        if not due or step == self.written:  # before the first step there is nothing to tell
            return
        self.written = step
        for line in _table(self.network):
            self.file.on_metrics({"step": step, **line})

    def on_end(self) -> None:
        self.file.on_end()


def _table(network: nn.Module) -> list[Metrics]:
    lines = []
    for name, windows in float8_layers(network).items():
        line: Metrics = {"layer": name}
        numbers = torch.stack([windows.scales(), windows.amax, windows.shares_cut_off()], 1).tolist()
        for role, (scale, amax, cut_off) in zip(ROLES, numbers, strict=True):
            line |= {f"{role}_scale": scale, f"{role}_amax": amax, f"{role}_cut_off": cut_off}
        lines.append(line)
    return lines
