"""RLAIF from end to end: a judge behind a server reads answers in both orders, and what it cannot do is counted."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.errors import TrainingError
from luthier.pipeline.rounds import read_rounds
from luthier.pipeline.run import run_recipe
from luthier.recipe.document import Recipe

Start = Callable[[Callable[[dict[str, Any]], Any]], Any]


def shown(request: dict[str, Any]) -> dict[str, str]:
    """The two answers that the judge is shown."""
    text = request["messages"][-1]["content"]
    found = re.findall(r"<answer_([AB])_(\w+)>\n(.*?)\n</answer_\1_\2>", text, re.DOTALL)
    return {letter: answer for letter, _, answer in found}


def shorter(request: dict[str, Any]) -> str:
    answers = shown(request)
    lengths = {letter: len(answer) for letter, answer in answers.items()}
    letter = "TIE" if lengths["A"] == lengths["B"] else min(lengths, key=lengths.__getitem__)
    return f"VERDICT: {letter}"


def recipe_of(base: Path, folder: Path, url: str) -> Recipe:
    rows = [{"prompt": f"What is {i}?"} for i in range(14)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {
        **{"data": str(folder / "prompts.jsonl"), "rounds": 1, "prompts_per_round": 10, "eval_prompts": 4},
        **{"judge": {"type": "endpoint", "url": url, "model": "judge", "retries": 0, "timeout_seconds": 5}},
        **{"max_new_tokens": 24, "batch_size": 2, "adapter": {"type": "lora", "r": 4}, "learning_rate": 1e-3},
    }
    return Recipe.model_validate(
        {"model": str(base), "output": str(folder / "run"), "dtype": "fp32", "stages": [{"rlaif": stage}]}
    )


def test_a_round_learns_what_a_judge_behind_a_server_prefers(speaker: Path, tmp_path: Path, serve: Start) -> None:
    server = serve(shorter)
    (summary,) = run_recipe(recipe_of(speaker, tmp_path, server.url))
    (result,) = read_rounds(tmp_path / "run" / "00-rlaif")
    assert result.pairs >= 1
    assert result.pairs + sum(result.unpaired.values()) == result.prompts == 10
    assert result.wins + result.ties + result.losses == 4
    assert summary.steps > 0
    for line in (tmp_path / "run" / "00-rlaif" / "round-0" / "pairs.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert len(row["chosen"][0]["content"]) < len(row["rejected"][0]["content"])
    asked = [tuple(shown(request).values()) for request in server.requests]
    assert all(pair[::-1] in asked for pair in asked), "both orders"


def test_a_judge_that_prefers_a_place_decides_nothing_and_the_flips_are_told(
    speaker: Path, tmp_path: Path, serve: Start
) -> None:
    with pytest.raises(TrainingError, match=r"no answer is preferred .*tie"):
        run_recipe(recipe_of(speaker, tmp_path, serve(lambda request: "VERDICT: A").url))


def test_nonsense_and_failures_are_counted_and_the_rest_is_learned(speaker: Path, tmp_path: Path, serve: Start) -> None:
    """By what is asked, so that both orders of a question fare alike."""

    def moody(request: dict[str, Any]) -> str:
        text = request["messages"][-1]["content"]
        number = int(re.findall(r"What is (\d+)\?", text)[-1])
        return shorter(request) if number % 3 else "Who am I to judge?"

    run_recipe(recipe_of(speaker, tmp_path, serve(moody).url))
    (result,) = read_rounds(tmp_path / "run" / "00-rlaif")
    assert result.pairs >= 1
    assert result.pairs + sum(result.unpaired.values()) == 10
    assert "failed" in result.judged


def test_a_server_that_is_down_ends_the_run_with_what_was_sampled_kept(
    speaker: Path, tmp_path: Path, serve: Start
) -> None:
    server = serve(shorter)
    server.stop()
    recipe = recipe_of(speaker, tmp_path, server.url)
    with pytest.raises(TrainingError, match="see to the judge"):
        run_recipe(recipe)
    answers = tmp_path / "run" / "00-rlaif" / "round-0" / "answers.json"
    assert len(json.loads(answers.read_text())["answers"]) == 10
    assert not (tmp_path / "run" / "00-rlaif" / "round-0" / "pairs.jsonl").exists()
