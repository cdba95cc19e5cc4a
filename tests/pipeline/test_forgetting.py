"""The forgetting guard in whole runs of a tiny model: what it tells, when it warns, and when it ends a run."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from luthier.errors import CheckpointError, DataError, RecipeError
from luthier.models.load import load
from luthier.pipeline.forgetting import general_data
from luthier.pipeline.manifest import data_hashes
from luthier.pipeline.train import Summary, train
from luthier.recipe.settings import settings_from
from luthier.recipe.stages import STAGE_SETTINGS
from luthier.recipe.training import SFT, Training
from luthier.training.callbacks import Callback, Metrics, read_metrics

HOT = {"learning_rate": 3e-2, "epochs": 20}
GENERAL = {"text": "general.jsonl"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in, with rows of each kind and general text that the speaker has been taught."""
    monkeypatch.chdir(tmp_path)
    write("general.jsonl", [{"text": "ab" * (i % 3 + 1)} for i in range(24)])
    write("chats.jsonl", [{"question": f"Say {i}.", "answer": "xyz" * (i % 2 + 1)} for i in range(24)])
    write("pairs.jsonl", [{"prompt": f"Say {i}.", "chosen": "xyz", "rejected": "ab"} for i in range(24)])
    write("prompts.jsonl", [{"prompt": f"What is {i}?", "answer": "ab"} for i in range(8)])
    write("quiz.jsonl", [{"question": f"What is {i}?", "choices": ["xyz", "ab"], "answer": "B"} for i in range(40)])
    write("texts.jsonl", [{"text": "xyz zyx yxz.\n" * 20} for _ in range(24)])
    return tmp_path


def write(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def settings_of(word: str, data: str, **further: Any) -> Training:
    given = {"data": data, "eval_fraction": 0.25, "eval_every": 2, "batch_size": 4, "adapter": {"r": 4}}
    given |= {"forgetting": "general.jsonl", "schedule": "constant", "dtype": "fp32"}
    return settings_from(STAGE_SETTINGS[word], given | further)


def run(word: str, model: Path, data: str, folder: str, callbacks: Sequence[Callback] = (), **further: Any) -> Summary:
    settings = settings_of(word, data, **further)
    return train(word, settings, load(str(model), dtype="fp32"), Path(folder), callbacks=callbacks)[1]


def evaluations(folder: str) -> list[Metrics]:
    return [line for line in read_metrics(Path(folder) / "metrics.jsonl") if "eval_loss" in line]


@pytest.mark.parametrize(
    ("word", "data", "further"),
    [("sft", "chats.jsonl", {}), ("pretrain", "texts.jsonl", {"max_length": 64}), ("dpo", "pairs.jsonl", {})],
)
@pytest.mark.usefixtures("place")
def test_a_run_that_is_too_hot_ends_with_the_best_weights(
    speaker: Path, word: str, data: str, further: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    summary = run(word, speaker, data, "run", **HOT, **further)
    told = evaluations("run")
    assert told[0]["eval_forgetting"] == 0
    assert [line["eval_forgetting"] > 0.15 for line in told] == [False] * (len(told) - 1) + [True]
    assert told[-1]["step"] == summary.steps
    assert "over forgetting.stop 0.15" in caplog.text
    allowed = min(told[:-1], key=lambda line: line["eval_loss"])
    best = Path("run/checkpoints/best")
    assert best.resolve().name == f"step-{allowed['step']:08d}"
    kept = {tuple(t.flatten().tolist()) for n, t in load_file(best / "state.safetensors").items() if "parameter/" in n}
    saved = load_file("run/adapter/adapter_model.safetensors")
    assert {tuple(tensor.flatten().tolist()) for tensor in saved.values()} == kept


@pytest.mark.usefixtures("place")
def test_a_gentle_run_goes_to_its_end_without_a_word(speaker: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run("sft", speaker, "chats.jsonl", "run", learning_rate=1e-5, epochs=2).steps == 10
    told = evaluations("run")
    assert [line["step"] for line in told] == [0, 2, 4, 6, 8, 10]
    base = told[0]["eval_forgetting_perplexity"]
    for line in told:
        assert line["eval_forgetting"] == pytest.approx(line["eval_forgetting_perplexity"] / base - 1)
        assert abs(line["eval_forgetting"]) < 0.05
    assert "forgetting" not in caplog.text


@pytest.mark.usefixtures("place")
def test_a_rise_on_the_way_is_warned_of_once(speaker: Path, caplog: pytest.LogCaptureFixture) -> None:
    run("sft", speaker, "chats.jsonl", "run", **HOT, forgetting={**GENERAL, "stop": 1e9})
    assert sum(line["eval_forgetting"] > 0.05 for line in evaluations("run")) > 1
    assert caplog.text.count("the perplexity on forgetting.text has risen") == 1
    assert "lower learning_rate or epochs" in caplog.text


@pytest.mark.usefixtures("place")
def test_a_run_that_goes_on_compares_with_the_same_model(speaker: Path, stop_at: Callable[[int], Callback]) -> None:
    given = {"learning_rate": 1e-3, "epochs": 2, "save_every": 2, "forgetting": {**GENERAL, "stop": 1e9}}
    run("sft", speaker, "chats.jsonl", "whole", **given)
    with pytest.raises(KeyboardInterrupt):
        run("sft", speaker, "chats.jsonl", "cut", [stop_at(5)], **given)
    base = Path("cut/forgetting.json").read_bytes()
    run("sft", speaker, "chats.jsonl", "cut", **given)
    assert Path("cut/forgetting.json").read_bytes() == base
    whole, cut = evaluations("whole"), evaluations("cut")
    assert [line["eval_forgetting"] for line in cut] == [line["eval_forgetting"] for line in whole]
    assert whole[-1]["eval_forgetting"] != 0


@pytest.mark.usefixtures("place")
def test_a_run_goes_on_with_no_other_start_and_no_other_text(speaker: Path, stop_at: Callable[[int], Callback]) -> None:
    given = {"learning_rate": 1e-5, "epochs": 2, "save_every": 2}
    with pytest.raises(KeyboardInterrupt):
        run("sft", speaker, "chats.jsonl", "run", [stop_at(5)], **given)
    Path("run/forgetting.json").unlink()
    with pytest.raises(CheckpointError, match=r"forgetting\.json: is damaged .*resume: false"):
        run("sft", speaker, "chats.jsonl", "run", **given)
    with pytest.raises(CheckpointError, match="other settings, data or model"):
        run("sft", speaker, "chats.jsonl", "run", **given, forgetting="texts.jsonl")
    run("sft", speaker, "chats.jsonl", "run", **given, forgetting="texts.jsonl", resume=False)
    assert Path("run/forgetting.json").exists()


@pytest.mark.usefixtures("place")
def test_a_bound_on_the_divergence_holds_beside_the_guard(speaker: Path, caplog: pytest.LogCaptureFixture) -> None:
    run("dpo", speaker, "pairs.jsonl", "run", **HOT, max_kl=1e-4, forgetting={**GENERAL, "stop": 1e9, "warn": 1e8})
    assert {"eval_forgetting", "eval_kl_per_token"} <= evaluations("run")[-1].keys()
    assert "over max_kl 0.0001; the training ends" in caplog.text


@pytest.mark.usefixtures("place")
def test_a_policy_is_measured_at_its_own_evaluations(speaker: Path) -> None:
    further = {"reward": {"type": "exact"}, "max_new_tokens": 4, "max_steps": 2, "eval_every": 1, "group_size": 2}
    run("grpo", speaker, "prompts.jsonl", "run", **further)
    told = evaluations("run")
    assert [line["step"] for line in told] == [0, 1, 2]
    assert all({"eval_forgetting", "eval_forgetting_perplexity"} <= line.keys() for line in told)


@pytest.mark.usefixtures("place")
def test_the_perplexity_is_the_one_of_the_first_tokens(speaker: Path) -> None:
    """Seven tokens: the first document's four, its end, and two of the second, whose first nothing can foretell."""
    write("two.jsonl", [{"text": "abcd"}, {"text": "efgh"}])
    model = load(str(speaker), dtype="fp32")
    forgetting = {"text": "two.jsonl", "tokens": 7}
    (block,) = general_data(settings_of("sft", "chats.jsonl", forgetting=forgetting), model.tokenizer).text
    assert model.tokenizer.decode(block.token_ids) == "abcd<|im_end|>ef"
    run("sft", speaker, "chats.jsonl", "run", forgetting=forgetting, max_steps=1)
    ids = model.tokenizer("abcd<|im_end|>ef", return_tensors="pt").input_ids
    labels = ids.clone()
    labels[0, 5] = -100
    loss = model.network(input_ids=ids, labels=labels).loss.detach()
    told = evaluations("run")[0]["eval_forgetting_perplexity"]
    assert told == pytest.approx(math.exp(float(loss)), rel=1e-4)


@pytest.mark.usefixtures("place")
def test_an_accuracy_that_falls_too_far_ends_the_run(speaker: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The speaker says ab, and is taught to say xyz, which is wrong here."""
    run("sft", speaker, "chats.jsonl", "run", **HOT, forgetting={"questions": "quiz.jsonl"})
    told = evaluations("run")
    first = told[0]["eval_general_accuracy"]
    assert first > 0.5
    assert told[0]["eval_general_accuracy_fall"] == 0
    for line in told:
        assert line["eval_general_accuracy_fall"] == pytest.approx(first - line["eval_general_accuracy"])
    assert [line["eval_general_accuracy_fall"] > 0.05 for line in told] == [False] * (len(told) - 1) + [True]
    assert "over forgetting.accuracy_stop 0.05" in caplog.text
    assert "going back to the best checkpoint" in caplog.text
    assert len(json.loads(Path("run/forgetting.json").read_text())["rightly"]) == 40


@pytest.mark.usefixtures("place")
def test_both_guards_hold_side_by_side_and_after_a_resume(speaker: Path, stop_at: Callable[[int], Callback]) -> None:
    both = {**GENERAL, "questions": "quiz.jsonl", "num_questions": 7, "stop": 1e9, "accuracy_stop": 0.99}
    given = {"learning_rate": 1e-3, "epochs": 2, "save_every": 2, "forgetting": both}
    run("sft", speaker, "chats.jsonl", "whole", **given)
    with pytest.raises(KeyboardInterrupt):
        run("sft", speaker, "chats.jsonl", "cut", [stop_at(5)], **given)
    run("sft", speaker, "chats.jsonl", "cut", **given)
    names = ("eval_forgetting", "eval_general_accuracy", "eval_general_accuracy_fall")
    whole, cut = ([[line[name] for name in names] for line in evaluations(folder)] for folder in ("whole", "cut"))
    assert cut == whole
    assert len(json.loads(Path("cut/forgetting.json").read_text())["rightly"]) == 7
    Path("quiz.jsonl").write_text(Path("quiz.jsonl").read_text().replace('"B"', '"A"'))
    with pytest.raises(CheckpointError, match="other settings, data or model"):
        run("sft", speaker, "chats.jsonl", "cut", **given)


@pytest.mark.usefixtures("place")
def test_questions_are_taken_from_all_over_the_files(speaker: Path) -> None:
    tokenizer = load(str(speaker)).tokenizer
    few = {"questions": "quiz.jsonl", "num_questions": 3}
    general = general_data(settings_of("sft", "chats.jsonl", forgetting=few), tokenizer)
    assert [group.origin.line for group in general.questions] == [1, 14, 27]
    assert general.num_characters == [(3, 2)] * 3
    with pytest.raises(DataError, match="none of 40 fits into max_length 8"):
        general_data(settings_of("sft", "chats.jsonl", forgetting=few, max_length=8), tokenizer)


@pytest.mark.parametrize("named", ["text", "questions"])
@pytest.mark.usefixtures("place")
def test_what_a_guard_measures_on_is_among_the_data_of_the_manifest(named: str) -> None:
    settings = settings_of("sft", "chats.jsonl", forgetting={named: ["quiz.jsonl", "general.jsonl"]})
    assert data_hashes(settings).keys() == {"chats.jsonl", "general.jsonl", "quiz.jsonl"}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"forgetting": "a.txt"}, "forgetting: needs evaluations; give eval_data or eval_fraction"),
        ({"forgetting": {"stop": 0.3}}, r"forgetting\.text: there is nothing to measure forgetting on"),
        ({"forgetting": {"questions": "q", "stop": 0.3}}, r"forgetting\.stop: has no effect without text"),
        ({"forgetting": {"text": "a", "num_questions": 9}}, r"forgetting\.num_questions: has no effect without q"),
        ({"forgetting": {"text": "a.txt", "warn": 0.2}}, r"forgetting\.warn: lies over stop"),
        ({"forgetting": {"questions": "q", "accuracy_warn": 0.2}}, r"forgetting\.accuracy_warn: lies over accuracy_s"),
    ],
)
def test_settings_that_cannot_guard_are_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=f"^{sentence}"):
        settings_from(SFT, {"data": "a", **given})


@pytest.mark.usefixtures("place")
def test_what_has_no_perplexity_is_refused(speaker: Path) -> None:
    tokenizer = load(str(speaker)).tokenizer
    with pytest.raises(RecipeError, match=r"^forgetting: a reward model"):
        general_data(settings_of("reward", "pairs.jsonl"), tokenizer)
    write("empty.jsonl", [{"text": ""}])
    with pytest.raises(DataError, match=r"^forgetting\.text: empty\.jsonl holds no text"):
        general_data(settings_of("sft", "chats.jsonl", forgetting="empty.jsonl", on_error="skip"), tokenizer)
