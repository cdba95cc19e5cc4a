"""Iterative DPO: pairs come from the policy and a judge, each round builds on the one before, and nothing is lost."""

import json
from pathlib import Path
from typing import Any

import pytest

import luthier as lt
from luthier.data.reading import read_examples
from luthier.errors import DataError, RecipeError, TrainingError
from luthier.models.weights import weights_hash
from luthier.pipeline.rounds import best_round
from luthier.pipeline.run import run_recipe
from luthier.recipe.document import Recipe

JUDGE = """
def shorter(prompt, answer, row):
    with open("asked.txt", "a") as file:
        file.write(f"{row['number']} ")
    return -len(answer)

def shorter_in_training(prompt, answer, row):
    return -len(answer) if row["number"] < 100 else 0

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
        **{"prompts_per_round": 4, "eval_prompts": 3, "max_new_tokens": 8, "patience": 2, "batch_size": 2},
        **{"adapter": {"type": "lora", "r": 4}, "learning_rate": 1e-3, **more},
    }
    return Recipe.model_validate(
        {"model": str(base), "output": "run", "dtype": "fp32", "stages": [{"iterative_dpo": stage}]}
    )


def folder_of(place: Path, number: int) -> Path:
    return place / "run" / "00-iterative_dpo" / f"round-{number}"


def test_each_round_learns_from_its_own_pairs_and_builds_on_the_one_before(place: Path, chat_model: Path) -> None:
    (summary,) = run_recipe(recipe_of(chat_model))
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
    best = best_round(folder_of(place, 0).parent)
    assert weights_hash(place / "run" / "model") == weights_hash(best / "model")
    assert summary.steps > 0


def test_rounds_that_are_done_are_not_judged_again(place: Path, chat_model: Path) -> None:
    run_recipe(recipe_of(chat_model))
    asked, before = (place / "asked.txt").read_text(), weights_hash(place / "run" / "model")
    for name in ("done.json", "summary.json"):
        (folder_of(place, 0).parent / name).unlink()
    run_recipe(recipe_of(chat_model))
    assert (place / "asked.txt").read_text() == asked
    assert weights_hash(place / "run" / "model") == before


def test_a_round_that_was_interrupted_before_it_trained_keeps_its_pairs(place: Path, chat_model: Path) -> None:
    run_recipe(recipe_of(chat_model, rounds=1))
    folder = folder_of(place, 0)
    pairs, result = (folder / "pairs.jsonl").read_bytes(), (folder / "round.json").read_text()
    before = weights_hash(folder / "model")
    (folder / "round.json").unlink()
    (folder / "done.json").unlink()
    for name in ("done.json", "summary.json"):
        (folder.parent / name).unlink()
    run_recipe(recipe_of(chat_model, rounds=1))
    assert (folder / "pairs.jsonl").read_bytes() == pairs
    assert (folder / "round.json").read_text() == result
    assert weights_hash(folder / "model") == before


def test_rounds_end_when_the_win_rate_stops_rising(place: Path, chat_model: Path) -> None:
    """By a judge to whom all answers to held-out prompts are equal."""
    (place / "held_out.jsonl").write_text("".join(f'{{"prompt": "What is {i}?", "number": {i}}}\n' for i in (101, 102)))
    run_recipe(recipe_of(chat_model, "shorter_in_training", rounds=4, patience=1, eval_data="held_out.jsonl"))
    assert (folder_of(place, 1) / "round.json").exists()
    assert not folder_of(place, 2).exists()
    assert best_round(folder_of(place, 0).parent) == folder_of(place, 0), "the first of equals"


@pytest.mark.parametrize(("function", "reason"), [("nothing", "tie 4"), ("broken", "raised ValueError 4")])
def test_a_judge_that_prefers_nothing_ends_the_run_with_its_reasons(
    place: Path, chat_model: Path, function: str, reason: str
) -> None:
    with pytest.raises(TrainingError, match=reason):
        run_recipe(recipe_of(chat_model, function))
    assert not (place / "run" / "model").exists()


def test_what_cannot_run_is_refused_before_anything_is_sampled(place: Path, chat_model: Path) -> None:
    with pytest.raises(DataError, match="eval_prompts"):
        run_recipe(recipe_of(chat_model, eval_prompts=10))
    with pytest.raises(RecipeError, match="defines no function"):
        run_recipe(recipe_of(chat_model, "missing"))
    assert not list(place.glob("run/*/round-*/pairs.jsonl"))


def test_from_python_the_model_is_what_the_best_round_left(place: Path, chat_model: Path) -> None:
    model = lt.load(str(chat_model))
    settings = recipe_of(chat_model).stages[0].settings.model_dump(exclude={"model", "output", "dtype"})
    lt.iterative_dpo(model, **settings, output="python")  # type: ignore[attr-defined]
    assert model.source.weights_hash == weights_hash(place / "python" / "model")
