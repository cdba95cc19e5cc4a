"""A function in a file may do anything: each answer ends with a number or a reason."""

from pathlib import Path

import pytest

from luthier.data.examples import Message
from luthier.errors import RecipeError
from luthier.rollout.scoring import Answered, Failure, function_from, scored_by

PROMPT = (Message("system", "Be brief."), Message("user", "2 + 2?"))
RULE = """
import math, sys
from dataclasses import dataclass

@dataclass
class Verdict:
    value: "int" = 1

def judge(prompt, answer, row):
    row["seen"] = prompt.pop()
    row["list"].append(answer)
    return eval(answer)

def see(prompt, answer, row):
    return float(prompt == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}])

not_callable = 3
"""


@pytest.fixture
def rule(tmp_path: Path) -> Path:
    path = tmp_path / "rule: mine.py"
    path.write_text(RULE)
    return path


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("2.5", 2.5),
        ("Verdict().value", 1.0),
        ("True", 1.0),
        ("__import__('numpy').float32(0.5)", 0.5),
        ("__import__('numpy').bool_(True)", 1.0),
        ("'1'", Failure("returned str", "expected a number")),
        ("None", Failure("returned NoneType", "expected a number")),
        ("1j", Failure("returned complex", "expected a number")),
        ("math.nan", Failure("returned nan", "expected a finite number")),
        ("-math.inf", Failure("returned -inf", "expected a finite number")),
        ("1 / 0", Failure("raised ZeroDivisionError", "ZeroDivisionError: division by zero")),
        ("10 ** 400", Failure("raised OverflowError", "OverflowError: int too large to convert to float")),
        ("sys.exit()", Failure("raised SystemExit", "SystemExit")),
    ],
)
def test_whatever_the_function_does_is_a_number_or_a_reason(rule: Path, answer: str, expected: object) -> None:
    function = function_from(f"{rule}:judge")
    row = {"list": [1]}
    assert scored_by(function, [Answered(PROMPT, answer, row), Answered(PROMPT, "7", row)]) == [expected, 7.0]
    assert row == {"list": [1]}


def test_the_function_sees_the_conversation(rule: Path) -> None:
    assert scored_by(function_from(f"{rule}:see"), [Answered(PROMPT, "4")]) == [1.0]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.py:f", None, "there is no Python file"),
        ("notes.txt:f", "f = 1", "there is no Python file"),
        ("a.py:f", "g = 1", "defines no function 'f'"),
        ("a.py:f", "f = 1", "defines no function 'f'"),
        ("a.py:f", "def f(:", "SyntaxError"),
        ("a.py:f", "raise RuntimeError('broken\\ninside')", r"\(RuntimeError: broken\); mend it"),
        ("a.py:f", "import sys; sys.exit(3)", "SystemExit: 3"),
    ],
)
def test_a_function_that_is_not_there_is_said_before_the_run(
    tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / name.partition(":")[0]).write_text(text)
    with pytest.raises(RecipeError, match=message):
        function_from(str(tmp_path / name))
