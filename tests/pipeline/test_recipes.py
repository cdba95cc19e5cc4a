"""Every recipe that comes with the package trains, as it is but for the model, the data and the number of steps."""

import json
from pathlib import Path

import pytest
import torch

from luthier.adapters.inject import ADAPTERS, adapter_parameters, inject
from luthier.adapters.peft_format import save_adapter
from luthier.models.adapted import load_adapted
from luthier.models.load import load
from luthier.pipeline.run import run_recipe
from luthier.recipe import Recipe, load_recipe
from luthier.recipe.adapters import AdapterFusion, Bottleneck
from luthier.recipe.stages import STAGE_SETTINGS

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes" / "adapters").glob("*.yaml"))
ALIGNMENT = sorted((ROOT / "recipes" / "alignment").glob("*.yaml"))
REWARDS = sorted((ROOT / "recipes" / "rewards").glob("*.yaml"))
STAY_BESIDE = {"bitfit", "bottleneck", "fusion", "prefix", "prompt"}


@pytest.fixture(scope="module")
def base(wide_chat_model: Path) -> str:
    return str(wide_chat_model)


@pytest.fixture(scope="module")
def members(base: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Two bottleneck adapters of the tiny model, for a fusion."""
    folders = []
    for seed in (1, 2):
        model = load(base)
        inject(model.network, Bottleneck(size=8), seed=seed)
        for i, parameter in enumerate(adapter_parameters(model.network).values()):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(100 * seed + i))
        folders.append(tmp_path_factory.mktemp("member"))
        save_adapter(model.network, folders[-1], base_model=base)
    return tuple(map(str, folders))


def small(recipe: Recipe, base: str, folder: Path, members: tuple[str, ...]) -> Recipe:
    """The same recipe on the tiny model, on 24 rows and for two steps."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"{i}?", "answer": f"{i}{i}."}) + "\n" for i in range(24)))
    (stage,) = recipe.stages
    update = {"data": str(rows), "max_steps": 2, "batch_size": 4, "dtype": "fp32"}
    if isinstance(stage.settings.adapter, AdapterFusion):
        update["adapter"] = stage.settings.adapter.model_copy(update={"adapters": members})
    settings = stage.settings.model_copy(update=update)
    return Recipe.model_validate(
        {"model": base, "output": str(folder / "run"), "dtype": "fp32", "stages": [{stage.word: _said(settings)}]}
    )


def _said(settings: object) -> dict[str, object]:
    said: dict[str, object] = settings.model_dump(exclude={"model", "output"})  # type: ignore[attr-defined]
    return said


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_and_leaves_a_model_or_an_adapter(
    path: Path, base: str, members: tuple[str, ...], tmp_path: Path
) -> None:
    (summary,) = run_recipe(small(load_recipe(path), base, tmp_path, members))
    assert summary.steps == 2
    assert summary.trained_parameters > 0
    word = load_recipe(path).stages[0].settings.adapter.type  # type: ignore[union-attr]
    assert (tmp_path / "run" / "model").is_dir() == (word not in STAY_BESIDE)
    adapted = load_adapted(base, tmp_path / "run" / "00-sft" / "adapter")
    ids = torch.arange(3, 15)[None]
    assert not torch.equal(adapted.network(ids).logits[..., :257], load(base).network(ids).logits[..., :257])


def test_every_type_has_a_recipe() -> None:
    recipes = [load_recipe(path).stages[0].settings.adapter for path in RECIPES]
    assert {adapter.type for adapter in recipes if adapter} == set(ADAPTERS)


@pytest.mark.parametrize("path", [path for path in ALIGNMENT if path.stem != "rlaif"], ids=lambda path: path.stem)
def test_a_recipe_of_preferences_trains_and_leaves_a_model(
    path: Path, base: str, speaker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [{"prompt": f"{i}?", "chosen": f"{i}{i}.", "rejected": "No."} for i in range(24)]
    rows = [{"question": pair["prompt"], "answer": pair["chosen"]} for pair in pairs]
    verdicts = [{"prompt": p["prompt"], "completion": p["chosen"], "label": i % 2} for i, p in enumerate(pairs)]
    steps = [
        {"prompt": p["prompt"], "completions": ["One.", "Two."], "labels": [True, i % 2]} for i, p in enumerate(pairs)
    ]
    for name, made in (("rows", rows), ("pairs", pairs), ("verdicts", verdicts), ("prompts", pairs), ("steps", steps)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    (tmp_path / "judge.py").write_text("def score(prompt, answer, row):\n    return -len(answer)\n")
    monkeypatch.chdir(tmp_path)
    small = {"max_steps": 2, "batch_size": 4, "dtype": "fp32"}
    in_rounds = {"prompts_per_round": 4, "eval_prompts": 2, "max_new_tokens": 24, "rounds": 1}
    stages = []
    for stage in load_recipe(path).stages:
        further = in_rounds if stage.word in ("iterative_dpo", "rlaif") else {}
        stages.append({stage.word: _said(stage.settings.model_copy(update={**small, **further}))})
    model = str(speaker) if path.stem == "iterative_dpo" else base
    summaries = run_recipe(Recipe.model_validate({"model": model, "output": "run", "dtype": "fp32", "stages": stages}))
    assert all(summary.steps > 0 for summary in summaries)
    assert (tmp_path / "run" / "model").is_dir()


@pytest.mark.parametrize("path", REWARDS, ids=lambda path: path.stem)
def test_a_recipe_of_rewards_trains_and_leaves_a_model(
    path: Path, speaker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"What is {i}?", "answer": f"{i}"} for i in range(20)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text("def score(prompt, answer, row):\n    return len(answer)\n")
    monkeypatch.chdir(tmp_path)
    (stage,) = load_recipe(path).stages
    small = {"max_steps": 1, "batch_size": 2, "max_new_tokens": 8, "group_size": min(2, stage.settings.group_size)}
    small |= {"length_margin": 4} if stage.word == "dapo" else {}
    said = {stage.word: _said(stage.settings) | small}
    (summary,) = run_recipe(
        Recipe.model_validate({"model": str(speaker), "output": "run", "dtype": "fp32", "stages": [said]})
    )
    assert summary.steps == 1
    assert (tmp_path / "run" / "model").is_dir()


def test_every_stage_has_a_recipe() -> None:
    words = {stage.word for path in (*ALIGNMENT, *REWARDS) for stage in load_recipe(path).stages}
    assert words | {"pretrain"} == set(STAGE_SETTINGS)
