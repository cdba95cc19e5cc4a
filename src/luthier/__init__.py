"""Luthier: fine-tune, align, compress, evaluate and serve language models from one recipe.

The names below are the Python interface, and with them a function for each training stage, by its word in recipes:
`sft`, `dpo` and so on. They are imported when they are first used, so `import luthier` costs next to nothing and loads
neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.adapters.cache import AdapterCache
    from luthier.adapters.dylora import set_rank
    from luthier.adapters.fuse_saved import fuse_saved
    from luthier.adapters.merge import adapters_merged, merge_adapters
    from luthier.adapters.switch import activate, adapter_names, adapters_off, assign_rows, delete_adapter, mix_adapters
    from luthier.data.batches import TokenBatch
    from luthier.errors import LuthierError
    from luthier.models.load import Model, load
    from luthier.models.rewards import load_reward, rewards, step_rewards
    from luthier.models.score import Scores, score
    from luthier.objectives.loss import Loss
    from luthier.pipeline.adapter_costs import adapter_costs
    from luthier.pipeline.python import Batches, batches, fit, save
    from luthier.pipeline.python_adapters import add_adapter, load_adapter, print_trainable_parameters, save_adapter
    from luthier.pipeline.run import run_recipe
    from luthier.pipeline.sample import sample
    from luthier.pipeline.train import Summary
    from luthier.recipe import Recipe, load_recipe
    from luthier.recipe.adapters import (
        IA3,
        AdaLoRA,
        AdapterFusion,
        BitFit,
        Bottleneck,
        DoRA,
        DyLoRA,
        LoHa,
        LoKr,
        LoRA,
        Prefix,
        Prompt,
        VeRA,
    )
    from luthier.training.callbacks import Callback

__version__ = "0.1.0"

__all__ = [
    "IA3",
    "AdaLoRA",
    "AdapterCache",
    "AdapterFusion",
    "Batches",
    "BitFit",
    "Bottleneck",
    "Callback",
    "DoRA",
    "DyLoRA",
    "LoHa",
    "LoKr",
    "LoRA",
    "Loss",
    "LuthierError",
    "Model",
    "Prefix",
    "Prompt",
    "Recipe",
    "Scores",
    "Summary",
    "TokenBatch",
    "VeRA",
    "activate",
    "adapter_costs",
    "adapter_names",
    "adapters_merged",
    "adapters_off",
    "add_adapter",
    "assign_rows",
    "batches",
    "delete_adapter",
    "fit",
    "fuse_saved",
    "load",
    "load_adapter",
    "load_recipe",
    "load_reward",
    "merge_adapters",
    "mix_adapters",
    "print_trainable_parameters",
    "rewards",
    "run_recipe",
    "sample",
    "save",
    "save_adapter",
    "score",
    "set_rank",
    "step_rewards",
]

_HOMES = {
    "IA3": "luthier.recipe.adapters",
    "AdaLoRA": "luthier.recipe.adapters",
    "AdapterCache": "luthier.adapters.cache",
    "AdapterFusion": "luthier.recipe.adapters",
    "Batches": "luthier.pipeline.python",
    "BitFit": "luthier.recipe.adapters",
    "Bottleneck": "luthier.recipe.adapters",
    "Callback": "luthier.training.callbacks",
    "DoRA": "luthier.recipe.adapters",
    "DyLoRA": "luthier.recipe.adapters",
    "LoHa": "luthier.recipe.adapters",
    "LoKr": "luthier.recipe.adapters",
    "LoRA": "luthier.recipe.adapters",
    "Loss": "luthier.objectives.loss",
    "LuthierError": "luthier.errors",
    "Model": "luthier.models.load",
    "Prefix": "luthier.recipe.adapters",
    "Prompt": "luthier.recipe.adapters",
    "Recipe": "luthier.recipe",
    "Scores": "luthier.models.score",
    "Summary": "luthier.pipeline.train",
    "TokenBatch": "luthier.data.batches",
    "VeRA": "luthier.recipe.adapters",
    "activate": "luthier.adapters.switch",
    "adapter_costs": "luthier.pipeline.adapter_costs",
    "adapter_names": "luthier.adapters.switch",
    "adapters_merged": "luthier.adapters.merge",
    "adapters_off": "luthier.adapters.switch",
    "add_adapter": "luthier.pipeline.python_adapters",
    "assign_rows": "luthier.adapters.switch",
    "batches": "luthier.pipeline.python",
    "delete_adapter": "luthier.adapters.switch",
    "fit": "luthier.pipeline.python",
    "fuse_saved": "luthier.adapters.fuse_saved",
    "load": "luthier.models.load",
    "load_adapter": "luthier.pipeline.python_adapters",
    "load_recipe": "luthier.recipe",
    "load_reward": "luthier.models.rewards",
    "merge_adapters": "luthier.adapters.merge",
    "mix_adapters": "luthier.adapters.switch",
    "print_trainable_parameters": "luthier.pipeline.python_adapters",
    "rewards": "luthier.models.rewards",
    "run_recipe": "luthier.pipeline.run",
    "sample": "luthier.pipeline.sample",
    "save": "luthier.pipeline.python",
    "save_adapter": "luthier.pipeline.python_adapters",
    "score": "luthier.models.score",
    "set_rank": "luthier.adapters.dylora",
    "step_rewards": "luthier.models.rewards",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _stages():
        return import_module("luthier.pipeline.python").FUNCTIONS[name]
    raise AttributeError(f"module 'luthier' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_stages()})


def _stages() -> list[str]:
    return list(import_module("luthier.recipe.stages").STAGE_SETTINGS)
