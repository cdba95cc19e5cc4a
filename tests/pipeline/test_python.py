"""Stages called from Python: the recipe's bits, adapters that never stack, one's own objective, and going on."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import luthier as lt
from luthier.adapters.inject import adapted_layers
from luthier.adapters.switch import adapters_off
from luthier.errors import CheckpointError, DataError, RecipeError, TrainingError
from luthier.pipeline.methods import next_tokens
from luthier.pipeline.python import FUNCTIONS
from luthier.pipeline.report import write_report
from luthier.recipe import STAGE_SETTINGS, recipe_of, settings_from
from luthier.training.callbacks import Callback, read_metrics

FIELDS: dict[str, Any] = {
    **{"epochs": 2, "batch_size": 4, "learning_rate": 0.01, "eval_fraction": 0.25, "save_every": 2},
    "adapter": lt.LoRA(r=4),
}
OF_DATA = ("epochs", "batch_size", "eval_fraction")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 16 rows in rows.jsonl."""
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"{i}?", "answer": f"{i}{i}."} for i in range(16)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def model_of(chat_model: Path) -> Callable[..., lt.Model]:
    """Loads the tiny model, in float32 or another type."""
    return lambda dtype="fp32": lt.load(str(chat_model), dtype=dtype)


def recipe_run(model: lt.Model, output: str, *stages: dict[str, Any]) -> None:
    """The recipe's run of sft stages, in the model's type."""
    dtype = "fp32" if model.dtype == torch.float32 else "bf16"
    top = {"model": model.source.name, "output": output, "dtype": dtype}
    lt.run_recipe(lt.Recipe.model_validate(top | {"stages": [{"sft": stage} for stage in stages]}))


def weights(folder: str | Path) -> dict[str, Tensor]:
    (file,) = Path(folder).glob("*model.safetensors")
    return load_file(file)


def measured(name: str, folder: str) -> list[float]:
    return [line[name] for line in read_metrics(Path(folder) / "metrics.jsonl") if name in line]


def losses(folder: str) -> list[float]:
    return measured("loss", folder)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def logits(model: lt.Model) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.network(torch.arange(20)[None]).logits
    return result


@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
@pytest.mark.parametrize("adapter", [lt.LoRA(r=4), None])
def test_two_stages_are_the_recipe_s_to_the_bit(
    model_of: Callable[..., lt.Model], dtype: str, adapter: lt.LoRA | None
) -> None:
    fields = FIELDS | {"data": "rows.jsonl", "adapter": adapter}
    recipe_run(model_of(dtype), "runs/recipe", fields, fields | {"seed": 7})
    model = model_of(dtype)
    lt.sft(model, **fields)
    lt.sft(model, **fields, seed=7)
    lt.save(model, "mine")
    assert losses("runs/sft/00-sft") == losses("runs/recipe/00-sft")
    assert losses("runs/sft-2/00-sft") == losses("runs/recipe/01-sft")
    if adapter or dtype == "fp32":
        assert same(weights("mine"), weights("runs/recipe/model"))
    else:
        assert same(weights("runs/sft-2/model"), weights("runs/recipe/model"))


def test_the_model_in_memory_is_the_trained_one_and_rests(model_of: Callable[..., lt.Model]) -> None:
    model = model_of()
    before = logits(model)
    summary = lt.sft(model, data="rows.jsonl", gradient_checkpointing=1, **FIELDS)
    with adapters_off(model.network):
        torch.testing.assert_close(logits(model), before)
    assert not torch.allclose(logits(model), before, atol=1e-3)
    assert not any(module.training for module in model.network.modules())
    assert summary.final_eval_loss is not None
    batches = lt.batches("rows.jsonl", model.tokenizer)
    with torch.no_grad():
        logprobs = torch.cat([lt.score(model, batch).logprobs for batch in batches])
    assert float(-logprobs.mean()) < summary.first_eval_loss


def test_adapters_never_stack(model_of: Callable[..., lt.Model]) -> None:
    model = model_of()
    lt.sft(model, data="rows.jsonl", **FIELDS)
    adapted = logits(model)
    summary = lt.sft(model, data="rows.jsonl", **FIELDS | {"adapter": lt.LoRA(r=2)})
    layers = adapted_layers(model.network).values()
    assert {len(layer.adapters) for layer in layers} == {1}
    with adapters_off(model.network):
        torch.testing.assert_close(logits(model), adapted, atol=1e-4, rtol=1e-4)
    assert summary.trained_parameters * 2 == sum(p.numel() for p in weights("runs/sft/00-sft/adapter").values())


def test_saving_merges_a_copy(model_of: Callable[..., lt.Model]) -> None:
    model = model_of()
    lt.sft(model, data="rows.jsonl", **FIELDS)
    folder = lt.save(model, "mine")
    assert adapted_layers(model.network)
    torch.testing.assert_close(logits(lt.load(str(folder))), logits(model), atol=1e-5, rtol=1e-5)
    assert {value.dtype for value in weights(lt.save(model, "half", dtype="bf16")).values()} == {torch.bfloat16}


def test_one_s_own_objective_that_is_language_modelling_is_sft(model_of: Callable[..., lt.Model]) -> None:
    def my_objective(model: Any, batch: lt.TokenBatch) -> lt.Loss:
        s = lt.score(model, batch)
        return lt.Loss(-s.logprobs * batch.weights, unit="tokens", metrics={"entropy": s.entropy.mean()})

    model, other = model_of(), model_of()
    lt.sft(model, data="rows.jsonl", **FIELDS)
    data = {name: FIELDS[name] for name in OF_DATA}
    rest = {name: value for name, value in FIELDS.items() if name not in data}
    lt.fit(other, lt.batches("rows.jsonl", other.tokenizer, **data), objective=my_objective, **rest)
    assert same(weights("runs/fit/00-sft/adapter"), weights("runs/sft/00-sft/adapter"))
    entropies = [
        [m.get("entropy") for m in read_metrics(Path(f"runs/{w}/00-sft/metrics.jsonl"))] for w in ("fit", "sft")
    ]
    assert entropies[0] == pytest.approx(entropies[1])


def test_an_interrupted_call_leaves_the_model_as_it_was_and_goes_on(
    model_of: Callable[..., lt.Model], stop_at: Callable[[int], Callback]
) -> None:
    whole, model = model_of(), model_of()
    lt.sft(whole, data="rows.jsonl", output="whole", **FIELDS)
    before = logits(model)
    with pytest.raises(KeyboardInterrupt):
        lt.sft(model, data="rows.jsonl", callbacks=[stop_at(3)], **FIELDS)
    torch.testing.assert_close(logits(model), before)
    assert not adapted_layers(model.network)
    summary = lt.sft(model, data="rows.jsonl", **FIELDS)
    assert same(weights("runs/sft/00-sft/adapter"), weights("whole/00-sft/adapter"))
    assert losses("runs/sft/00-sft") == losses("whole/00-sft")
    assert summary.steps == 6


@pytest.mark.parametrize("adapter", [lt.LoRA(r=4), None])
def test_the_second_stage_goes_on_too(
    model_of: Callable[..., lt.Model], adapter: lt.LoRA | None, stop_at: Callable[[int], Callback]
) -> None:
    fields = FIELDS | {"data": "rows.jsonl", "adapter": adapter}
    model = model_of("bf16")
    lt.sft(model, **fields)
    adapted = logits(model)
    with pytest.raises(KeyboardInterrupt):
        lt.sft(model, **fields, seed=1, callbacks=[stop_at(3)])
    torch.testing.assert_close(logits(model), adapted, atol=2e-2, rtol=2e-2)
    lt.sft(model, **fields, seed=1)
    again = model_of("bf16")
    lt.sft(again, **fields)
    lt.sft(again, **fields, seed=1)
    assert not Path("runs/sft-3").exists()
    assert same(again.network.state_dict(), model.network.state_dict())


def test_a_folder_with_another_run_is_left_alone(model_of: Callable[..., lt.Model]) -> None:
    lt.sft(model_of(), data="rows.jsonl", **FIELDS)
    lt.sft(model_of(), data="rows.jsonl", **FIELDS | {"learning_rate": 0.02})
    assert losses("runs/sft/00-sft") != losses("runs/sft-2/00-sft")
    with pytest.raises(CheckpointError, match="runs/sft holds another run"):
        lt.sft(model_of(), data="rows.jsonl", output=Path("runs/sft"), **FIELDS | {"learning_rate": 0.02})


def test_a_call_that_failed_before_its_first_checkpoint_frees_the_folder(
    model_of: Callable[..., lt.Model], stop_at: Callable[[int], Callback]
) -> None:
    model = model_of()
    with pytest.raises(DataError):
        lt.sft(model, data="rows.json", output="mine", **FIELDS)
    with pytest.raises(KeyboardInterrupt):
        lt.sft(model, data="rows.jsonl", output="mine", callbacks=[stop_at(1)], **FIELDS)
    lt.sft(model, data=["rows.jsonl"], output="mine", **FIELDS)
    assert len(losses("mine/00-sft")) == 6


def test_an_edited_objective_is_another_run(model_of: Callable[..., lt.Model]) -> None:
    def scaled(factor: float) -> Callable[[Any, lt.TokenBatch], lt.Loss]:
        return lambda model, batch: lt.Loss(-factor * lt.score(model, batch).logprobs, unit="tokens")

    for factor in (1.0, 1.0, 0.5):
        model = model_of()
        data = lt.batches("rows.jsonl", model.tokenizer, batch_size=8, epochs=1)
        lt.fit(model, data, objective=scaled(factor), learning_rate=0.01)
    assert sorted(path.name for path in Path("runs").iterdir()) == ["fit", "fit-2"]
    assert losses("runs/fit-2/00-sft")[0] == pytest.approx(losses("runs/fit/00-sft")[0] / 2)


@pytest.mark.parametrize(
    ("reduce", "message"),
    [
        (lambda p: lt.Loss(-p.mean(), unit="tokens"), r"shape \[\] for"),
        (lambda p: lt.Loss(-p, unit="sequences"), "one loss a unit"),
        (lambda p: lt.Loss(-p, unit="token"), 'unit is "token"'),
        (lambda p: -p.mean(), "returned Tensor"),
    ],
)
def test_losses_that_are_not_one_a_unit_are_refused(
    model_of: Callable[..., lt.Model], reduce: Callable[[Tensor], Any], message: str
) -> None:
    model = model_of()
    data = lt.batches("rows.jsonl", model.tokenizer)
    with pytest.raises(TrainingError, match=message):
        lt.fit(model, data, objective=lambda network, batch: reduce(lt.score(network, batch).logprobs))


def test_what_is_wrong_is_said_before_anything_happens(model_of: Callable[..., lt.Model]) -> None:
    model = model_of()
    data = lt.batches("rows.jsonl", model.tokenizer)
    with pytest.raises(RecipeError, match='learning_rat: unknown field; did you mean "learning_rate"'):
        lt.sft(model, data="rows.jsonl", learning_rat=1e-3)
    with pytest.raises(RecipeError, match="data: is required"):
        lt.sft(model)
    with pytest.raises(RecipeError, match="in memory in fp32"):
        lt.sft(model, data="rows.jsonl", dtype="bf16")
    with pytest.raises(RecipeError, match="batch_size: is about data"):
        lt.fit(model, data, objective=next_tokens, batch_size=2)
    with pytest.raises(RecipeError, match="learning_rate: is not about data"):
        lt.batches("rows.jsonl", model.tokenizer, learning_rate=1.0)
    with pytest.raises(RecipeError, match='did you mean "sft"'):
        lt.batches("rows.jsonl", model.tokenizer, stage="stf")
    assert not Path("runs").exists()


@pytest.mark.parametrize("word", STAGE_SETTINGS)
def test_every_stage_is_a_function_that_explains_itself(word: str) -> None:
    function, fields = getattr(lt, word), STAGE_SETTINGS[word].model_fields
    parameters = inspect.signature(function).parameters
    assert function is FUNCTIONS[word]
    assert word in dir(lt)
    assert set(parameters) == {"model", "callbacks", *fields} - {"dtype"}
    assert parameters["data"].default is inspect.Parameter.empty
    for name in parameters.keys() - {"data", "model", "callbacks"}:
        assert f"\n{name}: " in function.__doc__


def test_the_run_folder_is_a_recipe_s(model_of: Callable[..., lt.Model]) -> None:
    model = model_of()
    summary = lt.sft(model, data="rows.jsonl", **FIELDS)
    settings = FIELDS | {"data": "rows.jsonl", "model": model.source.name, "dtype": "fp32"}
    expected = recipe_of("sft", settings_from(STAGE_SETTINGS["sft"], settings))
    assert lt.load_recipe("runs/sft/recipe.yaml") == expected
    assert Path(summary.folder, "adapter").is_dir()
    assert "00-sft" in write_report(Path("runs/sft")).read_text()
