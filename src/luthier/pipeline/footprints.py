"""The footprint of a stage's step, from a few of the model's layers where these are alike.

Running a step on tensors without values takes as long as its operations are many, and a model's layers do the same
operations over and over. What stays from step to step is counted on the whole network; what a pass needs besides grows
by the same bytes with each layer, so two short networks give it for any number. Where the two say that it does not, the
whole network is asked.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from luthier.adapters.targets import decoder_blocks
from luthier.data.batches import TokenBatch
from luthier.models.load import Model, by_layer, outline
from luthier.pipeline.policy import COLUMNS
from luthier.pipeline.prepare import fresh_state, prepare_network
from luthier.pipeline.reference import placeholders
from luthier.pipeline.stages import STAGES
from luthier.recipe.preference import RewardModel
from luthier.recipe.training import Training
from luthier.training.footprint import Footprint, PassBytes, held_bytes, pass_bytes

__all__ = ["Outlined", "Stage", "footprint_of"]

_FEWEST_LAYERS = 2  # a prefix's first layer keeps more than the others


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of a recipe and the model that it is for. tokenizer: the model's, where that has been read already."""

    word: str
    settings: Training
    model_name: str
    tokenizer: PreTrainedTokenizerBase | None = None


class Outlined:
    """A stage's network without weights. dense_bytes: of the weights before they were quantized."""

    def __init__(self, stage: Stage, *, layers: int | None = None) -> None:
        """layers: the first of the model's; None for all. To be called, and used, within a FakeTensorMode."""
        settings, of_either = stage.settings, isinstance(stage.settings, RewardModel)
        self.objective = STAGES[stage.word].method(settings).objective
        self.model: Model = outline(
            stage.model_name, dtype=settings.dtype, either=of_either, layers=layers, tokenizer=stage.tokenizer
        )
        self.stage = replace(stage, tokenizer=self.model.tokenizer)  # as it is before the settings add tokens to it
        self.dense_bytes = sum(p.nbytes for p in self.model.network.parameters())
        prepare_network(settings, self.model)
        self.state = fresh_state(settings, self.model, outline=True)


def footprint_of(stage: Stage, batch: TokenBatch) -> tuple[Outlined, Footprint]:
    """The whole network without weights, and what a step over the batch holds."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        whole = Outlined(stage)
        filled = placeholders(batch, *COLUMNS)
        held = held_bytes(whole.state)
        peak = _extrapolated(partial(_short, whole.stage, filled), _kinds(whole.model))
        if peak is None:
            peak = _pass_bytes(whole, filled).peak
        return whole, replace(held, activations=peak)


def _kinds(model: Model) -> list[object]:
    """What tells each layer from others: its parameters and buffers, whether it is recomputed, and the configuration's
    own words on it.
    """
    blocks, said = decoder_blocks(model.network).values(), by_layer(model.config.get_text_config())
    return [
        (
            [(name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters()],
            [(name, buffer.shape, buffer.dtype) for name, buffer in block.named_buffers()],
            isinstance(block, GradientCheckpointingLayer) and block.gradient_checkpointing,
            {name: values[i] for name, values in said.items()},
        )
        for i, block in enumerate(blocks)
    ]


def _period(kinds: list[object]) -> int:
    """The fewest layers after which all come again as they were."""
    return next(n for n in range(1, len(kinds) + 1) if kinds[n:] == kinds[:-n])


def _extrapolated(shorter: Callable[[int], PassBytes], kinds: list[object]) -> int | None:
    """The peak of a pass, from two networks of fewer layers; None where they would not be shorter, or do not agree with
    what is kept from the forward pass to the backward pass.
    """
    if not kinds:
        return None
    period = _period(kinds)
    periods, rest = divmod(len(kinds), period)
    fewer = _FEWEST_LAYERS if period == 1 else 1
    if 2 * fewer + 1 >= periods:
        return None
    first, second = (shorter(n * period + rest) for n in (fewer, fewer + 1))
    grown = second.peak - first.peak
    return first.peak + grown * (periods - fewer) if grown == second.kept - first.kept else None


def _short(stage: Stage, batch: TokenBatch, layers: int) -> PassBytes:
    settings = stage.settings.model_copy(update={"parameter_groups": {}})  # patterns may name layers that are left out
    short = Outlined(replace(stage, settings=settings), layers=layers)
    short.state.hold_all()
    return _pass_bytes(short, batch)


def _pass_bytes(outlined: Outlined, batch: TokenBatch) -> PassBytes:
    offloaded = outlined.stage.settings.offload_activations
    return pass_bytes(outlined.state, batch, outlined.objective, offloaded=offloaded)
