"""A causal model on this machine as judge: which verdict it would rather say, without sampling.

The model is shown both answers by its own chat template, and log p of "A" is held against log p of "B" as its reply.
One forward pass, in which the question is computed once for both, so the same question always gets the same verdict.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from luthier.data.batches import collate, pack
from luthier.data.examples import Chat, Origin
from luthier.data.markers import text_encoder
from luthier.data.masks import encode_prompt
from luthier.data.sequences import TokenGroup, TokenSequence
from luthier.errors import DataError
from luthier.evaluate.judging_prompt import judging_messages
from luthier.evaluate.verdicts import Question, Verdict, verdict_by_scores
from luthier.models.load import Model
from luthier.models.score import evaluating, sequence_logprobs
from luthier.rollout.scoring import Failure, Score, finite

__all__ = ["ModelJudge"]

_FORM = "Reply with one letter, A or B, and nothing else."
_LETTERS = ("A", "B")


@dataclass(frozen=True, slots=True)
class ModelJudge:
    """micro_batch_tokens: the most tokens of one forward pass, but for a single question that has more."""

    model: Model
    criteria: str
    micro_batch_tokens: int = 8192

    def compare(self, questions: Sequence[Question]) -> list[Verdict]:
        """The likelier letter's answer wins; a question that the model cannot be shown has failed."""
        margins = self.margins(questions)
        return [verdict_by_scores(margin, margin if isinstance(margin, Failure) else 0.0) for margin in margins]

    def margins(self, questions: Sequence[Question]) -> list[Score]:
        """log p(A) - log p(B) of each question, in nats."""
        found = [self._replied(question, i) for i, question in enumerate(questions)]
        groups = {i: one for i, one in enumerate(found) if isinstance(one, TokenGroup)}
        margins: dict[int, Score] = {i: one for i, one in enumerate(found) if isinstance(one, Failure)}
        places = list(groups)
        for members in pack([len(group) for group in groups.values()], self.micro_batch_tokens):
            chosen = [places[i] for i in members]
            margins.update(zip(chosen, self._margins([groups[i] for i in chosen]), strict=True))
        return [margins[i] for i in range(len(questions))]

    def _replied(self, question: Question, index: int) -> TokenGroup | Failure:
        """The question with either reply, or why it cannot be asked."""
        tokenizer = self.model.tokenizer
        try:
            prompt = encode_prompt(Chat(judging_messages(question, criteria=self.criteria, form=_FORM)), tokenizer)
        except DataError as error:
            return Failure("cannot be shown", str(error))
        encoder = text_encoder(tokenizer)
        replies = [encoder.encode(letter, continues=True) for letter in _LETTERS]
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = len(prompt) + max(map(len, replies))
        if context is not None and longest > context:
            return Failure("longer than the context", f"{longest} tokens of {context}")
        return TokenGroup(tuple(_sequence(prompt, reply, Origin("question", index + 1)) for reply in replies))

    def _margins(self, groups: Sequence[TokenGroup]) -> list[Score]:
        batch = collate(groups)
        with evaluating(self.model.network):
            sums = sequence_logprobs(self.model, batch)
        return [finite(margin) for margin in (sums[0::2] - sums[1::2]).tolist()]


def _sequence(prompt: Sequence[int], reply: Sequence[int], origin: Origin) -> TokenSequence:
    token_ids = np.asarray([*prompt, *reply], dtype=np.int32)
    return TokenSequence(token_ids, np.arange(len(token_ids)) >= len(prompt), origin)
