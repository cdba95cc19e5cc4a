"""Saved LoRA adapters of one model fused into one, from folder to folder; the model is not needed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from luthier.adapters.fusion import Update, fuse
from luthier.adapters.peft_config import words_of_config
from luthier.adapters.peft_files import write_adapter
from luthier.adapters.peft_format import SavedAdapter, read_adapter
from luthier.errors import AdapterError
from luthier.recipe.adapters import DyLoRA, LoRA

__all__ = ["fuse_saved"]

_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def fuse_saved(
    folders: Sequence[Path],
    destination: Path,
    *,
    method: str,
    weights: Sequence[float] | None = None,
    r: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> LoRA:
    """Writes the fusion of these adapters, a LoRA that PEFT reads too, and returns its settings.

    method: a word of FUSIONS. weights: one for each adapter; by default the average. r, density, seed: as in `fuse`.
    A DyLoRA is taken at the rank that its file remembers.
    Raises AdapterError for adapters that are no LoRA alone or of different models, and what `fuse` raises.
    """
    saved = [read_adapter(folder) for folder in folders]
    base = _same_base(saved)
    fused = fuse([_updates(each) for each in saved], weights, method=method, r=r, density=density, seed=seed)
    settings = _settings(fused)
    tensors = {f"{_PREFIX}{layer}{_A}": update.a for layer, update in fused.items()}
    tensors |= {f"{_PREFIX}{layer}{_B}": update.b for layer, update in fused.items()}
    write_adapter(destination, tensors, words_of_config(settings, saved[0].base_model or "", {}), base)
    return settings


def _same_base(saved: Sequence[SavedAdapter]) -> dict[str, str]:
    """What all of them say of their base. Raises AdapterError where they say different things."""
    said = [each.metadata() for each in saved]
    for each, other in zip(saved, said, strict=True):
        for name, value in other.items():
            if said[0].get(name, value) != value:
                raise AdapterError(f"{each.folder}: its base is not that of {saved[0].folder} ({name} differs)")
    return {name: value for each in said for name, value in each.items()}


def _updates(saved: SavedAdapter) -> Mapping[str, Update]:
    settings, tensors = saved.settings, saved.tensors()
    odd = [key for key in tensors if not key.endswith((_A, _B))]
    if not isinstance(settings, LoRA | DyLoRA) or odd:
        what = f"holds {odd[0]}" if odd else f"is of type {settings.type}"
        raise AdapterError(f"{saved.folder}: {what}; only LoRA adapters without anything else can be fused")
    layers = [key.removeprefix(_PREFIX).removesuffix(_A) for key in tensors if key.endswith(_A)]
    pairs = {layer: (tensors[f"{_PREFIX}{layer}{_A}"], tensors[f"{_PREFIX}{layer}{_B}"]) for layer in layers}
    if isinstance(settings, LoRA):
        return {layer: Update(a, b, settings.scale_of(layer)) for layer, (a, b) in pairs.items()}
    rank = saved.rank or settings.r
    return {layer: Update(a[:rank], b[:, :rank], settings.scale_at(rank)) for layer, (a, b) in pairs.items()}


def _settings(fused: Mapping[str, Update]) -> LoRA:
    """Of a LoRA whose scale is each update's own."""
    ranks = {layer: len(update.a) for layer, update in fused.items()}
    strengths = {layer: update.scale * ranks[layer] for layer, update in fused.items()}
    r = max(ranks.values())
    return LoRA(
        r=r,
        alpha=float(r),
        target_modules=tuple(fused),
        rank_pattern={layer: rank for layer, rank in ranks.items() if rank != r},
        alpha_pattern={layer: alpha for layer, alpha in strengths.items() if alpha != r},
    )
