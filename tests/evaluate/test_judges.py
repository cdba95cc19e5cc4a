"""The judge that a recipe asks for is the judge that it gets."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from luthier.data.examples import Chat, Message
from luthier.errors import RecipeError
from luthier.evaluate.judges import judge_of
from luthier.evaluate.model_judge import ModelJudge
from luthier.evaluate.server_judge import ServerJudge
from luthier.evaluate.verdicts import Question, compare_both_orders
from luthier.models.heads import with_head
from luthier.models.load import load
from luthier.models.save import save
from luthier.recipe.judges import EndpointJudge, LocalJudge, RewardJudge, RuleJudge
from luthier.rollout.scoring import Rewards

PROMPT = (Message("user", "2 + 2?"),)
QUESTIONS = [Question(PROMPT, "4", "five", {"truth": "4"}), Question(PROMPT, "4", "4", {"truth": "4"})]


def lengths(name: str) -> Rewards:
    """The shortest answer's reward model; a name that ends in nan gives nothing better."""

    def rewards(chats: Sequence[Chat]) -> list[float]:
        return [float("nan") if name.endswith("nan") else -float(len(chat.messages[-1].content)) for chat in chats]

    return rewards


def test_a_rule_compares_with_its_row(tmp_path: Path) -> None:
    (tmp_path / "rule.py").write_text("def prefer(prompt, answer, row):\n    return answer == row['truth']\n")
    judge = judge_of(RuleJudge(function=f"{tmp_path / 'rule.py'}:prefer"), load_rewards=lengths)
    assert [verdict.outcome for verdict in compare_both_orders(judge, QUESTIONS)[0]] == ["first", "tie"]


def test_a_rule_that_never_returns_fails_for_that_answer_alone(tmp_path: Path) -> None:
    (tmp_path / "rule.py").write_text(
        "def prefer(prompt, answer, row):\n    while answer == 'five':\n        pass\n    return 1"
    )
    judge = judge_of(RuleJudge(function=f"{tmp_path / 'rule.py'}:prefer", timeout_seconds=0.5))
    failed, tie = judge.compare(QUESTIONS)
    assert failed.failure is not None
    assert (failed.failure.reason, tie.outcome) == ("timed out", "tie")


@pytest.mark.parametrize(("name", "expected"), [("short", ["first", "tie"]), ("short-nan", ["failed", "failed"])])
def test_a_reward_model_scores_the_conversation_with_the_answer(name: str, expected: list[str]) -> None:
    judge = judge_of(RewardJudge(model=name), load_rewards=lengths)
    assert [verdict.outcome for verdict in judge.compare(QUESTIONS)] == expected
    assert judge.compare([]) == []


def test_a_saved_reward_model_judges_by_its_head(chat_model: Path, tmp_path: Path) -> None:
    """The head is turned round, and so is every verdict; half a surrogate pair cannot be shown to any model."""
    model = with_head(load(str(chat_model), device="cpu"), seed=0)
    folder = save(model, tmp_path / "reward")
    model.network.score.weight.data.neg_()
    turned = save(model, tmp_path / "turned")
    asked = [*QUESTIONS, Question(PROMPT, "half \ud83d", "b")]
    verdicts, swapped = (judge_of(RewardJudge(model=str(place))).compare(asked) for place in (folder, turned))
    assert [verdict.outcome for verdict in verdicts[1:]] == ["tie", "failed"]
    assert verdicts[0].outcome in ("first", "second")
    assert swapped[0] == verdicts[0].swapped


def test_a_local_judge_is_loaded_by_its_name(chat_model: Path) -> None:
    judge = judge_of(LocalJudge(model=str(chat_model), criteria="Be right."), load_rewards=lengths, load_model=load)
    assert isinstance(judge, ModelJudge)
    assert (judge.model.source.folder, judge.criteria) == (chat_model, "Be right.")


def test_an_endpoint_has_its_key_from_the_environment() -> None:
    settings = EndpointJudge(url="http://localhost:1/v1/", model="m", api_key_env="JUDGE_KEY", parallel=9, retries=1)
    judge = judge_of(settings, load_rewards=lengths, environment={"JUDGE_KEY": " secret\n"})
    assert isinstance(judge, ServerJudge)
    assert (judge.endpoint.url, judge.endpoint.key, judge.endpoint.retries, judge.parallel) == (
        *("http://localhost:1/v1", "secret"),
        *(1, 9),
    )


@pytest.mark.parametrize("value", ["", "  ", "sec\nret", "sécret"])
def test_a_key_that_is_missing_or_broken_is_said_without_the_key(value: str) -> None:
    settings = EndpointJudge(url="http://localhost:1/v1", model="m", api_key_env="JUDGE_KEY")
    with pytest.raises(RecipeError, match="set it") as caught:
        judge_of(settings, load_rewards=lengths, environment={"JUDGE_KEY": value})
    assert "ret" not in str(caught.value)
