"""Luthier: fine-tune, align, compress, evaluate and serve language models from one recipe.

The names below are the Python interface. They are imported when they are first used, so `import luthier` costs next
to nothing and loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.data.batches import TokenBatch
    from luthier.errors import LuthierError
    from luthier.models.load import Model, load
    from luthier.models.save import save
    from luthier.models.score import Scores, score
    from luthier.objectives.loss import Loss
    from luthier.pipeline.run import run_recipe
    from luthier.recipe import LoRA, Recipe, load_recipe

__version__ = "0.1.0"

__all__ = [
    "LoRA",
    "Loss",
    "LuthierError",
    "Model",
    "Recipe",
    "Scores",
    "TokenBatch",
    "load",
    "load_recipe",
    "run_recipe",
    "save",
    "score",
]

_HOMES = {
    "LoRA": "luthier.recipe",
    "Loss": "luthier.objectives.loss",
    "LuthierError": "luthier.errors",
    "Model": "luthier.models.load",
    "Recipe": "luthier.recipe",
    "Scores": "luthier.models.score",
    "TokenBatch": "luthier.data.batches",
    "load": "luthier.models.load",
    "load_recipe": "luthier.recipe",
    "run_recipe": "luthier.pipeline.run",
    "save": "luthier.models.save",
    "score": "luthier.models.score",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'luthier' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
