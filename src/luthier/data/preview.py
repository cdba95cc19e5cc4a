"""A tokenized example as text to look at: runs of trained and untrained words, for colouring.

A character may take several tokens, and the border of a run may fall inside one; it then belongs to the later run, so
that the runs put together are the whole text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from luthier.data.markers import text_encoder
from luthier.data.sequences import TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Span", "preview"]


@dataclass(frozen=True, slots=True)
class Span:
    """Text whose tokens are all trained, or all not."""

    text: str
    trained: bool


def preview(sequence: TokenSequence, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """The example's text, special tokens included, cut where training starts and ends."""
    decode = text_encoder(tokenizer).decode
    ids = sequence.token_ids.tolist()
    whole = decode(ids)
    borders = [int(i) for i in np.flatnonzero(np.diff(sequence.trained)) + 1]
    cuts = [0, *(_num_shared(decode(ids[:border]), whole) for border in borders), len(whole)]
    flags = [bool(sequence.trained[start]) for start in ([0, *borders] if ids else [])]
    spans = [Span(whole[cuts[i] : cuts[i + 1]], trained) for i, trained in enumerate(flags)]
    return [span for span in spans if span.text]


def _num_shared(start: str, whole: str) -> int:
    """How many characters two texts share from their beginning: half a character decodes to another one."""
    pairs = enumerate(zip(start, whole, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(start), len(whole)))
