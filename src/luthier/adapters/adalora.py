"""AdaLoRA: low-rank updates in the form of a singular value decomposition, whose ranks go where they matter.

All layers start with the same rank. A triplet is a row of A, an entry of e and a column of B. While training, the
importance of every parameter is smoothed over the steps, and at intervals the least important triplets of all layers
together are set to zero, down to a budget that falls to its target (`rank_budget.py`). The smoothed importance is kept
in buffers, so that a run goes on where it stopped. A file holds the triplets that are left; an adapter that is read
from one has its ranks for good.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from luthier.adapters.base import Additive, PeftForm, Start, Step
from luthier.adapters.lora import checked_rank, plus_product
from luthier.adapters.rank_budget import Importance, budget_at, highest, last_choice
from luthier.adapters.starts import gaussian
from luthier.kernels.low_rank import add_low_rank
from luthier.recipe.adapters import AdaLoRA as Settings

__all__ = ["AdaLoRA"]

_START_STD = 0.02
_SAID_STEPS = 1000  # PEFT's file counts the phases in steps; here they are shares of however many there are


class AdaLoRA(Additive):
    """h = W x + (alpha / r) B diag(e) A x        Zhang et al. 2023, eq. 3; r is init_r, however few ranks are left"""

    kept: Tensor | None
    peft = PeftForm(
        "ADALORA",
        {
            **{name: name for name in ("target_r", "init_r", "target_modules", "layers_to_transform")},
            **{name: name for name in ("modules_to_save", "beta1", "beta2", "orth_reg_weight")},
            **{"alpha": "lora_alpha", "dropout": "lora_dropout", "prune_every": "deltaT"},
        },
        {"bias": "none", "fan_in_fan_out": False},
        unread=frozenset({"r", "rank_pattern", "tfinal", "tinit", "total_step"}),
    )
    file_names: ClassVar = {}

    def create(self) -> None:
        init_r = checked_rank(self, self.settings.init_r)
        self.scale = self.settings.alpha / (init_r + 1e-5)  # as PEFT divides
        self._make(init_r)
        self.importance = nn.ModuleDict()
        self.settled = False  # whether the last choice was made, as far as this process knows: it can be made again
        self.register_buffer("kept", None)  # [r], which triplets the last choice left; none where the ranks are final

    def _make(self, r: int) -> None:
        self.r = r
        self.lora_A = Parameter(torch.zeros(r, self.in_features, device=self.device))
        self.lora_B = Parameter(torch.zeros(self.out_features, r, device=self.device))
        self.lora_E = Parameter(torch.zeros(r, 1, device=self.device))

    @torch.no_grad()
    def initialize(self, start: Start) -> None:
        """A and B normal, e zero."""
        for parameter in (self.lora_A, self.lora_B):
            parameter.copy_(gaussian(tuple(parameter.shape), _START_STD, start.generator))
        self.kept = torch.ones(self.r, dtype=torch.bool, device=self.device)
        for name, parameter in self.named_parameters():
            self.importance[name] = Importance(parameter)

    def add(self, x: Tensor, output: Tensor | None) -> Tensor:
        if self.r == 0:
            return x.new_zeros(len(x), self.out_features) if output is None else output
        dropped = torch.nn.functional.dropout(x, self.settings.dropout, self.training)
        return add_low_rank(output, dropped, self.lora_E * self.lora_A, self.lora_B, self.scale)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return plus_product(weight, self.lora_E * self.lora_A, self.lora_B, self.scale), bias

    @classmethod
    def penalty(cls, adapters: Sequence[Any]) -> Tensor | None:
        """orth_reg_weight times the mean of |A A' - 1| and |B' B - 1| over all layers        eq. 4, not squared

        That is PEFT's form; the norms are Frobenius norms.
        """
        weight: float = adapters[0].settings.orth_reg_weight
        if weight == 0:
            return None
        grams = [gram for a in adapters for gram in (a.lora_A @ a.lora_A.T, a.lora_B.T @ a.lora_B)]
        norms = [torch.linalg.vector_norm(g - torch.eye(len(g), device=g.device)) for g in grams]
        return weight * torch.stack(norms).mean()

    @classmethod
    @torch.no_grad()
    def after_step(cls, adapters: Sequence[Any], step: Step) -> None:
        """Looks at the gradients, and chooses ranks where they are due.        Algorithm 1"""
        choosing: list[AdaLoRA] = [adapter for adapter in adapters if adapter.kept is not None]
        if not choosing:
            return
        settings: Settings = choosing[0].settings
        after_last = step.index + 1 - last_choice(settings, step)  # which is missed where a gradient was not finite
        if after_last < 0:
            for adapter in choosing:
                adapter._observe()
        budget = budget_at(settings, len(choosing), step)
        if budget is None:
            return
        kept = [adapter.kept for adapter in choosing if adapter.kept is not None]
        if after_last < 0 or not all(adapter.settled for adapter in choosing):
            chosen = highest([adapter.scores() for adapter in choosing], budget)
            for rows, new in zip(kept, chosen, strict=True):
                rows.copy_(new)
        for adapter, rows in zip(choosing, kept, strict=True):
            adapter.settled = after_last >= 0
            adapter.lora_E.masked_fill_(~rows[:, None], 0)

    def _observe(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.grad is not None:
                importance: Any = self.importance[name]
                importance.update(parameter * parameter.grad, self.settings.beta1, self.settings.beta2)

    def scores(self) -> Tensor:
        """How much each triplet matters: its e's score plus the means of its row's and its column's, [r].  eq. 7"""
        importance: Any = self.importance
        a, b, e = (importance[name].scores() for name in ("lora_A", "lora_B", "lora_E"))
        total: Tensor = e[:, 0] + torch.stack([a.mean(1), b.mean(0)], dim=1).sum(1)
        return total

    def _left(self) -> Tensor:
        """The numbers of the triplets that change anything: those set to zero learn on until the last choice."""
        if self.kept is None:
            return torch.arange(self.r)
        return (self.kept | (self.lora_E.detach()[:, 0] != 0)).nonzero()[:, 0]

    def saved(self) -> dict[str, Tensor]:
        """Of the triplets that are left."""
        if self.kept is None:
            return super().saved()
        rows = self._left()
        parts = {"lora_A": self.lora_A[rows], "lora_B": self.lora_B[:, rows], "lora_E": self.lora_E[rows]}
        return {self.key(name): part.detach() for name, part in parts.items()}

    def fit(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """A file says how many triplets are left, of init_r at most."""
        found = shapes.get(self.key("lora_A"), ())
        if found and found[0] < self.r:
            self._make(found[0])

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        key = self.key("lora_A")
        self.fit({key: tuple(tensors[key].shape)})
        super().fill(tensors)

    @classmethod
    def peft_words(cls, settings: Any, adapters: Sequence[Any]) -> dict[str, object]:
        """The phases in steps, and by layer which of the init_r triplets are left."""
        left = {f"{a.name}.lora_E": set(a._left().tolist()) for a in adapters if isinstance(a, AdaLoRA)}
        pruned = any(len(rows) < settings.init_r for rows in left.values())
        pattern = {name: [i in rows for i in range(settings.init_r)] for name, rows in left.items()}
        return {
            "rank_pattern": pattern if pruned else None,
            "tinit": int(settings.warmup_ratio * _SAID_STEPS),
            "tfinal": int(settings.final_ratio * _SAID_STEPS),
            "total_step": _SAID_STEPS,
        }
