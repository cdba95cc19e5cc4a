"""The adapters that a recipe knows, by their words.

A further type is one class, in `low_rank.py` or `small_adapters.py`, and one more member of `_Any`; recipes, flags,
JSON Schema and the messages about unknown types follow from that. `adapter: lora`, `adapter: {r: 8}` and
`adapter: {type: lora, r: 8}` all mean LoRA.
"""

from typing import Annotated, TypeAlias

from pydantic import BeforeValidator

from luthier.recipe.adapter import AnyAdapter
from luthier.recipe.kinds import by_type
from luthier.recipe.low_rank import AdaLoRA, DoRA, DyLoRA, LoHa, LoKr, LoRA, LowRank, VeRA
from luthier.recipe.settings import branches
from luthier.recipe.small_adapters import IA3, AdapterFusion, BitFit, Bottleneck, Prefix, Prompt

__all__ = [
    "ADAPTER_SETTINGS",
    "IA3",
    "AdaLoRA",
    "AdapterFusion",
    "AdapterSettings",
    "AnyAdapter",
    "BitFit",
    "Bottleneck",
    "DoRA",
    "DyLoRA",
    "LoHa",
    "LoKr",
    "LoRA",
    "LowRank",
    "Prefix",
    "Prompt",
    "VeRA",
]

_OTHER_WORDS = {  # what people call a type that is a setting of another here
    "loftq": "it is type: lora with init: loftq, over quantize_base: nf4",
    "lora+": "it is type: lora with lr_ratio_b: 16",
    "loraplus": "it is type: lora with lr_ratio_b: 16",
    "olora": "it is type: lora with init: olora",
    "p_tuning": "it is type: prompt",
    "pissa": "it is type: lora with init: pissa",
    "qlora": "it is type: lora, or any other, over quantize_base: nf4",
    "rslora": "it is type: lora with rs_scaling: true",
}

_OnLinearLayers: TypeAlias = LoRA | DoRA | LoHa | LoKr | VeRA | IA3 | AdaLoRA | DyLoRA | BitFit
_Any: TypeAlias = _OnLinearLayers | Bottleneck | AdapterFusion | Prefix | Prompt

ADAPTER_SETTINGS: dict[str, type[AnyAdapter]] = {kind.model_fields["type"].default: kind for kind in branches(_Any)}


def _by_type(value: object) -> object:
    return by_type(value, ADAPTER_SETTINGS, default="lora", other_words=_OTHER_WORDS)


AdapterSettings = Annotated[_Any, BeforeValidator(_by_type)]
