"""Answers by transformers' own generation, for networks that `LocalEngine` cannot decode: one prompt at a time.

transformers runs the network and keeps what it remembers; which tokens are taken, and when an answer ends, is decided
as for all other networks.
"""

from collections.abc import Sequence

import torch
from torch import LongTensor, Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from luthier.models.load import Model
from luthier.rollout.rows import Group, Row, Writer

__all__ = ["write_by_transformers"]


def write_by_transformers(model: Model, groups: Sequence[Group], writer: Writer, max_rows: int) -> None:
    """Brings the answers of all groups to their ends, so many of a group at once."""
    own, model.network.generation_config = model.network.generation_config, GenerationConfig()
    try:
        for group in groups:
            for first in range(0, len(group.rows), max_rows):
                _write(model, group.rows[first : first + max_rows], writer)
    finally:
        model.network.generation_config = own  # from which transformers fills in what it is not told


def _write(model: Model, rows: Sequence[Row], writer: Writer) -> None:
    """rows: of one group."""
    prompt = torch.tensor(rows[0].group.request.prompt_ids.tolist(), device=model.device).repeat(len(rows), 1)
    model.network.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=GenerationConfig(max_new_tokens=rows[0].most, do_sample=False),
        logits_processor=LogitsProcessorList([_Extending(rows, writer)]),
        stopping_criteria=StoppingCriteriaList([_Ended(rows)]),
    )


class _Extending(LogitsProcessor):
    """Leaves each row's logits the one token that was drawn for it."""

    def __init__(self, rows: Sequence[Row], writer: Writer) -> None:
        self.rows, self.writer = rows, writer

    def __call__(self, input_ids: LongTensor, scores: Tensor) -> Tensor:
        left = torch.full_like(scores, -torch.inf)
        self.writer.extend(self.rows, scores)
        drawn = torch.tensor([row.tokens[-1] for row in self.rows], device=scores.device)
        return left.scatter_(1, drawn[:, None], 0.0)


class _Ended(StoppingCriteria):
    """Which rows have."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __call__(self, input_ids: LongTensor, scores: object, **options: object) -> Tensor:
        return torch.tensor([row.ended for row in self.rows], device=input_ids.device)
