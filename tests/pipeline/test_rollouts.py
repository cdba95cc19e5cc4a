"""Rollouts: what is asked, scored and learned from, what fails alone, and what an interruption leaves to go on with."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from luthier.data.sequences import TokenGroup, sequences_of
from luthier.errors import CheckpointError, TrainingError
from luthier.models.load import load
from luthier.objectives.advantages import adapted_kl_weight
from luthier.pipeline.prepare import prepare_data, prepare_network
from luthier.pipeline.prompts import PreparedPrompts
from luthier.pipeline.rollout_files import RolloutFiles, Sampled, claim_rollouts
from luthier.pipeline.rollouts import RolloutPlan
from luthier.recipe.settings import settings_from
from luthier.recipe.stages import STAGE_SETTINGS
from luthier.rollout.engine import LocalEngine
from luthier.rollout.requests import Engine, Request, Sample, Sampling
from luthier.rollout.rewards import Part, Rewarder
from luthier.rollout.scoring import Answered, Failure, Score
from luthier.training.room import Room
from luthier.training.state import Progress

Scoring = Callable[[Answered], Score]
Planner = Callable[..., RolloutPlan]


def by_length(one: Answered) -> float:
    return float(len(one.answer))


def of_odd_prompts(one: Answered) -> float:
    """Which differs for prompts of odd numbers alone."""
    return by_length(one) * (one.row["number"] % 2)


@dataclass
class Speaker:
    """Answers with 1, 2, ... letters and an end, `count` answers to each prompt; keeps what it was asked."""

    end: int
    failing: frozenset[int] = frozenset()  # places of requests in a call
    letters: Sequence[int] | None = None
    asked: list[list[Request]] = field(default_factory=list)

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> list[tuple[Sample, ...] | Failure]:
        self.asked.append(list(requests))
        answers = [tuple(self.answer(i, sampling.max_new_tokens) for i in range(r.count)) for r in requests]
        return [Failure("timed out", "9 s") if i in self.failing else one for i, one in enumerate(answers)]

    def answer(self, number: int, most: int) -> Sample:
        length = number + 1 if self.letters is None else self.letters[number]
        ids = np.array([64 + number] * length + [self.end], dtype=np.int32)[:most]
        return Sample(ids, np.full(len(ids), -1.5, dtype=np.float32), "x" * length, finished=length < most)


class Silent:
    """An engine that must not be asked."""

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> list[tuple[Sample, ...] | Failure]:
        raise AssertionError("everything was sampled before")


@pytest.fixture
def plan(chat_model: Path, tmp_path: Path) -> Callable[..., RolloutPlan]:
    """Makes the plan of a stage in the folder `stage`, on ten prompts."""
    rows = [{"prompt": f"What is {i}?", "number": i} for i in range(10)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def plan(
        word: str = "grpo",
        scoring: Scoring = by_length,
        *,
        engine: Engine | None = None,
        oldest_step: Callable[[], int] = lambda: 0,
        **more: Any,
    ) -> RolloutPlan:
        usual = {"model": str(chat_model), "data": str(tmp_path / "prompts.jsonl"), "reward": "exact", "dtype": "fp32"}
        small = {"batch_size": 2, "group_size": 3, "max_new_tokens": 8, "epochs": 9, "seed": 3, "adapter": {"r": 4}}
        settings: Any = settings_from(STAGE_SETTINGS[word], {**usual, **small, **more})
        model = load(settings.model)
        prepared = prepare_data(settings, model, tmp_path / "stage")
        assert isinstance(prepared, PreparedPrompts)
        prepare_network(settings, model)
        rewarder = Rewarder([Part("score", 1.0, lambda answered: [scoring(one) for one in answered])])
        return RolloutPlan(
            *(settings, prepared, model, tmp_path / "stage"),
            engine=engine or Speaker(model.tokenizer.eos_token_id),
            rewarder=rewarder,
            room=Room(settings, 10**6, Progress),
            oldest_step=oldest_step,
        )

    return plan


def groups_of(plan: RolloutPlan, step: int = 0) -> list[TokenGroup]:
    return [item for item in plan.step(step) if isinstance(item, TokenGroup)]


def folder_of(plan: RolloutPlan, number: int = 0) -> Path:
    return plan.folder / "rollouts" / f"{number:06d}"


def read_answers(plan: RolloutPlan, number: int = 0) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder_of(plan, number) / "answers.jsonl").read_text().splitlines()]


def numbers_of(rows: Sequence[dict[str, Any]]) -> list[int]:
    """The numbers of the prompts, in order, each once."""
    return list(dict.fromkeys(int(row["prompt"].split()[-1].rstrip("?")) for row in rows))


def as_values(groups: Sequence[TokenGroup]) -> list[tuple[list[int], dict[str, list[float]]]]:
    return [
        (one.token_ids.tolist(), {name: c.tolist() for name, c in one.columns.items()}) for one in sequences_of(groups)
    ]


def test_every_answer_stands_in_a_file_for_people(plan: Planner) -> None:
    made = plan()
    groups = groups_of(made)
    rows = read_answers(made)
    assert len(rows) == sum(len(group.sequences) for group in groups) == 6
    assert [row["answer"] for row in rows] == ["x", "xx", "xxx"] * 2
    assert [row["reward"] for row in rows] == [1, 2, 3] * 2
    assert all(row["parts"] == {"score": row["reward"]} and row["finished"] and row["learned_from"] for row in rows)
    assert all(row["tokens"] == row["reward"] + 1 and "prompts.jsonl:" in row["from"] for row in rows)


def test_an_epoch_asks_every_prompt_once_and_the_next_in_another_order(plan: Planner) -> None:
    made = plan()
    orders: list[list[int]] = [[], []]
    for step in range(2 * made.steps_per_epoch):
        made.step(step)
        orders[step // made.steps_per_epoch] += numbers_of(read_answers(made, step))
    assert made.num_steps == 9 * made.steps_per_epoch == 45
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(10))
    assert orders[0] != orders[1]


def test_minibatches_part_a_rollout_and_epochs_repeat_it_in_another_order(plan: Planner) -> None:
    made = plan(minibatches=2, rollout_epochs=3)
    steps = [{group.sequences[0].token_ids.tobytes() for group in groups_of(made, step)} for step in range(6)]
    for one, other in ((0, 1), (2, 3), (4, 5)):
        assert not steps[one] & steps[other]
        assert steps[one] | steps[other] == steps[0] | steps[1]
    assert len({frozenset(step) for step in steps}) > 2


def test_groups_without_signal_are_replaced_by_other_prompts(plan: Planner) -> None:
    """Told and written is every answer; learned from are those of prompts that differ."""
    made = plan("dapo", of_odd_prompts, batch_size=4)
    groups, rows, told = groups_of(made), read_answers(made), made.told(0)
    asked = numbers_of(rows)
    assert len(groups) == 4
    assert numbers_of([row for row in rows if row["learned_from"]]) == [n for n in asked if n % 2]
    assert told["frac_reward_zero_std"] == pytest.approx(sum(n % 2 == 0 for n in asked) / len(asked))
    assert told["reward"] == pytest.approx(np.mean([row["reward"] for row in rows]))
    made.step(1)
    following = numbers_of(read_answers(made, 1))
    assert not set(asked) & set(following[: 10 - len(asked)])


def test_where_no_group_has_signal_sampling_ends_and_says_so(plan: Planner, caplog: pytest.LogCaptureFixture) -> None:
    engine = Speaker(257)
    made = plan("dapo", lambda one: 1.0, engine=engine, max_resampling=2)
    groups = groups_of(made)
    assert [len(requests) for requests in engine.asked] == [2, 2, 2]
    assert "teaches nothing" in caplog.text
    assert len(groups) == 6
    assert all((one.columns["advantages"] == 0).all() for one in sequences_of(groups))


def test_an_answer_that_was_cut_off_is_masked_where_asked(plan: Planner) -> None:
    engine = Speaker(257, letters=[2, 9, 3])
    for masked in (True, False):
        made = plan(engine=engine, mask_truncated=masked, seed=4 + masked)
        claim_rollouts(made.folder, str(masked), anew=True)
        learned = [one.num_trained for one in sequences_of(groups_of(made))]
        assert learned == [3, 0 if masked else 8, 4] * 2
        assert [row["learned_from"] for row in read_answers(made)] == [True, not masked, True] * 2
        assert made.told(0)["completions/clipped_ratio"] == pytest.approx(1 / 3)


def test_the_length_penalty_is_that_of_dapo(plan: Planner) -> None:
    """eq. 13 with 8 tokens at most, of which 4 are the margin: answers of 3, 6, 8 tokens lose 0, 1/2 and 1."""
    made = plan(scoring=lambda one: 5.0, engine=Speaker(257, letters=[2, 5, 9]), length_margin=4)
    made.step(0)
    assert [row["reward"] for row in read_answers(made)] == [5, 4.5, 4] * 2
    assert made.told(0)["rewards/length_penalty/mean"] == -0.5


def test_an_answer_without_a_reward_is_left_out_of_its_group_alone(
    plan: Planner, caplog: pytest.LogCaptureFixture
) -> None:
    """Rewards 1 and 3 are left: their mean is 2 and their deviation sqrt(2)."""
    made = plan(scoring=lambda one: Failure("returned nan") if len(one.answer) == 2 else by_length(one))
    sequences = sequences_of(groups_of(made))
    assert [float(one.columns["advantages"][0]) for one in sequences] == pytest.approx(
        [-1 / (2**0.5 + 1e-4), 1 / (2**0.5 + 1e-4)] * 2
    )
    assert made.told(0)["rewards/failed"] == pytest.approx(1 / 3)
    assert "2 of 6 answers have no reward: score: returned nan 2" in caplog.text
    failed = [row for row in read_answers(made) if row["reward"] is None]
    assert [(row["parts"]["score"], row["learned_from"]) for row in failed] == [("returned nan: ", False)] * 2


def test_where_no_answer_has_a_reward_the_run_stops_and_keeps_what_was_sampled(plan: Planner) -> None:
    with pytest.raises(TrainingError, match=r"no answer could be scored \(score: raised KeyError 6\)"):
        plan(scoring=lambda one: Failure("raised KeyError")).step(0)
    mended = plan(engine=Silent())
    assert len(groups_of(mended)) == 2


def test_a_prompt_without_answers_is_told_and_the_others_teach(plan: Planner, caplog: pytest.LogCaptureFixture) -> None:
    made = plan(engine=Speaker(257, failing=frozenset([1])), batch_size=4)
    assert len(groups_of(made)) == 3
    assert made.told(0)["rollout/failed"] == 0.25
    assert "1 of 4 prompts have no answers: timed out 1" in caplog.text


def test_where_no_prompt_is_answered_the_run_stops_and_asks_again_when_it_goes_on(plan: Planner) -> None:
    with pytest.raises(TrainingError, match="no prompt was answered"):
        plan(engine=Speaker(257, failing=frozenset([0, 1]))).step(0)
    assert len(groups_of(plan())) == 2


def test_an_answer_that_says_nothing_is_learned_from(plan: Planner) -> None:
    """It is its end alone, and to end is what is learned."""
    made = plan(engine=Speaker(257, letters=[0, 1, 2]))
    sequences = sequences_of(groups_of(made))
    assert [one.num_trained for one in sequences] == [1, 2, 3] * 2
    assert [row["answer"] for row in read_answers(made)] == ["", "x", "xx"] * 2


@pytest.mark.parametrize("scored", [False, True])
def test_a_rollout_that_was_interrupted_goes_on_from_what_is_written(plan: Planner, scored: bool) -> None:
    """Between sampling and scoring, and between scoring and learning; of a model's own answers, drawn by chance."""

    def interrupted(one: Answered) -> Score:
        raise KeyboardInterrupt

    own = plan()
    own.engine = LocalEngine(own.model)
    wanted, told = as_values(groups_of(own)), own.told(0)
    assert len(set(map(str, wanted))) > 3
    claim_rollouts(own.folder, "begun anew", anew=True)
    stopped = plan(scoring=by_length if scored else interrupted)
    stopped.engine = LocalEngine(stopped.model)
    if scored:
        stopped.step(0)
    else:
        with pytest.raises(KeyboardInterrupt):
            stopped.step(0)
    resumed = plan(engine=Silent(), **({"scoring": interrupted} if scored else {}))
    assert as_values(groups_of(resumed)) == wanted
    timeless = {name for name in told if "seconds" not in name and "per_second" not in name}
    assert {n: resumed.told(0)[n] for n in timeless} == {n: told[n] for n in timeless}
    assert not list(folder_of(resumed).glob("samples-*"))


def test_resampling_that_was_interrupted_asks_only_what_is_missing(plan: Planner) -> None:
    calls = iter(range(100))

    def at_second(one: Answered) -> Score:
        if next(calls) >= 12:
            raise KeyboardInterrupt
        return of_odd_prompts(one)

    whole = plan("dapo", of_odd_prompts, batch_size=4)
    wanted = as_values(groups_of(whole))
    attempts = len(whole.engine.asked)  # type: ignore[attr-defined]
    assert attempts > 1
    claim_rollouts(whole.folder, "begun anew", anew=True)
    with pytest.raises(KeyboardInterrupt):
        plan("dapo", at_second, batch_size=4).step(0)
    engine = Speaker(257)
    assert as_values(groups_of(plan("dapo", of_odd_prompts, batch_size=4, engine=engine))) == wanted
    assert len(engine.asked) == attempts - 2


def test_what_only_earlier_checkpoints_need_is_deleted_and_what_people_read_stays(plan: Planner) -> None:
    """The oldest checkpoint is of step 5, in the third rollout of two steps each."""
    made = plan(minibatches=2, batch_size=1, oldest_step=lambda: 5)
    for step in range(8):
        made.step(step)
    kept = [(folder_of(made, number) / "batch.safetensors").exists() for number in range(4)]
    assert kept == [False, False, True, True]
    assert all(len(read_answers(made, number)) == 6 for number in range(4))
    assert all("reward" in json.loads((folder_of(made, n) / "rollout.json").read_text())["told"] for n in range(4))


def test_beta_goes_where_the_divergence_is_aimed_at_and_is_kept_between_runs(plan: Planner) -> None:
    """By the formula, from the numbers of each rollout; a run that goes on reads the last."""
    given: dict[str, Any] = {"beta": 0.1, "target_kl": 2.0, "group_size": 2, "minibatches": 1}
    made = plan("rloo", **given)
    for parameter in made.model.network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    beta = 0.1
    for number in range(3):
        plan_now = made if number < 2 else plan("rloo", **given)
        plan_now.step(number)
        assert plan_now.told(number)["rollout/beta"] == pytest.approx(beta)
        tensors = load_file(folder_of(made, number) / "batch.safetensors")
        kl = float((tensors["column/old"] - tensors["column/reference"]).sum()) / 4
        beta = adapted_kl_weight(beta, kl=kl, target=2.0, num_answers=4, horizon=10_000)
    assert beta != 0.1


def test_a_damaged_rollout_is_named(plan: Planner, caplog: pytest.LogCaptureFixture) -> None:
    made = plan()
    made.step(0)
    (folder_of(made) / "batch.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match=r"batch\.safetensors: cannot be read .* delete it"):
        plan().step(0)
    (folder_of(made) / "batch.safetensors").unlink()
    plan().step(0)
    assert "its batch is gone, so it is sampled anew" in caplog.text


def test_rollouts_of_another_run_are_forgotten(tmp_path: Path) -> None:
    claim_rollouts(tmp_path, "mine", anew=False)
    left = tmp_path / "rollouts" / "000000"
    for fingerprint, anew, stays in (("mine", False, True), ("theirs", False, False), ("theirs", True, False)):
        left.mkdir(exist_ok=True)
        claim_rollouts(tmp_path, fingerprint, anew=anew)
        assert left.exists() == stays, (fingerprint, anew)


LOGPROBS = st.lists(st.floats(width=32, max_value=0) | st.just(float("nan")), min_size=1, max_size=4)
SAMPLES = st.builds(
    lambda logprobs, text, finished: Sample(
        np.arange(len(logprobs), dtype=np.int32), np.array(logprobs, dtype=np.float32), text, finished
    ),
    LOGPROBS,
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.just("a\u2028b\nc\x85"),
    st.booleans(),
)
FOUND = st.lists(st.tuples(SAMPLES, SAMPLES) | st.builds(Failure, st.just("timed out"), st.text("ab ")), max_size=4)


@given(FOUND)
def test_samples_are_read_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, found: list[Sampled]) -> None:
    files = RolloutFiles(tmp_path_factory.mktemp("rollout"))
    assert files.samples(0) is None
    files.keep_samples(0, found)
    read = files.samples(0)
    assert read is not None
    assert list(map(as_said, read)) == list(map(as_said, found))


def as_said(one: Sampled) -> Any:
    """To the bit."""
    if isinstance(one, Failure):
        return one
    return [(s.token_ids.tobytes(), s.logprobs.tobytes(), s.text, s.finished) for s in one]


def test_an_evaluation_asks_held_out_prompts_for_their_most_likely_answer(plan: Planner) -> None:
    made = plan(scoring=lambda one: float(one.row["number"]), eval_fraction=0.3, eval_prompts=2)
    told = made.evaluation()
    asked = made.engine.asked[0]  # type: ignore[attr-defined]
    held_out = [one.prompt.row["number"] for one in made.prepared.held_out]
    learned = Counter(one.prompt.row["number"] for one in made.prepared.prompts)
    assert [request.count for request in asked] == [1, 1]
    assert told["reward"] == np.mean(held_out[:2]) == -told["loss"]
    assert not set(held_out) & set(learned)
    assert len(held_out) == 3
    assert set(learned.values()) == {1}


def test_an_evaluation_without_any_answer_stops_the_run(plan: Planner) -> None:
    made = plan(engine=Speaker(257, failing=frozenset(range(9))), eval_fraction=0.3)
    with pytest.raises(TrainingError, match=r"no prompt was answered \(timed out 3; 9 s\)"):
        made.evaluation()


def test_a_prompt_that_fills_the_context_fails_alone(plan: Planner, caplog: pytest.LogCaptureFixture) -> None:
    """In a context of 45 tokens, which leaves some room to the others."""
    made = plan(batch_size=10)
    prompts = made.prepared.prompts
    prompts[0] = replace(prompts[0], token_ids=np.zeros(45, dtype=np.int32))
    made.model.config.get_text_config().max_position_embeddings = 45
    made.engine = LocalEngine(made.model)
    assert max(len(one.token_ids) for one in prompts[1:]) < 45
    assert len(groups_of(made)) == 9
    assert "1 of 10 prompts have no answers: prompt too long 1" in caplog.text
    assert all(len(one.token_ids) <= 45 for one in sequences_of(groups_of(made)))
