"""Loss invariance, shown on the user's own recipe: the gradient of a step does not depend on how the step is cut.

The same sequences go through the model whole, in two micro-batches, one by one and in another order, and the gradients
are compared. Beside them stands what averaging the micro-batches' means would have given, the common mistake. A policy
learns here from answers of the longest length with advantages drawn by chance.
Dropout is off, since its draws belong to a micro-batch. All is computed in float64: in float32 the order of summation
alone moved the gradient of a 135M model by 3e-5 of its norm, in float64 by 4e-16, so what is left is a mistake.
For the same reason nothing is rounded to eight bits, whatever the recipe says.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.adapters.inject import adapter_parameters
from luthier.data.batches import StepPlan, TokenBatch, collate, cut
from luthier.data.sequences import Item, TokenGroup, sequences_of
from luthier.errors import VerificationError
from luthier.models.load import Model, load
from luthier.pipeline.known import known_of
from luthier.pipeline.methods import Method
from luthier.pipeline.prepare import prepare_data, prepare_network
from luthier.pipeline.prompts import answered
from luthier.pipeline.stages import STAGES
from luthier.recipe.document import Recipe
from luthier.recipe.policy import OnPolicy
from luthier.recipe.preference import WithReference
from luthier.recipe.training import Training
from luthier.training.loop import step_gradients
from luthier.training.run import Objective

__all__ = ["GRADIENT_BOUND", "CutResult", "LossProof", "verify_loss"]

# Not 1e-12, as float64 allows: a model's own layers may compute their norms or angles in float32, whose order of
# summation then shows. A wrong divisor changes the gradient by percents.
GRADIENT_BOUND = 1e-5
_PERTURBATION = 0.01  # of adapter parameters that start at zero, beside which others would have no gradient

Gradient = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class CutResult:
    """A way to compute the step. loss: nats a unit. difference: |g - g_whole| / |g_whole| over all that is trained."""

    name: str
    num_micro_batches: int
    loss: float
    difference: float


@dataclass(frozen=True, slots=True)
class LossProof:
    """cuts: all ways to compute the step, the whole first. averaged: the mean of the means of single sequences."""

    num_sequences: int
    num_tokens: int
    num_trained_tokens: int
    cuts: tuple[CutResult, ...]
    averaged: CutResult

    @property
    def largest_difference(self) -> float:
        """The largest relative difference of a gradient to the whole step's."""
        return max(result.difference for result in self.cuts)


def verify_loss(recipe: Recipe, *, num_sequences: int = 8, objective: Objective | None = None) -> LossProof:
    """Computes one step of the recipe's first stage in every way.

    num_sequences: of those with a trained token, in the order that the stage's seed gives. objective: by default the
    stage's own. Raises VerificationError if a gradient differs by more than GRADIENT_BOUND.
    """
    stage = recipe.stages[0]
    live = {"cache_reference": False} if isinstance(stage.settings, WithReference) else {}
    settings = stage.settings.model_copy(update={"dtype": "fp32", "fp8": None, **live})
    model = load(recipe.model, dtype="fp32")
    items = _items(settings, model, num_sequences)
    prepare_network(settings, model)
    _perturb(model.network, settings.seed)
    model.network.double().eval()
    if isinstance(settings, OnPolicy):
        items = _answered(items, model.network, settings)
    method = STAGES[stage.word].method(settings) if objective is None else Method(objective)
    proof = _measure(model.network, items, method)
    _check(proof)
    return proof


def _items(settings: Training, model: Model, wanted: int) -> list[Item]:
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare_data(settings, model, Path(folder))
    usable = [item for item in prepared.train if item.num_trained]
    items = StepPlan(usable, wanted, epochs=1, seed=settings.seed).step(0)
    if len(items) < 2:
        raise VerificationError("one sequence cannot be cut in several ways; give at least two rows and two sequences")
    return items


def _answered(items: Sequence[Item], network: PreTrainedModel, settings: OnPolicy) -> list[Item]:
    """Prompts' stand-ins as groups, with what a rollout would know of their answers."""
    groups = [answered(one, settings.group_size) for one in sequences_of(items)]
    known = known_of(network, groups, settings, micro_batch_tokens=sum(map(len, groups)))
    counts = [one.num_trained for one in sequences_of(groups)]
    generator = torch.Generator().manual_seed(settings.seed)
    drawn = {name: torch.randn(sum(counts), generator=generator) for name in ("advantages", "returns")}
    unknown = {"sampled": torch.full((sum(counts),), torch.nan)}
    columns = {name: iter(whole.split(counts)) for name, whole in {**known, **drawn, **unknown}.items()}
    return [
        TokenGroup(
            tuple(
                replace(one, columns={name: next(parts).numpy() for name, parts in columns.items()})
                for one in group.sequences
            )
        )
        for group in groups
    ]


@torch.no_grad()
def _perturb(network: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(network).values():
        if not parameter.any():
            parameter.copy_(_PERTURBATION * torch.randn(parameter.shape, generator=generator))


def _measure(network: nn.Module, items: Sequence[Item], method: Method) -> LossProof:
    half = len(items) // 2
    singles = cut(items, None, packing=False)
    ways = {
        "two micro-batches": [collate(items[:half]), collate(items[half:])],
        "one sequence each": singles,
        "in reverse order": [collate(items[::-1])],
    }
    whole = collate(items)
    loss, reference = _gradient(network, [whole], method)
    cuts = [CutResult("whole", 1, loss, 0.0)]
    for name, batches in ways.items():
        loss, gradient = _gradient(network, batches, method)
        cuts.append(CutResult(name, len(batches), loss, _difference(gradient, reference)))
    loss, gradient = _averaged(network, singles, method)
    return LossProof(
        num_sequences=len(items),
        num_tokens=whole.num_tokens,
        num_trained_tokens=whole.count("tokens"),
        cuts=tuple(cuts),
        averaged=CutResult("means averaged", len(singles), loss, _difference(gradient, reference)),
    )


def _loss(network: nn.Module, batches: Sequence[TokenBatch], method: Method) -> float:
    """Of one step; its gradient is added to the parameters."""
    prepared = batches if method.prepare is None else method.prepare(network, batches)
    return step_gradients(network, prepared, method.objective)["loss"]


def _gradient(network: nn.Module, batches: Sequence[TokenBatch], method: Method) -> tuple[float, Gradient]:
    network.zero_grad(set_to_none=True)
    loss = _loss(network, batches, method)
    gradient = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad(set_to_none=True)
    return loss, gradient


def _averaged(network: nn.Module, batches: Sequence[TokenBatch], method: Method) -> tuple[float, Gradient]:
    """The mistake: each micro-batch divides by its own units, and the results are averaged."""
    network.zero_grad(set_to_none=True)
    losses = [_loss(network, [batch], method) for batch in batches]
    gradient = {name: p.grad / len(batches) for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad(set_to_none=True)
    return sum(losses) / len(batches), gradient


def _difference(gradient: Gradient, reference: Gradient) -> float:
    """|g - r| / |r| over all parameters together: single ones (a key's bias) may have no gradient but rounding."""
    if gradient.keys() != reference.keys():
        return float("inf")
    squared = sum(float((gradient[name].double() - r.double()).square().sum()) for name, r in reference.items())
    norm = sum(float(r.double().square().sum()) for r in reference.values())
    return float((squared / norm) ** 0.5) if norm else float("nan")


def _check(proof: LossProof) -> None:
    for result in proof.cuts:
        if not result.difference <= GRADIENT_BOUND:  # written so that nan, from a gradient of zeros, fails too
            raise VerificationError(
                f"the gradient computed as {result.name} differs from the whole step's by {result.difference:.1e} of "
                f"its norm, more than the {GRADIENT_BOUND:.0e} that rounding explains; the "
                "objective must return its losses one by one and leave the division to the loop"
            )
