"""Luthier: fine-tune, align, compress, evaluate and serve language models from one recipe.

The names below are the Python interface, and with them a function for each training stage, by its word in recipes:
`sft`, `pretrain`. They are imported when they are first used, so `import luthier` costs next to nothing and loads
neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.data.batches import TokenBatch
    from luthier.errors import LuthierError
    from luthier.models.load import Model, load
    from luthier.models.score import Scores, score
    from luthier.objectives.loss import Loss
    from luthier.pipeline.python import Batches, batches, fit, save
    from luthier.pipeline.run import run_recipe
    from luthier.pipeline.train import Summary
    from luthier.recipe import LoRA, Recipe, load_recipe
    from luthier.training.callbacks import Callback

__version__ = "0.1.0"

__all__ = [
    "Batches",
    "Callback",
    "LoRA",
    "Loss",
    "LuthierError",
    "Model",
    "Recipe",
    "Scores",
    "Summary",
    "TokenBatch",
    "batches",
    "fit",
    "load",
    "load_recipe",
    "run_recipe",
    "save",
    "score",
]

_HOMES = {
    "Batches": "luthier.pipeline.python",
    "Callback": "luthier.training.callbacks",
    "LoRA": "luthier.recipe",
    "Loss": "luthier.objectives.loss",
    "LuthierError": "luthier.errors",
    "Model": "luthier.models.load",
    "Recipe": "luthier.recipe",
    "Scores": "luthier.models.score",
    "Summary": "luthier.pipeline.train",
    "TokenBatch": "luthier.data.batches",
    "batches": "luthier.pipeline.python",
    "fit": "luthier.pipeline.python",
    "load": "luthier.models.load",
    "load_recipe": "luthier.recipe",
    "run_recipe": "luthier.pipeline.run",
    "save": "luthier.pipeline.python",
    "score": "luthier.models.score",
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
