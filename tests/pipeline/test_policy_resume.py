"""A policy stage that was stopped ends as the one that was not, and goes on only as the run that it is."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from luthier.cli.signals import heard
from luthier.errors import CheckpointError
from luthier.pipeline.run import run_recipe
from luthier.recipe.document import Recipe, dump_recipe
from luthier.training.callbacks import Metrics
from luthier.training.stopping import Stop

DRIVER = Path(__file__).with_name("killed_policy.py")
TIMES = {
    "seconds",
    "tokens_per_second",
    "memory_bytes",
    "energy_joules",
    "rollout/seconds",
    "rollout/tokens_per_second",
}

REWARD = """
def score(prompt, answer, row):
    return min(len(answer), 6) * (row["number"] % 3 + 1)
"""

QUICK = "grpo", "ppo"  # whose resume does not wait for the longer proofs
STAGES: dict[str, dict[str, Any]] = {
    "grpo": {"reward": "rewards.py:score", "save_every": 2, "eval_fraction": 0.25, "eval_every": 2},
    "ppo": {"save_every": 1, "minibatches": 2, "rollout_epochs": 2, "value_trunk": "own", "group_size": 2},
    "dapo": {"save_every": 2, "length_margin": 3, "minibatches": 2},
    "rloo": {"save_every": 3, "target_kl": 0.1, "adapter": {"type": "lora", "r": 4, "dropout": 0.2}},
    "reinforce_pp": {"save_every": None, "rollout_epochs": 2, "group_size": 2},
}


class Stopped(Exception):
    """The end of a process, in a test."""


class StopAfter:
    """Ends a run once a step is computed and before it is saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_start(self, step: int, num_steps: int) -> None: ...

    def on_metrics(self, metrics: Metrics) -> None:
        if metrics["step"] == self.step and "loss" in metrics:
            raise Stopped

    def on_end(self) -> None: ...


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with prompts and a reward."""
    rows = [{"prompt": f"What is {i}?", "number": i} for i in range(8)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe_of(word: str, base: Path, output: str = "run", **more: Any) -> Recipe:
    stage = {
        **{"data": "prompts.jsonl", "reward": {"type": "length", "aim": 6}, "max_new_tokens": 8, "batch_size": 2},
        **{"adapter": {"type": "lora", "r": 4}, "learning_rate": 1e-2, "epochs": 9, "max_steps": 5, "group_size": 3},
        **{**STAGES[word], **more},
    }
    return Recipe.model_validate({"model": str(base), "output": output, "dtype": "fp32", "stages": [{word: stage}]})


def stopped(recipe: Recipe, step: int) -> None:
    with pytest.raises(Stopped):
        run_recipe(recipe, listeners=lambda index, stage: [StopAfter(step)])


def left(output: str) -> dict[str, object]:
    """All that decides what comes next or that people read, but for times: by path, bytes or numbers."""
    found: dict[str, object] = {}
    for path in sorted(Path(output).rglob("*")):
        name = str(path.relative_to(output))
        if path.suffix == ".jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
        elif path.name == "rollout.json":
            numbers = json.loads(path.read_text())
            del numbers["sha256"]  # of times too
            numbers["told"] = {key: value for key, value in numbers["told"].items() if key not in TIMES}
            found[name] = numbers
        elif path.suffix == ".safetensors":
            found[name] = path.read_bytes()
    return found


ASKING = """
import os, pathlib, signal

def score(prompt, answer, row):
    stage = pathlib.Path({run!r}) / "stopped" / "00-grpo"
    if len(list(stage.glob("rollouts/*/rollout.json"))) == 2 and not (stage / "asked").exists():
        (stage / "asked").touch()
        os.kill({process}, signal.SIGTERM)
    return min(len(answer), 6) * (row["number"] % 3 + 1)
"""


def test_a_rollout_ends_at_once_where_the_run_is_asked_to_end(place: Path, speaker: Path) -> None:
    """By SIGTERM, while rewards are waited for. What was sampled is kept, and so is the step before, which no setting
    saves; and it goes on to the same end.
    """
    (place / "rewards.py").write_text(ASKING.format(run=str(place), process=os.getpid()))
    less = {"save_every": 4, "eval_every": 4}
    run_recipe(recipe_of("grpo", speaker, "whole", **less))
    stop, recipe, stage = Stop(), recipe_of("grpo", speaker, "stopped", **less), place / "stopped" / "00-grpo"
    with pytest.raises(KeyboardInterrupt), heard(stop) as signals:
        run_recipe(recipe, listeners=lambda index, stage: [stop])
    assert signals.exit_code == 143
    assert (stage / "checkpoints" / "last").readlink() == Path("step-00000002")
    assert list((stage / "rollouts" / "000002").glob("samples-0.jsonl"))
    run_recipe(recipe)
    assert left("stopped") == left("whole")


@pytest.mark.parametrize(
    "word", [word if word in QUICK else pytest.param(word, marks=pytest.mark.slow) for word in STAGES]
)
@pytest.mark.usefixtures("place")
def test_a_run_that_was_stopped_ends_bit_for_bit_as_one_that_was_not(word: str, speaker: Path) -> None:
    """Weights, optimizer, rollouts and metrics; stopped between checkpoints, within a rollout too, and twice."""
    run_recipe(recipe_of(word, speaker, "whole"))
    recipe = recipe_of(word, speaker, "stopped")
    for step in (1, 4):
        stopped(recipe, step)
    run_recipe(recipe)
    whole, resumed = left("whole"), left("stopped")
    assert [name for name in whole if whole[name] != resumed.get(name)] == []
    assert whole.keys() == resumed.keys()
    assert any("batch.safetensors" in name for name in whole)


def test_a_run_does_not_go_on_with_another_reward_or_other_rows(place: Path, speaker: Path) -> None:
    """Stopped after a checkpoint, and once it is done. A column alone changes no prompt, but what it is worth."""
    (place / "held_out.jsonl").write_text(json.dumps({"prompt": "What is 99?", "number": 99}))
    recipe = recipe_of("grpo", speaker, eval_data="held_out.jsonl", eval_fraction=0.0)
    changes = [
        ("rewards.py", "6", "5"),
        ("prompts.jsonl", '"number": 7', '"number": 8'),
        ("prompts.jsonl", "is 7", "was 7"),
        ("held_out.jsonl", '"number": 99', '"number": 98'),
    ]
    stopped(recipe, 3)
    kept = left("run")
    for done in (False, True):
        for file, old, new in changes:
            text = (place / file).read_text()
            (place / file).write_text(text.replace(old, new))
            reason = f"{file} changed since then" if done else "was made with other settings, data or model"
            with pytest.raises(CheckpointError, match=reason):
                run_recipe(recipe)
            (place / file).write_text(text)
            assert done or left("run") == kept
        run_recipe(recipe)


def test_what_was_sampled_before_any_checkpoint_is_forgotten_where_the_reward_has_changed(
    place: Path, speaker: Path
) -> None:
    recipe = recipe_of("grpo", speaker, save_every=None, eval_fraction=0.0, eval_every=None)
    stopped(recipe, 2)
    (place / "rewards.py").write_text(REWARD.replace("return", "return 100 +"))
    run_recipe(recipe)
    rows = (place / "run/00-grpo/rollouts/000000/answers.jsonl").read_text().splitlines()
    assert all(json.loads(row)["reward"] > 100 for row in rows)


def test_a_run_that_begins_anew_takes_nothing_from_the_one_before(place: Path, speaker: Path) -> None:
    run_recipe(recipe_of("grpo", speaker))
    (place / "rewards.py").write_text(REWARD.replace("return", "return 100 +"))
    run_recipe(recipe_of("grpo", speaker, resume=False))
    run_recipe(recipe_of("grpo", speaker, "fresh"))
    begun_anew, fresh = left("run"), left("fresh")
    assert [name for name in fresh if fresh[name] != begun_anew.get(name)] == []


@pytest.mark.slow
@pytest.mark.parametrize("word", ["ppo", "dapo"])
def test_a_run_killed_at_its_writes_ends_as_the_one_that_was_left_alone(word: str, place: Path, speaker: Path) -> None:
    """Every eleventh file that is opened, made, renamed or removed, so within samples, answers and batches too."""
    recipe = recipe_of(word, speaker, data=str(place / "prompts.jsonl"), reward={"type": "length", "aim": 6})
    (place / "recipe.yaml").write_text(dump_recipe(recipe))
    command = [sys.executable, str(DRIVER), str(place / "recipe.yaml"), "11", "3"]
    environment = {**os.environ, "LUTHIER_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert {"rollout", "learning"} <= json.loads(done.stdout).keys()
