"""Preference stages as whole runs: their reference, their chain, and what they leave behind."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from luthier.adapters.switch import adapters_off
from luthier.data.batches import TokenBatch, collate
from luthier.data.sequences import TokenGroup
from luthier.errors import CheckpointError, RecipeError
from luthier.models.adapted import load_adapted
from luthier.models.load import load
from luthier.models.score import divergence, sequence_logprobs
from luthier.pipeline.prepare import adapt, prepare_data
from luthier.pipeline.reference import referred
from luthier.pipeline.run import run_recipe
from luthier.pipeline.stages import STAGES
from luthier.pipeline.train import train
from luthier.pipeline.verify_loss import verify_loss
from luthier.pipeline.verify_resume import verify_resume
from luthier.recipe.adapters import LoRA
from luthier.recipe.document import Recipe
from luthier.recipe.settings import settings_from
from luthier.recipe.stages import STAGE_SETTINGS
from luthier.training.callbacks import read_metrics

PAIRS = [
    {"prompt": f"What is {i}?", "chosen": f"{i} is a number.", "rejected": "Who knows " + "?" * (i % 5 + 1)}
    for i in range(24)
]
VERDICTS = [
    {"prompt": row["prompt"], "completion": row["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
    for i, row in enumerate(PAIRS)
]
OF_PAIRS = ["dpo", "ipo", "orpo", "simpo", "cpo"]


@pytest.fixture
def rows(tmp_path: Path) -> dict[str, str]:
    """The data file of each stage's word."""
    for name, made in (("pairs", PAIRS), ("verdicts", VERDICTS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    pairs = str(tmp_path / "pairs.jsonl")
    return {**dict.fromkeys([*OF_PAIRS, "reward"], pairs), "kto": str(tmp_path / "verdicts.jsonl")}


def settings_of(word: str, rows: dict[str, str], base: Path, **more: object) -> Any:
    usual = {"model": str(base), "data": rows[word], "dtype": "fp32", "batch_size": 4, "max_steps": 3}
    return settings_from(STAGE_SETTINGS[word], {**usual, "adapter": {"type": "lora", "r": 4}, **more})


def recipe_of(word: str, rows: dict[str, str], base: Path, output: Path, **more: object) -> Recipe:
    stage = {"data": rows[word], "batch_size": 4, "adapter": {"type": "lora", "r": 4}, "max_steps": 4, **more}
    return Recipe.model_validate(
        {"model": str(base), "output": str(output), "dtype": "fp32", "stages": [{word: stage}]}
    )


@pytest.mark.parametrize("word", [*OF_PAIRS, "kto"])
def test_a_stage_learns_its_rows_and_tells_rewards(
    word: str, rows: dict[str, str], chat_model: Path, tmp_path: Path
) -> None:
    further = {"learning_rate": 5e-3, "max_steps": 30, "epochs": 6, "eval_fraction": 0.25, "seed": 1}
    (summary,) = run_recipe(recipe_of(word, rows, chat_model, tmp_path / "run", **further))
    lines = read_metrics(tmp_path / "run" / f"00-{word}" / "metrics.jsonl")
    first, *_, last = [line for line in lines if "eval_loss" in line]
    assert last["eval_loss"] < first["eval_loss"]
    assert summary.steps == 30
    steps = [line for line in lines if "loss" in line]
    assert {"rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"} <= steps[-1].keys()
    margins = [line["eval_rewards/margins"] for line in (first, last)]
    difference = last["eval_rewards/chosen"] - last["eval_rewards/rejected"]
    assert margins[1] == pytest.approx(difference, rel=1e-5)
    assert margins[1] > margins[0]
    assert "eval_perplexity" not in last
    if word == "kto":
        assert all(line["kl"] >= 0 for line in steps)
    else:
        assert last["eval_rewards/accuracies"] == 1 or word == "cpo", "its rewards are sums, larger for shorter answers"
    assert (tmp_path / "run" / "model").is_dir()


@pytest.mark.parametrize("word", ["dpo", "ipo", "kto"])
def test_a_cached_reference_is_the_model_with_its_adapter_off(
    word: str, rows: dict[str, str], chat_model: Path, tmp_path: Path
) -> None:
    """In every step, by training on with both: metrics agree to 1e-5, float32 sums over streams cut otherwise."""
    told = []
    for cached in (True, False):
        folder = tmp_path / str(cached)
        settings = settings_of(word, rows, chat_model, cache_reference=cached, learning_rate=1e-3)
        train(word, settings, load(str(chat_model)), folder)
        told.append([line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line])
        assert (folder / "reference.safetensors").exists() == cached
    for one, other in zip(*told, strict=True):
        assert one.keys() == other.keys()
        for name in {"loss", "rewards/chosen", "rewards/rejected", "grad_norm"} & one.keys():
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name


def test_the_second_stages_reference_is_the_merged_first_stage(
    rows: dict[str, str], chat_model: Path, tmp_path: Path
) -> None:
    data = tmp_path / "sft.jsonl"
    data.write_text("".join(json.dumps({"question": p["prompt"], "answer": p["chosen"]}) + "\n" for p in PAIRS))
    usual = {"adapter": {"type": "lora", "r": 4}, "batch_size": 4, "learning_rate": 1e-2, "max_steps": 4}
    stages = [{"sft": {"data": str(data), **usual}}, {"dpo": {"data": rows["dpo"], **usual}}]
    output = tmp_path / "run"
    run_recipe(
        Recipe.model_validate({"model": str(chat_model), "output": str(output), "dtype": "fp32", "stages": stages})
    )
    merged, base = load(str(output / "00-sft" / "model")), load(str(chat_model))
    groups = prepare_data(settings_of("dpo", rows, chat_model), base, tmp_path / "x").train
    batch = collate(groups)
    with torch.no_grad():
        expected, of_base = sequence_logprobs(merged.network, batch), sequence_logprobs(base.network, batch)
    assert (expected - of_base).abs().max() > 0.1, "or the first stage would have taught nothing"
    kept = load_file(output / "01-dpo" / "reference.safetensors")["logprobs"]
    for logprobs, same in ((expected, True), (of_base, False)):
        nearest = (kept[:, None] - logprobs).abs().amin(1)
        assert bool((nearest < 1e-3).all()) == same
    adapted = load_adapted(str(chat_model), output / "00-sft" / "adapter")
    with torch.no_grad():
        logits = [model.network(batch.token_ids[None, :20]).logits for model in (adapted, merged)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)
    start = next(line for line in read_metrics(output / "01-dpo" / "metrics.jsonl") if "loss" in line)
    assert start["loss"] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-4), (
        "policy and reference are one model"
    )
    with torch.no_grad():
        ids = batch.token_ids[None, :20]
        policy = load(str(output / "model")).network(ids).logits
        assert not torch.allclose(policy, merged.network(ids).logits, atol=1e-3)


def test_another_model_may_be_the_reference(
    rows: dict[str, str], chat_model: Path, wide_chat_model: Path, tmp_path: Path
) -> None:
    settings = settings_of("dpo", rows, chat_model)
    model, other = load(str(chat_model)), load(str(wide_chat_model))
    groups = prepare_data(settings, model, tmp_path / "x").train[:3]
    kept = referred(groups, model, tmp_path / "stage", name=str(wide_chat_model), micro_batch_tokens=512)
    with torch.no_grad():
        expected = sequence_logprobs(other.network, collate(groups))
    found = [value for group in kept for value in group.reference]  # type: ignore[union-attr]
    torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-4)


def test_a_kept_reference_is_read_back_only_for_the_same_rows_and_model(
    rows: dict[str, str], chat_model: Path, wide_chat_model: Path, tmp_path: Path
) -> None:
    model = load(str(chat_model))
    groups = prepare_data(settings_of("dpo", rows, chat_model), model, tmp_path / "x").train
    first = referred(groups[:4], model, tmp_path, name=None, micro_batch_tokens=64)
    with torch.no_grad():
        model.network.model.embed_tokens.weight.mul_(2)  # what is read back does not see it
    again = referred(groups[:4], model, tmp_path, name=None, micro_batch_tokens=64)
    others = referred(groups[4:8], model, tmp_path, name=None, micro_batch_tokens=64)
    assert [g.reference for g in again if isinstance(g, TokenGroup)] == [
        g.reference for g in first if isinstance(g, TokenGroup)
    ]
    assert [g.reference for g in others if isinstance(g, TokenGroup)] != [
        g.reference for g in first if isinstance(g, TokenGroup)
    ]
    other = replace(load(str(wide_chat_model)), tokenizer=model.tokenizer)
    of_other = referred(groups[4:8], other, tmp_path, name=None, micro_batch_tokens=64)
    with torch.no_grad():
        expected = sequence_logprobs(other.network, collate(groups[4:8]))
    found = [value for group in of_other for value in group.reference]  # type: ignore[union-attr]
    torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-4)
    (tmp_path / "reference.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="delete it"):
        referred(groups[:4], model, tmp_path, name=None, micro_batch_tokens=64)


@pytest.mark.parametrize("word", [*OF_PAIRS, "kto"])
def test_a_steps_gradient_does_not_depend_on_how_it_is_cut(
    word: str, rows: dict[str, str], chat_model: Path, tmp_path: Path
) -> None:
    """KTO's baseline among them, which TRL takes over each micro-batch."""
    proof = verify_loss(recipe_of(word, rows, chat_model, tmp_path / "run"))
    assert proof.largest_difference < 1e-10


@pytest.mark.parametrize("word", ["dpo", "kto"])
def test_a_stopped_run_ends_as_one_that_was_not(
    word: str, rows: dict[str, str], chat_model: Path, tmp_path: Path
) -> None:
    assert verify_resume(recipe_of(word, rows, chat_model, tmp_path / "run")).resumed_after == 2


def test_full_fine_tuning_has_the_model_that_it_starts_from_as_its_reference(
    rows: dict[str, str], chat_model: Path, tmp_path: Path
) -> None:
    settings = settings_of("dpo", rows, chat_model, adapter=None, learning_rate=1e-3)
    model = load(str(chat_model))
    _, summary = train("dpo", settings, model, tmp_path / "run")
    assert summary.trained_parameters == sum(p.numel() for p in model.network.parameters())
    first, *_, last = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert abs(last["rewards/margins"]) > 1e-4


def test_a_reference_of_its_own_is_not_computed_live(rows: dict[str, str], chat_model: Path) -> None:
    with pytest.raises(RecipeError, match="cache_reference"):
        settings_of("dpo", rows, chat_model, cache_reference=False, adapter="none")
    with pytest.raises(RecipeError, match="cache_reference"):
        settings_of("dpo", rows, chat_model, cache_reference=False, reference="smollm2-135m")


def test_a_live_reference_leaves_adapters_and_mode_as_they_were(
    rows: dict[str, str], chat_model: Path, tmp_path: Path
) -> None:
    settings = settings_of("dpo", rows, chat_model, cache_reference=False)
    model = load(str(chat_model))
    groups = prepare_data(settings, model, tmp_path / "x").train[:2]
    adapt(model, LoRA(r=4), seed=0)
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    model.network.train()
    prepare = STAGES["dpo"].method(settings).prepare
    assert prepare is not None
    (batch,) = prepare(model.network, [collate(groups)])
    assert model.network.training
    with torch.no_grad(), adapters_off(model.network):
        off = sequence_logprobs(model.network, batch)
    with torch.no_grad():
        on = sequence_logprobs(model.network, batch)
    assert isinstance(batch, TokenBatch)
    assert batch.reference is not None
    torch.testing.assert_close(batch.reference, off)
    assert not torch.allclose(on, off)


def test_a_policy_that_goes_too_far_is_stopped_and_goes_back(
    rows: dict[str, str], chat_model: Path, tmp_path: Path
) -> None:
    further = {"learning_rate": 2e-2, "schedule": "constant", "max_steps": 30, "epochs": 9, "eval_fraction": 0.25}
    free = run_recipe(recipe_of("dpo", rows, chat_model, tmp_path / "free", **further, eval_every=1, max_kl=1e9))[0]
    told = [line for line in read_metrics(Path(free.folder) / "metrics.jsonl") if "eval_loss" in line]
    assert told[0]["eval_kl_per_token"] == pytest.approx(0, abs=1e-6)
    bound = told[4]["eval_kl_per_token"]
    assert max(line["eval_kl_per_token"] for line in told) > bound > 0
    held = run_recipe(recipe_of("dpo", rows, chat_model, tmp_path / "held", **further, eval_every=1, max_kl=bound))[0]
    lines = read_metrics(Path(held.folder) / "metrics.jsonl")
    kept = [line for line in lines if "eval_loss" in line]
    assert held.steps == kept[-1]["step"] < free.steps
    assert kept[-1]["eval_kl_per_token"] > bound >= max(line["eval_kl_per_token"] for line in kept[:-1])
    allowed = min(kept[:-1], key=lambda line: line["eval_loss"])
    model = load_adapted(str(chat_model), Path(held.folder) / "adapter")
    groups = prepare_data(settings_of("dpo", rows, chat_model, eval_fraction=0.25), model, tmp_path / "x").evaluation
    found = torch.cat([divergence(model.network, collate([group])) for group in groups]).mean()
    assert float(found) == pytest.approx(allowed["eval_kl_per_token"], rel=1e-3)


DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.parametrize(
    ("word", "file", "further"),
    [
        pytest.param("dpo", "hh_harmless_pairs.jsonl", {"on_error": "skip"}, marks=pytest.mark.slow),
        pytest.param("orpo", "dpo_en_sharegpt.jsonl", {}, marks=pytest.mark.slow),
        ("kto", "kto_en_sharegpt.jsonl", {}),
        pytest.param("reward", "hh_harmless_pairs.jsonl", {"on_error": "skip"}, marks=pytest.mark.slow),
    ],
)
def test_real_files_train_as_they_are(
    word: str, file: str, further: dict[str, object], chat_model: Path, tmp_path: Path
) -> None:
    if not (DATA / file).exists():
        pytest.skip(f"{DATA / file} is not here")
    given = {"model": str(chat_model), "data": str(DATA / file), "dtype": "fp32", "max_length": 4096, "max_steps": 2}
    settings = settings_from(
        STAGE_SETTINGS[word], {**given, "batch_size": 2, "adapter": {"type": "lora", "r": 4}, **further}
    )
    prepared, summary = train(word, settings, load(str(chat_model)), tmp_path / "run")
    counts = prepared.counts
    assert counts.rows == counts.examples + counts.bad
    assert counts.sequences + counts.dropped_long == counts.examples
    assert summary.steps == 2
