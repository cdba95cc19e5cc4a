"""A model's norms, gated feed-forward blocks and linear layers exchanged for faster ones with the same names.

Which module is a norm or a gated block is recognised by its shape, and proven before it is exchanged: old and new run
on the same random input, and where they differ the old one stays and is reported. So an architecture that nobody
foresaw is slower, never wrong. What a linear layer is needs no proof.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from luthier.kernels.float8 import AmaxWindows
from luthier.kernels.float8_linear import float8_linear
from luthier.kernels.gate import GATES, gated
from luthier.kernels.linear import linear, linear_onto
from luthier.kernels.norm import rms_norm

__all__ = ["FastLinear", "FusedGatedMLP", "Fusion", "fuse"]


@dataclass(frozen=True, slots=True)
class Fusion:
    """What was exchanged and what was left, by class name."""

    fused: Counter[str]
    kept: Counter[str]


class FastLinear(nn.Linear):
    """x W^T + b, by the library that is fastest for it; in eight bits while it has `windows`."""

    takes_onto = True
    windows: AmaxWindows | None

    def __init__(self, old: nn.Linear) -> None:
        super().__init__(old.in_features, old.out_features, bias=False, device="meta")
        self.weight = old.weight
        self.bias = old.bias
        self.windows = None

    def forward(self, x: Tensor, *, onto: Tensor | None = None) -> Tensor:
        """x: [..., in] -> [..., out]; with `onto`, [tokens, out], added to it, perhaps where it lies."""
        if self.windows is not None:
            return float8_linear(x, self.weight, self.bias, self.windows, onto=onto)
        if onto is not None:
            return linear_onto(onto, x, self.weight, self.bias)
        return linear(x, self.weight, self.bias)


class FusedRMSNorm(nn.Module):
    """w x / rms(x), or (1 + w) x / rms(x) where the architecture counts its weight from one (Gemma)."""

    def __init__(self, weight: nn.Parameter, eps: float, *, one_more: bool) -> None:
        super().__init__()
        self.weight, self.eps, self.one_more = weight, eps, one_more

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden] -> the same shape."""
        weight = (
            self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)) + 1 if self.one_more else self.weight
        )
        return rms_norm(x, weight, eps=self.eps)


class FusedGatedMLP(nn.Module):
    """down(act(gate(x)) * up(x))        Shazeer 2020, eq. 6"""

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module, *, activation: str) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down
        self.activation = activation
        self.recomputed = False

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden] -> the same shape. Where it is recomputed the backward pass forms all but the last product
        again, and x alone is kept.
        """
        if self.recomputed and torch.is_grad_enabled():
            again: Tensor = checkpoint(self._computed, x, use_reentrant=False)
            return again
        return self._computed(x)

    def _computed(self, x: Tensor) -> Tensor:
        down: Tensor = self.down_proj(gated(self.gate_proj(x), self.up_proj(x), activation=self.activation))
        return down


def fuse(network: PreTrainedModel) -> Fusion:
    """Exchanges linear layers and what can be proven equal, in place. Names in the state dict stay as they are."""
    fusion = Fusion(Counter(), Counter())
    activation = getattr(network.config.get_text_config(), "hidden_act", None) or getattr(
        network.config.get_text_config(), "hidden_activation", None
    )
    for path, module in list(network.named_modules()):
        name = type(module).__name__
        if type(module) is nn.Linear:
            network.set_submodule(path, FastLinear(module).train(module.training))
            fusion.fused[name] += 1
            continue
        candidates = _candidates(module, name, activation)
        if not candidates:
            continue
        proven = next((c for c in candidates if _same(module, c)), None)
        if proven is None:
            fusion.kept[name] += 1
        else:
            network.set_submodule(path, proven.train(module.training))
            fusion.fused[name] += 1
    return fusion


def _candidates(module: nn.Module, name: str, activation: str | None) -> list[nn.Module]:
    parameters = dict(module.named_parameters(recurse=False))
    if name.endswith("RMSNorm") and list(parameters) == ["weight"]:
        eps = [v for k, v in vars(module).items() if k in {"eps", "variance_epsilon"}]
        return [FusedRMSNorm(parameters["weight"], e, one_more=one) for e in eps for one in (False, True)]
    children = dict(module.named_children())
    projections = [children.get(f"{part}_proj") for part in ("gate", "up", "down")]
    if activation in GATES and all(isinstance(p, nn.Linear) for p in projections) and len(children) <= 4:
        gate, up, down = projections
        assert gate is not None
        assert up is not None
        assert down is not None
        return [FusedGatedMLP(gate, up, down, activation=activation)]
    return []


@torch.no_grad()
def _same(old: nn.Module, new: nn.Module) -> bool:
    """On rows from a ten-thousandth to a thousand times the usual size: where eps counts and where bounds would."""
    parameter = next(new.parameters())
    if isinstance(parameter, FakeTensor):
        return True  # a plan's network: it has no values to compare, and either takes the same memory
    generator = torch.Generator(parameter.device).manual_seed(0)
    rows = torch.randn(1, 8, parameter.shape[-1], generator=generator, device=parameter.device)
    x = (rows * torch.logspace(-4, 3, 8, device=parameter.device)[:, None]).to(parameter.dtype)
    bound = 2e-2 if parameter.dtype.itemsize < 4 else 1e-5  # two roundings of bfloat16, relative to a row's largest
    expected = old(x)
    return bool(((expected - new(x)).abs().amax(-1) <= bound * expected.abs().amax(-1)).all())
