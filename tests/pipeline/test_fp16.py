"""Recipes in fp16 on a CPU: the model itself, adapters, quantized bases and other stages learn as in fp32."""

import math
from pathlib import Path

import pytest

from luthier.models.load import load
from luthier.pipeline.run import run_recipe
from luthier.pipeline.train import Summary
from luthier.pipeline.verify_resume import verify_resume
from luthier.recipe import Recipe, parse_recipe
from luthier.training.callbacks import read_metrics

SFT = "sft: {data: ROWS, eval_data: ROWS, epochs: 4, batch_size: 4, learning_rate: 1e-3, adapter: ADAPTER}"


def recipe(base: Path, output: Path, stage: str, *, dtype: str = "fp16") -> Recipe:
    return parse_recipe(f"model: {base}\noutput: {output}\ndtype: {dtype}\nstages: [{{{stage}}}]")


def trained(base: Path, output: Path, stage: str, *, dtype: str = "fp16") -> Summary:
    (summary,) = run_recipe(recipe(base, output, stage, dtype=dtype))
    return summary


@pytest.mark.parametrize("adapter", ["none", "lora", "dora", "bottleneck", "prompt"])
def test_a_stage_learns_as_in_fp32(chat_model: Path, rows: Path, tmp_path: Path, adapter: str) -> None:
    """To 2^-11 of the loss, one rounding of float16, of which a mean over tokens has less."""
    stage = SFT.replace("ROWS", str(rows)).replace("ADAPTER", adapter)
    ends = {dtype: trained(chat_model, tmp_path / dtype, stage, dtype=dtype) for dtype in ("fp16", "fp32")}
    ours, wide = ends["fp16"], ends["fp32"]
    assert ours.final_eval_loss == pytest.approx(wide.final_eval_loss, rel=2**-11)
    assert ours.final_eval_loss < ours.first_eval_loss
    told = [line for line in read_metrics(Path(ours.folder) / "metrics.jsonl") if "loss" in line]
    assert {line["loss_scale"] for line in told} == {2.0**16}


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_an_adapter_learns_over_a_quantized_base(chat_model: Path, rows: Path, tmp_path: Path, scheme: str) -> None:
    stage = SFT.replace("ROWS", str(rows)).replace("ADAPTER", f"lora, quantize_base: {scheme}")
    summary = trained(chat_model, tmp_path / "run", stage)
    assert summary.final_eval_loss < summary.first_eval_loss
    assert load(str(tmp_path / "run" / "model")).tokenizer is not None


@pytest.mark.parametrize("word", ["dpo", "orpo"])
def test_preferences_are_learned_as_in_fp32(chat_model: Path, pairs: Path, tmp_path: Path, word: str) -> None:
    stage = f"{word}: {{data: {pairs}, epochs: 4, batch_size: 4, learning_rate: 1e-3, adapter: lora}}"
    ends = {dtype: trained(chat_model, tmp_path / dtype, stage, dtype=dtype).final_loss for dtype in ("fp16", "fp32")}
    assert ends["fp16"] == pytest.approx(ends["fp32"], rel=2e-3)


def test_a_policy_answers_and_learns(chat_model: Path, rows: Path, tmp_path: Path) -> None:
    asked = "group_size: 2, max_new_tokens: 4, reward: {type: length, aim: 6}, adapter: lora"
    stage = f"grpo: {{data: {rows}, max_steps: 2, batch_size: 4, {asked}}}"
    summary = trained(chat_model, tmp_path / "run", stage)
    assert summary.steps == 2
    assert math.isfinite(summary.final_loss)


def test_a_resumed_stage_is_the_whole_stage(chat_model: Path, rows: Path, tmp_path: Path) -> None:
    stage = SFT.replace("ROWS", str(rows)).replace("ADAPTER", "none")
    assert verify_resume(recipe(chat_model, tmp_path / "run", stage)).num_parameters > 0
