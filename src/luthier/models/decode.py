"""One network's part in generation: prompts read once, then one new token of each answer at a time.

Both are passes of the same body that training runs, over a stream without padding. Only networks whose attention is
Luthier's can do it, and whose adapters see one token at a time; `can_decode` says so.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from luthier.adapters.adapted import AdaptedLinear
from luthier.adapters.inject import adapted_layers
from luthier.adapters.targets import decoder
from luthier.kernels.attention import ATTENTION
from luthier.kernels.decoding import Decoding, PromptKeys
from luthier.kernels.logprobs import logits_of
from luthier.kernels.streams import STREAM_MULTIPLE, Segments
from luthier.models.score import head_options

__all__ = ["can_decode", "next_logits", "read_prompts"]


def can_decode(network: PreTrainedModel) -> bool:
    """Whether `read_prompts` and `next_logits` compute what the network computes."""
    adapted = adapted_layers(network).values()
    own = network.config._attn_implementation == ATTENTION
    return own and all(isinstance(layer, AdaptedLinear) and layer.rows is None for layer in adapted)


def read_prompts(network: PreTrainedModel, prompts: Sequence[NDArray[np.int32]]) -> tuple[PromptKeys, Tensor]:
    """The prompts' keys and values, and the logits of what follows each, [prompts, vocabulary] in float32."""
    lengths = [len(prompt) for prompt in prompts]
    missing = -sum(lengths) % STREAM_MULTIPLE
    segments, keys = Segments.alone([*lengths, missing] if missing else lengths), PromptKeys(lengths)
    ids = np.concatenate([*prompts, np.zeros(missing, dtype=np.int32)]).astype(np.int64)
    positions = torch.cat([torch.arange(length) for length in segments.lengths])
    _, body = decoder(network)
    output = body(
        input_ids=torch.from_numpy(ids)[None].to(network.device),
        position_ids=positions[None].to(network.device),
        use_cache=False,
        segments=segments,
        prompt_keys=keys,
    )
    last = torch.tensor(lengths, device=network.device).cumsum(0) - 1
    return keys, _logits(network, output.last_hidden_state[0, last])


def next_logits(network: PreTrainedModel, tokens: Tensor, decoding: Decoding) -> Tensor:
    """The logits of what follows each answer's new token, [rows, vocabulary] in float32. tokens: [rows]."""
    _, body = decoder(network)
    output = body(input_ids=tokens[None], position_ids=decoding.positions[None], use_cache=False, decoding=decoding)
    return _logits(network, output.last_hidden_state[0])


def _logits(network: PreTrainedModel, hidden: Tensor) -> Tensor:
    return logits_of(network.get_output_embeddings()(hidden), head_options(network))
