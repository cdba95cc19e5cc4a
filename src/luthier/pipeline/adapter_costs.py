"""What each type of adapter costs on a model: parameters, the file, and the extra memory and time of a step.

Everything but the time is counted on tensors without values, so no weights are loaded for it. What is extra is counted
against the same step of the frozen model, with gradients that pass through all of it and end in nothing.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from luthier.adapters.base import Adapter
from luthier.adapters.inject import inject, penalty
from luthier.adapters.merge import remove_adapters
from luthier.data.batches import TokenBatch, collate
from luthier.data.examples import Origin
from luthier.data.sequences import TokenSequence
from luthier.models.fuse import fuse
from luthier.models.load import load, outline
from luthier.models.trainable import freeze_base, trainable_parameters
from luthier.pipeline.methods import next_tokens
from luthier.pipeline.prepare import fresh_state
from luthier.recipe.adapters import ADAPTER_SETTINGS, AnyAdapter
from luthier.recipe.settings import settings_from
from luthier.recipe.training import SFT, DType
from luthier.training.footprint import LiveBytes, step_footprint
from luthier.training.loop import step_gradients

__all__ = ["AdapterCost", "adapter_costs", "of_rank"]

_NUM_SEQUENCES = 4
_RANK_FIELDS = {"adalora": "target_r"}  # where the rank is not called r
_OTHER_RANKS = {"vera"}  # whose rank is that of a pair for all layers, and ten times as high as LoRA's


@dataclass(frozen=True, slots=True)
class AdapterCost:
    """One type on one model. r: the rank that it is counted with, if it has one. share: of all parameters, 0 to 1.

    file_bytes: of its tensors on the disk, before AdaLoRA prunes them. memory_bytes, seconds: of a training step
    besides what the frozen model takes; seconds is None where not measured.
    """

    type: str
    r: int | None
    trainable_parameters: int
    share: float
    file_bytes: int
    memory_bytes: int
    seconds: float | None
    mergeable: bool

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return asdict(self)


def of_rank(word: str, r: int | None) -> AnyAdapter:
    """A type's settings with this rank, where it has one like LoRA's."""
    kind, field = ADAPTER_SETTINGS[word], _RANK_FIELDS.get(word, "r")
    fits = field in kind.model_fields and word not in _OTHER_RANKS
    return settings_from(kind, {field: r} if fits and r is not None else {})


def _rank_of(settings: AnyAdapter) -> int | None:
    rank: int | None = settings.model_dump().get(_RANK_FIELDS.get(settings.type, "r"))
    return rank


def adapter_costs(
    model_name: str,
    *,
    types: Sequence[str] = (),
    r: int | None = None,
    dtype: DType = "bf16",
    num_tokens: int = 512,
    repeats: int = 5,
) -> tuple[list[AdapterCost], float | None]:
    """The costs of each type, and the seconds of a step of the frozen model.

    types: by default all that need nothing but a model. r: for those that have a rank like LoRA's, which VeRA's is not;
    by default each its own.
    num_tokens: of the batch that a step goes over. repeats: steps of which the median counts; 0 measures no time.
    Raises ModelError if the model cannot be used, AdapterError for a rank that does not fit.
    """
    batch = _batch(num_tokens)
    settings = [of_rank(word, r) for word in types or _self_sufficient()]
    costs = _counted(model_name, settings, dtype, batch)
    if not repeats:
        return costs, None
    frozen, *seconds = _timed(model_name, [None, *settings], dtype, batch, repeats)
    return [replace(cost, seconds=took - frozen) for cost, took in zip(costs, seconds, strict=True)], frozen


def _self_sufficient() -> list[str]:
    kinds = ADAPTER_SETTINGS.items()
    return [word for word, kind in kinds if not any(field.is_required() for field in kind.model_fields.values())]


def _batch(num_tokens: int) -> TokenBatch:
    """Token ids that every vocabulary has, all of them trained on but the first of each sequence."""
    size = -(-num_tokens // _NUM_SEQUENCES)
    ids = np.random.default_rng(0).integers(5, 200, (_NUM_SEQUENCES, size), dtype=np.int32)
    return collate([TokenSequence(row, np.arange(size) > 0, Origin("-", i)) for i, row in enumerate(ids)])


def _counted(model_name: str, settings: Sequence[AnyAdapter], dtype: DType, batch: TokenBatch) -> list[AdapterCost]:
    """All of the costs but the seconds."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = outline(model_name, dtype=dtype)
        network = _frozen(model.network)
        frozen_bytes = sum(p.nbytes for p in network.parameters()) + _frozen_peak(network, batch)
        costs = []
        for each in settings:
            adapters = inject(network, each, seed=0)
            trained, total = trainable_parameters(network)
            state = fresh_state(SFT(data="-", dtype=dtype), model, outline=True)
            peak = step_footprint(state, batch, next_tokens).peak_bytes
            costs.append(
                AdapterCost(
                    type=each.type,
                    r=_rank_of(each),
                    trainable_parameters=trained,
                    share=trained / total,
                    file_bytes=sum(value.nbytes for adapter in adapters for value in adapter.parameters()),
                    memory_bytes=peak - frozen_bytes,
                    seconds=None,
                    mergeable=all(adapter.mergeable for adapter in adapters),
                )
            )
            remove_adapters(network)
    return costs


def _frozen_peak(network: PreTrainedModel, batch: TokenBatch) -> int:
    """Bytes of a step of the frozen model besides its weights."""
    counter = LiveBytes()
    counter.ignore([*network.parameters(), *network.buffers()])
    network.enable_input_require_grads()
    with counter:
        next_tokens(network, batch).per_unit.sum().backward()
    network.disable_input_require_grads()
    return counter.peak


def _frozen(network: PreTrainedModel) -> PreTrainedModel:
    fuse(network)
    freeze_base(network)
    network.train()
    return network


def _timed(
    model_name: str, settings: Sequence[AnyAdapter | None], dtype: DType, batch: TokenBatch, repeats: int
) -> list[float]:
    """Seconds of a step's gradients, the median; None stands for the frozen model."""
    network = _frozen(load(model_name, dtype=dtype).network)
    medians = []
    for each in settings:
        adapters = [] if each is None else inject(network, each, seed=0)
        if each is None:
            network.enable_input_require_grads()
        medians.append(statistics.median([_seconds(network, adapters, batch) for _ in range(repeats + 1)][1:]))
        if each is None:
            network.disable_input_require_grads()
        remove_adapters(network)
    return medians


def _seconds(network: PreTrainedModel, adapters: list[Adapter], batch: TokenBatch) -> float:
    started = time.perf_counter()
    step_gradients(network, [batch], next_tokens)
    if (added := penalty(adapters)) is not None:
        added.backward()
    if network.device.type == "cuda":
        torch.cuda.synchronize(network.device)
    took = time.perf_counter() - started
    network.zero_grad(set_to_none=True)
    return took
