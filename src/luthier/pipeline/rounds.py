"""Preference learning in rounds: the policy answers prompts, a judge ranks, DPO learns from the pairs, and again.

Every round is a DPO stage in a folder of its own, whose reference is the model that the round before left. After each,
the policy's answers to prompts that are never trained on are compared with those of the model before the first round;
when that win rate stops rising the rounds end, and the best round's model is the stage's. What was sampled and judged
is written down at once, so an interrupted run goes on where it stopped and asks nobody twice.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from luthier.data.conversations import text_of
from luthier.data.examples import Chat, Prompt
from luthier.data.reading import read_examples
from luthier.data.writing import write_examples
from luthier.errors import DataError, TrainingError
from luthier.evaluate.judges import judge_of
from luthier.evaluate.ranking import Candidates, rank
from luthier.evaluate.significance import win_rate
from luthier.evaluate.verdicts import Judge, Question, compare_both_orders
from luthier.files import write_whole
from luthier.models.load import Model, load
from luthier.pipeline.train import Summary
from luthier.recipe.document import Stage
from luthier.recipe.preference import DPO
from luthier.recipe.rounds import IterativeDPO
from luthier.recipe.settings import settings_from
from luthier.rollout.generate import Sampling, samples

__all__ = ["RoundResult", "TrainRound", "best_round", "run_rounds"]

logger = logging.getLogger(__name__)

TrainRound = Callable[[Stage, str, Path, Path], Summary]
"""Trains a stage from a source in a folder and leaves its model in another, unless that is done."""


@dataclass(frozen=True, slots=True)
class RoundResult:
    """What a round did. pairs: of so many prompts; unpaired: why the others gave none, by reason. judged: the counts in
    one line. rate: of the policy's answers against those of the model before the first round, between low and high.
    """

    round: int
    prompts: int
    pairs: int
    unpaired: dict[str, int]
    judged: str
    wins: int
    ties: int
    losses: int
    rate: float
    low: float
    high: float


def run_rounds(settings: IterativeDPO, source: str, folder: Path, train: TrainRound) -> list[Summary]:
    """All rounds that are not done yet; returns what each trained.

    Raises TrainingError where a judge prefers nothing in a whole round, and what reading, judging and training raise.
    """
    rounds = _Rounds(settings, source, folder)
    summaries: list[Summary] = []
    results: list[RoundResult] = []
    for number in range(settings.rounds):
        place = folder / f"round-{number}"
        pairs = rounds.pairs(number, source)
        summaries.append(train(_stage(settings, pairs), source, place, place / "model"))
        source = str(place / "model")
        results.append(rounds.result(number, source))
        logger.info(
            "round %d: answers win %.0f%% against the start; %s", number, 100 * results[-1].rate, results[-1].judged
        )
        since_best = len(results) - 1 - max(range(len(results)), key=lambda i: results[i].rate)
        if since_best >= settings.patience:
            break
    return summaries


def best_round(folder: Path) -> Path:
    """The folder of the round with the highest win rate, the first of equals."""
    found = [RoundResult(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("round-*/round.json")]
    return folder / f"round-{max(found, key=lambda result: (result.rate, -result.round)).round}"


class _Rounds:
    """The prompts and the judge of all rounds."""

    def __init__(self, settings: IterativeDPO, source: str, folder: Path) -> None:
        self.settings, self.source, self.folder = settings, source, folder

    @cached_property
    def judge(self) -> Judge:
        return judge_of(self.settings.judge, load_model=partial(load, dtype=self.settings.dtype))

    @cached_property
    def prompts(self) -> tuple[list[Prompt], list[Prompt]]:
        """Those that are learned from, in the seed's order, and those that win rates are taken on."""
        settings = self.settings
        found = _read(settings, settings.data)
        order = np.random.default_rng(settings.seed).permutation(len(found))
        shuffled = [found[i] for i in order]
        if settings.eval_data is not None:
            return shuffled, _read(settings, settings.eval_data)[: settings.eval_prompts]
        if len(shuffled) <= settings.eval_prompts:
            raise DataError(
                f"{len(shuffled)} prompts leave none to learn from beside {settings.eval_prompts} to evaluate on; "
                "lower eval_prompts or give eval_data"
            )
        return shuffled[settings.eval_prompts :], shuffled[: settings.eval_prompts]

    def pairs(self, number: int, source: str) -> Path:
        """The file of a round's pairs, made unless it is there."""
        place = self.folder / f"round-{number}"
        path = place / "pairs.jsonl"
        if path.exists():
            return path
        count = self.settings.prompts_per_round
        prompts = [self.prompts[0][i % len(self.prompts[0])] for i in range(number * count, (number + 1) * count)]
        answers = self._answers(source, list({id(p): p for p in prompts}.values()), self.settings.num_answers, number)
        ranked, report = rank(self.judge, _candidates(answers))
        preferences = [one.preference for one in ranked if one.preference is not None]
        if not preferences:
            why = ", ".join(f"{reason} {count}" for reason, count in Counter(one.reason for one in ranked).items())
            raise TrainingError(
                f"round {number}: no answer is preferred ({why}); raise temperature, or ask another judge"
            )
        unpaired = dict(Counter(one.reason for one in ranked if one.preference is None))
        counts = {"prompts": len(ranked), "pairs": len(preferences), "unpaired": unpaired, "judged": str(report)}
        place.mkdir(parents=True, exist_ok=True)
        write_whole(place / "judged.json", json.dumps(counts, indent=1) + "\n")
        write_examples(preferences, path)
        return path

    def result(self, number: int, source: str) -> RoundResult:
        """What the round did, measured unless it was before."""
        place = self.folder / f"round-{number}"
        path = place / "round.json"
        if path.exists():
            return RoundResult(**json.loads(path.read_text(encoding="utf-8")))
        counts: dict[str, Any] = json.loads((place / "judged.json").read_text(encoding="utf-8"))
        now = self._answers(source, self.prompts[1], 1, number)
        questions = [
            Question(prompt.messages, answer, before, prompt.row)
            for (prompt, (answer,)), before in zip(now, self._first_answers(), strict=True)
        ]
        verdicts, _ = compare_both_orders(self.judge, questions)
        result = RoundResult(number, **counts, **asdict(win_rate(verdicts)))
        write_whole(path, json.dumps(asdict(result), indent=1) + "\n")
        return result

    def _first_answers(self) -> list[str]:
        """Of the model before the first round, to the prompts that win rates are taken on."""
        path = self.folder / "first_answers.json"
        if not path.exists():
            answers = [answer for _, (answer,) in self._answers(self.source, self.prompts[1], 1, 0)]
            write_whole(path, json.dumps(answers, indent=1) + "\n")
        found: list[str] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def _answers(
        self, source: str, prompts: Sequence[Prompt], count: int, number: int
    ) -> list[tuple[Prompt, tuple[str, ...]]]:
        """Each prompt with so many sampled answers, drawn by the seed, the round and the prompt's place."""
        settings = self.settings
        model: Model = load(source, dtype=settings.dtype)
        sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.top_p)
        found = []
        for place, prompt in enumerate(prompts):
            seed = int(np.random.SeedSequence((settings.seed, number, count, place)).generate_state(1)[0])
            chat = Chat(prompt.messages, prompt.tools)
            found.append((prompt, tuple(samples(model, chat, replace(sampling, seed=seed), count))))
        return found


def _candidates(answered: Sequence[tuple[Prompt, tuple[str, ...]]]) -> list[Candidates]:
    """Without answers that nobody could learn from."""
    return [
        Candidates(prompt.messages, tuple(filter(_can_be_learned, answers)), prompt.tools, prompt.row)
        for prompt, answers in answered
    ]


def _can_be_learned(answer: str) -> bool:
    """Whether it would be read from a file: it is not empty, and holds no NUL and no half of a character."""
    try:
        text_of("an answer", answer)
    except DataError:
        return False
    return True


def _read(settings: IterativeDPO, patterns: str | Sequence[str]) -> list[Prompt]:
    reading = read_examples(
        patterns, task="ask", format=settings.format, columns=settings.columns, on_error=settings.on_error
    )
    return [example for _, example in reading.examples if isinstance(example, Prompt)]


def _stage(settings: IterativeDPO, pairs: Path) -> Stage:
    """A round's training: the same settings, on its own pairs."""
    shared = {name: value for name, value in settings.model_dump().items() if name in DPO.model_fields}
    own = {"data": str(pairs), "format": "preference", "eval_data": None, "eval_fraction": 0.0, "eval_every": None}
    return Stage("dpo", settings_from(DPO, {**shared, **own, "columns": {}, "reference": None}))
