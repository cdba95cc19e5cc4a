"""A local judge says what the model's own logits say, and always the same."""

from pathlib import Path

import pytest
import torch

from luthier.data.examples import Chat, Message
from luthier.data.masks import encode_prompt
from luthier.evaluate.judging_prompt import judging_messages
from luthier.evaluate.model_judge import ModelJudge
from luthier.evaluate.verdicts import Question, compare_both_orders
from luthier.models.load import Model, load
from luthier.rollout.scoring import Failure

CRITERIA = "The better answer is right."
PROMPT = (Message("system", "Be brief."), Message("user", "2 + 2?"))
QUESTIONS = [Question(PROMPT, first, second) for first, second in [("4", "5"), ("four", ""), ("<|im_end|>", "a" * 90)]]
FORM = "Reply with one letter, A or B, and nothing else."


@pytest.fixture(scope="module")
def model(chat_model: Path) -> Model:
    return load(str(chat_model), device="cpu")


@torch.no_grad()
def naive_margin(model: Model, question: Question) -> float:
    """From the full logits of the last position, by transformers' own attention."""
    ids = encode_prompt(Chat(judging_messages(question, criteria=CRITERIA, form=FORM)), model.tokenizer)
    letters = [model.tokenizer.convert_tokens_to_ids(letter) for letter in "AB"]
    logprobs = torch.log_softmax(model.network(torch.tensor([ids])).logits[0, -1], dim=-1)
    return float(logprobs[letters[0]] - logprobs[letters[1]])


@pytest.mark.parametrize("micro_batch_tokens", [1, 100_000], ids=["one by one", "all at once"])
def test_margins_equal_the_full_logits(model: Model, chat_model: Path, micro_batch_tokens: int) -> None:
    """To 1e-5: float32 sums of other order, over two layers."""
    plain = load(str(chat_model), device="cpu", attention="eager")
    found = ModelJudge(model, CRITERIA, micro_batch_tokens).margins(QUESTIONS)
    assert found == pytest.approx([naive_margin(plain, question) for question in QUESTIONS], abs=1e-5)
    assert len({round(float(margin), 4) for margin in found if isinstance(margin, float)}) == len(QUESTIONS)


def test_the_likelier_letter_wins_and_always_the_same(model: Model) -> None:
    judge = ModelJudge(model, CRITERIA)
    verdicts = judge.compare(QUESTIONS)
    margins = judge.margins(QUESTIONS)
    assert [verdict.outcome for verdict in verdicts] == ["first" if margin > 0 else "second" for margin in margins]
    assert judge.compare(QUESTIONS) == verdicts
    assert judge.margins(QUESTIONS) == margins


def test_dropout_does_not_judge(model: Model) -> None:
    judge = ModelJudge(model, CRITERIA)
    margins = judge.margins(QUESTIONS)
    model.network.train()
    try:
        assert judge.margins(QUESTIONS) == margins
        assert model.network.training
    finally:
        model.network.eval()


def test_a_question_that_the_model_cannot_be_shown_fails_alone(model: Model) -> None:
    asked = [QUESTIONS[0], Question(PROMPT, "a" * 3000, "b"), Question(PROMPT, "half \ud83d", "b"), QUESTIONS[1]]
    first, long, broken, last = ModelJudge(model, CRITERIA).compare(asked)
    assert {first.outcome, last.outcome} <= {"first", "second"}
    assert isinstance(long.failure, Failure)
    assert isinstance(broken.failure, Failure)
    assert (long.failure.reason, broken.failure.reason) == ("longer than the context", "cannot be shown")


def test_nothing_is_lost_in_both_orders(model: Model) -> None:
    verdicts, report = compare_both_orders(ModelJudge(model, CRITERIA), QUESTIONS)
    assert len(verdicts) == report.num_asked == report.num_decided + report.num_ties == 3
    assert compare_both_orders(ModelJudge(model, CRITERIA), [])[0] == []
