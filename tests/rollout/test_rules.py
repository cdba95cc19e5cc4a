"""Each rule with right, wrong and nasty answers: what is wrong is worth 0, what cannot be compared has a reason."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.errors import RecipeError
from luthier.recipe.rewards import (
    AnyReward,
    ExactReward,
    JsonReward,
    LengthReward,
    MathReward,
    NumericReward,
    RegexReward,
    TagsReward,
)
from luthier.rollout.rules import RULES, length_rule, rule_of
from luthier.rollout.scoring import Answered, Failure, Score

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k_train.jsonl"
HUGE = "a\u0301<think>[[" * 50_000
PERSON = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}

answers = st.text() | st.text(alphabet="<>/thinkaswer#\\boxed{}0123456789.,$-[]\"' \n")


def worth(settings: AnyReward, answer: str, right: object = None) -> Score:
    return rule_of(settings)(Answered((), answer, {} if right is None else {"answer": right}))


def gsm8k_answers() -> list[str]:
    if not GSM8K.exists():
        pytest.skip("needs the data folder ../shared/data beside the checkout")
    return [json.loads(line)["answer"] for line in GSM8K.read_text(encoding="utf-8").split("\n") if line]


@pytest.mark.parametrize(
    ("given_length", "length", "expected"),
    [
        ({"aim": 10}, 10, 1.0),
        ({"aim": 10}, 5, 0.5),
        ({"aim": 10}, 15, 0.5),
        ({"aim": 10}, 40, 0.0),
        ({"maximum": 10}, 0, 1.0),
        ({"maximum": 10}, 10, 1.0),
        ({"maximum": 10}, 15, 0.5),
        ({"maximum": 10}, 21, 0.0),
    ],
)
def test_length_falls_with_the_distance(given_length: dict[str, int], length: int, expected: float) -> None:
    assert worth(LengthReward(**given_length), "é" * length) == pytest.approx(expected)


def test_length_counts_tokens_where_somebody_can() -> None:
    settings = LengthReward(maximum=2, unit="tokens")
    assert length_rule(settings, lambda text: len(text.split()))(Answered((), "three words here")) == 0.5
    assert length_rule(LengthReward(maximum=2), lambda text: 99)(Answered((), "ab")) == 1.0
    with pytest.raises(RecipeError, match="no tokenizer to count tokens with; set unit: characters"):
        rule_of(settings)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"name": "Ada"}', 1.0),
        ('\n```json\n{"name": "Ada"}\n```\n', 1.0),
        ("null", 1.0),
        ("", 0.0),
        ("Here: {}", 0.0),
        ("```json\n{}", 0.0),
        ("```", 0.0),
        ("{'name': 1}", 0.0),
        ('{"a": 1, "a": 2}', 0.0),
        ("NaN", 0.0),
        ("[" * 100_000, 0.0),
        ("[" * 5_000 + "]" * 5_000, 0.0),
        ("1" * 10_000, 0.0),
        ('"half \ud83d"', 1.0),
    ],
)
def test_json_is_strict_and_may_be_fenced(answer: str, expected: float) -> None:
    assert worth(JsonReward(), answer) == expected


def test_json_holds_to_a_schema_from_the_recipe_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "person.json"
    path.write_text(json.dumps(PERSON))
    for settings in (JsonReward(json_schema=PERSON), JsonReward(schema_file=str(path))):
        found = [worth(settings, answer) for answer in ('{"name": "Ada"}', '{"name": 1}', "{}", "[]", "{")]
        assert found == [1.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("7", "is the number 7, no schema"),
        ('{"type": "x"}', "schema is none"),
    ],
)
def test_a_schema_that_is_none_is_refused_before_the_run(tmp_path: Path, text: str | None, sentence: str) -> None:
    if text is not None:
        (tmp_path / "schema.json").write_text(text)
    with pytest.raises(RecipeError, match=sentence):
        rule_of(JsonReward(schema_file=str(tmp_path / "schema.json")))


@pytest.mark.parametrize(
    ("match", "expected"), [("search", [1, 1, 1, 0]), ("start", [1, 1, 0, 0]), ("full", [1, 0, 0, 0])]
)
def test_a_pattern_matches_where_it_must(match: Any, expected: list[float]) -> None:
    settings = RegexReward(pattern=r"\d+ €", match=match)
    assert [worth(settings, answer) for answer in ("12 €", "12 € now", "for 12 €", "")] == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        (" \n<think>a\n< b</think>\n\n<answer></answer>\n", 1.0),
        ("<think>a</think> so <answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer>!", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a<answer>b</answer></think>", 0.0),
        ("<think>a</think><think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b", 0.0),
        ("<Think>a</Think><answer>b</answer>", 0.0),
        ("", 0.0),
        (HUGE, 0.0),
    ],
)
def test_tags_stand_in_order_each_once_with_nothing_around(answer: str, expected: float) -> None:
    assert worth(TagsReward(), answer) == expected


def test_tags_have_the_names_that_they_are_given() -> None:
    assert worth(TagsReward(tags=("a.b",)), "<a.b>x</a.b>") == 1.0
    assert worth(TagsReward(tags=("a.b",)), "<acb>x</acb>") == 0.0


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [
        ("  The\n CAT ", "the cat", 1.0),
        ("the cat.", "the cat", 0.0),
        ("Stra\u00dfe", "STRASSE", 1.0),
        ("e\u0301t\u00e9", "\u00e9t\u00e9", 1.0),
        ("\uff14\uff12", 42, 1.0),
        ("b", ["a", "b"], 1.0),
        ("true", True, 1.0),
        ("", "a", 0.0),
        ("", "", 1.0),
        (HUGE, "a", 0.0),
        ("a", None, Failure('no column "answer"', "the row has no columns")),
        ("a", [], Failure('no text in column "answer"', "it is an empty list")),
        ("a", {"b": 1}, Failure('no text in column "answer"', "it is an object")),
    ],
)
def test_exact_text_may_differ_in_space_and_case_alone(answer: str, right: object, expected: Score) -> None:
    assert worth(ExactReward(), answer, right) == expected


def test_case_counts_where_it_is_told_to() -> None:
    assert worth(ExactReward(ignore_case=False), "Cat", "cat") == 0.0


@pytest.mark.parametrize("settings", [ExactReward(tag="answer"), NumericReward(tag="answer"), MathReward(tag="answer")])
def test_only_the_last_tag_is_compared(settings: AnyReward) -> None:
    right = ["<answer>42</answer>", "41 <answer>41</answer><answer>42</answer> 43"]
    wrong = ["42", "<answer>42", "42</answer>", "</answer>42<answer>", "<answer>41</answer> 42", "<answer></answer>"]
    assert [worth(settings, answer, "42") for answer in right] == [1.0, 1.0]
    assert [worth(settings, answer, "42") for answer in wrong] == [0.0] * 6


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [
        ("It is 42.", 42, 1.0),
        ("42 of 43", 42, 0.0),
        ("3 + 4 = 7\n#### 7 (in 2 steps)", "#### 7", 1.0),
        ("#### 7\n#### 8", "8", 1.0),
        ("####", "7", 0.0),
        (r"so \boxed{x = 1{,}5 or \text{about } 7} in 2 steps", 7, 1.0),
        (r"\boxed{7", 7, 0.0),
        ("1,234,567.50", 1234567.5, 1.0),
        ("12,34", 34, 1.0),
        ("-$5", -5, 1.0),
        ("\u22125", -5, 1.0),
        ("10-3", 3, 1.0),
        ("2.5e3", 2500, 1.0),
        (".5", "0.5", 1.0),
        ("\u7b54\u6848\u662f42", 42, 1.0),
        ("\u0664\u0662", 42, 1.0),
        ("1e999999", 42, 0.0),
        ("9" * 100_000, 42, 0.0),
        ("", 42, 0.0),
        ("nan", 42, 0.0),
        (HUGE, 42, 0.0),
        ("42", "none", Failure('no number in column "answer"', "it says 'none'")),
        ("42", None, Failure('no column "answer"', "the row has no columns")),
    ],
)
def test_the_number_that_counts_is_compared(answer: str, right: object, expected: Score) -> None:
    assert worth(NumericReward(), answer, right) == expected


@pytest.mark.parametrize(("where", "right"), [("marker", 1), ("boxed", 2), ("last", 3), ("any", 1)])
def test_a_recipe_says_which_number_counts(where: Any, right: int) -> None:
    found = [worth(NumericReward(where=where, marker="A:"), r"A: 1, \boxed{2}, 3", n) for n in (1, 2, 3)]
    assert found == [float(n == right) for n in (1, 2, 3)]
    assert worth(NumericReward(where=where), "4", 4) == float(where in ("last", "any"))


def test_numbers_may_be_as_far_apart_as_a_recipe_says() -> None:
    settings = NumericReward(tolerance=0.01)
    found = [worth(settings, answer, 3.14159) for answer in ("3.14", "3.15", "3.2", "1e999", "-1e999")]
    assert found == [1.0, 1.0, 0.0, 0.0, 0.0]


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3), st.text(alphabet="abc €%\n"))
def test_a_number_is_found_among_words(number: Any, words: str) -> None:
    for text in (f"{words}#### {number:,}{words}", f"{words}\\boxed{{{number}}}", f"{words} {number}{words}"):
        assert worth(NumericReward(), text, str(number)) == 1.0


def test_every_answer_of_gsm8k_equals_itself_as_a_number() -> None:
    """And not the next one's, unless the two numbers behind #### are equal."""
    rows = gsm8k_answers()
    assert {worth(NumericReward(), row, row) for row in rows} == {1.0}
    tails = [float(row.rpartition("####")[2].replace(",", "")) for row in rows]
    for row, other, tail, next_tail in zip(rows, rows[1:], tails, tails[1:], strict=False):
        assert worth(NumericReward(), other, row) == float(tail == next_tail)


@pytest.mark.parametrize("step", [40, pytest.param(1, marks=pytest.mark.slow)])
def test_every_answer_of_gsm8k_equals_itself_as_mathematics(step: int) -> None:
    rows = gsm8k_answers()[::step]
    rule = rule_of(MathReward())
    assert {rule(Answered((), row, {"answer": row})) for row in rows} == {1.0}


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [
        (r"so $\frac{1}{\sqrt{2}}$", r"\sqrt{2}/2", 1.0),
        (r"\boxed{0.5}", r"$\frac12$", 1.0),
        ("$1 + x$", "x+1", 1.0),
        (r"$\{2, 1\}$", r"\{1, 2\}", 1.0),
        ("$x + 2$", "x+1", 0.0),
        ("72", 72, 1.0),
        ("$2$", r"\{1, 2\}", 0.0),
        ("$15$", "15 apples", 1.0),
        (r"$\sqrt{2}$", r"It is \(\sqrt{2}\).", 1.0),
        ("it is 1/2", ["3", "0.5"], 1.0),
        ("", "7", 0.0),
        ("\\frac{" * 50, "7", 0.0),
        ("7", "", Failure('no mathematics in column "answer"', "it says ''")),
    ],
)
def test_expressions_are_equal_by_mathematics(answer: str, right: object, expected: Score) -> None:
    assert worth(MathReward(), answer, right) == expected


@pytest.mark.parametrize(
    ("settings", "library"), [(MathReward(), "math_verify"), (JsonReward(json_schema=PERSON), "jsonschema")]
)
def test_a_library_that_is_missing_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, settings: AnyReward, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(RecipeError, match=r'install it with pip install "luthier\[rl\]"$'):
        rule_of(settings)


@given(answers, st.sampled_from([s for s in RULES if s not in ("math", "regex", "length")]))
def test_whatever_an_answer_says_is_worth_0_or_1(answer: str, kind: str) -> None:
    settings = {"json": JsonReward(), "tags": TagsReward(), "exact": ExactReward(), "numeric": NumericReward()}[kind]
    assert worth(settings, answer, "42") in (0.0, 1.0)


@given(answers, st.integers(1, 50))
def test_no_length_is_worth_less_than_0_or_more_than_1(answer: str, aim: int) -> None:
    assert all(0 <= worth(s, answer) <= 1 for s in (LengthReward(aim=aim), LengthReward(maximum=aim)))
