"""What was sampled and scored is read back, and nobody's output or answers become another run's."""

from pathlib import Path

import pytest

from luthier.errors import CheckpointError, RecipeError
from luthier.pipeline.sample_files import Answer, SampleFiles
from luthier.rollout.scoring import Failure

ANSWERS, REWARDS, CHOICE = {"seed": 1}, {"reward": ["numeric"]}, {"keep": "best"}
SAID = (Answer("a \u2028 b", True), Answer("c\nd", False))


@pytest.fixture
def files(tmp_path: Path) -> SampleFiles:
    """Of a run that has answers and rewards, and no output yet."""
    files = SampleFiles(tmp_path / "out" / "picked.jsonl")
    files.claim(ANSWERS, REWARDS, CHOICE)
    files.keep_answers({0: SAID, 2: SAID[:1]})
    files.keep_rewards({0: [1.0, Failure("raised ValueError")], 2: [0.5]})
    return files


def test_answers_and_rewards_are_read_back_and_what_failed_has_none(files: SampleFiles) -> None:
    assert files.answers() == {0: SAID, 2: SAID[:1]}
    assert files.rewards() == {0: [1.0, None], 2: [0.5]}


def test_what_is_written_later_counts_and_loses_nothing(files: SampleFiles) -> None:
    files.keep_answers({1: SAID})
    files.keep_rewards({0: [1.0, 0.25]})
    assert files.answers() == {0: SAID, 1: SAID, 2: SAID[:1]}
    assert files.rewards() == {0: [1.0, 0.25], 2: [0.5]}


def test_the_same_run_goes_on_with_and_without_its_output(files: SampleFiles) -> None:
    files.claim(ANSWERS, REWARDS, CHOICE)
    files.output.write_text("{}\n")
    files.claim(ANSWERS, REWARDS, CHOICE)
    assert files.rewards() == {0: [1.0, None], 2: [0.5]}


def test_an_output_of_another_run_is_refused_with_what_differs(files: SampleFiles) -> None:
    files.output.write_text("{}\n")
    for answers, rewards, choice, name in (
        ({"seed": 2}, REWARDS, CHOICE, "seed"),
        (ANSWERS, {"reward": ["exact"]}, CHOICE, "reward"),
        (ANSWERS, REWARDS, {"keep": "all"}, "keep"),
    ):
        with pytest.raises(CheckpointError, match=rf"is another run's \({name}\); move it away"):
            files.claim(answers, rewards, choice)
    assert files.answers() == {0: SAID, 2: SAID[:1]}


def test_a_file_that_was_not_made_here_is_refused(tmp_path: Path) -> None:
    files = SampleFiles(tmp_path / "rows.jsonl")
    files.output.write_text("{}\n")
    with pytest.raises(CheckpointError, match="was not made here"):
        files.claim(ANSWERS, REWARDS, CHOICE)
    assert not files.folder.exists()


def test_without_an_output_answers_serve_another_choice_and_another_reward(files: SampleFiles) -> None:
    files.claim(ANSWERS, REWARDS, {"keep": "all"})
    assert files.rewards() == {0: [1.0, None], 2: [0.5]}
    files.claim(ANSWERS, {"reward": ["exact"]}, CHOICE)
    assert (files.answers(), files.rewards()) == ({0: SAID, 2: SAID[:1]}, {})


def test_answers_that_another_run_sampled_are_refused_and_stay(files: SampleFiles) -> None:
    with pytest.raises(CheckpointError, match=r"another run's answers \(seed\)"):
        files.claim({"seed": 2}, REWARDS, CHOICE)
    assert files.answers() == {0: SAID, 2: SAID[:1]}


def test_a_place_that_cannot_be_written_is_said_before_anything_is_sampled(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="cannot be used"):
        SampleFiles(tmp_path / "file" / "picked.jsonl").claim(ANSWERS, REWARDS, CHOICE)
