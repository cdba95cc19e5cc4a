"""A recipe of two stages that is killed at any moment and run again ends, byte for byte, as one that was left alone."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("killed_recipe.py")

RECIPE = """\
model: {model}
output: run
dtype: fp32
stages:
  - pretrain: {{data: {folder}/text.jsonl, max_length: 32, batch_size: 4, epochs: {epochs}, learning_rate: 0.01,
      eval_fraction: 0.2, eval_every: 2, save_every: 2, adapter: {{r: 4, dropout: 0.1}}}}
  - sft: {{data: {folder}/rows.jsonl, batch_size: 4, epochs: {epochs}, learning_rate: 0.01,
      eval_fraction: 0.25, eval_every: 2, save_every: 1, adapter: {{r: 4, dropout: 0.1}}}}
"""

Kill = Callable[..., dict[str, int]]


@pytest.fixture
def kill(chat_model: Path, tmp_path: Path) -> Kill:
    def kill(how: str, number: int, seed: int, *, epochs: int = 2) -> dict[str, int]:
        """Runs the driver, which compares; returns how many kills fell into each phase of the run."""
        texts = [json.dumps({"text": f"{i} and {i} is {i + i}. " * 5}) for i in range(12)]
        rows = [json.dumps({"question": f"{i}?", "answer": f"{i}{i}."}) for i in range(24)]
        for name, lines in {"text.jsonl": texts, "rows.jsonl": rows}.items():
            (tmp_path / name).write_text("\n".join(lines))
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(RECIPE.format(model=chat_model, folder=tmp_path, epochs=epochs))
        command = [sys.executable, str(DRIVER), str(recipe), how, str(number), str(seed)]
        environment = {**os.environ, "LUTHIER_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return kill


def test_a_recipe_killed_at_random_moments_ends_as_the_one_that_was_left_alone(kill: Kill) -> None:
    assert sum(kill("fork", 1, 0).values()) == 1


@pytest.mark.slow
def test_a_recipe_killed_twenty_times_ends_as_the_one_that_was_left_alone(kill: Kill) -> None:
    """The kills lie in both stages."""
    phases = kill("fork", 20, 0, epochs=8)
    assert sum(phases.values()) == 20
    assert {"first stage", "second stage"} <= phases.keys()


@pytest.mark.slow
def test_a_recipe_that_is_asked_to_end_ends_as_the_one_that_was_left_alone(kill: Kill) -> None:
    """SIGTERM; also no checkpoint is left that the other one has not."""
    assert sum(kill("term", 1, 0).values()) == 1


@pytest.mark.slow
def test_a_recipe_that_is_asked_twenty_times_to_end_ends_as_the_one_that_was_left_alone(kill: Kill) -> None:
    phases = kill("term", 20, 1, epochs=8)
    assert sum(phases.values()) == 20
    assert {"first stage", "second stage"} <= phases.keys()


@pytest.mark.slow
def test_a_command_killed_at_random_moments_ends_as_the_one_that_was_left_alone(kill: Kill) -> None:
    """Real processes, from their imports on."""
    assert sum(kill("spawn", 4, 0).values()) == 4


@pytest.mark.slow
def test_a_recipe_killed_at_its_writes_ends_as_the_one_that_was_left_alone(kill: Kill) -> None:
    """Every third file that is opened, made, renamed or removed, so also in the moments that time hardly ever meets."""
    assert kill("writes", 3, 1).keys() == {"first stage", "hand-over", "second stage", "model", "report"}
