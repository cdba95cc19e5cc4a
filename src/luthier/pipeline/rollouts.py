"""Rollouts as the plan of a training: prompts are answered, answers get their rewards, and steps learn from them.

A rollout is made when its first step is asked for, by the policy as it then is, and serves `minibatches` times
`rollout_epochs` steps. What it is depends on the seed, its number and the policy, so a resumed run samples what the
interrupted one did; what was sampled or scored already is read from the stage's folder.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import compress, groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier.data.batches import pass_sizes, pieces
from luthier.data.sequences import Item, TokenGroup
from luthier.errors import TrainingError
from luthier.models.load import Model
from luthier.objectives.advantages import adapted_kl_weight, carries_signal, soft_length_penalty
from luthier.pipeline.answers import ScoredAnswer, as_rows, groups_of, stored, summed_up, targets_of, trained_on
from luthier.pipeline.known import known_of
from luthier.pipeline.policy import Scored, advantages
from luthier.pipeline.prompts import Asked, PreparedPrompts
from luthier.pipeline.rollout_files import RolloutFiles, Sampled
from luthier.recipe.policy import OnPolicy
from luthier.rollout.requests import Engine, Request, Sampling
from luthier.rollout.rewards import Rewarder, count_failures
from luthier.rollout.scoring import Answered, Failure
from luthier.shortage import release_freed_memory
from luthier.training.room import Room

__all__ = ["RolloutPlan", "sampling_of"]

logger = logging.getLogger(__name__)

_KL_HORIZON = 10_000  # answers that it takes beta to change by a fifth (Ziegler et al. 2019, section 2.2)


@dataclass(frozen=True, slots=True)
class _Rollout:
    """What steps learn from, and what is told of it."""

    groups: list[TokenGroup]
    told: dict[str, float]


class RolloutPlan:
    """The steps of a policy stage."""

    def __init__(
        self,
        settings: OnPolicy,
        prepared: PreparedPrompts,
        model: Model,
        folder: Path,
        *,
        engine: Engine,
        rewarder: Rewarder,
        room: Room,
        oldest_step: Callable[[], int] = lambda: 0,
    ) -> None:
        """oldest_step: of which a checkpoint is kept; what only earlier ones need is deleted."""
        self.settings, self.prepared, self.model, self.folder = settings, prepared, model, folder
        self.engine, self.rewarder, self.room = engine, rewarder, room
        self.oldest_step = oldest_step
        self.current: tuple[int, _Rollout] | None = None

    @property
    def prompts_per_rollout(self) -> int:
        """Prompts that a rollout answers."""
        return self.settings.batch_size * self.settings.minibatches

    @property
    def steps_per_rollout(self) -> int:
        """Steps that learn from it."""
        return self.settings.minibatches * self.settings.rollout_epochs

    @property
    def steps_per_epoch(self) -> int:
        """Steps that go through the prompts once."""
        return -(-len(self.prepared.prompts) // self.prompts_per_rollout) * self.steps_per_rollout

    @property
    def num_steps(self) -> int:
        """Steps of the whole training."""
        whole, most = self.steps_per_epoch * self.settings.epochs, self.settings.max_steps
        return whole if most is None else min(whole, most)

    def epoch_at(self, step: int) -> float:
        """Epochs gone through once `step` steps are done."""
        return step / self.steps_per_epoch

    def step(self, index: int) -> list[Item]:
        """The groups of step `index`, counted from 0, of its rollout, which is made where it is not yet."""
        number, within = divmod(index, self.steps_per_rollout)
        groups = self._rollout(number).groups
        epoch, part = divmod(within, self.settings.minibatches)
        order = np.random.default_rng((self.settings.seed, number, epoch)).permutation(len(groups))
        chosen = (groups[i] for i in order[part :: self.settings.minibatches])
        bound = self.room.tokens
        return [piece for group in chosen for piece in ([group] if bound is None else pieces(group, bound))]

    def told(self, index: int) -> dict[str, float]:
        """What is told of the step's rollout."""
        return self._rollout(index // self.steps_per_rollout).told

    def evaluation(self) -> dict[str, float]:
        """Mean rewards of held-out prompts, the most likely answer to each; "loss" is the mean reward taken negative.

        Raises TrainingError where no answer could be scored.
        """
        asked = self.prepared.held_out[: self.settings.eval_prompts]
        sampling = sampling_of(self.settings, greedy=True)
        found = self._sampled([Request(one.token_ids) for one in asked], sampling)
        answers = self._scored(list(enumerate(asked)), found)
        told = summed_up(self._usable(answers), answers)
        return {"loss": -told["reward"], **told}

    def _rollout(self, number: int) -> _Rollout:
        if self.current is None or self.current[0] != number:
            files = RolloutFiles.of(self.folder, number)
            found = files.batch() or self._made(number, files)
            self.current = number, _Rollout(groups_of(found[0]), found[1]["told"])
            self._forget(number)
        return self.current[1]

    def _forget(self, number: int) -> None:
        """What rollouts that lie before all checkpoints left for learning."""
        for earlier in range(min(number, self.oldest_step() // self.steps_per_rollout)):
            RolloutFiles.of(self.folder, earlier).forget_batch()

    def _made(self, number: int, files: RolloutFiles) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Samples, scores, and works out what is known of every token; written down. What learning and sampling need is
        of other sizes, so each gives back before the other begins.
        """
        release_freed_memory()
        started = time.perf_counter()
        if files.numbers() is not None:
            logger.warning("%s: its batch is gone, so it is sampled anew, by the policy as it is now", files.folder)
        before = RolloutFiles.of(self.folder, number - 1).numbers() if number else None
        first = number * self.prompts_per_rollout if before is None else int(before["next_prompt"])
        beta = self.settings.beta if before is None else float(before["next_beta"])
        everything, chosen, next_prompt = self._answers(files, first)
        told = summed_up(self._usable(everything), everything)
        seconds = time.perf_counter() - started
        told |= {
            "rollout/failed": 1 - len({one.group for one in everything}) / (next_prompt - first),
            "rollout/seconds": seconds,
            "rollout/tokens_per_second": sum(len(one.token_ids) for one in everything) / seconds,
        }
        told |= {"rollout/beta": beta} if self.settings.target_kl is not None else {}
        if self.settings.length_margin is not None:
            told["rewards/length_penalty/mean"] = fmean(one.length_penalty for one in everything)
        usable = [one for one in chosen if one.score is not None]
        trained = trained_on(usable, mask_truncated=self.settings.mask_truncated)
        tensors, kl = self._known(usable, trained, beta)
        numbers = {"told": told, "next_prompt": next_prompt, "next_beta": self._next_beta(beta, kl, len(usable))}
        files.keep_answers(as_rows(everything, list(compress(usable, trained))))
        files.keep_batch(tensors, numbers)
        release_freed_memory()
        return tensors, numbers

    def _next_beta(self, beta: float, kl: float | None, num_answers: int) -> float:
        target = self.settings.target_kl
        if target is None or kl is None:
            return beta
        return adapted_kl_weight(beta, kl=kl, target=target, num_answers=num_answers, horizon=_KL_HORIZON)

    def _answers(self, files: RolloutFiles, first: int) -> tuple[list[ScoredAnswer], list[ScoredAnswer], int]:
        """All answers, those that are learned from, and the number of the next prompt. Dynamic sampling asks further
        prompts while groups without signal leave room for others.
        """
        everything: list[ScoredAnswer] = []
        chosen: list[ScoredAnswer] = []
        next_prompt, num_groups = first, 0
        for attempt in range(self.settings.max_resampling + 1 if self.settings.dynamic_sampling else 1):
            wanted = self.prompts_per_rollout - num_groups
            numbered = [(next_prompt + i, self._prompt(next_prompt + i)) for i in range(wanted)]
            next_prompt += wanted
            scored = self._scored(numbered, self._kept_or_sampled(files, attempt, numbered))
            everything += scored
            chosen += _with_signal(scored) if self.settings.dynamic_sampling else scored
            num_groups = len({one.group for one in chosen})
            if num_groups >= self.prompts_per_rollout:
                break
        if not chosen:
            logger.warning("no prompt has answers of different rewards, so this rollout teaches nothing")
        return everything, chosen or everything, next_prompt

    def _prompt(self, place: int) -> Asked:
        """The prompt of this place in all epochs, one after the other."""
        epoch, within = divmod(place, len(self.prepared.prompts))
        prompts = self.prepared.prompts
        return prompts[_shuffled(len(prompts), self.settings.seed, epoch)[within]]

    def _kept_or_sampled(
        self, files: RolloutFiles, attempt: int, numbered: Sequence[tuple[int, Asked]]
    ) -> list[Sampled]:
        found = files.samples(attempt)
        if found is None:
            count = self.settings.group_size
            requests = [Request(asked.token_ids, count, place) for place, asked in numbered]
            found = self._sampled(requests, sampling_of(self.settings))
            files.keep_samples(attempt, found)
        return found

    def _sampled(self, requests: Sequence[Request], sampling: Sampling) -> list[Sampled]:
        """The engine's answers; why prompts have none is told. Raises TrainingError where none has any."""
        found: list[Sampled] = [*self.engine.sample(requests, sampling)]
        failed = [one for one in found if isinstance(one, Failure)]
        why = ", ".join(f"{reason} {count}" for reason, count in Counter(one.reason for one in failed).most_common())
        if len(failed) == len(found):
            raise TrainingError(
                f"no prompt was answered ({why}; {failed[0].detail}); see to it and run the same command again, which "
                "goes on from the last checkpoint"
            )
        if failed:
            logger.warning("%d of %d prompts have no answers: %s", len(failed), len(found), why)
        return found

    def _scored(self, numbered: Sequence[tuple[int, Asked]], found: Sequence[Sampled]) -> list[ScoredAnswer]:
        """The answers with their rewards, those of a prompt together; a prompt that was not answered has none."""
        pairs = [
            (place, asked, sample)
            for (place, asked), samples in zip(numbered, found, strict=True)
            if not isinstance(samples, Failure)
            for sample in samples
        ]
        rewards = self.rewarder.score(
            [Answered(asked.prompt.messages, sample.text, asked.prompt.row) for _, asked, sample in pairs]
        )
        return [
            ScoredAnswer(place, asked, sample, reward, self._length_penalty(len(sample.token_ids)))
            for (place, asked, sample), reward in zip(pairs, rewards, strict=True)
        ]

    def _length_penalty(self, length: int) -> float:
        margin = self.settings.length_margin
        if margin is None:
            return 0.0
        longest = self.settings.max_new_tokens
        return float(soft_length_penalty(torch.tensor([float(length)]), longest=longest, margin=margin))

    def _usable(self, answers: Sequence[ScoredAnswer]) -> list[ScoredAnswer]:
        """Those with a reward; why others have none is told. Raises TrainingError where none has."""
        usable = [one for one in answers if one.score is not None]
        reasons = count_failures(one.reward for one in answers)
        why = ", ".join(f"{reason} {count}" for reason, count in reasons.items())
        if not usable:
            raise TrainingError(
                f"no answer could be scored ({why}); see to what the reward needs and run the same command again, "
                "which goes on from the last checkpoint; with an edited reward, begin anew with resume: false"
            )
        if reasons:
            logger.warning("%d of %d answers have no reward: %s", len(answers) - len(usable), len(answers), why)
        return usable

    def _known(
        self, usable: Sequence[ScoredAnswer], trained: Sequence[bool], beta: float
    ) -> tuple[dict[str, Tensor], float | None]:
        """Everything that learning needs of the answers, and the mean divergence of one, in nats."""
        tensors = stored(usable, trained)
        groups = groups_of(tensors)
        known = self.room.fitting(
            lambda: known_of(self.model.network, groups, self.settings, micro_batch_tokens=self.room.tokens),
            lambda: pass_sizes(groups, self.room.tokens),
        )
        kl = known["old"] - known["reference"] if {"old", "reference"} <= known.keys() else None
        scores = torch.tensor([one.score for one in usable])
        scored = Scored(scores, tensors["groups"].long(), targets_of(tensors), kl, known.get("values"))
        columns = known | advantages(self.settings, scored, beta=beta)
        mean_kl = None if kl is None else float(kl.sum()) / len(usable)
        return tensors | {f"column/{name}": column for name, column in columns.items()}, mean_kl


def sampling_of(settings: OnPolicy, *, greedy: bool = False) -> Sampling:
    """How answers are sampled."""
    return Sampling(
        max_new_tokens=settings.max_new_tokens,
        temperature=0.0 if greedy else settings.temperature,
        top_p=1.0 if greedy else settings.top_p,
        top_k=0 if greedy else settings.top_k,
        min_p=0.0 if greedy else settings.min_p,
        repetition_penalty=settings.repetition_penalty,
        stop=settings.stop,
        seed=settings.seed,
    )


def _with_signal(answers: Sequence[ScoredAnswer]) -> list[ScoredAnswer]:
    """The groups whose answers have different rewards."""
    kept: list[ScoredAnswer] = []
    for _, members in groupby(answers, key=lambda one: one.group):
        group = list(members)
        rewards = torch.tensor([float("nan") if one.score is None else one.score for one in group])
        if bool(carries_signal(rewards, torch.zeros(len(group), dtype=torch.int64)).all()):
            kept += group
    return kept


@lru_cache(maxsize=2)
def _shuffled(count: int, seed: int, epoch: int) -> list[int]:
    order: list[int] = np.random.default_rng((seed, epoch)).permutation(count).tolist()
    return order
