"""A recipe that trains the model itself in bf16: what is saved are its float32 masters, and stages hand them on."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from luthier.models.load import load
from luthier.pipeline.run import run_recipe
from luthier.pipeline.verify_loss import verify_loss
from luthier.pipeline.verify_resume import verify_resume
from luthier.recipe import Recipe, parse_recipe
from luthier.training.callbacks import Callback

SFT = "sft: {data: ROWS, epochs: 2, batch_size: 4, adapter: none, save_every: 2, learning_rate: RATE}"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i}?", "answer": f"{i}{i}."}) + "\n" for i in range(12)))
    return path


def recipe(base: Path, rows: Path, output: Path, *stages: str, rate: float = 1e-3, dtype: str = "bf16") -> Recipe:
    lines = "".join(f"  - {stage}\n" for stage in stages).replace("ROWS", str(rows)).replace("RATE", str(rate))
    return parse_recipe(f"model: {base}\noutput: {output}\ndtype: {dtype}\nstages:\n{lines}")


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def is_rounded(weight: Tensor) -> bool:
    return torch.equal(weight, weight.bfloat16().float())


def test_the_saved_model_is_the_masters(chat_model: Path, rows: Path, tmp_path: Path) -> None:
    """At a rate of 1e-6 the whole training moves a weight by less than bfloat16 could tell."""
    (summary,) = run_recipe(recipe(chat_model, rows, tmp_path / "run", SFT, rate=1e-6))
    before, after = weights(chat_model), weights(tmp_path / "run" / "model")
    kept = load_file(tmp_path / "run" / "00-sft" / "checkpoints" / "last" / "state.safetensors")
    assert summary.trained_parameters == sum(value.numel() for value in before.values())
    for name, value in after.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, kept[f"parameter/{name}"]), name
        assert 0 < float((value - before[name]).abs().max()) < 1e-5, name
    assert load(str(tmp_path / "run" / "model")).config.dtype == torch.float32


def test_training_lowers_the_loss_as_in_fp32(chat_model: Path, rows: Path, tmp_path: Path) -> None:
    """To 2^-8 of the loss, as for a step."""
    stage = SFT.replace("epochs: 2", "epochs: 8, eval_data: ROWS")
    ends = {}
    for dtype in ("bf16", "fp32"):
        (summary,) = run_recipe(recipe(chat_model, rows, tmp_path / dtype, stage, dtype=dtype))
        ends[dtype] = summary.final_eval_loss
        assert summary.final_eval_loss < summary.first_eval_loss - 0.5
    assert ends["bf16"] == pytest.approx(ends["fp32"], rel=2**-8)


def test_what_is_frozen_is_saved_as_it_was_stored(chat_model: Path, rows: Path, tmp_path: Path) -> None:
    stage = SFT.replace("adapter: none", "adapter: none, freeze: ['*.embed_tokens.*']")
    run_recipe(recipe(chat_model, rows, tmp_path / "run", stage))
    before, after = weights(chat_model), weights(tmp_path / "run" / "model")
    assert not is_rounded(before["model.embed_tokens.weight"])
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == before.keys() - {"model.embed_tokens.weight"}


def test_a_second_stage_goes_on_from_the_masters_of_the_first(chat_model: Path, rows: Path, tmp_path: Path) -> None:
    """Two stages at 1e-6: rounded in between, the second would start from the base again."""
    run_recipe(recipe(chat_model, rows, tmp_path / "run", SFT, SFT, rate=1e-6))
    before, after = weights(tmp_path / "run" / "00-sft" / "model"), weights(tmp_path / "run" / "model")
    base = weights(chat_model)
    for name, value in after.items():
        assert 0 < float((value - before[name]).abs().max()) < 1e-5, name
        assert not torch.equal(before[name], base[name])


@pytest.mark.parametrize("optimizer", ["adamw", "schedule_free", "muon, offload_optimizer: disk"])
def test_an_interrupted_run_ends_as_the_uninterrupted_one(
    chat_model: Path, rows: Path, tmp_path: Path, stop_at: Callable[[int], Callback], optimizer: str
) -> None:
    stage = SFT.replace("adapter: none", f"adapter: none, eval_data: ROWS, optimizer: {optimizer}")
    run_recipe(recipe(chat_model, rows, tmp_path / "whole", stage))
    stopped = recipe(chat_model, rows, tmp_path / "stopped", stage)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(stopped, listeners=lambda index, stage: [stop_at(3)])
    run_recipe(stopped)
    found = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_what_schedule_free_saves_is_the_average(chat_model: Path, rows: Path, tmp_path: Path, dtype: str) -> None:
    """x = y + (z - y) (1 - 1 / b1), of which the checkpoint has all three."""
    stage = SFT.replace("adapter: none", "adapter: none, optimizer: schedule_free")
    run_recipe(recipe(chat_model, rows, tmp_path / "run", stage, dtype=dtype))
    kept = load_file(tmp_path / "run" / "00-sft" / "checkpoints" / "last" / "state.safetensors")
    for name, value in weights(tmp_path / "run" / "model").items():
        y, z = kept[f"optimizer/y/{name}"], kept[f"optimizer/z/{name}"]
        assert torch.equal(value, y.lerp(z, 1 - 1 / 0.9)), name
        assert not torch.equal(value, y), name


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_moments_on_the_disk_give_the_same_bytes_and_leave_no_file(
    chat_model: Path, rows: Path, tmp_path: Path, dtype: str
) -> None:
    for name in ("disk", "none"):
        stage = SFT.replace("adapter: none", f"adapter: none, offload_optimizer: {name}")
        run_recipe(recipe(chat_model, rows, tmp_path / name, stage, dtype=dtype))
    found = {name: weights(tmp_path / name / "model") for name in ("disk", "none")}
    for name, value in found["none"].items():
        assert torch.equal(value, found["disk"][name]), name
    assert list((tmp_path / "disk").rglob("optimizer-*")) == []


def test_loss_and_resume_are_verified_too(chat_model: Path, rows: Path, tmp_path: Path) -> None:
    plan = recipe(chat_model, rows, tmp_path / "run", SFT)
    proof = verify_resume(plan)
    num_trained = len(weights(chat_model))
    assert (proof.num_parameters, proof.num_optimizer_tensors) == (num_trained, 3 * num_trained)
    assert verify_loss(plan, num_sequences=4).largest_difference < 1e-12
