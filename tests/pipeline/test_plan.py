"""The memory plan: made before anything is loaded, kept by the run, and with a way out where it does not fit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from luthier.cli.plan import command
from luthier.models.load import load
from luthier.pipeline.plan import DeviceMemory, Planner, largest_micro_batch, plan_stage
from luthier.pipeline.prepare import prepare_data
from luthier.pipeline.sealed import read_sealed, write_sealed
from luthier.pipeline.train import train
from luthier.recipe.policy import GRPO
from luthier.recipe.training import SFT


@pytest.fixture
def settings(chat_model: Path, tmp_path: Path) -> SFT:
    rows = [{"prompt": f"Count to {n}.", "completion": " ".join(map(str, range(n)))} for n in range(2, 12)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SFT(data=str(data), model=str(chat_model), dtype="fp32", batch_size=4, max_steps=2)


def planner(settings: SFT, folder: Path, available_bytes: int = 10**12) -> Planner:
    """For a process that holds nothing, on a machine of so much memory."""
    prepared = prepare_data(settings, load(settings.model), folder)
    return Planner("sft", settings.model, prepared, DeviceMemory(torch.device("cpu"), 0, available_bytes))


def test_the_peak_is_the_sum_of_the_parts_or_the_loading(settings: SFT) -> None:
    planned, change = plan_stage("sft", settings, settings.model)
    assert planned.peak_bytes == max(planned.loading_bytes, sum(planned.parts.values()))
    assert planned.fits
    assert change is None
    assert {"process", "weights", "gradients", "optimizer", "activations"} <= planned.parts.keys()


def test_micro_batches_are_halved_until_they_fit(settings: SFT, tmp_path: Path) -> None:
    settings = settings.model_copy(update={"batch_size": 32})  # several micro-batches of 512 tokens a step
    whole, small = (
        planner(settings, tmp_path).plan(settings.model_copy(update={"micro_batch_tokens": n})) for n in (512, 128)
    )
    between = (whole.peak_bytes + small.peak_bytes) // 2
    planned = planner(settings, tmp_path, between).plan(settings)
    assert planned.fits
    assert planned.micro_batch_tokens < 512
    assert planned.largest_tokens <= planned.micro_batch_tokens


def test_where_a_named_size_does_not_fit_the_cheapest_change_is_named(settings: SFT, tmp_path: Path) -> None:
    named = settings.model_copy(update={"micro_batch_tokens": 512})
    needed = planner(named, tmp_path).plan(named).peak_bytes
    tight = planner(named, tmp_path, needed - 10_000)
    change = tight.cheapest_change(named)
    assert not tight.plan(named).fits
    assert change is not None
    assert change.words.startswith("micro_batch_tokens: ")
    assert change.words in tight.plan(named).sentence(change)


def test_moments_in_a_byte_each_are_a_change_that_may_make_it_fit(settings: SFT, tmp_path: Path) -> None:
    """With the smallest micro-batches and recomputed layers already."""
    own = {"adapter": None, "dtype": "bf16", "micro_batch_tokens": 64, "gradient_checkpointing": 1}
    whole = settings.model_copy(update=own)
    needed = planner(whole, tmp_path).plan(whole).peak_bytes
    change = planner(whole, tmp_path, needed - 10_000).cheapest_change(whole)
    assert change is not None
    assert change.words == "optimizer: adam8bit"


def test_moments_on_the_disk_are_no_memory_but_must_find_room(settings: SFT, tmp_path: Path) -> None:
    whole = settings.model_copy(update={"adapter": None, "dtype": "bf16", "output": str(tmp_path)})
    planned = planner(whole, tmp_path).plan(whole)
    on_disk = planner(whole, tmp_path).plan(whole.model_copy(update={"offload_optimizer": "disk"}))
    moved = planned.parts["masters"] + planned.parts["optimizer"]
    assert on_disk.offloaded_bytes == moved > 0
    assert sum(planned.parts.values()) - sum(on_disk.parts.values()) == moved
    assert on_disk.fits
    full = replace(on_disk, offloaded_room_bytes=moved - 1)
    assert not full.fits
    assert "offload_optimizer takes" in full.sentence(None)


@pytest.mark.slow
def test_nothing_helps_where_the_weights_alone_are_too_large(settings: SFT, tmp_path: Path) -> None:
    tight = planner(settings, tmp_path, 100_000)
    assert tight.cheapest_change(settings) is None
    assert "take a smaller model" in tight.plan(settings).sentence(None)


def test_the_largest_micro_batch_is_the_largest_of_the_epoch(settings: SFT, tmp_path: Path) -> None:
    prepared = prepare_data(settings, load(settings.model), tmp_path)
    one_by_one = settings.model_copy(update={"packing": False})
    assert largest_micro_batch(one_by_one, prepared, 512).num_tokens == max(map(len, prepared.train))
    every = settings.model_copy(update={"batch_size": 10})
    assert largest_micro_batch(every, prepared, 10**6).num_tokens == sum(map(len, prepared.train))


def test_a_run_writes_its_plan_and_goes_on_with_the_micro_batches_it_began_with(settings: SFT, tmp_path: Path) -> None:
    train("sft", settings, load(settings.model), tmp_path / "run")
    path = tmp_path / "run" / "plan.json"
    planned = read_sealed(path, mend="")
    assert planned["peak_bytes"] >= sum(planned["parts"].values())
    write_sealed(path, planned | {"micro_batch_tokens": 64})
    train("sft", settings, load(settings.model), tmp_path / "run")
    assert json.loads(path.read_text())["micro_batch_tokens"] == 64


def test_the_command_prints_peak_bytes_and_parts_as_json(settings: SFT) -> None:
    arguments = ["sft", "--model", settings.model, "--data", str(settings.data), "--json"]
    printed = json.loads(CliRunner().invoke(command("plan"), arguments, catch_exceptions=False).output)
    assert printed["peak_bytes"] == max(printed["loading_bytes"], sum(printed["parts"].values()))
    assert printed["change"] is None


def test_the_command_says_what_to_change_for_a_smaller_machine(settings: SFT) -> None:
    arguments = ["sft", "--model", settings.model, "--data", str(settings.data), "--memory-gb", "0.001"]
    printed = CliRunner().invoke(command("plan"), arguments, catch_exceptions=False).output
    assert "does not fit" in printed
    assert "take a smaller model" in " ".join(printed.split())


@pytest.mark.parametrize("micro_batch_tokens", [1, 20, 64, 100, 10**6])
def test_a_policys_largest_micro_batch_is_full_whatever_lengths_will_come(
    chat_model: Path, tmp_path: Path, micro_batch_tokens: int
) -> None:
    """Or has all that a step can have, and one answer in any case."""
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Say {'the ' * n}word.", "answer": "1"}) + "\n" for n in range(9)))
    policy = GRPO(data=str(data), reward="numeric", batch_size=2, group_size=4, max_new_tokens=10, max_length=64)
    prepared = prepare_data(policy, load(str(chat_model)), tmp_path)
    longest = sorted(map(len, prepared.train))[-2:]
    whole = sum(longest) + 2 * 3 * 10
    expected = min(max(micro_batch_tokens, longest[-1]), whole)
    assert longest[-1] > 20
    assert largest_micro_batch(policy, prepared, micro_batch_tokens).num_tokens == expected
