"""What a user sees who presses Ctrl-C, or whose machine sends SIGTERM: one sentence, soon, and nothing is lost."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from luthier.cli import main as cli
from luthier.cli.progress import Screen
from luthier.cli.run import _listeners
from luthier.cli.signals import heard
from luthier.errors import LuthierError
from luthier.training.stopping import Stop, Stopped

Start = Callable[..., subprocess.Popen[str]]

SFT = "sft: {data: rows.jsonl, batch_size: 4, epochs: 9999, save_every: 5000, adapter: {r: 2}}"
JUDGED = """\
iterative_dpo: {{data: prompts.jsonl, rounds: 1, prompts_per_round: 4, eval_prompts: 2, max_new_tokens: 12,
      judge: {{type: endpoint, url: "{url}", model: judge, timeout_seconds: 300}}, adapter: {{r: 2}}}}"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, columns in {"rows.jsonl": ("question", "answer"), "prompts.jsonl": ("prompt",)}.items():
        rows = [json.dumps(dict.fromkeys(columns, f"{i}{i}?")) for i in range(24)]
        Path(name).write_text("\n".join(rows))
    return tmp_path


def recipe_of(model: Path, stage: str) -> str:
    Path("recipe.yaml").write_text(f"model: {model}\noutput: run\ndtype: fp32\nstages:\n  - {stage}\n")
    return "recipe.yaml"


def wait_for(is_there: Callable[[], Any], run: subprocess.Popen[str]) -> None:
    while not is_there():
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.02)


def steps_of(metrics: Path) -> int:
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


@pytest.mark.parametrize(
    ("sent", "code", "how"),
    [
        (signal.SIGTERM, 143, "ended by SIGTERM"),
        pytest.param(signal.SIGINT, 130, "interrupted", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_a_run_after_its_step_in_one_sentence(
    sent: signal.Signals, code: int, how: str, place: Path, chat_model: Path, started: Start
) -> None:
    run, stage = started("run", recipe_of(chat_model, SFT)), place / "run" / "00-sft"
    wait_for(lambda: steps_of(stage / "metrics.jsonl") >= 2, run)
    run.send_signal(sent)
    asked = time.monotonic()
    _, error = run.communicate(timeout=60)
    assert time.monotonic() - asked < 10
    assert run.returncode == code
    assert "Traceback" not in error
    assert error.splitlines()[-1] == f"luthier: {how}; run the same command again to go on"
    saved = json.loads((stage / "checkpoints" / "last" / "progress.json").read_text())["progress"]["step"]
    assert saved == steps_of(stage / "metrics.jsonl") >= 2


@pytest.mark.slow
def test_a_signal_ends_a_run_that_waits_for_a_judge(
    place: Path, speaker: Path, started: Start, serve: Callable[..., Any], answer: Any
) -> None:
    """Whose server takes its time, and keeps the reply open."""
    server = serve(lambda request: answer([b"{"], pause_seconds=300.0))
    run = started("run", recipe_of(speaker, JUDGED.format(url=server.url)))
    wait_for(lambda: server.requests, run)
    run.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    _, error = run.communicate(timeout=60)
    assert time.monotonic() - asked < 10
    assert run.returncode == 143
    assert error.splitlines()[-1] == "luthier: ended by SIGTERM; run the same command again to go on"


def test_a_second_signal_ends_at_once() -> None:
    """SIGTERM as the system ends a process, Ctrl-C as Python does."""
    stop, ended = Stop(), False
    with heard(stop) as signals, suppress(Stopped), stop.held():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            ended = True
    assert ended
    assert signals.exit_code == 143


@pytest.mark.parametrize("error", [ValueError, LuthierError])
def test_an_interruption_that_a_library_takes_for_an_error_is_one(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """PyTorch does so where the signal comes while it asks for the length of a storage."""

    def run(*given: object, obj: Stop, **options: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Stopped:
            raise error("could not determine the shape of object type 'torch.storage.UntypedStorage'") from None

    monkeypatch.setattr(cli, "luthier", SimpleNamespace(main=run))
    with pytest.raises(SystemExit) as ended:
        cli.main(["run"])
    assert ended.value.code == 143
    assert capsys.readouterr().err.splitlines()[-1] == "luthier: ended by SIGTERM; run the same command again to go on"


def test_what_listened_before_listens_afterwards_and_what_was_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with heard(Stop()):
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    with pytest.raises(Stopped), heard(Stop()):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_another_thread_than_the_main_one_can_run_commands() -> None:
    found: list[int] = []

    def listen() -> None:
        with heard(Stop()) as signals:
            found.append(signals.exit_code)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [130]


def test_a_script_may_show_a_run_without_a_command() -> None:
    """As the demo does: nobody listens to signals there, and the run has somebody to ask all the same."""
    screen, stop = _listeners(Console())(0, SimpleNamespace(word="sft"))  # type: ignore[arg-type]
    assert isinstance(screen, Screen)
    assert isinstance(stop, Stop)
