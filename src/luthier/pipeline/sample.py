"""Examples to learn from, made by sampling: prompts are answered several times, answers get rewards, good ones stay.

The answers are those of the engines, and the rewards those, that policies learn from. An interrupted run goes on and
samples nothing twice; the output appears at the end, whole, as rows that an sft stage reads.
"""

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType

from torch._subclasses.fake_tensor import FakeTensorMode

from luthier.data.encoding import encode
from luthier.data.examples import Chat, Message, Prompt
from luthier.data.reading import Reading, read_examples
from luthier.data.sequences import sequences_of
from luthier.data.writing import write_examples, write_quarantine
from luthier.errors import DataError, TrainingError
from luthier.files import write_whole
from luthier.models.load import Model, load, outline
from luthier.pipeline.pick import SampleCounts, ScoredText, pick
from luthier.pipeline.prompts import distinct
from luthier.pipeline.python_calls import MODELS_OWN, explained, settings_for, with_paths_as_text
from luthier.pipeline.python_rewards import Functions, GivenReward, described
from luthier.pipeline.rollout_memory import weights_of
from luthier.pipeline.sample_claim import answers_made_of, choice_made_of, rewards_made_of
from luthier.pipeline.sample_files import SampleFiles
from luthier.pipeline.sampled import SampledPrompts, by_reason
from luthier.recipe.rewards import parts_of
from luthier.recipe.sampling import AnswerSampling
from luthier.recipe.settings import settings_from
from luthier.rollout.engine import LocalEngine
from luthier.rollout.requests import Engine, Request, Sampling
from luthier.rollout.rewards import rewarder_of
from luthier.rollout.scoring import Failure
from luthier.rollout.server_engine import server_engine

__all__ = ["sample", "sample_answers"]


def sample(model: Model | str, *, reward: GivenReward, **given: object) -> SampleCounts:
    """Answers prompts several times and writes the answers that are good, as examples that `sft` learns from.

    model: as `load` gives it, with the adapter that it carries, or its name.
    reward: as in a recipe, a Python function called as reward(prompt, answer, row) -> float, or a list of these.
    Returns the counts. The same call again after an interruption goes on; it asks and scores once more what has failed.
    Raises RecipeError for a setting that is wrong, DataError for rows that do not fit, CheckpointError if `output` is
    another run's, TrainingError where no answer can be had, scored or kept, and what loading a model raises.
    """
    worth, functions = described(reward)
    values: dict[str, object] = {**with_paths_as_text(given), "reward": worth}
    if isinstance(model, str):
        return sample_answers(settings_from(AnswerSampling, {**values, "model": model}), functions=functions)
    return sample_answers(settings_for(model, AnswerSampling, values), model, functions=functions)


def sample_answers(
    settings: AnswerSampling, model: Model | None = None, *, functions: Functions = MappingProxyType({})
) -> SampleCounts:
    """Makes the output, or goes on with it. model: the one that the settings name, if it is in memory. functions: those
    that the reward means. Returns and raises what `sample` does.
    """
    reading = _read(settings)
    model = model or _loaded(settings)
    prompts, requests = _requests(reading, settings, model)
    files = SampleFiles(Path(settings.output))
    choice = choice_made_of(settings)
    files.claim(answers_made_of(settings, model, requests), rewards_made_of(settings, prompts), choice)
    if settings.on_error == "skip":
        write_quarantine(reading.bad, files.folder / "quarantine.jsonl")
    sampled = SampledPrompts(prompts, requests, _sampling(settings), files)
    with rewarder_of(parts_of(settings.reward), functions=functions, model=model) as worth:
        sampled.complete(_engine(settings, model), worth, batch_size=settings.batch_size)
    return _finished(settings, sampled, reading)


def _read(settings: AnswerSampling) -> Reading:
    return read_examples(
        settings.data, task="ask", format=settings.format, columns=settings.columns, on_error=settings.on_error
    )


def _loaded(settings: AnswerSampling) -> Model:
    """The model; where a server answers, without weights."""
    if settings.server is None:
        return load(settings.model, dtype=settings.dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        return outline(settings.model, dtype=settings.dtype)


def _requests(reading: Reading, settings: AnswerSampling, model: Model) -> tuple[list[Prompt], list[Request]]:
    """Each prompt once, and what is asked. Raises DataError for one that the template cannot show."""
    origins = {id(example): origin for origin, example in reading.examples}
    prompts = distinct([example for _, example in reading.examples if isinstance(example, Prompt)])
    if not prompts:
        raise DataError(f"{settings.data}: no prompt of {reading.num_rows} rows is good; mend the rows")
    items = [one for prompt in prompts for one in encode(prompt, origins[id(prompt)], model.tokenizer, train_on="last")]
    asked = enumerate(sequences_of(items))
    return prompts, [Request(one.token_ids, settings.num_answers, place) for place, one in asked]


def _sampling(settings: AnswerSampling) -> Sampling:
    return Sampling(**settings.model_dump(include={field.name for field in fields(Sampling)}))


def _engine(settings: AnswerSampling, model: Model) -> Engine:
    if settings.server is not None:
        return server_engine(settings.server, model.tokenizer)
    weights = weights_of(settings, model.network)
    return LocalEngine(model, weights=weights, max_rows=settings.rollout_rows, fixed=True)


def _finished(settings: AnswerSampling, sampled: SampledPrompts, reading: Reading) -> SampleCounts:
    """Writes the output, and counts."""
    kept, dropped = _kept(settings, sampled)
    _write(kept, sampled.files)
    rewards = [one for scores in sampled.rewards.values() for one in scores]
    return SampleCounts(
        bad_rows=len(reading.bad),
        repeated=len(reading.examples) - len(sampled.prompts),
        prompts=len(sampled.prompts),
        unanswered=by_reason(sampled.unanswered.values()),
        answers=len(rewards),
        scored=len(sampled.scores),
        failed=by_reason(one for one in rewards if isinstance(one, Failure)),
        kept=len(kept),
        dropped=dropped,
        mean_reward=statistics.fmean(sampled.scores),
        mean_kept_reward=statistics.fmean(reward for _, reward in kept),
    )


def _kept(settings: AnswerSampling, sampled: SampledPrompts) -> tuple[list[tuple[Chat, float]], dict[str, int]]:
    """The conversations that are kept, with their rewards, and why the others are not. Raises TrainingError where
    nothing is kept.
    """
    kept: list[tuple[Chat, float]] = []
    dropped: Counter[str] = Counter()
    for place, answers in sorted(sampled.answers.items()):
        together = zip(answers, sampled.rewards[place], strict=True)
        scored = [ScoredText(one.text, one.finished, score) for one, score in together if isinstance(score, float)]
        good, others = pick(scored, settings)
        kept += [(_example(sampled.prompts[place], one.text), one.reward) for one in good]
        dropped += others
    if not kept:
        why = ", ".join(f"{reason} {count}" for reason, count in dropped.most_common())
        raise TrainingError(
            f"no answer is kept ({why}); lower min_reward, which samples nothing anew, or choose another output with "
            "a higher num_answers or max_new_tokens"
        )
    return kept, dict(dropped.most_common())


def _example(prompt: Prompt, answer: str) -> Chat:
    return Chat((*prompt.messages, Message("assistant", answer)), prompt.tools)


def _write(kept: Sequence[tuple[Chat, float]], files: SampleFiles) -> None:
    """Rows of messages, each with the reward of its answer."""
    plain = files.folder / "messages.jsonl"
    write_examples((chat for chat, _ in kept), plain)
    rows = [json.loads(line) for line in plain.read_text(encoding="utf-8").split("\n") if line]
    together = [row | {"reward": reward} for row, (_, reward) in zip(rows, kept, strict=True)]
    write_whole(files.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in together))
    plain.unlink()


explained(sample, AnswerSampling, AnswerSampling.model_fields.keys() - MODELS_OWN)
