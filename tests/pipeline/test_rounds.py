"""Iterative DPO: pairs come from the policy and a judge, each round builds on the one before, and nothing is lost."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import luthier as lt
from luthier.data.reading import read_examples
from luthier.errors import AdapterError, CheckpointError, DataError, RecipeError, TrainingError
from luthier.models.weights import weights_hash
from luthier.pipeline.rounds import read_rounds
from luthier.pipeline.run import run_recipe
from luthier.recipe.document import Recipe

JUDGE = """
def shorter(prompt, answer, row):
    with open("asked.txt", "a") as file:
        file.write(f"{row['number']} ")
    return -len(answer)

def shorter_in_training(prompt, answer, row):
    return -len(answer) if row["number"] < 100 else 0

def longer(prompt, answer, row):
    return len(answer)

def broken_for_odd(prompt, answer, row):
    if row["number"] % 2:
        raise ValueError("no idea")
    return -len(answer)

def nothing(prompt, answer, row):
    return 0.0

def broken(prompt, answer, row):
    raise ValueError("no idea")
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with prompts and functions that judge."""
    rows = [{"prompt": f"What is {i}?", "number": i} for i in range(10)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "judge.py").write_text(JUDGE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe_of(base: Path, function: str = "shorter", **more: Any) -> Recipe:
    stage = {
        **{"data": "prompts.jsonl", "judge": {"type": "rule", "function": f"judge.py:{function}"}, "rounds": 2},
        **{"prompts_per_round": 4, "eval_prompts": 3, "max_new_tokens": 24, "patience": 2, "batch_size": 2},
        **{"adapter": {"type": "lora", "r": 4}, "learning_rate": 1e-3, **more},
    }
    return Recipe.model_validate(
        {"model": str(base), "output": "run", "dtype": "fp32", "stages": [{"iterative_dpo": stage}]}
    )


def folder_of(place: Path, number: int) -> Path:
    return place / "run" / "00-iterative_dpo" / f"round-{number}"


def test_each_round_learns_from_its_own_pairs_and_builds_on_the_one_before(place: Path, speaker: Path) -> None:
    (summary,) = run_recipe(recipe_of(speaker))
    for number in range(2):
        folder = folder_of(place, number)
        result = json.loads((folder / "round.json").read_text())
        judged = json.loads((folder / "judged.json").read_text())
        reading = read_examples(str(folder / "pairs.jsonl"), task="prefer")
        assert len(reading.examples) == result["pairs"]
        assert result["pairs"] + sum(result["unpaired"].values()) == result["prompts"] == judged["prompts"] == 4
        assert result["wins"] + result["ties"] + result["losses"] == 3
        assert 0 <= result["low"] <= result["rate"] <= result["high"] <= 1
        for _, pair in reading.examples:
            better, worse = (answer[0].content for answer in pair.answers)  # type: ignore[union-attr]
            assert len(better) < len(worse)
    models = [weights_hash(folder_of(place, number) / "model") for number in range(2)]
    assert models[0] != models[1]
    best = max(read_rounds(folder_of(place, 0).parent), key=lambda result: (result.rate, -result.round))
    kept = speaker if best.rate < 0.5 else folder_of(place, best.round) / "model"
    assert weights_hash(place / "run" / "model") == weights_hash(kept)
    assert summary.steps > 0


@pytest.mark.slow
def test_rounds_that_are_done_are_not_judged_again(place: Path, speaker: Path) -> None:
    run_recipe(recipe_of(speaker))
    asked, before = (place / "asked.txt").read_text(), weights_hash(place / "run" / "model")
    for name in ("done.json", "summary.json"):
        (folder_of(place, 0).parent / name).unlink()
    run_recipe(recipe_of(speaker))
    assert (place / "asked.txt").read_text() == asked
    assert weights_hash(place / "run" / "model") == before


def test_a_round_that_was_interrupted_before_it_trained_keeps_its_pairs(place: Path, speaker: Path) -> None:
    run_recipe(recipe_of(speaker, rounds=1))
    folder = folder_of(place, 0)
    pairs, result = (folder / "pairs.jsonl").read_bytes(), (folder / "round.json").read_text()
    before = weights_hash(folder / "model")
    for name in ("round.json", "done.json", "held_out_answers.json"):
        (folder / name).unlink()
    for name in ("done.json", "summary.json"):
        (folder.parent / name).unlink()
    run_recipe(recipe_of(speaker, rounds=1))
    assert (folder / "pairs.jsonl").read_bytes() == pairs
    assert (folder / "round.json").read_text() == result
    assert weights_hash(folder / "model") == before


@pytest.mark.slow
def test_rounds_end_when_the_win_rate_stops_rising(place: Path, speaker: Path) -> None:
    """By a judge to whom all answers to held-out prompts are equal."""
    (place / "held_out.jsonl").write_text("".join(f'{{"prompt": "What is {i}?", "number": {i}}}\n' for i in (101, 102)))
    run_recipe(recipe_of(speaker, "shorter_in_training", rounds=4, patience=1, eval_data="held_out.jsonl"))
    assert (folder_of(place, 1) / "round.json").exists()
    assert not folder_of(place, 2).exists()
    assert [result.rate for result in read_rounds(folder_of(place, 0).parent)] == [0.5, 0.5]
    first = folder_of(place, 0) / "model"
    assert weights_hash(place / "run" / "model") == weights_hash(first), "the first of equals"


@pytest.mark.parametrize(("function", "reason"), [("nothing", "tie"), ("broken", "raised ValueError")])
def test_a_judge_that_prefers_nothing_ends_the_run_with_its_reasons(
    place: Path, speaker: Path, function: str, reason: str
) -> None:
    with pytest.raises(TrainingError, match=reason):
        run_recipe(recipe_of(speaker, function))
    assert not (place / "run" / "model").exists()


def test_what_cannot_run_is_refused_before_anything_is_sampled(place: Path, speaker: Path) -> None:
    with pytest.raises(DataError, match="eval_prompts"):
        run_recipe(recipe_of(speaker, eval_prompts=10))
    with pytest.raises(RecipeError, match="defines no function"):
        run_recipe(recipe_of(speaker, "missing"))
    assert not list(place.glob("run/*/round-*/pairs.jsonl"))


def test_from_python_the_model_is_what_the_best_round_left(place: Path, speaker: Path) -> None:
    model = lt.load(str(speaker))
    settings = recipe_of(speaker).stages[0].settings.model_dump(exclude={"model", "output", "dtype"})
    lt.iterative_dpo(model, **settings, output="python")  # type: ignore[attr-defined]
    assert model.source.weights_hash == weights_hash(place / "python" / "model")


def test_a_judge_that_fails_on_some_answers_is_counted_and_the_round_goes_on(place: Path, speaker: Path) -> None:
    (summary,) = run_recipe(recipe_of(speaker, "broken_for_odd", rounds=1, prompts_per_round=7))
    result = read_rounds(folder_of(place, 0).parent)[0]
    assert result.unpaired["raised ValueError"] >= 1
    assert result.pairs + sum(result.unpaired.values()) == result.prompts == 7
    assert "raised ValueError" in result.judged
    assert summary.steps > 0


def test_an_answer_that_was_cut_off_is_not_learned_from(place: Path, speaker: Path) -> None:
    with pytest.raises(TrainingError, match="fewer than two answers that are whole 4"):
        run_recipe(recipe_of(speaker, max_new_tokens=1))
    assert not list(place.glob("run/*/round-0/pairs.jsonl"))


@pytest.mark.parametrize("change", ["judge", "prompts", "beta"])
def test_rounds_of_another_judge_prompts_or_settings_are_not_taken_up(place: Path, speaker: Path, change: str) -> None:
    run_recipe(recipe_of(speaker, rounds=1))
    for name in ("done.json", "summary.json"):
        (folder_of(place, 0).parent / name).unlink()
    if change == "judge":
        (place / "judge.py").write_text(JUDGE + "\n# of another mind\n")
    if change == "prompts":
        (place / "prompts.jsonl").write_text((place / "prompts.jsonl").read_text().replace("What", "Who"))
    with pytest.raises(CheckpointError):
        run_recipe(recipe_of(speaker, rounds=1, **({"beta": 0.2} if change == "beta" else {})))


def test_a_run_that_was_stopped_within_its_rounds_is_nobody_elses(place: Path, speaker: Path) -> None:
    run_recipe(recipe_of(speaker, rounds=1))
    shutil.rmtree(place / "run" / "model")
    (folder_of(place, 0).parent / "done.json").unlink()
    with pytest.raises(CheckpointError, match="another recipe"):
        run_recipe(recipe_of(speaker, rounds=1, seed=7))


@pytest.mark.slow
def test_beginning_anew_judges_again(place: Path, speaker: Path) -> None:
    run_recipe(recipe_of(speaker, rounds=1))
    before = (folder_of(place, 0) / "pairs.jsonl").read_bytes()
    run_recipe(recipe_of(speaker, "longer", rounds=1, resume=False))
    assert (folder_of(place, 0) / "pairs.jsonl").read_bytes() != before
    for _, pair in read_examples(str(folder_of(place, 0) / "pairs.jsonl"), task="prefer").examples:
        better, worse = (answer[0].content for answer in pair.answers)  # type: ignore[union-attr]
        assert len(better) > len(worse)


def test_no_prompt_is_learned_from_and_compared_on(place: Path, speaker: Path) -> None:
    rows = [json.dumps({"prompt": f"What is {i % 4}?", "number": i}) for i in range(12)]
    (place / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    run_recipe(recipe_of(speaker, rounds=1, eval_prompts=2, seed=7))
    result = read_rounds(folder_of(place, 0).parent)[0]
    assert result.prompts == 2
    assert result.wins + result.ties + result.losses == 2


@pytest.mark.parametrize(
    "setting", [{"max_kl": 0.1}, {"early_stopping": 2}, {"reference": "other"}, {"eval_fraction": 0.1}]
)
def test_settings_without_effect_in_rounds_are_refused(speaker: Path, setting: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(setting))):
        recipe_of(speaker, **setting, eval_data="held_out.jsonl" if "eval_fraction" not in setting else None)


def test_an_adapter_that_cannot_be_merged_is_refused_before_anything_is_sampled(place: Path, speaker: Path) -> None:
    with pytest.raises(AdapterError, match="prompt: cannot be merged"):
        run_recipe(recipe_of(speaker, adapter={"type": "prompt"}, learning_rate=1e-3))
    assert not list(place.glob("run/*/round-*"))


def test_the_report_shows_each_round_and_what_it_won(place: Path, speaker: Path) -> None:
    run_recipe(recipe_of(speaker, rounds=1))
    page = (place / "run" / "report.html").read_text()
    assert "00-iterative_dpo/round-0" in page
    assert "Wins against the start" in page
    assert "No step is done yet" not in page
