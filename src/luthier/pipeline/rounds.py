"""Preference learning in rounds: the policy answers prompts, a judge ranks, DPO learns from the pairs, and again.

Every round is a DPO stage in a folder of its own, whose reference is the model that the round before left. After each,
the policy's answers to prompts that are never trained on are compared with those of the model before the first round;
when that win rate stops rising the rounds end, and the best round's model is the stage's. What was sampled is written
down before it is judged, verdicts as they come, and pairs before they are learned from, so an interrupted run goes on
where it stopped.
"""

import gc
import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from luthier.adapters.base import Adapter
from luthier.adapters.inject import ADAPTERS
from luthier.data.conversations import text_of
from luthier.data.examples import Chat, Preference, Prompt
from luthier.data.reading import read_examples
from luthier.data.writing import write_examples
from luthier.errors import AdapterError, CheckpointError, DataError, TrainingError
from luthier.evaluate.judges import judge_of
from luthier.evaluate.ranking import Candidates, rank
from luthier.evaluate.remembered import Remembered
from luthier.evaluate.significance import WinRate, win_rate
from luthier.evaluate.verdicts import Judge, JudgeReport, Question, ScalarJudge, compare_both_orders
from luthier.files import write_whole
from luthier.models.load import load
from luthier.pipeline.claim import FREE_SETTINGS
from luthier.pipeline.manifest import data_hashes
from luthier.pipeline.prepare import set_template
from luthier.pipeline.prompts import distinct
from luthier.pipeline.sealed import read_sealed, write_sealed
from luthier.pipeline.train import Summary
from luthier.recipe.document import Stage
from luthier.recipe.judges import RuleJudge
from luthier.recipe.preference import DPO
from luthier.recipe.rounds import IterativeDPO
from luthier.recipe.settings import settings_from
from luthier.rollout.engine import LocalEngine
from luthier.rollout.generate import request_for
from luthier.rollout.requests import Sample, Sampling
from luthier.rollout.scoring import Failure

__all__ = ["RoundResult", "TrainRound", "forget_rounds", "read_rounds", "run_rounds"]

logger = logging.getLogger(__name__)

_ANEW = "delete it and run again, which measures the round anew"

TrainRound = Callable[[Stage, str, Path, Path], Summary]
"""Trains a stage from a source in a folder and leaves its model in another, unless that is done."""


@dataclass(frozen=True, slots=True)
class RoundResult(WinRate):
    """What a round did, and how often the policy's answers win against those of the model before the first round.

    pairs: of so many prompts; unpaired: why the others gave none, by reason. judged, compared: the judge's counts in
    one line, of the answers that were ranked and of those that the win rate is of.
    """

    round: int
    prompts: int
    pairs: int
    unpaired: dict[str, int]
    judged: str
    compared: str


@dataclass(frozen=True, slots=True)
class _Answer:
    """What is kept of a sample. finished: it ended by itself, and not because it was as long as it may be."""

    text: str
    finished: bool

    @classmethod
    def of(cls, sample: Sample) -> "_Answer":
        return cls(sample.text, sample.finished)


def run_rounds(settings: IterativeDPO, source: str, folder: Path, train: TrainRound) -> tuple[list[Summary], str]:
    """All rounds that are not done yet; returns what each trained, and the model that is the best: of the round with
    the highest win rate, the first of equals, or the source where no round's answers win as often as they lose.

    Raises TrainingError where a judge prefers nothing in a whole round or compares nothing, CheckpointError where the
    folder holds rounds of other settings, data or judges, and what reading, judging and training raise.
    """
    if settings.adapter is not None and ADAPTERS[settings.adapter.type].merge is Adapter.merge:
        raise AdapterError(f"{settings.adapter.type}: cannot be merged between rounds; take lora or another that can")
    rounds = _Rounds(settings, source, folder)
    rounds.check()
    _claim(settings, source, folder)
    summaries: list[Summary] = []
    results: list[RoundResult] = []
    current = source
    for number in range(settings.rounds):
        place = folder / f"round-{number}"
        summaries.append(train(_stage(settings, rounds.pairs(number, current)), current, place, place / "model"))
        current = str(place / "model")
        results.append(rounds.result(number, current))
        logger.info("round %d against the start: %s; %s", number, results[-1], results[-1].judged)
        best = max(results, key=lambda result: (result.rate, -result.round))
        if number - best.round >= settings.patience:
            break
    if best.rate < 0.5:
        logger.warning("no round's answers win as often as they lose; the model stays what it was before the rounds")
        return summaries, source
    return summaries, str(folder / f"round-{best.round}" / "model")


def read_rounds(folder: Path) -> list[RoundResult]:
    """What the rounds did that are done, in order."""
    paths = sorted(folder.glob("round-*/round.json"), key=lambda path: int(path.parent.name.removeprefix("round-")))
    return [RoundResult(**read_sealed(path, mend=_ANEW)) for path in paths]


def forget_rounds(folder: Path) -> None:
    """Deletes all rounds of a stage, for one that begins anew."""
    for place in folder.glob("round-*"):
        shutil.rmtree(place)
    for name in ("rounds.json", "first_answers.json"):
        (folder / name).unlink(missing_ok=True)


def _claim(settings: IterativeDPO, source: str, folder: Path) -> None:
    """Makes the folder's rounds this stage's, or makes sure that they are."""
    path = folder / "rounds.json"
    made_of = {"settings": settings.model_dump(mode="json", exclude={*FREE_SETTINGS, "model"}), "source": source}
    made_of |= {"data": data_hashes(settings), "judge": _code_of(settings)}
    text = json.dumps(made_of, indent=1, sort_keys=True) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise CheckpointError(
            f"{folder} holds rounds of other settings, prompts or judges; choose another output, or begin anew with "
            "resume: false"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)


def _code_of(settings: IterativeDPO) -> str:
    """A digest of the file that a rule stands in; its name alone where there is none, which is complained of later."""
    if not isinstance(settings.judge, RuleJudge):
        return ""
    file = Path(settings.judge.function.rpartition(":")[0])
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else str(file)


class _Rounds:
    """The prompts and the judge of all rounds."""

    def __init__(self, settings: IterativeDPO, source: str, folder: Path) -> None:
        self.settings, self.source, self.folder = settings, source, folder

    def check(self) -> None:
        """Raises what is wrong with the prompts or the judge, before anything is sampled."""
        logger.info("%d prompts to learn from, %d to compare on", *map(len, self.prompts))
        assert self.judge is not None

    @cached_property
    def judge(self) -> Judge:
        return judge_of(self.settings.judge, load_model=partial(load, dtype=self.settings.dtype))

    @cached_property
    def prompts(self) -> tuple[list[Prompt], list[Prompt]]:
        """Those that are learned from, in the seed's order, and those that win rates are taken on."""
        settings = self.settings
        found = distinct(self._read(settings.data))
        shuffled = [found[i] for i in np.random.default_rng(settings.seed).permutation(len(found))]
        if settings.eval_data is not None:
            held_out = distinct(self._read(settings.eval_data))[: settings.eval_prompts]
            return distinct(shuffled, besides=held_out), held_out
        if len(shuffled) <= settings.eval_prompts:
            raise DataError(
                f"{len(shuffled)} prompts leave none to learn from beside {settings.eval_prompts} to evaluate on; "
                "lower eval_prompts or give eval_data"
            )
        return shuffled[settings.eval_prompts :], shuffled[: settings.eval_prompts]

    def _read(self, patterns: str | Sequence[str]) -> list[Prompt]:
        settings = self.settings
        reading = read_examples(
            patterns,
            task="ask",
            format=settings.format,
            columns=settings.columns,
            on_error=settings.on_error,
            quarantine=self.folder / "quarantine.jsonl",
        )
        logger.info("%d prompts, %d bad rows", len(reading.examples), len(reading.bad))
        return [example for _, example in reading.examples if isinstance(example, Prompt)]

    def pairs(self, number: int, source: str) -> Path:
        """The file of a round's pairs, made unless it is there."""
        place = self.folder / f"round-{number}"
        path = place / "pairs.jsonl"
        if path.exists():
            return path
        prompts = self._prompts_of(number)
        sampled = self._sampled(place / "answers.json", source, prompts, self.settings.num_answers, seed=number + 1)
        pairs, unpaired, report = _ranked(self._judge_of(place), prompts, sampled)
        if not pairs:
            raise TrainingError(_nothing_preferred(number, unpaired, report))
        counts = {"prompts": len(prompts), "pairs": len(pairs), "unpaired": unpaired, "judged": str(report)}
        write_sealed(place / "judged.json", counts)
        write_examples(pairs, path)
        return path

    def _judge_of(self, place: Path) -> Judge:
        """The judge; what one that reads has said in a round is kept there. Numbers are had again at once."""
        return self.judge if isinstance(self.judge, ScalarJudge) else Remembered(self.judge, place / "verdicts.jsonl")

    def _prompts_of(self, number: int) -> list[Prompt]:
        """Each at most once in a round."""
        prompts, count = self.prompts[0], min(self.settings.prompts_per_round, len(self.prompts[0]))
        return [prompts[(number * count + i) % len(prompts)] for i in range(count)]

    def result(self, number: int, source: str) -> RoundResult:
        """What the round did, measured unless it was before."""
        place = self.folder / f"round-{number}"
        path = place / "round.json"
        if path.exists():
            return RoundResult(**read_sealed(path, mend=_ANEW))
        counts = read_sealed(place / "judged.json", mend="copy it back, or begin anew with resume: false")
        prompts = self.prompts[1]  # one seed for all: luck in sampling is the same for every model
        now = self._sampled(place / "held_out_answers.json", source, prompts, 1, seed=0)
        before = self._sampled(self.folder / "first_answers.json", self.source, prompts, 1, seed=0)
        questions = [
            Question(prompt.messages, one.text, other.text, prompt.row)
            for prompt, some, others in zip(prompts, now, before, strict=True)
            for one, other in zip(some, others, strict=True)  # none where the prompt leaves no room
        ]
        verdicts, report = compare_both_orders(self._judge_of(place), questions)
        rate = win_rate(verdicts)
        if not rate.wins + rate.ties + rate.losses:
            raise TrainingError(f"round {number}: the judge compared no answers ({report}); run the same command again")
        result = RoundResult(**asdict(rate), round=number, **counts, compared=str(report))
        write_sealed(path, asdict(result))
        return result

    def _sampled(
        self, path: Path, source: str, prompts: Sequence[Prompt], count: int, *, seed: int
    ) -> list[tuple[_Answer, ...]]:
        """So many answers to each prompt, none to one without room in the model's context, drawn by the stage's seed,
        this one and the prompt's place; read back where they were sampled before.
        """
        settings = self.settings
        if not path.exists():
            model = load(source, dtype=settings.dtype)
            set_template(model, settings)
            chats = [Chat(prompt.messages, prompt.tools) for prompt in prompts]
            requests = [request_for(model, chat, count=count, seed=place) for place, chat in enumerate(chats)]
            drawn = int(np.random.SeedSequence((settings.seed, seed, count)).generate_state(1)[0])
            sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.top_p, seed=drawn)
            sampled = LocalEngine(model).sample(requests, sampling)
            found = [[] if isinstance(some, Failure) else [_Answer.of(one) for one in some] for some in sampled]
            del model
            gc.collect()  # a network refers to itself, and the next one needs its place
            path.parent.mkdir(parents=True, exist_ok=True)
            write_sealed(path, {"answers": [list(map(asdict, answers)) for answers in found]})
        read = read_sealed(path, mend="delete it, and it is sampled anew")["answers"]
        return [tuple(_Answer(**answer) for answer in answers) for answers in read]


def _ranked(
    judge: Judge, prompts: Sequence[Prompt], sampled: Sequence[tuple[_Answer, ...]]
) -> tuple[list[Preference], dict[str, int], JudgeReport]:
    """The pairs that the judge makes, why the other prompts gave none, and what the judge said."""
    usable = [tuple(answer.text for answer in answers if _can_be_learned(answer)) for answers in sampled]
    candidates = [Candidates(p.messages, texts, p.tools, p.row) for p, texts in zip(prompts, usable, strict=True)]
    ranked, report = rank(judge, candidates)
    few = "fewer than two answers that are whole"
    reasons = [
        few if len(texts) < 2 else one.reason
        for one, texts in zip(ranked, usable, strict=True)
        if one.preference is None
    ]
    return [one.preference for one in ranked if one.preference is not None], dict(Counter(reasons)), report


def _can_be_learned(answer: _Answer) -> bool:
    """Whether it ended by itself, and would be read from a file: it is not empty, and holds no NUL or half character.

    One that was cut off would teach to stop in the middle of a sentence.
    """
    try:
        text_of("an answer", answer.text)
    except DataError:
        return False
    return answer.finished


def _nothing_preferred(number: int, unpaired: dict[str, int], report: JudgeReport) -> str:
    why = ", ".join(f"{reason} {count}" for reason, count in unpaired.items())
    mend = "raise max_new_tokens, temperature or num_answers, or ask another judge"
    if report.failed:
        mend = "see to the judge and run the same command again"
    return f"round {number}: no answer is preferred ({why}); {mend}"


def _stage(settings: IterativeDPO, pairs: Path) -> Stage:
    """A round's training: the same settings, on its own pairs."""
    shared = {name: value for name, value in settings.model_dump().items() if name in DPO.model_fields}
    own: dict[str, object] = {
        "data": str(pairs),
        "format": "preference",
        "eval_data": None,
        "eval_every": None,
        "columns": {},
    }
    return Stage("dpo", settings_from(DPO, {**shared, **own}))
