"""Plain text for pretraining: documents end to end, cut into blocks, and general text mixed in by its share."""

from collections.abc import Mapping, Sequence

import numpy as np

from luthier.data.sequences import TokenSequence

__all__ = ["blocks_of", "mixed"]


def blocks_of(documents: Sequence[TokenSequence], length: int) -> list[TokenSequence]:
    """The documents' tokens, in order, as blocks of `length`; no token is lost, the last block may be shorter.

    A block names the document that it begins in. Its first token is trained too wherever another stands before it in
    its document, but nothing in the block predicts it, so one token in `length` is context alone.
    """
    if not documents:
        return []
    token_ids = np.concatenate([d.token_ids for d in documents])
    trained = np.concatenate([d.trained for d in documents])
    ends = np.cumsum([len(d) for d in documents])
    return [
        TokenSequence(
            token_ids[start : start + length],
            trained[start : start + length],
            documents[int(np.searchsorted(ends, start, side="right"))].origin,
        )
        for start in range(0, len(token_ids), length)
        if len(token_ids) - start > 1
    ]


def mixed(
    blocks: Sequence[TokenSequence],
    general: Mapping[str, Sequence[TokenSequence]],
    shares: Mapping[str, float],
    seed: int,
) -> list[TokenSequence]:
    """The blocks, and of each general text so many that it makes up its share of all tokens.

    With N tokens of its own and shares s_i, the whole is N / (1 - sum s_i) tokens, s_i of them from text i, drawn
    without replacement until it is used up and then anew.
    """
    whole = sum(map(len, blocks)) / (1 - sum(shares.values()))
    result = list(blocks)
    for name, share in shares.items():
        rng = np.random.default_rng((seed, len(result)))
        wanted, source = share * whole, general[name]
        while wanted > 0:
            for i in rng.permutation(len(source)):
                if wanted <= 0:
                    break
                result.append(source[int(i)])
                wanted -= len(source[int(i)])
    return result
