"""A reward is the weighted sum of its parts, and what fails in one answer costs that answer alone."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.examples import Chat, Message
from luthier.errors import RecipeError
from luthier.models.heads import with_head
from luthier.models.load import load
from luthier.models.save import save
from luthier.recipe.rewards import (
    REWARD_SETTINGS,
    AnyReward,
    CodeReward,
    ExactReward,
    FunctionReward,
    JsonReward,
    JudgeReward,
    LengthReward,
    MathReward,
    ModelReward,
    NumericReward,
    PythonReward,
    RegexReward,
    TagsReward,
)
from luthier.rollout.rewards import Part, Reward, Rewarder, count_failures, rewarder_of
from luthier.rollout.scoring import Answered, Failure, Rewards, Score

PROMPT = (Message("user", "6 * 7?"),)
ROW = {"answer": "42", "tests": "assert f() == 42", "extra": [1]}
URL = "http://127.0.0.1:9/v1"
RULE = """
import os, time

def score(prompt, completion, row):
    if completion == "loop":
        time.sleep(60)
    if completion == "exit":
        os._exit(1)
    return {"42": 1.0, "nan": float("nan")}.get(completion, 0.0)
"""
EACH = [  # a kind, an answer that is worth 1, and one that is worth 0
    (LengthReward(maximum=2), "42", "a" * 9),
    (JsonReward(json_schema={"type": "integer"}), "42", "{}"),
    (RegexReward(pattern=r"\d+", match="full"), "42", "x42"),
    (TagsReward(tags=("answer",)), "<answer>42</answer>", "42"),
    (ExactReward(), "42", "41"),
    (NumericReward(), "It is 42.", "It is 41."),
    (MathReward(), r"$\frac{84}{2}$", "$41$"),
    (CodeReward(), "def f(): return 42", "def f(): return 41"),
]


def asked(*answers: str) -> list[Answered]:
    return [Answered(PROMPT, answer, ROW) for answer in answers]


def totals(found: Sequence[Reward]) -> list[Score]:
    return [reward.total for reward in found]


def by_length(name: str, adapter: str | None = None) -> Rewards:
    """A reward model that likes what is short; a name that ends in `broken` gives none."""

    def rewards(chats: Sequence[Chat]) -> list[float]:
        if name.endswith("broken"):
            raise RuntimeError("out of order")
        return [-float(len(chat.messages[-1].content)) for chat in chats]

    return rewards


@pytest.mark.parametrize(("settings", "right", "wrong"), EACH, ids=[settings.type for settings, *_ in EACH])
def test_a_part_gives_its_number(settings: AnyReward, right: str, wrong: str) -> None:
    with rewarder_of(settings) as rewarder:
        found = rewarder.score(asked(right, wrong, right))
    assert totals(found) == [1.0, 0.0, 1.0]
    assert [set(reward.parts) for reward in found] == [{settings.type}] * 3


def test_every_kind_is_tried_somewhere_here() -> None:
    assert {settings.type for settings, *_ in EACH} | {"model", "function", "judge", "python"} == set(REWARD_SETTINGS)


def test_parts_are_weighted_and_kept_by_their_names() -> None:
    parts = (ExactReward(weight=2), ExactReward(name="loose", column="other"), LengthReward(aim=4, weight=-0.5))
    (found,) = rewarder_of(parts).score([Answered(PROMPT, "42", {"answer": "42", "other": "x"})])
    assert found == Reward(2.0 * 1 + 1.0 * 0 - 0.5 * 0.5, {"exact": 1.0, "loose": 0.0, "length": 0.5})


def test_a_failed_part_leaves_its_answer_without_a_total_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(RULE)
    function = FunctionReward(function=f"{tmp_path / 'mine.py'}:score", timeout_seconds=1)
    with rewarder_of([function, ExactReward()]) as rewarder:
        found = rewarder.score(asked("42", "loop", "exit", "nan", "nan", "41"))
    assert [reward.total for reward in found if not isinstance(reward.total, Failure)] == [2.0, 0.0]
    assert [reward.parts["exact"] for reward in found] == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert found[1].total == Failure("function: timed out", "no number within 1 seconds")
    assert count_failures(found) == {
        "function: returned nan": 2,
        "function: timed out": 1,
        "function: ended its process": 1,
    }


def test_a_part_that_fails_as_a_whole_fails_for_each_answer() -> None:
    rewarder = rewarder_of([ModelReward(model="broken"), ExactReward()], load_rewards=by_length)
    found = rewarder.score(asked("42", "41"))
    assert totals(found) == [Failure("model: raised RuntimeError", "RuntimeError: out of order")] * 2
    assert [reward.parts["exact"] for reward in found] == [1.0, 0.0]
    assert rewarder.score([]) == []


def test_a_total_is_finite_or_a_failure() -> None:
    rewarder = rewarder_of([ExactReward(weight=1.7e308), ExactReward(weight=1.7e308, name="again")])
    assert totals(rewarder.score(asked("42", "41"))) == [Failure("returned inf", "expected a finite number"), 0.0]


def test_functions_of_python_run_here_and_get_copies() -> None:
    seen: list[str] = []

    def mine(prompt: list[dict[str, Any]], completion: str, row: dict[str, Any]) -> float:
        seen.append(completion)
        row["extra"].append(2)
        prompt.clear()
        return 1 / (len(completion) - 2)

    parts = [PythonReward(digest="1", name="mine"), ExactReward()]
    found = rewarder_of(parts, functions={"1": mine}).score(asked("420", "42"))
    assert found[0] == Reward(1.0, {"mine": 1.0, "exact": 0.0})
    assert found[1].total == Failure("mine: raised ZeroDivisionError", "ZeroDivisionError: division by zero")
    assert (seen, ROW["extra"]) == (["420", "42"], [1])
    with pytest.raises(RecipeError, match="mine is a function of the program that began this run; run that program"):
        rewarder_of(parts)


def test_a_reward_model_computes_all_answers_at_once() -> None:
    batches: list[int] = []

    def loaded(name: str, adapter: str | None) -> Rewards:
        def rewards(chats: Sequence[Chat]) -> list[float]:
            batches.append(len(chats))
            return [1.0] * len(chats)

        return rewards

    assert totals(rewarder_of(ModelReward(model="m"), load_rewards=loaded).score(asked("a", "b", "c"))) == [1.0] * 3
    assert batches == [3]


def test_a_saved_reward_model_is_loaded_by_its_name(chat_model: Path, tmp_path: Path) -> None:
    folder = save(with_head(load(str(chat_model), device="cpu"), seed=0), tmp_path / "reward")
    one, other, unshown = totals(rewarder_of(ModelReward(model=str(folder))).score(asked("a", "b", "half \ud83d")))
    assert isinstance(one, float)
    assert isinstance(other, float)
    assert one != other
    assert isinstance(unshown, Failure)


def test_tokens_are_counted_by_who_can(chat_model: Path) -> None:
    settings = LengthReward(maximum=2, unit="tokens")
    assert totals(rewarder_of(settings, model=load(str(chat_model))).score(asked("abc"))) == [0.5]
    with pytest.raises(RecipeError, match="no tokenizer"):
        rewarder_of(settings)


@pytest.mark.parametrize(
    ("reward", "sentence"),
    [
        (FunctionReward(function="missing.py:f"), "there is no Python file"),
        (JsonReward(schema_file="missing.json"), "cannot be read"),
        (JudgeReward(url=URL, model="m", api_key_env="JUDGE_KEY"), "JUDGE_KEY is not set"),
        ([ExactReward(), ExactReward()], 'two parts are called "exact"'),
    ],
)
def test_what_is_not_there_is_said_before_the_run(reward: Any, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        rewarder_of(reward, environment={})


@given(st.lists(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=2, max_size=2), max_size=6))
def test_totals_are_sums_where_no_part_fails(columns: list[list[float]]) -> None:
    """Part i says row[i] of each answer; nan stands for its failure."""

    def part(place: int) -> Callable[[Sequence[Answered]], list[Score]]:
        return lambda answered: [
            Failure("no") if math.isnan(n) else n for n in (one.row["n"][place] for one in answered)
        ]

    rewarder = Rewarder([Part("a", 2.0, part(0)), Part("b", -1.0, part(1))])
    found = rewarder.score([Answered((), "", {"n": row}) for row in columns])
    for (a, b), reward in zip(columns, found, strict=True):
        failed = "a" if math.isnan(a) else "b" if math.isnan(b) else None
        assert reward.total == (2 * a - b if failed is None else Failure(f"{failed}: no"))
    assert sum(count_failures(found).values()) == sum(math.isnan(n) for row in columns for n in row)
