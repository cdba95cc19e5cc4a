"""The reference model's log-probabilities of answers, which preference losses compare with.

They are numbers of the data and of the model before its first step, so they are computed once, with the adapter
switched off or before any weight has changed, and kept in the stage's folder. A second copy of the weights is there
only while another model is the reference that a recipe names.
"""

import gc
import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.adapters.inject import adapted_layers
from luthier.adapters.switch import adapters_off
from luthier.data.batches import TokenBatch, collate, passes
from luthier.data.sequences import Item, TokenGroup
from luthier.errors import CheckpointError, RecipeError
from luthier.files import replacing
from luthier.models.float8 import float8_layers
from luthier.models.fuse import fuse
from luthier.models.load import Model, load
from luthier.models.quantize import quantized_as
from luthier.models.score import evaluating, sequence_logprobs
from luthier.models.sources import resolve
from luthier.pipeline.live import dtype_of
from luthier.pipeline.sealed import OTHER, seal_of

__all__ = ["placeholders", "referred", "with_reference"]

logger = logging.getLogger(__name__)

_FILE = "reference.safetensors"


def with_reference(network: nn.Module, batches: Sequence[TokenBatch]) -> list[TokenBatch]:
    """The batches with the log-probabilities that the network gives without its adapters."""
    with _as_reference(network):
        return [_referred_batch(network, batch) for batch in batches]


def referred(
    items: Sequence[Item], model: Model, folder: Path, *, name: str | None, micro_batch_tokens: int
) -> list[Item]:
    """The groups with the reference's log-probabilities, read from the stage's folder, or computed and kept there.

    name: of another model than the given one, which is loaded for the while. Raises RecipeError where its tokens are
    others, CheckpointError where the file in the folder cannot be read.
    """
    groups = [item for item in items if isinstance(item, TokenGroup)]
    key = _key(groups, model, name)
    values = _read(folder / _FILE, key)
    if values is None:
        logger.info("log-probabilities of %d answers by the reference model", sum(len(g.sequences) for g in groups))
        values = _computed(groups, model, name, micro_batch_tokens)
        _write(folder / _FILE, key, values)
    remaining = iter(values.tolist())
    return [_filled(group, remaining) for group in groups]


def placeholders(batch: TokenBatch, *columns: str) -> TokenBatch:
    """The batch with zeros for what a reference model says of it, and for columns of these names: for memory plans."""
    other = batch.mismatched
    zeros = torch.zeros(batch.count("sequences"))
    return replace(
        batch,
        reference=zeros,
        baseline=zeros.sum(),
        mismatched=None if other is None else placeholders(other),
        columns=dict.fromkeys(columns, torch.zeros(batch.count("tokens"))),
    )


def _referred_batch(network: nn.Module, batch: TokenBatch) -> TokenBatch:
    device = next(network.parameters()).device
    batch = batch.to(device)
    other = None if batch.mismatched is None else _referred_batch(network, batch.mismatched)
    return replace(batch, reference=sequence_logprobs(network, batch), mismatched=other)


@contextmanager
def _as_reference(network: nn.Module) -> Iterator[None]:
    with evaluating(network), adapters_off(network) if adapted_layers(network) else nullcontext():
        yield


def _computed(groups: Sequence[TokenGroup], model: Model, name: str | None, micro_batch_tokens: int) -> Tensor:
    """One number a sequence, a group's mismatched one after its own, in the groups' order."""
    network = model.network if name is None else _other(name, model)
    everything = [_with_mismatched(group) for group in groups]
    found: list[Tensor] = [torch.empty(0)] * len(groups)
    with _as_reference(network):
        for members in passes(everything, micro_batch_tokens):
            batch = collate([everything[i] for i in members])
            logprobs = sequence_logprobs(network, batch).float().cpu()
            pieces = logprobs.split([len(everything[i].sequences) for i in members])
            for i, piece in zip(members, pieces, strict=True):
                found[i] = piece
    del network
    gc.collect()  # a network refers to itself, and the policy's first step needs its place
    return torch.cat(found)


def _with_mismatched(group: TokenGroup) -> TokenGroup:
    """The group with its mismatched answer among its sequences, since it begins with the same prompt."""
    return group if group.mismatched is None else TokenGroup((*group.sequences, group.mismatched))


def _other(name: str, model: Model) -> PreTrainedModel:
    other = load(name, dtype=dtype_of(model), device=model.device)
    if other.tokenizer.get_vocab() != model.tokenizer.get_vocab():
        raise RecipeError(f"reference: {name} has other tokens than {model.source.name}; name one of its family")
    fuse(other.network)
    return other.network


def _filled(group: TokenGroup, values: Iterator[float]) -> TokenGroup:
    own = tuple(next(values) for _ in group.sequences)
    return replace(group, reference=own, mismatched_reference=None if group.mismatched is None else next(values))


def _key(groups: Sequence[TokenGroup], model: Model, name: str | None) -> str:
    """What decides the numbers: the tokens, the weights and their type, and what of them is rounded to eight bits."""
    weights = model.source.weights_hash if name is None else resolve(name).weights_hash
    digest = hashlib.sha256(f"{weights} {quantized_as(model.network)} {model.dtype}".encode())
    for layer, windows in float8_layers(model.network).items() if name is None else ():
        digest.update(f"{layer} in float8, margin {windows.margin}".encode())
    for group in groups:
        for sequence in _with_mismatched(group).sequences:
            digest.update(sequence.token_ids.tobytes())
            digest.update(sequence.trained.tobytes())
    return digest.hexdigest()


def _read(path: Path, key: str) -> Tensor | None:
    """What the file holds, None where there is none or it is of other data."""
    if not path.exists():
        return None
    why = OTHER
    try:
        with safe_open(path, framework="pt") as file:
            said, _, seal = (file.metadata() or {}).get("key", "").partition(" ")
            if said != key:
                return None
            values: Tensor = file.get_tensor("logprobs")
        if seal == seal_of(values.tolist()):
            return values
    except (SafetensorError, OSError) as error:
        why = str(error)
    raise CheckpointError(f"{path}: cannot be read ({why}); delete it, and it is computed anew")


def _write(path: Path, key: str, values: Tensor) -> None:
    """With one word of metadata, for safetensors writes several in any order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        save_file({"logprobs": values}, beside, metadata={"key": f"{key} {seal_of(values.tolist())}"})
