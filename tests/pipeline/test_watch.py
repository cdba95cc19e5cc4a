"""The output watch in whole runs of a tiny model: what it keeps, what it says, and that it disturbs nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import luthier
from luthier.errors import RecipeError
from luthier.models.load import load
from luthier.pipeline.report import write_report
from luthier.pipeline.train import Summary, train
from luthier.pipeline.watch import read_watched
from luthier.recipe.settings import settings_from
from luthier.recipe.stages import STAGE_SETTINGS
from luthier.training.callbacks import Callback, read_metrics

WATCH = {"prompts": ["What is 1?", "What is 2?", "What is 5?"], "max_new_tokens": 24}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in, with rows of each kind."""
    monkeypatch.chdir(tmp_path)
    write("same.jsonl", [{"question": f"What is {i}?", "answer": "ab" * (i % 3 + 1)} for i in range(24)])
    write("loops.jsonl", [{"question": f"What is {i}?", "answer": "xy" * 12} for i in range(24)])
    write("texts.jsonl", [{"text": "xyz zyx yxz.\n" * 8} for _ in range(24)])
    write("pairs.jsonl", [{"prompt": f"Say {i}.", "chosen": "xyz", "rejected": "ab"} for i in range(24)])
    write("prompts.jsonl", [{"prompt": f"What is {i}?", "answer": "ab"} for i in range(8)])
    return tmp_path


def write(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(word: str, model: Path, data: str, folder: str, *callbacks: Callback, **further: Any) -> Summary:
    given = {"data": data, "eval_fraction": 0.25, "eval_every": 2, "batch_size": 4, "adapter": {"r": 4}}
    given |= {"schedule": "constant", "dtype": "fp32", "save_every": 2, "epochs": 2, "learning_rate": 1e-4}
    settings = settings_from(STAGE_SETTINGS[word], given | {"watch": WATCH} | further)
    return train(word, settings, load(str(model), dtype="fp32"), Path(folder), callbacks=callbacks)[1]


def watched(folder: str) -> list[dict[str, Any]]:
    return read_watched(Path(folder) / "watched.jsonl")


@pytest.mark.usefixtures("place")
def test_answers_are_the_models_own_and_kept_with_each_evaluation(
    speaker: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run("sft", speaker, "same.jsonl", "run", max_steps=4)
    rows = watched("run")
    assert [row["step"] for row in rows] == [step for step in (0, 2, 4) for _ in WATCH["prompts"]]
    model = luthier.load(str(speaker), dtype="fp32")
    prompt = "<|im_start|>user\nWhat is 1?<|im_end|>\n<|im_start|>assistant\n"
    ids = model.tokenizer(prompt, return_tensors="pt").input_ids
    told = model.network.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    assert rows[0]["answer"] == model.tokenizer.decode(told, skip_special_tokens=True)
    assert rows[0]["tokens"] == len(told)
    lines = [line for line in read_metrics(Path("run/metrics.jsonl")) if "eval_loss" in line]
    assert all({"eval_watch_repeated", "eval_watch_nats", "eval_watch_cut_off"} <= line.keys() for line in lines)
    assert "watched answers" not in caplog.text


@pytest.mark.usefixtures("place")
def test_to_be_watched_changes_no_number(speaker: Path) -> None:
    given = {"adapter": {"r": 4, "dropout": 0.2}, "max_steps": 5}
    run("sft", speaker, "same.jsonl", "watched", **given)
    run("sft", speaker, "same.jsonl", "alone", **given, watch=None)
    ours, theirs = (load_file(f"{name}/adapter/adapter_model.safetensors") for name in ("watched", "alone"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert not Path("alone/watched.jsonl").exists()


@pytest.mark.usefixtures("place")
def test_a_run_that_learns_loops_is_told_once_with_its_mend_also_where_it_goes_on(
    speaker: Path, stop_at: Callable[[int], Callback], caplog: pytest.LogCaptureFixture
) -> None:
    given = {"learning_rate": 1e-2, "epochs": 6, "eval_every": 5}
    run("sft", speaker, "loops.jsonl", "whole", **given)
    assert all(row["repeated"] > 0.5 for row in watched("whole")[-3:])
    assert "3 watched answers go round in loops" in caplog.text
    assert "lower learning_rate or epochs" in caplog.text
    assert caplog.text.count("go round in loops") == 1
    said = next(record.getMessage() for record in caplog.records if "go round in loops" in record.getMessage())
    caplog.clear()
    with pytest.raises(KeyboardInterrupt):
        run("sft", speaker, "loops.jsonl", "cut", stop_at(int(said.split()[1].rstrip(":")) + 3), **given)
    run("sft", speaker, "loops.jsonl", "cut", **given)
    assert watched("cut") == watched("whole")
    assert caplog.text.count("go round in loops") == 1


@pytest.mark.parametrize(
    ("word", "data", "further"),
    [
        ("pretrain", "texts.jsonl", {"max_length": 64}),
        ("dpo", "pairs.jsonl", {}),
        ("grpo", "prompts.jsonl", {"reward": {"type": "exact"}, "max_new_tokens": 4, "group_size": 2}),
        ("sft", "same.jsonl", {"adapter": None}),
    ],
)
@pytest.mark.usefixtures("place")
def test_every_kind_of_stage_that_writes_can_be_watched(
    speaker: Path, word: str, data: str, further: dict[str, Any]
) -> None:
    run(word, speaker, data, "run", **further, max_steps=2)
    rows = watched("run")
    assert [row["step"] for row in rows] == [0] * 3 + [2] * 3
    assert all((row["nats"] is None) == (further.get("adapter", 0) is None) for row in rows)


@pytest.mark.usefixtures("place")
def test_a_reward_model_has_nothing_to_watch(speaker: Path) -> None:
    with pytest.raises(RecipeError, match="watch: a reward model writes no answers"):
        run("reward", speaker, "pairs.jsonl", "run")


@pytest.mark.usefixtures("place")
def test_the_report_shows_the_first_answers_and_the_last(speaker: Path) -> None:
    text = "stages: [{sft: {data: same.jsonl, eval_fraction: 0.25, max_steps: 1, watch: ['<b>What is 1?']}}]"
    Path("recipe.yaml").write_text(f"model: {speaker}\noutput: run\n{text}\n")
    luthier.run_recipe(luthier.load_recipe("recipe.yaml"))
    page = write_report(Path("run")).read_text()
    assert "Watched prompts, answered at the first evaluation and at the last" in page
    assert page.count("<pre>&lt;b&gt;What is 1?</pre>") == 1
