"""Bottleneck adapters: a small network with a narrow middle on the sublayers of each block.

They sit on attention and feed-forward as wholes, on what these give before the block adds it to its residual. Which of
a block's children these are is known by the names that architectures use; a block without them is refused by name.
There is one of each at most in a block: of several feed-forward modules side by side, the first name below counts.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from luthier.adapters.adapted import Base, bare
from luthier.adapters.base import Adapter, Start
from luthier.adapters.starts import kaiming_uniform
from luthier.adapters.targets import decoder_blocks
from luthier.errors import AdapterError
from luthier.kernels.bottleneck import Middle, Weights, add_bottleneck

__all__ = ["Bottleneck", "sublayer_input", "sublayers", "with_output"]

_SUBLAYERS: Mapping[str, Sequence[str]] = {  # by the names that transformers' models give them
    "attention": ("self_attn", "self_attention", "attention", "attn", "linear_attn", "temporal_block"),
    "feed_forward": ("mlp", "feed_forward", "block_sparse_moe", "ffn", "moe", "mlp_block"),
}


class Bottleneck(Adapter):
    """y + s (U f(D y + d) + u)        Houlsby et al. 2019, section 2.1; after the feed-forward layer alone, Pfeiffer et
    al. 2020; with D x for D y, x being what the sublayer reads, He et al. 2022, table 1 (parallel adapter)

    y: [..., hidden], what the sublayer gives. D [size, hidden] starts as kaiming, U [hidden, size], d and u at zero.
    Dropout acts on f's output, which U reads.
    """

    file_names: ClassVar = {
        **{"adapter_down": "adapter_down.weight", "adapter_down_bias": "adapter_down.bias"},
        **{"adapter_up": "adapter_up.weight", "adapter_up_bias": "adapter_up.bias"},
    }

    @classmethod
    def places(cls, network: nn.Module, settings: Any) -> dict[str, nn.Module]:
        return sublayers(network, settings.after)

    @property
    def sees_rows(self) -> bool:
        return False

    def create(self) -> None:
        hidden, size = self.config.hidden_size, self.settings.size  # type: ignore[union-attr]
        self.adapter_down = Parameter(torch.zeros(size, hidden, device=self.device))
        self.adapter_down_bias = Parameter(torch.zeros(size, device=self.device))
        self.adapter_up = Parameter(torch.zeros(hidden, size, device=self.device))
        self.adapter_up_bias = Parameter(torch.zeros(hidden, device=self.device))

    @torch.no_grad()
    def initialize(self, start: Start) -> None:
        """D uniform in +-1/sqrt(hidden), all else zero."""
        self.adapter_down.copy_(kaiming_uniform(tuple(self.adapter_down.shape), start.generator))

    def forward(self, *inputs: Any, base: Base, **options: Any) -> Any:
        result = base(*inputs, **options)
        output: Tensor = result[0] if isinstance(result, tuple) else result
        x = sublayer_input(self.name, inputs, options).flatten(0, -2) if self.settings.parallel else None
        settings = self.settings
        middle = Middle(settings.activation, settings.scale, settings.dropout if self.training else 0.0)
        weights = Weights(self.adapter_down, self.adapter_down_bias, self.adapter_up, self.adapter_up_bias)
        return with_output(result, add_bottleneck(output.flatten(0, -2), x, weights, middle).view(output.shape))


def sublayers(network: nn.Module, after: str) -> dict[str, nn.Module]:
    """The attention sublayers, the feed-forward ones, or both, of all blocks, by dotted name, in order.

    Raises AdapterError for a model without blocks, and for a block that has no such child.
    """
    kinds = _SUBLAYERS if after == "both" else {after: _SUBLAYERS[after]}
    blocks = decoder_blocks(network)
    if not blocks:
        raise AdapterError(f"{type(network).__name__}: has no repeated blocks that a bottleneck can sit in; use lora")
    found = {}
    for path, block in blocks.items():
        children = {name: bare(child) for name, child in block.named_children()}
        for kind, names in kinds.items():
            known = next((name for name in names if name in children), None)
            if known is None:
                raise AdapterError(
                    f"{path}: no child of it is known as its {kind.replace('_', '-')} sublayer, its children are "
                    f"{', '.join(children)}; use an adapter of linear layers, such as lora"
                )
            found[f"{path}.{known}"] = children[known]
    return found


def sublayer_input(name: str, inputs: Sequence[Any], options: Mapping[str, Any]) -> Tensor:
    """The hidden states that a sublayer is called with. Raises AdapterError where they are not to be found."""
    states = inputs[0] if inputs else options.get("hidden_states")
    if not isinstance(states, Tensor):
        raise AdapterError(
            f"{name}: is called without hidden states that an adapter beside it could read; set parallel: false"
        )
    return states


def with_output(result: Any, output: Tensor) -> Any:
    """What a sublayer returned, with another output: it alone, or first in a tuple (attention gives weights too)."""
    return (output, *result[1:]) if isinstance(result, tuple) else output
