"""score: one forward pass over a batch, and of it what objectives need. The only place that makes log-probabilities.

Positions that predict nothing never reach the output layer, and full logits are never built. Architectures whose body
cannot run a ragged stream are run one sequence after the other: slower, and equal.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.adapters.new_tokens import further_rows
from luthier.adapters.switch import adapters_off
from luthier.adapters.targets import decoder
from luthier.data.batches import TokenBatch
from luthier.kernels.attention import ATTENTION
from luthier.kernels.divergence import linear_divergence
from luthier.kernels.logprobs import HeadOptions, linear_logprobs
from luthier.kernels.streams import STREAM_MULTIPLE, Segments
from luthier.models.load import Model

__all__ = [
    "Scores",
    "divergence",
    "evaluating",
    "head_options",
    "hidden_states",
    "score",
    "scores_of",
    "sequence_logprobs",
]


@dataclass(frozen=True, slots=True)
class Scores:
    """For every target of a batch: logprobs [targets] in nats, differentiable; entropy [targets] in nats, without
    gradient unless asked for.
    """

    logprobs: Tensor
    entropy: Tensor


def score(model: Model | PreTrainedModel, batch: TokenBatch, *, temperature: float = 1.0) -> Scores:
    """log p(target | what stands before it in its own sequence), and the entropy of that distribution.

    model: as `load` gives it, or its network alone, which is what an objective is called with. temperature: that logits
    are divided by.
    """
    network = model.network if isinstance(model, Model) else model
    batch = batch.to(network.device)
    return scores_of(network, hidden_states(network, batch)[batch.target_index], batch, temperature=temperature)


def scores_of(
    network: PreTrainedModel,
    hidden: Tensor,
    batch: TokenBatch,
    *,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
) -> Scores:
    """As `score`, where the hidden states of the targets are known already, [targets, hidden]. entropy_gradient: the
    entropies are differentiable too.
    """
    head, options = network.get_output_embeddings(), head_options(network)
    logprobs, entropy = linear_logprobs(
        hidden,
        head.weight,
        head.bias,
        batch.target_ids,
        replace(options, temperature=temperature),
        further=further_rows(head),
        entropy_gradient=entropy_gradient,
    )
    return Scores(logprobs, entropy)


def sequence_logprobs(model: Model | PreTrainedModel, batch: TokenBatch) -> Tensor:
    """log p of each sequence's targets, summed, [sequences], in nats, differentiable."""
    pieces = score(model, batch).logprobs.split(list(batch.target_counts))
    return torch.stack([piece.sum() for piece in pieces])


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """For the time of the context, no dropout and no gradients."""
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train(was_training)


@torch.no_grad()
def divergence(network: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """KL(p || p_base) of the next token at every target's place, [targets] in nats, p_base being without adapters.

    Tokens that an adapter has added count for nothing: the base has no logits for them. No gradient.
    """
    batch = batch.to(network.device)
    head = network.get_output_embeddings()
    hidden, weight, bias = hidden_states(network, batch)[batch.target_index], head.weight, head.bias
    with adapters_off(network):
        other, of_base = hidden_states(network, batch)[batch.target_index], head.weight
    return linear_divergence(hidden, other, (weight, of_base), (bias, head.bias), head_options(network))


def hidden_states(network: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """The last hidden states of the stream, [tokens, hidden]."""
    _, body = decoder(network)
    if network.config._attn_implementation == ATTENTION:
        return _run_stream(body, batch)
    return torch.cat([_run_segment(body, batch, i) for i in range(len(batch.segments.lengths))])


def _run_stream(body: nn.Module, batch: TokenBatch) -> Tensor:
    """The whole stream at once, made up to a multiple of STREAM_MULTIPLE by one more sequence that nobody looks at: the
    longest one's first tokens, whose numbers are there already where eight-bit scales look for the greatest.
    """
    missing = -batch.num_tokens % STREAM_MULTIPLE
    if not missing:
        return _run(body, batch.token_ids, batch.positions, batch.segments)
    further = torch.arange(missing, device=batch.positions.device)
    alone = [s for s, parent in zip(batch.segments.slices, batch.segments.parents, strict=True) if parent is None]
    longest = max(alone, key=lambda s: s.stop - s.start)
    again = batch.token_ids[longest][further % (longest.stop - longest.start)]
    token_ids = torch.cat([batch.token_ids, again])
    positions = torch.cat([batch.positions, further])
    return _run(body, token_ids, positions, batch.segments.and_one_more(missing))[: batch.num_tokens]


def _run_segment(body: nn.Module, batch: TokenBatch, number: int) -> Tensor:
    """A segment by itself, computed with what it goes on from."""
    slices, parent = batch.segments.slices, batch.segments.parents[number]
    pieces = [slices[number]] if parent is None else [slices[parent], slices[number]]
    token_ids, positions = (torch.cat([t[p] for p in pieces]) for t in (batch.token_ids, batch.positions))
    return _run(body, token_ids, positions, None)[-batch.segments.lengths[number] :]


def _run(body: nn.Module, token_ids: Tensor, positions: Tensor, segments: Segments | None) -> Tensor:
    further = {} if segments is None else {"segments": segments}
    output = body(input_ids=token_ids[None], position_ids=positions[None], use_cache=False, **further)
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


def head_options(network: PreTrainedModel) -> HeadOptions:
    """What architectures do to their logits, by the names in their configurations: Gemma's soft cap, Cohere's and
    Granite's scale.
    """
    config = network.config.get_text_config()
    divisor = getattr(config, "logits_scaling", None)
    scale = getattr(config, "logit_scale", None)
    return HeadOptions(
        scale=(1.0 if scale is None else scale) / (1.0 if divisor is None else divisor),
        softcap=getattr(config, "final_logit_softcapping", None),
    )
