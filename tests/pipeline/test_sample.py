"""Examples made by sampling: sft learns from what was best, nothing is lost or sampled twice, all is counted."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import luthier as lt
from luthier.data.examples import Chat
from luthier.data.reading import read_examples
from luthier.errors import CheckpointError, DataError, RecipeError, TrainingError
from luthier.recipe.rewards import LengthReward
from luthier.recipe.sampling import AnswerSampling

Prompt = list[dict[str, Any]]
GIVEN: dict[str, Any] = {"data": "prompts.jsonl", "num_answers": 4, "max_new_tokens": 24, "batch_size": 2}
NUM_PROMPTS = 5


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With prompts that have a number."""
    monkeypatch.chdir(tmp_path)
    write("prompts.jsonl", [{"prompt": f"What is {i}?", "number": i} for i in range(NUM_PROMPTS)])


def write(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(name: str = "picked.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def kept_beside(kind: str, name: str = "picked.jsonl") -> dict[int, Any]:
    """By the prompt's place what the folder beside the output says."""
    files = sorted(Path(f"{name}.sampled").glob(f"{kind}-*.jsonl"))
    return {row["prompt"]: row[kind] for file in files for row in rows_of(str(file))}


def shorter(prompt: Prompt, answer: str, row: dict[str, Any]) -> float:
    return -float(len(answer))


def shorter_than_a_page(prompt: Prompt, answer: str, row: dict[str, Any]) -> float:
    return float(len(answer) < 100)


def stopped_at_three(prompt: Prompt, answer: str, row: dict[str, Any]) -> float:
    if row["number"] == 3 and Path("stop").exists():
        raise KeyboardInterrupt
    return -float(len(answer))


def down_for_odd(prompt: Prompt, answer: str, row: dict[str, Any]) -> float:
    if row["number"] % 2 and not Path("up").exists():
        raise ConnectionError("down")
    return -float(len(answer))


def down(prompt: Prompt, answer: str, row: dict[str, Any]) -> float:
    raise ConnectionError("down")


def test_the_best_answer_to_each_prompt_is_a_row_of_messages(speaker: Path) -> None:
    counts = lt.sample(str(speaker), reward=shorter, keep_truncated=True, **GIVEN)
    answers, rewards = kept_beside("answers"), kept_beside("rewards")
    for place, row in enumerate(rows_of()):
        best = rewards[place].index(max(score for score in rewards[place] if score < 0))  # 0 is an empty answer's
        assert row["messages"][0] == {"role": "user", "content": f"What is {place}?"}
        assert row["messages"][1] == {"role": "assistant", "content": answers[place][best][0]}
        assert row["reward"] == -len(row["messages"][1]["content"]) == rewards[place][best]
    assert (counts.prompts, counts.answers, counts.scored, counts.kept) == (NUM_PROMPTS, 20, 20, NUM_PROMPTS)
    assert counts.kept + sum(counts.dropped.values()) == counts.scored
    assert counts.mean_kept_reward == pytest.approx(sum(row["reward"] for row in rows_of()) / NUM_PROMPTS)
    assert counts.mean_kept_reward > counts.mean_reward


def test_all_that_reach_the_reward_are_kept_and_none_that_was_cut_off(speaker: Path) -> None:
    counts = lt.sample(str(speaker), reward=shorter, keep="all", min_reward=-2, **GIVEN | {"max_new_tokens": 6})
    said = [(place, text, whole) for place, some in kept_beside("answers").items() for text, whole in some]
    good = {(place, text) for place, text, whole in said if whole and 0 < len(text) <= 2}
    rows = [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in rows_of()]
    assert sorted(rows) == sorted((f"What is {place}?", text) for place, text in good)
    assert counts.kept == len(good)
    assert counts.dropped.keys() >= {"below min_reward", "cut off at max_new_tokens"}


def test_sft_reads_what_is_written_and_learns_from_it(speaker: Path) -> None:
    write("prompts.jsonl", [{"prompt": "Why?", "system": "Be brief.", "number": 0}])
    lt.sample(str(speaker), reward=shorter, **GIVEN)
    ((_, chat),) = read_examples("picked.jsonl").examples
    assert isinstance(chat, Chat)
    assert [message.role for message in chat.messages] == ["system", "user", "assistant"]
    summary = lt.sft(lt.load(str(speaker)), data="picked.jsonl", max_steps=1, adapter=lt.LoRA(r=2))
    assert summary.steps == 1


def test_an_interrupted_run_goes_on_to_the_same_output_and_samples_nothing_twice(speaker: Path) -> None:
    lt.sample(str(speaker), reward=stopped_at_three, output="whole.jsonl", **GIVEN)
    Path("stop").touch()
    with pytest.raises(KeyboardInterrupt):
        lt.sample(str(speaker), reward=stopped_at_three, **GIVEN)
    assert not Path("picked.jsonl").exists()
    written = {file: file.read_bytes() for file in Path("picked.jsonl.sampled").glob("*-*.jsonl")}
    assert sorted(kept_beside("answers")) == [0, 1, 2, 3]
    assert sorted(kept_beside("rewards")) == [0, 1]
    Path("stop").unlink()
    lt.sample(str(speaker), reward=stopped_at_three, **GIVEN)
    assert Path("picked.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert {file: file.read_bytes() for file in written} == written
    assert kept_beside("answers") == kept_beside("answers", "whole.jsonl")


def test_answers_that_are_kept_are_taken_as_they_were(speaker: Path) -> None:
    """One that no model has said shows where the answers come from."""
    lt.sample(str(speaker), reward=shorter, **GIVEN)
    file = Path("picked.jsonl.sampled/answers-000000.jsonl")
    file.write_text(json.dumps({"prompt": 0, "answers": [["edited", True]] * 4}) + "\n")
    (file.parent / "rewards-000000.jsonl").unlink()
    Path("picked.jsonl").unlink()
    lt.sample(str(speaker), reward=shorter, **GIVEN)
    assert rows_of()[0]["messages"][1]["content"] == "edited"


def test_an_output_of_another_run_is_refused_and_stays(speaker: Path) -> None:
    lt.sample(str(speaker), reward=shorter, **GIVEN)
    before = Path("picked.jsonl").read_bytes()
    for more, name in (({"seed": 1}, "seed"), ({"min_reward": -2}, "min_reward"), ({"reward": down_for_odd}, "reward")):
        with pytest.raises(CheckpointError, match=rf"another run's \({name}\)"):
            lt.sample(str(speaker), **{"reward": shorter, **GIVEN, **more})
    write("prompts.jsonl", [{"prompt": "Another?", "number": 1}])
    with pytest.raises(CheckpointError, match="data"):
        lt.sample(str(speaker), reward=shorter, **GIVEN)
    assert Path("picked.jsonl").read_bytes() == before


def test_what_has_no_reward_is_counted_and_scored_by_the_same_command_later(speaker: Path) -> None:
    first = lt.sample(str(speaker), reward=down_for_odd, **GIVEN)
    reason = "down_for_odd: raised ConnectionError"
    assert (first.answers, first.scored, first.failed) == (20, 12, {reason: 8})
    Path("up").touch()
    second = lt.sample(str(speaker), reward=down_for_odd, **GIVEN)
    assert (second.answers, second.scored, second.failed) == (20, 20, {})
    lt.sample(str(speaker), reward=shorter, output="whole.jsonl", **GIVEN)
    assert rows_of() == rows_of("whole.jsonl")


def test_a_reward_that_never_gives_a_number_ends_the_run_and_its_answers_serve_another(speaker: Path) -> None:
    with pytest.raises(TrainingError, match=r"no answer could be scored \(down: raised ConnectionError 8\)"):
        lt.sample(str(speaker), reward=down, **GIVEN)
    file = Path("picked.jsonl.sampled/answers-000000.jsonl")
    stamp = file.stat().st_mtime_ns
    counts = lt.sample(str(speaker), reward=shorter, **GIVEN)
    assert (counts.scored, file.stat().st_mtime_ns) == (20, stamp)


def test_where_nothing_is_kept_there_is_no_output_and_another_choice_samples_nothing(speaker: Path) -> None:
    with pytest.raises(TrainingError, match=r"no answer is kept \(.*below min_reward"):
        lt.sample(str(speaker), reward=shorter, min_reward=1, **GIVEN)
    assert not Path("picked.jsonl").exists()
    before = kept_beside("answers")
    lt.sample(str(speaker), reward=shorter, **GIVEN)
    assert kept_beside("answers") == before


def test_bad_rows_repeated_prompts_and_prompts_that_leave_no_room_are_counted(speaker: Path) -> None:
    """The tiny model's context is 2,048 tokens, and its tokens are bytes."""
    prompts = [{"prompt": "Why?"}, {"prompt": ""}, {"prompt": "Why?"}, {"prompt": "Why? " * 500}, {"prompt": "How?"}]
    write("prompts.jsonl", prompts)
    counts = lt.sample(str(speaker), reward=shorter, on_error="skip", **GIVEN)
    assert (counts.bad_rows, counts.repeated, counts.prompts) == (1, 1, 3)
    assert counts.unanswered == {"prompt too long": 1}
    assert counts.answers == 8
    assert [row["line"] for row in rows_of("picked.jsonl.sampled/quarantine.jsonl")] == [2]
    with pytest.raises(DataError, match=r"prompts.jsonl:2"):
        lt.sample(str(speaker), reward=shorter, **GIVEN)


def test_a_model_in_memory_answers_as_the_one_of_its_name(speaker: Path) -> None:
    named = lt.sample(str(speaker), reward=shorter, dtype="fp32", output=Path("named.jsonl"), **GIVEN)
    assert lt.sample(lt.load(str(speaker)), reward=shorter, **GIVEN) == named
    assert rows_of() == rows_of("named.jsonl")


@pytest.mark.parametrize(
    ("reward", "parts"),
    [
        ("rewards.py:shorter", 1),
        ({"type": "regex", "pattern": "(?s).", "weight": 2}, 2),
        (LengthReward(maximum=100), 1),
        ([shorter_than_a_page, "rewards.py:shorter", {"type": "length", "maximum": 100}], 3),
    ],
)
def test_a_reward_is_what_a_recipe_says_a_function_or_several(speaker: Path, reward: Any, parts: int) -> None:
    """Each part is worth its weight for an answer that is not empty and short."""
    Path("rewards.py").write_text("def shorter(prompt, answer, row):\n    return float(len(answer) < 100)\n")
    lt.sample(str(speaker), reward=reward, **GIVEN)
    assert {row["reward"] for row in rows_of()} == {parts}


def test_a_model_is_another_with_its_adapter(speaker: Path) -> None:
    model = lt.load(str(speaker))
    lt.sample(model, reward=shorter, **GIVEN)
    lt.add_adapter(model, lt.LoRA(r=2))
    with pytest.raises(CheckpointError, match=r"\(model\)"):
        lt.sample(model, reward=shorter, **GIVEN)
    with pytest.raises(RecipeError, match="in memory in fp32"):
        lt.sample(model, reward=shorter, dtype="bf16", **GIVEN)


def completions(answer: Any, *texts: str) -> Any:
    choices = [{"index": i, "text": text, "finish_reason": "stop"} for i, text in enumerate(texts)]
    return answer([json.dumps({"choices": choices}).encode()])


def test_a_server_answers_and_its_texts_are_the_rows(speaker: Path, serve: Callable[..., Any], answer: Any) -> None:
    server = serve(lambda request: completions(answer, *(["long answer", "short"] * 2)[: request["n"]]))
    asked = {"url": server.url, "model": "m", "kind": "openai"}
    lt.sample(str(speaker), reward=shorter, server=asked, **GIVEN)
    assert [row["messages"][1]["content"] for row in rows_of()] == ["short"] * NUM_PROMPTS


def test_a_server_that_falls_silent_ends_the_run_which_goes_on_when_it_is_back(
    speaker: Path, serve: Callable[..., Any], answer: Any
) -> None:
    """It answers the first batch of two prompts, and then nothing until it is back."""
    alive = [True] * 2

    def play(request: dict[str, Any]) -> Any:
        here = Path("back").exists() or (alive and alive.pop())
        return completions(answer, *["fine"] * request["n"]) if here else answer([b""], dropped=True)

    asked = {"url": serve(play).url, "model": "m", "kind": "openai", "retries": 0}
    with pytest.raises(TrainingError, match=r"the server gives no answer \(no connection 2\)"):
        lt.sample(str(speaker), reward=shorter, server=asked, **GIVEN)
    assert sorted(kept_beside("answers")) == [0, 1]
    Path("back").touch()
    assert lt.sample(str(speaker), reward=shorter, server=asked, **GIVEN).kept == NUM_PROMPTS


def test_python_shows_every_setting_of_sampling() -> None:
    shown = inspect.signature(lt.sample).parameters
    assert set(shown) == AnswerSampling.model_fields.keys() - {"dtype"}
    assert shown["num_answers"].default == 8
    assert all(f"\n{name}: " in (lt.sample.__doc__ or "") for name in shown)
