"""A function may loop, exit, crash, print or eat memory: it costs one answer its number, and the run goes on."""

import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from luthier.data.examples import Message
from luthier.errors import RecipeError
from luthier.recipe.rewards import MathReward, RegexReward
from luthier.rollout.isolated import Isolated, isolated_function, isolated_rule
from luthier.rollout.scoring import Answered, Failure

PROMPT = (Message("user", "2 + 2?"),)
RULE = """
import ctypes, os, signal, subprocess, sys, time

calls = 0

def judge(prompt, completion, row):
    global calls
    calls += 1
    if completion == "loop":
        while True:
            pass
    if completion == "print":
        print('{"number": 0.5}', flush=True)
        os.write(1, b'{"number": 0.5}\\n')
        print("loud " * 10, file=sys.stderr)
        return float(sys.stdin.read() == "")
    if completion == "child":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        time.sleep(600)
    if completion == "segfault":
        ctypes.string_at(0)
    if completion == "hog":
        return len(bytearray(3 * 2**30))
    if completion == "row":
        return float(row["when"] == "2024-01-01" and prompt == [{"role": "user", "content": "2 + 2?"}])
    return eval(completion)
"""


@pytest.fixture
def rule(tmp_path: Path) -> Iterator[Isolated]:
    (tmp_path / "rule.py").write_text(RULE)
    found = isolated_function(f"{tmp_path / 'rule.py'}:judge", timeout_seconds=1.5, memory_bytes=2**31)
    yield found
    found.close()


def score(rule: Isolated, *answers: str, row: dict[str, object] | None = None) -> list[object]:
    return list(rule.score([Answered(PROMPT, answer, row or {}) for answer in answers]))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("loop", "timed out"),
        ("time.sleep(9)", "timed out"),
        ("os._exit(3)", "ended its process"),
        ("segfault", "ended its process"),
        ("os.kill(os.getpid(), signal.SIGSTOP)", "timed out"),
        ("hog", "raised MemoryError"),
        ("sys.exit()", "raised SystemExit"),
        ("float('nan')", "returned nan"),
        ("'1'", "returned str"),
        ("1 / 0", "raised ZeroDivisionError"),
        ("(_ for _ in ()).throw(KeyboardInterrupt)", "ended its process"),
    ],
)
def test_one_answer_fails_with_a_reason_and_the_next_has_its_number(rule: Isolated, answer: str, reason: str) -> None:
    first, failed, last = score(rule, "0.25", answer, "0.75")
    assert (first, last) == (0.25, 0.75)
    assert isinstance(failed, Failure)
    assert failed.reason == reason


def test_what_a_function_prints_is_no_number(capfd: pytest.CaptureFixture[str], rule: Isolated) -> None:
    assert score(rule, "os._exit(0)", "print", "0.25")[1:] == [1.0, 0.25]  # a process of this test's own output
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "loud" in shown.err


def test_a_function_keeps_its_state_between_answers(rule: Isolated) -> None:
    assert score(rule, "calls", "calls", "calls") == [1.0, 2.0, 3.0]
    assert score(rule, "loop", "calls")[1] == 1.0


def test_rows_of_any_size_and_kind_arrive(rule: Isolated) -> None:
    date = time.strptime("2024", "%Y")
    assert score(rule, "row", row={"when": Date(), "long": "é\ud83d\n" * 300_000, "nan": float("nan")}) == [1.0]
    assert score(rule, "len(row['long'])", row={"long": "x" * 5_000_000}) == [5_000_000.0]
    strange = score(rule, "1", row={"keys": {(1, 2): date}})[0]
    assert isinstance(strange, Failure)
    assert strange.reason == "cannot be written as JSON"


class Date:
    def __str__(self) -> str:
        return "2024-01-01"


def test_what_a_function_has_started_ends_with_it(rule: Isolated) -> None:
    assert score(rule, "child") == [Failure("timed out", "no number within 1.5 seconds")]
    assert [one for one in psutil.Process().children(recursive=True) if one.status() != psutil.STATUS_ZOMBIE] == []
    assert not any("time.sleep(600)" in " ".join(one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"]))


def test_a_process_ends_when_nobody_uses_it(tmp_path: Path) -> None:
    (tmp_path / "rule.py").write_text("import os\n\ndef pid(prompt, completion, row):\n    return os.getpid()\n")
    rule = isolated_function(f"{tmp_path / 'rule.py'}:pid")
    pid = int(score(rule, "")[0])
    assert pid != os.getpid()
    assert psutil.pid_exists(pid)
    del rule
    gc.collect()
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "there is no Python file"),
        ("g = 1", "defines no function 'f'"),
        ("raise RuntimeError('broken')", r"\(RuntimeError: broken\); mend it"),
        ("import os; os._exit(7)", r"rule\.py:f: its process did not start \(exit status 7\)"),
    ],
)
def test_a_function_that_is_not_there_is_said_before_the_run(tmp_path: Path, text: str | None, sentence: str) -> None:
    if text is not None:
        (tmp_path / "rule.py").write_text(text)
    with pytest.raises(RecipeError, match=sentence):
        isolated_function(f"{tmp_path / 'rule.py'}:f")


def test_a_function_that_breaks_in_mid_run_fails_for_each_answer(tmp_path: Path) -> None:
    path = tmp_path / "rule.py"
    path.write_text("import os\n\ndef f(prompt, completion, row):\n    os._exit(1)\n")
    rule = isolated_function(f"{path}:f")
    path.write_text("def g(): ...\n")
    reasons = [found.reason for found in rule.score([Answered((), "")] * 3) if isinstance(found, Failure)]
    assert reasons == ["ended its process", "did not start", "did not start"]


def test_a_pattern_that_backtracks_for_ever_and_a_power_of_powers_are_stopped() -> None:
    pattern = isolated_rule(RegexReward(pattern="(a+)+$", match="full"), timeout_seconds=1)
    found = pattern.score([Answered((), "a"), Answered((), "a" * 64 + "b"), Answered((), "b")])
    assert found == [1.0, Failure("timed out", "no number within 1 seconds"), 0.0]
    powers = isolated_rule(MathReward(), timeout_seconds=3)
    row = {"answer": "9^{9^{9^{9}}}"}
    hard, easy = powers.score([Answered((), "$9^{9^{9^9}} + 1$", row), Answered((), "$7$", {"answer": "7"})])
    assert easy == 1.0
    assert hard in (0.0, Failure("timed out", "no number within 3 seconds"))
