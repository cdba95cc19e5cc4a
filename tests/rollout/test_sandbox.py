"""Programs pass tests or fail them, and whatever else they try comes to nothing."""

import doctest
import json
import logging
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.recipe.rewards import CodeReward
from luthier.rollout.isolated import start_of
from luthier.rollout.sandbox import Exam, num_passed, program_in, scored_by_tests
from luthier.rollout.scoring import Answered, Failure

HUMAN_EVAL = Path(__file__).parents[3] / "shared" / "data" / "human_eval.jsonl"

# What a program tries; afterwards `tried` says what came of it.
TRIES = """
import os
def trying():
{attempt}
try:
    tried = trying() or "done"
except BaseException as error:
    tried = type(error).__name__
"""


def passed(program: str, *tests: str, timeout_seconds: float = 10.0) -> int | Failure:
    return num_passed(textwrap.dedent(program), Exam(tests, timeout_seconds=timeout_seconds))


def refused(attempt: str, *errors: str) -> bool:
    """Whether the attempt raises one of these errors, as seen from the tests."""
    program = TRIES.format(attempt=textwrap.indent(textwrap.dedent(attempt), "    "))
    return passed(program, f"assert tried in {errors or ('PermissionError',)!r}, tried") == 1


@pytest.fixture(scope="session")
def closed() -> list[str]:
    """What this kernel lets a process close."""
    code = start_of("luthier.rollout.confinement").replace("import main; main()", "import confine")
    code += "; import pathlib; print(*confine(pathlib.Path('/tmp'), memory_bytes=2**30, cpu_seconds=9))"
    found = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return found.stdout.split()


@pytest.fixture
def closed_files(closed: list[str]) -> None:
    if "files" not in closed:
        pytest.skip("this kernel has no Landlock")


@pytest.fixture
def closed_processes(closed: list[str]) -> None:
    if "processes" not in closed:
        pytest.skip("this kernel has no filter of system calls that is known here")


@pytest.mark.parametrize(
    ("program", "test"),
    [
        ("def f(x): return x + 1", "assert f(1) == 2 and f(x=2) == 3"),
        ("def f(x): x.sort()", "x = [2, 1]; f(x); assert x == [1, 2]"),
        ("def f(x): x.update(a=[1])", "x = {}; f(x); assert x == {'a': [1]}"),
        ("def f(x): return {x: (1, {2.5}, b'3', 1j, None, True, float('inf'), 10**5000)}",
         "assert f('a') == {'a': (1, {2.5}, b'3', 1j, None, True, float('inf'), 10**5000)}"),
        ("from collections import *\nP = namedtuple('P', 'x y')\ndef f(s): return Counter(s), P(1, 2)",
         "assert f('aab') == ({'a': 2, 'b': 1}, (1, 2))"),
        ("def f(n):\n    for i in range(n): yield i * i", "assert list(f(4)) == [0, 1, 4, 9]"),
        ("class S:\n    def __init__(self): self.x = []\n    def push(self, v): self.x.append(v)\n"
         "    def __len__(self): return len(self.x)\n    def __getitem__(self, i): return self.x[i]",
         "s = S(); s.push('a'); assert len(s) == 1 and s[0] == 'a' and s.x == ['a']"),
        ("def f(): raise KeyError('k')", "try:\n    f()\nexcept KeyError:\n    pass\nelse:\n    raise AssertionError"),
        ("def f(g, x): return g(x)\ndef double(x): return 2 * x", "assert f(double, 4) == 8"),
        ("LIMIT = 5", "assert LIMIT == 5"),
        ("import numpy\ndef f(): return float(numpy.hypot(3, 4))", "import math; assert math.isclose(f(), 5)"),
        ("if __name__ == '__main__': raise SystemExit", "pass"),
        ("open('notes', 'w').write('a')\ndef f(): return open('notes').read()", "assert f() == 'a'"),
        ("import threading\nt = threading.Thread(target=print); t.start(); t.join()", "pass"),
        ("def max(x): return 'mine'", "assert max([1, 2]) == 2"),
        ("s = 'half \\ud83d'", "assert s == 'half \\ud83d'"),
    ],
)  # fmt: skip
def test_a_right_program_passes(program: str, test: str) -> None:
    assert passed(program, test) == 1


@pytest.mark.parametrize(
    "program",
    [
        "",
        "def f(x: return",
        "def f(x): return 2",
        "f = 7",
        "raise RuntimeError",
        "def f(x): raise ValueError",
        "def f(x): return f(x)",
        "\0",
        "(" * 100_000,
        "half \ud83d",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "def f(x):\n    import os; os._exit(0)",
        "def f(x): raise SystemExit(0)",
        "def f(x):\n    while True: pass",
        "import ctypes; ctypes.string_at(0)",
        "import time; time.sleep(60)",
        "def f(x): return 'a' * 10**9 * 10",
        "x = []\nwhile True: x.append(' ' * 10**7)",
        "def f(x): return 10**10**7",
        "def f(x):\n    y = []\n    y.append(y)\n    return y",
        "while True: print('loud' * 10**6, flush=True)",
        "import sys\nwhile True: sys.stderr.write('loud' * 10**6)",
    ],
)
def test_a_wrong_program_passes_nothing_in_time(program: str) -> None:
    start = time.monotonic()
    assert passed(program, "assert f(1) == 1", timeout_seconds=3) == 0
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "program",
    [
        "class E:\n    def __eq__(self, other): return True\n    __bool__ = __len__ = lambda self: True\n"
        "    __contains__ = __eq__\n    __sub__ = __rsub__ = lambda self, other: 0\ndef f(x): return E()",
        "class E(int):\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(x): return E(5)",
        "class E(list):\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
        "def f(x): return E()",
        "import builtins\nbuiltins.AssertionError = Warning\nbuiltins.abs = lambda x: 0\ndef f(x): return 5",
        "def abs(x): return 0\ndef isinstance(*a): return True\ndef f(x): return 5",
        "__builtins__ = {}\ndef check(c): pass\ndef f(x): return 5",
        "import itertools\ndef f(x): return itertools.count()",
    ],
)  # fmt: skip
def test_no_trick_with_equality_or_python_itself_passes(program: str) -> None:
    tests = ("assert f(1) == 1", "assert 1 == f(1)", "assert not f(1) != 1", "assert abs(f(1) - 1) < 0.1")
    assert passed(program, *tests, "assert 1 in f(1)", "assert f(1) in (1,)", "assert isinstance(f(1), dict)") == 0


@pytest.mark.parametrize(
    "attempt",
    [
        "for fd in range(1, 64):\n    try: os.write(fd, b'{\"passed\": true}\\n' * 9)\n    except OSError: pass",
        "import sys\nfor m in list(sys.modules.values()):\n    for n in ('_verdicts', '_reply', '_say', 'json'):\n"
        "        setattr(m, n, lambda *a, **k: {'passed': True})",
        "import sys\nframe = sys._getframe()\nwhile frame:\n    for v in list(frame.f_locals.values()):\n"
        "        if hasattr(v, 'write'): v.write(b'{\"passed\": true}\\n' * 9); v.flush()\n    frame = frame.f_back",
        "os.dup2(1, 5); os.close(0)",
    ],
)
def test_no_program_writes_its_own_verdict(attempt: str) -> None:
    program = TRIES.format(attempt=textwrap.indent(attempt, "    ")) + "\ndef f(x): return 2\n"
    assert passed(program, "assert f(1) == 1", "assert f(2) == 1", timeout_seconds=3) == 0


@pytest.mark.usefixtures("closed_files")
def test_a_program_reaches_no_file_but_its_own(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("key")
    for attempt in (f"open({str(secret)!r}).read()", f"os.listdir({str(tmp_path)!r})", f"os.unlink({str(secret)!r})"):
        assert refused(attempt), attempt
    for place in (tmp_path / "new", Path.home() / "new", Path("../new"), Path("/tmp/new"), Path("../tests/new")):
        assert refused(f"open({str(place)!r}, 'w')", "PermissionError", "FileNotFoundError"), place
    assert refused(f"os.truncate({str(secret)!r}, 0)")
    assert refused(f"os.rename({str(secret)!r}, 'mine')", "PermissionError", "OSError")
    assert secret.read_text() == "key"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret"]


@pytest.mark.usefixtures("closed_files")
def test_a_program_sees_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "secret-123")
    assert passed("import os\nseen = dict(os.environ)", "assert 'secret-123' not in str(seen), seen") == 1
    for process in ("self", "os.getppid()", "1"):
        attempt = f"place = {process!r} if {process!r}.isalnum() else eval({process!r})\n"
        assert refused(attempt + "return open(f'/proc/{place}/environ', 'rb').read().hex()"), process


@pytest.mark.usefixtures("closed_processes")
@pytest.mark.parametrize(
    "attempt",
    [
        "os.fork()",
        "import subprocess; subprocess.run(['/bin/true'])",
        "os.execv('/bin/true', ['true'])",
        "os.kill(os.getppid(), 0)",
        "os.kill(-1, 28)",
        "import signal; signal.pidfd_send_signal(0, 28)",
        "os.setsid()",
        "import socket; socket.socket()",
        "import socket; socket.socket(socket.AF_UNIX)",
        "os.chmod('.', 0)",
        "os.memfd_create('x')",
        "import resource; resource.prlimit(os.getppid(), resource.RLIMIT_CORE, (0, 0))",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))",
        "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
        "os.sched_setaffinity(os.getppid(), [0])",
        "import ctypes; c = ctypes.CDLL(None, use_errno=True)\n"
        "if c.ptrace(16, os.getppid(), 0, 0) < 0: raise OSError(ctypes.get_errno(), '')",
        "import multiprocessing; multiprocessing.Process(target=print).start()",
    ],
)
def test_a_program_reaches_no_process_and_no_network(attempt: str) -> None:
    assert refused(attempt, "PermissionError", "ValueError")


@pytest.mark.usefixtures("closed_processes")
def test_a_program_connects_to_no_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        assert refused(
            f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}', timeout=2)", "URLError"
        )
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.usefixtures("closed_processes")
def test_a_fork_bomb_leaves_no_process() -> None:
    before = set(psutil.pids())
    bomb = "import os, threading\nwhile True:\n    try: os.fork()\n    except OSError: pass\n"
    assert passed(bomb, "pass", timeout_seconds=3) == 0
    new = [psutil.Process(pid) for pid in set(psutil.pids()) - before if psutil.pid_exists(pid)]
    _, left = psutil.wait_procs(new, timeout=20)  # those of tests that run beside this one end by themselves
    assert not [one for one in left if one.is_running() and "luthier.rollout.candidate" in " ".join(one.cmdline())]


def test_big_files_and_open_files_have_limits() -> None:
    assert refused("open('big', 'wb').write(bytes(17 * 2**20))", "OSError")
    assert refused("return [open('x', 'w') for _ in range(100)] and None", "OSError")


def test_tests_that_pass_before_time_is_up_count() -> None:
    program = "def f(x):\n    while x > 2: pass\n    return x"
    assert passed(program, "assert f(1) == 1", "assert f(2) == 2", "f(3)", "pass", timeout_seconds=3) == 2


def test_tests_may_not_do_more_than_programs(tmp_path: Path, closed_files: None) -> None:
    assert passed("", f"open({str(tmp_path / 'new')!r}, 'w')", "raise SystemExit(0)", "pass") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("row", "settings", "reason"),
    [
        ({}, {}, 'no tests in column "tests"'),
        ({"tests": []}, {}, 'no tests in column "tests"'),
        ({"tests": ["pass", 7]}, {}, 'no tests in column "tests"'),
        ({"tests": "def f(:"}, {}, "broken tests"),
        ({"tests": "pass"}, {"entry_point": "name"}, 'no name in column "name"'),
    ],
)
def test_tests_that_cannot_be_run_are_a_failure(
    row: dict[str, object], settings: dict[str, object], reason: str
) -> None:
    (found,) = scored_by_tests(CodeReward(**settings), [Answered((), "x = 1", row)])
    assert isinstance(found, Failure)
    assert found.reason == reason


def test_answers_are_scored_in_their_order_whole_or_by_share() -> None:
    answers = ["```python\ndef f(x): return x\n```", "def f(x): return 1", "no program"]
    asked = [Answered((), answer, {"tests": ["assert f(1) == 1", "assert f(2) == 2"]}) for answer in answers * 3]
    assert scored_by_tests(CodeReward(), asked) == [1.0, 0.0, 0.0] * 3
    assert scored_by_tests(CodeReward(score="share"), asked) == [1.0, 0.5, 0.0] * 3


def test_a_check_is_called_with_the_function_that_the_row_names() -> None:
    test = "def check(candidate):\n    assert candidate([1, 3]) == 'mine'"
    row = {"tests": test, "name": "max"}
    scores = scored_by_tests(
        CodeReward(entry_point="name"), [Answered((), f"def {name}(x): return 'mine'", row) for name in ("max", "maxi")]
    )
    assert scores == [1.0, 0.0]


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("x = 1", "x = 1"),
        ("So:\n```python\nx = 1\n```\nPrints\n```\n1\n```", "x = 1"),
        ("```\na\n```\n```\nb\n```", "b"),
        ("```py\na\n```\n```Python\nb\n```\n```py\ncut", "b"),
        ("1. One\n   ```python\n   if x:\n       y\n   ```", "if x:\n    y"),
        ("```python\ncut off", "```python\ncut off"),
        ("", ""),
    ],
)
def test_the_program_is_the_last_block_of_python(answer: str, program: str) -> None:
    assert program_in(answer) == program


@given(st.text(alphabet="`\n pyx ", max_size=80))
def test_every_answer_has_a_program(answer: str) -> None:
    assert "```\n" not in program_in(answer) or program_in(answer) == answer


def test_what_is_left_open_is_said_once(caplog: pytest.LogCaptureFixture, closed: list[str]) -> None:
    caplog.set_level(logging.WARNING)
    assert passed("", "pass") == passed("", "pass") == 1
    assert len(caplog.records) == (0 if set(closed) == {"files", "processes"} else 1)


def test_the_solutions_of_human_eval_pass_their_own_examples() -> None:
    """The examples (>>>) of a prompt, made asserts; the 30 first rows that have some."""
    if not HUMAN_EVAL.exists():
        pytest.skip("needs the data folder ../shared/data beside the checkout")
    rows = [json.loads(line) for line in HUMAN_EVAL.read_text(encoding="utf-8").split("\n") if line]
    asked = []
    for row in rows:
        examples = doctest.DocTestParser().get_examples(row["prompt"])
        tests = [f"assert {one.source.strip()} == {one.want.splitlines()[0]}" for one in examples if one.want.strip()]
        answer = f"```python\n{row['prompt']}{row['canonical_solution']}\n```"
        asked += [Answered((), answer, {"tests": tests})] if tests else []
    assert set(scored_by_tests(CodeReward(), asked[:30])) == {1.0}
