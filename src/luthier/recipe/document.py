"""A whole recipe: read from YAML with every error at its line, written back complete, described as JSON Schema.

What a recipe says at its top holds for every stage that does not say its own. `model` and `output` belong to the
recipe alone: a stage trains the model that the one before it made, and writes into its own folder below `output`.
Relative paths in a recipe start at the current folder, not at the recipe's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Annotated, Any

from annotated_types import MinLen
from pydantic import PlainValidator, ValidationError, ValidationInfo, field_validator
from pydantic.json_schema import models_json_schema

from luthier.errors import RecipeError
from luthier.recipe.problems import Problem, Problems, problems_in, unknown
from luthier.recipe.settings import Settings, Word
from luthier.recipe.stages import STAGE_SETTINGS
from luthier.recipe.training import DType, OnError, Seed, Tracker, Training
from luthier.recipe.yaml_text import read_yaml, write_yaml

__all__ = ["Recipe", "Stage", "dump_recipe", "load_recipe", "parse_recipe", "recipe_of", "recipe_schema"]

_RECIPES_ALONE = ("model", "output")
_HANDED_DOWN = (*_RECIPES_ALONE, "seed", "dtype", "report_to", "on_error")


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of a recipe: its word, and the settings that the word takes."""

    word: str
    settings: Training


def _read_stage(value: object, info: ValidationInfo) -> Stage:
    """`{"sft": {...}}` or a Stage; raises Problems. Others of its settings depend on the recipe's dtype."""
    if isinstance(value, Stage):
        return _check_stage(value)
    if isinstance(value, str) and value in STAGE_SETTINGS:
        raise Problems([Problem((), f'the stage has no settings; write "{value}: {{data: ...}}"')])
    if not isinstance(value, Mapping) or len(value) != 1:
        raise Problems([Problem((), 'expected one stage with its settings, such as "sft: {data: rows.jsonl}"')])
    word, settings = next(iter(value.items()))
    if word not in STAGE_SETTINGS:
        raise Problems([Problem((word,), unknown("stage", str(word), list(STAGE_SETTINGS)))])
    found = [_trespass(word, name) for name in _RECIPES_ALONE if isinstance(settings, Mapping) and name in settings]
    try:
        if settings is None or isinstance(settings, Mapping):
            handed_down = {"dtype": info.data["dtype"]} if "dtype" in info.data else {}
            settings = handed_down | dict(settings or {})
        stage = Stage(word, STAGE_SETTINGS[word].model_validate(settings))
    except ValidationError as error:
        found += [problem.under(word) for problem in problems_in(error, settings)]
    if found:
        raise Problems(found)
    return stage


def _check_stage(stage: Stage) -> Stage:
    if type(stage.settings) is not STAGE_SETTINGS.get(stage.word):
        message = f'"{stage.word}" is no stage that takes {type(stage.settings).__name__} settings'
        raise Problems([Problem((), f"{message}; known stages are {', '.join(STAGE_SETTINGS)}")])
    return stage


class Recipe(Settings):
    """Stages that one model goes through, one after the other."""

    model: Word = "smollm2-135m"
    """The model that the first stage starts from: an alias, a hub id, a folder or a .gguf file."""

    output: Word = "runs/recipe"
    """The folder of the run; each stage has its own folder below."""

    seed: Seed = 42
    """The seed of every stage that does not say its own."""

    dtype: DType = "bf16"
    """The type of weights and activations in every stage that does not say its own."""

    report_to: tuple[Tracker, ...] = ()
    """Where metrics go besides metrics.jsonl, in every stage that does not say its own."""

    on_error: OnError = "stop"
    """What a row that does not fit does, in every stage that does not say its own."""

    stages: Annotated[tuple[Annotated[Stage, PlainValidator(_read_stage)], ...], MinLen(1)]
    """What happens to the model, in this order; each is one word with its settings."""

    @field_validator("stages")
    @classmethod
    def _hand_down(cls, stages: tuple[Stage, ...], info: ValidationInfo) -> tuple[Stage, ...]:
        shared = {name: info.data[name] for name in _HANDED_DOWN if name in info.data}
        found = [problem.under(i) for i, stage in enumerate(stages) for problem in _trespasses(stage, shared)]
        if found:
            raise Problems(found)
        return tuple(_with_defaults(stage, shared) for stage in stages)


def load_recipe(path: str | FilePath) -> Recipe:
    """The recipe in a YAML file; raises RecipeError with one line for each thing that is wrong, in the file's order."""
    return parse_recipe(_read_text(FilePath(path)), name=str(path))


def parse_recipe(text: str, *, name: str = "recipe") -> Recipe:
    """The recipe that a YAML text holds; `name` is what the errors call it."""
    document = read_yaml(text, name)
    found = list(document.found)
    try:
        recipe = Recipe.model_validate(document.value)
    except ValidationError as error:
        wrong = [problem for problem in problems_in(error, document.value) if problem.path not in document.refused]
        found += [(document.line(problem.path), problem) for problem in wrong]
    if found:
        raise RecipeError(_listed(found, name))
    return recipe


def recipe_of(word: str, settings: Training) -> Recipe:
    """The recipe with this one stage: what a training command runs."""
    shared = {name: getattr(settings, name) for name in _HANDED_DOWN}
    return Recipe.model_validate({**shared, "stages": (Stage(word, settings),)})


def dump_recipe(recipe: Recipe) -> str:
    """YAML with every resolved setting; `parse_recipe` reads it as the same recipe."""
    top = {name: getattr(recipe, name) for name in _HANDED_DOWN}
    stages = [{stage.word: stage.settings.model_dump(exclude=set(_RECIPES_ALONE))} for stage in recipe.stages]
    return write_yaml({**top, "stages": stages})


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of a recipe file, with the descriptions of all fields, for editors."""
    references, shared = models_json_schema([(kind, "validation") for kind in dict.fromkeys(STAGE_SETTINGS.values())])
    for kind in STAGE_SETTINGS.values():
        for name in _RECIPES_ALONE:
            shared["$defs"][kind.__name__]["properties"].pop(name, None)
    schema = Recipe.model_json_schema()
    stages = [_stage_schema(word, references[kind, "validation"]) for word, kind in STAGE_SETTINGS.items()]
    described = {"description": schema["properties"]["stages"]["description"]}
    schema["properties"]["stages"] = described | {"type": "array", "minItems": 1, "items": {"oneOf": stages}}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "$defs": shared["$defs"]}


def _stage_schema(word: str, settings: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {word: settings}, "required": [word], "additionalProperties": False}


def _trespasses(stage: Stage, shared: Mapping[str, object]) -> list[Problem]:
    """What settings made in Python say of their own, against the recipe, about what belongs to it alone."""
    own = [name for name in _RECIPES_ALONE if name in stage.settings.model_fields_set]
    return [_trespass(stage.word, name) for name in own if getattr(stage.settings, name) != shared.get(name)]


def _trespass(word: str, name: str) -> Problem:
    return Problem((word, name), f"belongs to the whole recipe; say {name} once, at the top")


def _with_defaults(stage: Stage, shared: Mapping[str, object]) -> Stage:
    """The stage with the recipe's word for all that it does not say itself."""
    missing = {name: value for name, value in shared.items() if name not in stage.settings.model_fields_set}
    said = {name: getattr(stage.settings, name) for name in stage.settings.model_fields_set}
    return Stage(stage.word, type(stage.settings).model_validate(said | missing))


def _read_text(path: FilePath) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such file in {FilePath.cwd()}; check the path") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: this is not text in UTF-8; a recipe is a YAML file") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); a recipe is a YAML file") from None


def _listed(found: list[tuple[int, Problem]], name: str) -> str:
    return "\n".join(f"{name}:{line}: {problem}" for line, problem in sorted(found, key=lambda entry: entry[0]))
