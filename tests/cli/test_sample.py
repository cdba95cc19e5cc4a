"""`luthier data sample`: the same words as in recipes, a table of counts, and a file that `luthier sft` trains on."""

import json
from pathlib import Path

import click
import pytest

from luthier.cli.main import main
from luthier.cli.train import command as stage

SAMPLED = ("data", "sample", "--data", "prompts.jsonl", "--num-answers", "4", "--max-new-tokens", "24")


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, speaker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder, with prompts, a reward, and the model `speaker`, which says ab once or several times."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    Path("speaker").symlink_to(speaker)
    rows = [{"prompt": f"What is {i}?", "answer": "abab"} for i in range(3)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("rewards.py").write_text("def score(prompt, answer, row):\n    return float(answer.startswith('ab'))\n")


def ended(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str]:
    """The exit code, and what was printed."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    said = capsys.readouterr()
    return end.value.code, said.out + said.err


def rows() -> list[dict[str, object]]:
    return [json.loads(line) for line in Path("picked.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("reward", [("exact",), ("rewards.py:score",), ("exact", "rewards.py:score")])
def test_the_answers_of_the_best_rewards_are_written_and_counted(
    capsys: pytest.CaptureFixture[str], reward: tuple[str, ...]
) -> None:
    flags = [word for one in reward for word in ("--reward", one)]
    code, said = ended(capsys, *SAMPLED, "--model", "speaker", "--min-reward", "0.5", *flags)
    assert code == 0
    assert rows()
    assert all(list(row) == ["messages", "reward"] and row["reward"] >= 0.5 for row in rows())  # type: ignore[operator]
    lines = {
        cells[0].strip(): cells[1].strip() for line in said.splitlines() if len(cells := line.split("│")[1:-1]) == 2
    }
    assert (lines["prompts"], lines["answers"], lines["scored"], lines["kept"]) == ("3", "12", "12", str(len(rows())))
    dropped = sum(int(count) for name, count in lines.items() if name.startswith("dropped"))
    assert dropped + len(rows()) == 12
    assert float(lines["mean reward, kept"]) >= float(lines["mean reward, all answers"])


def test_what_is_written_is_what_sft_trains_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(capsys, *SAMPLED, "--model", "speaker", "--reward", "rewards.py:score")[0] == 0
    code, _ = ended(
        capsys, "sft", "--model", "speaker", "--data", "picked.jsonl", "--max-steps", "1", "--adapter.r", "2"
    )
    assert code == 0


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--reward", "numerc"], 'unknown type; did you mean "numeric"?'),
        (["--reward", "missing.py:score"], "there is no Python file 'missing.py'"),
        (["--reward", "exact", "--keep", "all"], "--min-reward: keep: all keeps what reaches it"),
        ([], "--reward: is required"),
        (["--reward", "exact", "--output", "rewards.py"], "rewards.py is there already and was not made here"),
        (["--reward", "exact", "--min-reward", "2"], "no answer is kept"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(
    capsys: pytest.CaptureFixture[str], flags: list[str], sentence: str
) -> None:
    code, said = ended(capsys, *SAMPLED, "--model", "speaker", *flags)
    assert code == 1
    assert sentence in said
    assert "Traceback" not in said
    assert not Path("picked.jsonl").exists()


@pytest.mark.parametrize("reward", ["numeric", "rewards.py:score"])
def test_a_policy_stage_takes_a_reward_by_its_type_and_by_its_function(reward: str) -> None:
    context = stage("grpo").make_context("grpo", ["--data", "prompts.jsonl", "--reward", reward])
    assert isinstance(context, click.Context)
    assert context.params["flag_reward"] == (reward,)
