"""Log-probabilities of chosen tokens straight from hidden states, without the full logits matrix.

The output layer of a small model is a quarter of its work and nearly all of its memory: 2,000 tokens times 49,152
words are 400 MB of logits, and as much again for each gradient. Here rows are taken in chunks, and what the backward
pass needs is formed while a chunk's probabilities are at hand. For a frozen output layer that is one vector a row, so
nothing is computed twice; where the output layer is trained, a chunk's probabilities are formed a second time in the
backward pass. Softmax, entropy and gradient of a chunk go over a few rows at a time, which stay in the cache. Rows of
the output layer that are kept apart from it, as an adapter trains those of new tokens, join it there.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from luthier.kernels.linear import linear, product
from luthier.kernels.turns import slices, turns

__all__ = ["FurtherRows", "HeadOptions", "linear_logprobs", "linear_logprobs_plain", "logits_of"]

CHUNK_BYTES = (
    48 * 2**20
)  # of float32 logits: with half as many rows, reading the output layer takes a third of the time
CACHED_BYTES = 2 * 2**20
ROW_MULTIPLE = 32  # of a chunk: each size of a product is compiled once and kept


@dataclass(frozen=True, slots=True)
class HeadOptions:
    """What happens between the output layer's product and the softmax: logits = softcap(scale * (h W^T + b)) / T."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    chunk_bytes: int = CHUNK_BYTES


@dataclass(frozen=True, slots=True)
class FurtherRows:
    """Rows of the output layer that are kept apart from it.

    rows: [k, hidden]. columns: the token of each, ascending. Those that the output layer has a row for stand for that
    row; those after them follow it without a gap.
    """

    rows: Tensor
    columns: tuple[int, ...]

    def num_replaced(self, num_columns: int) -> int:
        """How many of them stand for a row of an output layer of this length."""
        return sum(column < num_columns for column in self.columns)

    def products(self, hidden: Tensor, bias: Tensor | None) -> Tensor:
        """h R^T + b, [..., k]; a token has the bias that the output layer has for it, or none."""
        products = torch.nn.functional.linear(hidden, self.rows.to(hidden.dtype))
        if bias is None:
            return products
        known = list(self.columns[: self.num_replaced(len(bias))])
        return products + torch.nn.functional.pad(bias[known], (0, len(self.columns) - len(known)))

    def joined(self, others: Tensor, own: Tensor) -> Tensor:
        """The output layer's products [..., vocabulary] with these rows' [..., k] in their columns."""
        replaced = self.num_replaced(others.shape[-1])
        if replaced:
            columns = torch.tensor(self.columns[:replaced], device=own.device)
            others = others.index_copy(-1, columns, own[..., :replaced])
        return torch.cat([others, own[..., replaced:]], -1) if replaced < len(self.columns) else others

    def separated(self, joined: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
        """Of a gradient with respect to what `joined` gives, the parts of the output layer's products and of these."""
        columns = torch.tensor(self.columns, device=joined.device)
        own, others = joined.index_select(-1, columns), joined[..., :num_columns]
        if replaced := self.num_replaced(num_columns):
            others = others.index_fill(-1, columns[:replaced], 0)
        return others, own


def linear_logprobs_plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: HeadOptions
) -> tuple[Tensor, Tensor]:
    """The same by definition, with full logits; what `linear_logprobs` is tested against."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * options.scale
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    logprobs = torch.log_softmax(logits / options.temperature, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets[:, None]).squeeze(-1), entropy.detach()


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: HeadOptions,
    *,
    further: FurtherRows | None = None,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """log softmax(h W^T + b)[target] and the entropy of the same distribution, in nats.

    hidden: [targets, hidden]. weight: [vocabulary, hidden]. bias: [vocabulary] or None. targets: [targets].
    further: rows that stand for some of the weight's, or follow them. entropy_gradient: entropies are differentiable
    too, which takes another product with the weight; not with further rows.
    Returns log-probabilities [targets] (differentiable in hidden, weight, bias and the further rows) and entropies
    [targets], both float32, or float64 where hidden is.
    """
    assert further is None or not entropy_gradient, "entropies have no gradient where rows are kept apart"
    own = None if further is None else further.products(hidden, bias)
    logprobs, entropy = _LinearLogprobs.apply(hidden, weight, bias, targets, options, own, further, entropy_gradient)
    return logprobs, entropy


def _chunks(num_rows: int, vocabulary: int, chunk_bytes: int) -> list[slice]:
    """Equal ones, for a last chunk of three rows would waste the read of the output layer."""
    most = max(ROW_MULTIPLE, chunk_bytes // (4 * vocabulary) // ROW_MULTIPLE * ROW_MULTIPLE)
    num_chunks = max(1, -(-num_rows // most))
    rows = _round_up(-(-num_rows // num_chunks))
    return slices(num_rows, rows)


def _length(rows: slice) -> tuple[int]:
    return (rows.stop - rows.start,)


def _round_up(rows: int) -> int:
    return max(1, -(-rows // ROW_MULTIPLE)) * ROW_MULTIPLE


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True, slots=True)
class _Own:
    """A chunk's products with the further rows, [rows, k], which become its gradient in place."""

    products: Tensor
    further: FurtherRows

    @classmethod
    def of(cls, products: Tensor | None, further: FurtherRows | None, rows: slice) -> "_Own | None":
        return None if products is None or further is None else cls(products[rows], further)

    def join(self, products: Tensor, few: slice) -> Tensor:
        return self.further.joined(products, self.products[few])

    def separate(self, gradient: Tensor, few: slice, num_columns: int) -> Tensor:
        others, self.products[few] = self.further.separated(gradient, num_columns)
        return others


class _LinearLogprobs(Function):
    """own: the products with the further rows, [targets, k]; where they come from, autograd knows."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: HeadOptions,
        own: Tensor | None,
        further: FurtherRows | None,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(len(hidden), dtype=_wide(hidden.dtype), device=hidden.device)
        entropy = torch.empty_like(logprobs)
        head_is_trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        pull = torch.empty_like(hidden) if hidden.requires_grad and not head_is_trained else None
        entropy_pull = torch.empty_like(hidden) if pull is not None and entropy_gradient else None
        kept = own if own is None or pull is None else own.clone()
        for rows in turns(_chunks(len(hidden), len(weight), options.chunk_bytes), _length, over=hidden):
            products, part = _products(hidden[rows], weight, bias), _Own.of(kept, further, rows)
            also = None if entropy_pull is None else torch.zeros_like(products)
            logprobs[rows], entropy[rows] = _score(
                products, targets[rows], options, part, differentiate=pull is not None, of_entropy=also
            )
            if pull is not None:  # d logprob / d hidden = (onehot(target) - softmax) W
                pull[rows] = product(products, weight.T)[: len(targets[rows])]
            if entropy_pull is not None and also is not None:
                entropy_pull[rows] = product(also, weight.T)[: len(targets[rows])]
            del products, also  # before the next chunk's are there
        ctx.save_for_backward(hidden, weight, bias, targets, pull, kept, entropy_pull)
        ctx.options, ctx.further, ctx.entropy_gradient = options, further, entropy_gradient
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, pull, own, entropy_pull = ctx.saved_tensors
        if pull is not None:
            grads = [None if t is None else t * grad_logprobs[:, None].to(t.dtype) for t in (pull, own)]
            if entropy_pull is not None:
                grads[0] = grads[0] + entropy_pull * grad_entropy[:, None].to(pull.dtype)
            return grads[0], None, None, None, None, grads[1], None, None
        *grads, grad_own = _backward_through_head(ctx, grad_logprobs, grad_entropy, hidden, weight, bias, targets, own)
        return (*grads, None, None, grad_own, None, None)


def _products(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """h W^T + b, with rows of zeros in the hidden states up to a multiple of ROW_MULTIPLE."""
    return linear(torch.nn.functional.pad(hidden, (0, 0, 0, _round_up(len(hidden)) - len(hidden))), weight, bias)


def _score(
    products: Tensor,
    targets: Tensor,
    options: HeadOptions,
    own: _Own | None,
    *,
    differentiate: bool,
    of_entropy: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of the first len(targets) rows. Each row is read once from memory, and where a
    gradient is wanted written once: `products`, and `own`, then hold d logprob / d product. of_entropy: like products,
    gets d entropy / d product, with p_j (log p_j + H) taken off for each j.
    """
    logprobs = torch.empty(len(targets), dtype=_wide(products.dtype), device=products.device)
    entropy = torch.empty_like(logprobs)
    at_once = max(1, CACHED_BYTES // (4 * products.shape[1])) if products.device.type == "cpu" else len(products)
    for rows in turns(slices(len(targets), at_once), _length, over=products):
        of_few = None if of_entropy is None else of_entropy[rows]
        logprobs[rows], entropy[rows] = _score_few(
            products, rows, targets[rows], options, own, differentiate=differentiate, of_entropy=of_few
        )
    return logprobs, entropy


def _score_few(
    products: Tensor,
    rows: slice,
    targets: Tensor,
    options: HeadOptions,
    own: _Own | None,
    *,
    differentiate: bool,
    of_entropy: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `_score`, of rows that are so few that they stay in the cache; targets and of_entropy are theirs alone."""
    logits = logits_of(products[rows] if own is None else own.join(products[rows], rows), options)
    target, peak = targets[:, None], logits.amax(-1, keepdim=True)
    minus_softmax = (logits - peak).exp_()
    total = minus_softmax.sum(-1, keepdim=True)
    minus_softmax.div_(-total)
    normalizer = total.log_().add_(peak)
    logprobs = (logits.gather(-1, target) - normalizer).squeeze(-1)
    entropy = (normalizer + (minus_softmax * logits).sum(-1, keepdim=True)).squeeze(-1)
    if of_entropy is not None:
        gradient = (logits - normalizer).add_(entropy[:, None]).mul_(minus_softmax)
        of_entropy.copy_(_logits_gradient(gradient, logits, options))
    if differentiate:
        gradient = minus_softmax.scatter_add_(-1, target, torch.ones_like(normalizer))
        gradient = _logits_gradient(gradient, logits, options)
        products[rows] = gradient if own is None else own.separate(gradient, rows, products.shape[1])
    return logprobs, entropy


def logits_of(products: Tensor, options: HeadOptions) -> Tensor:
    """softcap(scale * products) / temperature, in float32 or wider; in place where the products are wide enough."""
    logits = products.to(_wide(products.dtype))
    if options.scale != 1.0:
        logits = logits.mul_(options.scale)
    if options.softcap is not None:
        logits = logits.div_(options.softcap).tanh_().mul_(options.softcap)
    return logits if options.temperature == 1.0 else logits.div_(options.temperature)


def _logits_gradient(gradient: Tensor, logits: Tensor, options: HeadOptions) -> Tensor:
    """Through the temperature, the soft cap and the scale, back to the product h W^T, in place.

    d softcap(z) / dz = 1 - (softcap(z) / c)^2
    """
    factor = options.scale / options.temperature
    if options.softcap is not None:
        gradient = gradient.mul_(1 - (logits * (options.temperature / options.softcap)).square_())
    return gradient.mul_(factor) if factor != 1.0 else gradient


def _backward_through_head(
    ctx: Any,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    own: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_hidden = torch.empty_like(hidden) if needs_hidden else None
    grad_weight = torch.zeros(weight.shape, dtype=_wide(weight.dtype), device=weight.device) if needs_weight else None
    grad_bias = torch.zeros(len(weight), dtype=_wide(weight.dtype), device=weight.device) if needs_bias else None
    grad_own = None if own is None else own.clone()
    for rows in turns(_chunks(len(hidden), len(weight), ctx.options.chunk_bytes), _length, over=hidden):
        products, part = _products(hidden[rows], weight, bias), _Own.of(grad_own, ctx.further, rows)
        also = torch.zeros_like(products) if ctx.entropy_gradient else None
        _score(products, targets[rows], ctx.options, part, differentiate=True, of_entropy=also)
        gradient = products[: len(targets[rows])].mul_(grad_logprobs[rows, None])
        if also is not None:
            gradient += also[: len(gradient)] * grad_entropy[rows, None]
        if grad_hidden is not None:
            grad_hidden[rows] = product(gradient, weight.T)
        if grad_weight is not None:
            grad_weight += gradient.T @ hidden[rows]
        if grad_bias is not None:
            grad_bias += gradient.sum(0, dtype=grad_bias.dtype)
        del products, also, gradient  # before the next chunk's are there
    if grad_own is not None:
        grad_own.mul_(grad_logprobs[:, None])
    narrow_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
    narrow_bias = None if grad_bias is None or bias is None else grad_bias.to(bias.dtype)
    return grad_hidden, narrow_weight, narrow_bias, grad_own
