"""The language of recipes: typed settings without torch, YAML in, errors with line and field, YAML and schema out."""

from luthier.recipe.adapters import ADAPTER_SETTINGS, AdapterSettings, LoRA
from luthier.recipe.document import Recipe, Stage, dump_recipe, load_recipe, parse_recipe, recipe_of, recipe_schema
from luthier.recipe.flags import Flag, flags_of, settings_from_flags
from luthier.recipe.settings import Settings, settings_from
from luthier.recipe.stages import STAGE_SETTINGS
from luthier.recipe.training import SFT, Pretrain, Training

__all__ = [
    "ADAPTER_SETTINGS",
    "SFT",
    "STAGE_SETTINGS",
    "AdapterSettings",
    "Flag",
    "LoRA",
    "Pretrain",
    "Recipe",
    "Settings",
    "Stage",
    "Training",
    "dump_recipe",
    "flags_of",
    "load_recipe",
    "parse_recipe",
    "recipe_of",
    "recipe_schema",
    "settings_from",
    "settings_from_flags",
]
