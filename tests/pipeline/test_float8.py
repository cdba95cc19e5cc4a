"""Stages in eight bits: the model itself, adapters, preferences and policies learn, and leave a model as any."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import luthier
from luthier.models.float8 import float8_layers
from luthier.models.load import load
from luthier.pipeline.plan import plan_stage
from luthier.pipeline.run import run_recipe
from luthier.pipeline.train import Summary
from luthier.pipeline.verify_loss import verify_loss
from luthier.pipeline.verify_resume import verify_resume
from luthier.recipe import SFT, Recipe, parse_recipe
from luthier.training.callbacks import Callback, read_metrics

STAGE = "sft: {data: ROWS, eval_data: ROWS, epochs: 4, batch_size: 4, learning_rate: 1e-3, adapter: ADAPTER, fp8: FP8}"


def recipe(base: Path, output: Path, stage: str) -> Recipe:
    return parse_recipe(f"model: {base}\noutput: {output}\nstages: [{{{stage}}}]")


def trained(base: Path, output: Path, stage: str) -> Summary:
    (summary,) = run_recipe(recipe(base, output, stage))
    return summary


def sft(rows: Path, adapter: str, fp8: str) -> str:
    return STAGE.replace("ROWS", str(rows)).replace("ADAPTER", adapter).replace("FP8", fp8)


@pytest.mark.parametrize(
    ("adapter", "fp8"),
    [
        ("none", "delayed"),
        ("{type: lora, target_modules: [q_proj, up_proj], modules_to_save: [o_proj]}", "{window: 2, margin: 1}"),
        pytest.param("lora", "current", marks=pytest.mark.slow),
        pytest.param("dora", "delayed", marks=pytest.mark.slow),
        pytest.param("bottleneck", "{type: delayed, skip: '*.down_proj'}", marks=pytest.mark.slow),
    ],
)
def test_a_stage_learns_as_in_bf16(chat_model: Path, rows: Path, tmp_path: Path, adapter: str, fp8: str) -> None:
    """To a fiftieth of the way that the held-out loss goes."""
    ours = trained(chat_model, tmp_path / "fp8", sft(rows, adapter, fp8))
    wide = trained(chat_model, tmp_path / "bf16", sft(rows, adapter, "none"))
    assert ours.final_eval_loss < ours.first_eval_loss
    fallen = wide.first_eval_loss - wide.final_eval_loss
    assert ours.final_eval_loss == pytest.approx(wide.final_eval_loss, abs=fallen / 50)
    told = [line for line in read_metrics(Path(ours.folder) / "metrics.jsonl") if "loss" in line]
    assert all(0 < line["fp8/weight_scale_min"] <= line["fp8/weight_scale_max"] < math.inf for line in told)
    lines = read_metrics(Path(ours.folder) / "fp8.jsonl")
    assert sorted({line["step"] for line in lines}) == [3, 6, 9, 12]
    assert lines[0]["layer"] == "model.layers.0.self_attn.q_proj"
    assert {"step", "layer", "input_scale", "weight_amax", "gradient_cut_off"} < lines[0].keys()


def test_a_resumed_stage_is_the_whole_stage_and_the_division_is_the_loops(
    chat_model: Path, rows: Path, tmp_path: Path
) -> None:
    made = recipe(chat_model, tmp_path / "run", sft(rows, "none", "delayed"))
    assert verify_resume(made).num_parameters > 0
    assert verify_loss(made, num_sequences=4).largest_difference < 1e-12


@pytest.mark.parametrize("live", ["cache_reference: true", "cache_reference: false"])
@pytest.mark.slow
def test_preferences_are_learned_as_in_bf16(chat_model: Path, pairs: Path, tmp_path: Path, live: str) -> None:
    ends = {}
    for fp8 in ("delayed", "none"):
        stage = f"dpo: {{data: {pairs}, epochs: 4, batch_size: 4, learning_rate: 1e-3, {live}, fp8: {fp8}}}"
        ends[fp8] = trained(chat_model, tmp_path / fp8, stage).final_loss
    assert ends["delayed"] == pytest.approx(ends["none"], abs=0.02)


@pytest.mark.slow
def test_a_policy_answers_and_learns(chat_model: Path, rows: Path, tmp_path: Path) -> None:
    asked = "group_size: 2, max_new_tokens: 4, reward: {type: length, aim: 6}, adapter: lora, fp8: delayed"
    stage = f"grpo: {{data: {rows}, max_steps: 2, batch_size: 4, {asked}}}"
    summary = trained(chat_model, tmp_path / "run", stage)
    assert summary.steps == 2
    assert math.isfinite(summary.final_loss)


def test_afterwards_the_model_in_memory_is_the_saved_one(chat_model: Path, rows: Path, tmp_path: Path) -> None:
    model = luthier.load(str(chat_model))
    luthier.sft(model, data=rows, epochs=1, adapter=None, fp8="delayed", output=tmp_path / "run")
    assert not float8_layers(model.network)
    saved = load(str(luthier.save(model, tmp_path / "model")))
    ids = torch.arange(9)[None]
    torch.testing.assert_close(model.network(ids).logits, saved.network(ids).logits)


def test_an_interrupted_call_leaves_a_model_without_eight_bits(
    chat_model: Path, rows: Path, tmp_path: Path, stop_at: Callable[[int], Callback]
) -> None:
    model = luthier.load(str(chat_model))
    with pytest.raises(KeyboardInterrupt):
        luthier.sft(model, data=rows, epochs=1, fp8="current", output=tmp_path / "run", callbacks=[stop_at(1)])
    assert not float8_layers(model.network)


@pytest.mark.slow
def test_a_plan_without_weights_counts_it_and_proposes_nothing_that_is_refused(chat_model: Path, rows: Path) -> None:
    settings = SFT(data=str(rows), fp8="delayed")
    planned, change = plan_stage("sft", settings, str(chat_model))
    assert planned.fits
    assert change is None
    _, change = plan_stage("sft", settings, str(chat_model), limit_bytes=planned.peak_bytes - 1)
    assert change is None or "quantize_base" not in change.words
