"""Language modelling: the loss of pre-training and of supervised fine-tuning, which differ only in their masks."""

from torch import Tensor

from luthier.objectives.loss import Loss

__all__ = ["language_modelling"]


def language_modelling(logprobs: Tensor, weights: Tensor, entropy: Tensor) -> Loss:
    """-w_t log p(x_t | x_<t), one loss a trained token.

    logprobs, weights, entropy: [targets], in nats. The unit is the token, so a step's loss is the mean over all its
    trained tokens however they are cut into micro-batches.
    """
    return Loss(-logprobs * weights, unit="tokens", metrics={"entropy": entropy})
