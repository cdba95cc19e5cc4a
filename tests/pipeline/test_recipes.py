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

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes" / "adapters").glob("*.yaml"))
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
