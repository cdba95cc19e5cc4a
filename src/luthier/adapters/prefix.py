"""Prefix tuning: learned keys and values before those of every text, in every attention layer.

The adapter sits on the whole body. It hands the prefix down through the layers, to the attention function of this
package, and moves the text behind it; a cache holds the text alone. Whether the parameters were trained as such or
through an encoder, what is saved and loaded is the prefix itself.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import DynamicCache

from luthier.adapters.adapted import Base
from luthier.adapters.base import Adapter, PeftForm, Start
from luthier.adapters.prompt import starting_tokens, whole_body
from luthier.adapters.starts import gaussian, kaiming_uniform
from luthier.errors import AdapterError
from luthier.kernels.attention import ATTENTION, KeysAndValues
from luthier.kernels.linear import linear

__all__ = ["Prefix"]

_FLAT = "prompt_embeddings"
_COUNT_BY_MASK = ("opt",)  # architectures that pass over padding where no positions are given; others count it


class Prefix(Adapter):
    """softmax(q [P_k; K]') [P_v; V] in every attention layer        Li and Liang 2021, section 4

    P: [virtual tokens, layers * 2 * key heads * head size], trained as such; or made by an encoder, section 4.3:
    P = W_flat tanh(W_hidden E + b_hidden) + b_flat, E: [virtual tokens, key heads * head size].
    """

    peft = PeftForm("PREFIX_TUNING", {"num_virtual_tokens": "num_virtual_tokens"})

    @classmethod
    def places(cls, network: nn.Module, settings: Any) -> dict[str, nn.Module]:
        return whole_body(network)

    def create(self) -> None:
        config: Any = self.config
        self._refuse_other_attention()
        self.length: int = self.settings.num_virtual_tokens
        self.num_layers: int = config.num_hidden_layers
        self.num_heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.head_size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        size = self.num_heads * self.head_size
        flat = 2 * self.num_layers * size
        hidden = self.settings.encoder_hidden_size
        self.encodes = hidden is not None
        if hidden is None:
            self.prompt_embeddings = self._zeros(self.length, flat)
            return
        self.embedding = self._zeros(self.length, size)
        self.hidden_weight, self.hidden_bias = self._zeros(hidden, size), self._zeros(hidden)
        self.flat_weight, self.flat_bias = self._zeros(flat, hidden), self._zeros(flat)

    def _zeros(self, *shape: int) -> Parameter:
        return Parameter(torch.zeros(shape, device=self.device))

    def _refuse_other_attention(self) -> None:
        used = getattr(self.config, "_attn_implementation", None)
        if used != ATTENTION:
            raise AdapterError(
                f"{self.name}: its layers run {used} attention, which would pass over a prefix; choose type: prompt, "
                f"or load the model with {ATTENTION}'s attention if its architecture has it"
            )

    @torch.no_grad()
    def initialize(self, start: Start) -> None:
        """The keys and values that the model has for a text or for random tokens; at random as PEFT draws them."""
        if self.encodes:
            self._initialize_encoder(start.generator)
        elif self.settings.init == "random":
            self.prompt_embeddings.copy_(gaussian(tuple(self.prompt_embeddings.shape), 1.0, start.generator))
        else:
            tokens = starting_tokens(self.settings, start, num_embeddings=len(self.place.get_input_embeddings().weight))
            self.prompt_embeddings.copy_(self._keys_and_values(tokens.to(self.device)))

    def _initialize_encoder(self, generator: torch.Generator) -> None:
        """Embeddings standard normal, weights and biases uniform in +-1/sqrt(in)."""
        self.embedding.copy_(gaussian(tuple(self.embedding.shape), 1.0, generator))
        for weight, bias in ((self.hidden_weight, self.hidden_bias), (self.flat_weight, self.flat_bias)):
            bound = weight.shape[1] ** -0.5
            weight.copy_(kaiming_uniform(tuple(weight.shape), generator))
            bias.copy_(torch.empty(len(bias)).uniform_(-bound, bound, generator=generator))

    def _keys_and_values(self, tokens: Tensor) -> Tensor:
        """Those of the body for a text of these tokens, laid out as the parameters are."""
        training, cache = self.place.training, DynamicCache()
        try:
            self.place.eval()(input_ids=tokens[None], past_key_values=cache, use_cache=True)
        finally:
            self.place.train(training)
        parts = torch.stack([t[0] for layer in cache.layers for t in (layer.keys, layer.values)])
        return parts.permute(2, 0, 1, 3).flatten(1).float()

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        base: Base,
        inputs_embeds: Tensor | None = None,
        prefix: Sequence[KeysAndValues] | None = None,
        **options: Any,
    ) -> Any:
        """As the body: of one stream of sequences or of a padded batch, with a cache or without. options: what else
        transformers gives to a body. Raises AdapterError where the attention was changed, and for two prefixes.
        """
        self._refuse_other_attention()
        if prefix is not None:
            raise AdapterError(f"{self.name}: two prefixes are active at once; switch one of them off")
        if options.get("position_ids") is None:
            options["position_ids"] = self._positions(inputs_embeds if input_ids is None else input_ids, options)
        options["position_ids"] = options["position_ids"] + self.length
        return base(input_ids=input_ids, inputs_embeds=inputs_embeds, prefix=self._by_layer(), **options)

    def _positions(self, given: Any, options: Mapping[str, Any]) -> Tensor:
        """What the body would count itself, [sequences or 1, tokens]."""
        cache, mask = options.get("past_key_values"), options.get("attention_mask")
        past = 0 if cache is None else cache.get_seq_length()
        if mask is not None and self.config is not None and self.config.model_type in _COUNT_BY_MASK:
            counted: Tensor = mask.long().cumsum(1) * mask.long() - 1
            return counted[:, -given.shape[1] :]
        return torch.arange(given.shape[1], device=given.device)[None] + past

    def _prefix(self) -> Tensor:
        """[virtual tokens, layers * 2 * key heads * head size], keys before values."""
        if not self.encodes:
            return self.prompt_embeddings
        hidden = torch.tanh(linear(self.embedding, self.hidden_weight, self.hidden_bias))
        return linear(hidden, self.flat_weight, self.flat_bias)

    def _by_layer(self) -> tuple[KeysAndValues, ...]:
        shape = (self.length, 2 * self.num_layers, self.num_heads, self.head_size)
        parts = self._prefix().view(shape).permute(1, 2, 0, 3).unbind(0)
        return tuple(zip(parts[0::2], parts[1::2], strict=True))

    @torch.no_grad()
    def saved(self) -> dict[str, Tensor]:
        """The prefix itself, under a name without a module, as PEFT saves it."""
        return {_FLAT: self._prefix().detach()}

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """From then on the prefix is trained as such: no encoder can be found that makes it."""
        if self.encodes:
            del self.embedding, self.hidden_weight, self.hidden_bias, self.flat_weight, self.flat_bias
            self.encodes = False
        self.prompt_embeddings = Parameter(tensors[_FLAT].to(self.device, torch.float32, copy=True))

    @classmethod
    def peft_words(cls, settings: Any, adapters: Sequence[Any]) -> dict[str, object]:
        """The sizes by which the flat parameters are unfolded."""
        if not adapters:
            return {}
        one: Prefix = adapters[0]
        sizes = {"num_attention_heads": one.num_heads, "num_layers": one.num_layers, "num_transformer_submodules": 1}
        return {**sizes, "prefix_projection": False, "token_dim": one.num_heads * one.head_size}
