"""The JSON Schema admits what the loader admits, refuses what it refuses, and describes every field."""

from collections.abc import Iterator
from typing import Any

import pytest

from luthier.errors import RecipeError
from luthier.recipe import dump_recipe, parse_recipe, recipe_schema
from luthier.recipe.yaml_text import read_yaml

SCHEMA = recipe_schema()
GOOD = [
    "stages: [{sft: {data: a}}]",
    "stages: [{sft: {data: [a, b], adapter: none, gradient_checkpointing: true, max_steps: none}}]",
    "stages: [{sft: {data: a, adapter: lora, report_to: tensorboard, eval_fraction: 0.1, eval_every: epoch}}]",
    "stages: [{sft: {data: a, adapter: {r: 8, alpha: 3, target_modules: [q_proj]}, columns: {prompt: question}}}]",
    "stages: [{sft: {data: a, eval_fraction: 0.1, forgetting: general.txt, watch: [Hi, 'Who are you?']}}]",
    "stages: [{sft: {data: a, eval_data: b, forgetting: {questions: q, num_questions: 9}, watch: {prompts: Hi}}}]",
    "stages: [{sft: {data: a, optimizer: muon, parameter_groups: {'*.lora_B': 4, '*': {weight_decay: 0}}}}]",
    "stages: [{sft: {data: a, adapter: none, optimizer: {type: lion, beta1: 0.8}, offload_optimizer: disk}}]",
    "{model: m, output: o, seed: 1, stages: [{pretrain: {data: a, mix: {b: 0.3}}}, {sft: {data: a, save_every: 9}}]}",
]
BAD = [
    "stages: []",
    "seed: 1",
    "stages: [{stf: {data: a}}]",
    "stages: [{sft: {epochs: 1}}]",
    "stages: [{sft: {data: a, learning_rte: 1}}]",
    "stages: [{sft: {data: a, epochs: 0}}]",
    "stages: [{sft: {data: a, eval_every: epochs}}]",
    "stages: [{sft: {data: a, adapter: dorra}}]",
    "stages: [{sft: {data: a, adapter: {r: x}}}]",
    "stages: [{sft: {data: a, model: b}}]",
    "stages: [{sft: {data: a, optimizer: moun}}]",
    "stages: [{sft: {data: a, optimizer: {type: lion, momentum: 0.9}}}]",
    "stages: [{sft: {data: a, parameter_groups: {'*': x}}}]",
    "stages: [{pretrain: {data: a, mix: {b: 2}}}]",
    "stages: [{sft: {data: a, eval_fraction: 0.1, forgetting: 3}}]",
    "stages: [{sft: {data: a, eval_fraction: 0.1, forgetting: {txt: a}}}]",
    "{dtype: fp61, stages: [{sft: {data: a}}]}",
]


@pytest.mark.parametrize("text", GOOD)
def test_the_schema_admits_good_recipes(text: str) -> None:
    assert admits(SCHEMA, read_yaml(text, "good").value)
    assert admits(SCHEMA, read_yaml(dump_recipe(parse_recipe(text)), "written").value)


@pytest.mark.parametrize("text", BAD)
def test_the_schema_refuses_bad_recipes(text: str) -> None:
    with pytest.raises(RecipeError):
        parse_recipe(text)
    assert not admits(SCHEMA, read_yaml(text, "bad").value)


def test_the_schema_describes_every_field() -> None:
    properties = [SCHEMA["properties"], *(kind["properties"] for kind in SCHEMA["$defs"].values())]
    assert [name for fields in properties for name, field in fields.items() if not field.get("description")] == []


def test_the_schema_speaks_of_each_form_once() -> None:
    unions = [node["anyOf"] for node in nodes(SCHEMA) if "anyOf" in node]
    assert unions
    assert [forms for forms in unions if any(forms.count(form) > 1 for form in forms)] == []


def nodes(schema: object) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
    if isinstance(schema, dict | list):
        for inner in schema.values() if isinstance(schema, dict) else schema:
            yield from nodes(inner)


TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}


def admits(schema: dict[str, Any], value: object) -> bool:
    """As much of JSON Schema as recipes need."""
    if "$ref" in schema:
        return admits(SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], value)
    kinds = [TYPES[schema["type"]]] if "type" in schema else [object]
    number_for_truth = isinstance(value, bool) and bool not in kinds and object not in kinds
    return (
        any(isinstance(value, kind) for kind in kinds)
        and not number_for_truth
        and value in schema.get("enum", [value])
        and schema.get("const", value) == value
        and ("anyOf" not in schema or any(admits(form, value) for form in schema["anyOf"]))
        and ("oneOf" not in schema or sum(admits(form, value) for form in schema["oneOf"]) == 1)
        and within(schema, value)
        and inside(schema, value)
    )


def within(schema: dict[str, Any], value: Any) -> bool:
    if isinstance(value, str | list):
        return len(value) >= schema.get("minLength" if isinstance(value, str) else "minItems", 0)
    if not isinstance(value, int | float):
        return True
    above = value >= schema.get("minimum", value) and value > schema.get("exclusiveMinimum", value - 1)
    return above and value <= schema.get("maximum", value) and value < schema.get("exclusiveMaximum", value + 1)


def inside(schema: dict[str, Any], value: object) -> bool:
    if isinstance(value, list):
        return all(admits(schema.get("items", {}), entry) for entry in value)
    if not isinstance(value, dict):
        return True
    known, others = schema.get("properties", {}), schema.get("additionalProperties", {})
    if set(schema.get("required", [])) - set(value) or (others is False and set(value) - set(known)):
        return False
    return all(admits(known.get(name) or others or {}, entry) for name, entry in value.items())
