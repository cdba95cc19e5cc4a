"""One token more for each answer, without calling the network's modules: the same sums in fewer, larger products.

For a token of a few answers, calling modules takes longer than computing what they compute. Here layers that read the
same input are one product over weights in few bytes, adapters of low rank are two small ones more for all of them, and
nothing lies between. It is had for networks of one well-known build; the others are called as they are.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.adapters.adapted import Adapted, bare
from luthier.adapters.targets import decoder
from luthier.kernels.attention import ATTENTION
from luthier.kernels.decoding import Decoding, decode_attention
from luthier.kernels.logprobs import logits_of
from luthier.kernels.rotary import rotated
from luthier.models.packed import PACKED, versions_of
from luthier.models.score import head_options

__all__ = ["PLAIN", "Lean", "can_be_lean"]

PLAIN = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Architectures whose layers are x + attention(norm(x)) and x + down(silu(gate(norm(x))) * up(norm(x))), both norms by
the root of the mean square, positions by rotation of whole heads."""


def can_be_lean(network: PreTrainedModel, form: str) -> bool:
    """Whether `Lean` computes what the network computes with the adapters that now apply."""
    config = network.config.get_text_config()
    plain = config.model_type in PLAIN and getattr(config, "hidden_act", None) == "silu"
    if form not in PACKED or not plain or network.config._attn_implementation != ATTENTION:
        return False
    adapted = [module for module in network.modules() if isinstance(module, Adapted)]
    return all(_factors(module) is not None for module in adapted)


def _factors(place: nn.Module) -> list[tuple[Tensor, Tensor]] | None:
    """What the adapters that apply add, as factors A and B of B A x; None where it is not of this kind."""
    if not isinstance(place, Adapted):
        return []
    idle = [adapter for name, adapter in place.adapters.items() if name not in place.active]
    shared = any(place.shares.get(name, 1.0) != 1 for name in place.active)
    if shared or place.rows is not None or place.is_merged or any(adapter.stripped for adapter in idle):
        return None
    found = [place.adapters[name].low_rank() for name in place.active]
    pairs = [pair for pair in found if pair is not None]
    return pairs if len(pairs) == len(found) else None


class _Product:
    """Linear layers that read the same input, as one: x [rows, in] -> [rows, all their outputs], in x's type."""

    def __init__(self, places: Sequence[nn.Module], form: str) -> None:
        layers: list[Any] = [bare(place) for place in places]
        self.places, self.made_of = places, _made_of(places)
        self.sizes = [layer.out_features for layer in layers]
        weights = [layer.weight.detach() for layer in layers]
        self.multiply = PACKED[form](weights[0] if len(weights) == 1 else torch.cat(weights), _biases(layers))
        self.a: Tensor | None = None
        self.b: Tensor | None = None

    @property
    def is_current(self) -> bool:
        """Whether nothing was written into the weights since this was made of them."""
        return self.made_of == _made_of(self.places)

    @property
    def is_trained(self) -> bool:
        """Whether an optimizer may write into them, of which a fused one leaves no trace."""
        return any(p.requires_grad for place in self.places for p in bare(place).parameters())

    def read_adapters(self) -> None:
        """Takes the factors as they are now: A of all layers one below the other, B in blocks along a diagonal."""
        found = [_factors(place) or [] for place in self.places]
        self.a = self.b = None
        if any(found):
            self.a = torch.cat([a.float() for pairs in found for a, _ in pairs])
            empty = [torch.zeros(size, 0, device=self.a.device) for size in self.sizes]
            blocks = [
                torch.cat([no, *(b.float() for _, b in pairs)], 1) for no, pairs in zip(empty, found, strict=True)
            ]
            self.b = torch.block_diag(*blocks)

    def __call__(self, x: Tensor) -> Tensor:
        product = self.multiply(x)
        if self.a is not None and self.b is not None:
            product.addmm_(x.float() @ self.a.T, self.b.T)
        return product.to(x.dtype)


def _made_of(places: Sequence[nn.Module]) -> list[tuple[nn.Module, list[tuple[int, int]]]]:
    return [(bare(place), versions_of(bare(place))) for place in places]


def _biases(layers: Sequence[Any]) -> Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    none = [torch.zeros(layer.out_features, dtype=layer.weight.dtype) for layer in layers]
    return torch.cat([n if layer.bias is None else layer.bias.detach() for n, layer in zip(none, layers, strict=True)])


@dataclass(frozen=True, slots=True)
class _Norm:
    weight: Tensor
    eps: float

    @classmethod
    def of(cls, module: Any) -> "_Norm":
        named = vars(module)
        return cls(module.weight.detach(), named["eps"] if "eps" in named else named["variance_epsilon"])

    def __call__(self, x: Tensor) -> Tensor:
        return torch.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _Layer:
    """A layer of the network. Of its attention, the products are those of queries, keys and values in this order."""

    def __init__(self, layer: Any, number: int, products: Sequence[_Product]) -> None:
        attention = layer.self_attn
        self.into_heads, self.out_of_heads, self.gate_and_up, self.down = products
        self.number, self.size, self.scale = number, attention.head_dim, attention.scaling
        of_all = getattr(attention.config, "sliding_window", None)  # of single layers where these say one
        self.window: int | None = vars(attention).get("sliding_window", of_all)
        self.before, self.between = _Norm.of(layer.input_layernorm), _Norm.of(layer.post_attention_layernorm)
        norms = dict(attention.named_children())
        self.of_queries, self.of_keys = (_Norm.of(norms[n]) if n in norms else None for n in ("q_norm", "k_norm"))
        self.num_queries, self.num_keys = (size // self.size for size in self.into_heads.sizes[:2])

    def add_to(self, x: Tensor, cos: Tensor, sin: Tensor, decoding: Decoding) -> None:
        """Adds what the layer adds, in place. x: [rows, hidden]. cos, sin: [rows, 1, head size / 2]."""
        heads = self.into_heads(self.before(x)).view(len(x), -1, self.size)
        query, key, value = heads.split([self.num_queries, self.num_keys, self.num_keys], dim=1)
        query = query if self.of_queries is None else self.of_queries(query)
        key = key if self.of_keys is None else self.of_keys(key)
        turned = (rotated(query, cos, sin), rotated(key, cos, sin), value)
        query, key, value = (t.transpose(0, 1)[None] for t in turned)
        attended = decode_attention(query, key, value, decoding, self.number, scale=self.scale, window=self.window)
        x += self.out_of_heads(attended.reshape(len(x), -1))
        gate, up = self.gate_and_up(self.between(x)).chunk(2, dim=-1)
        x += self.down(torch.nn.functional.silu(gate).mul_(up))


class Lean:
    """`next_logits` of a network for which `can_be_lean` holds."""

    def __init__(self, network: PreTrainedModel, form: str, *, fixed: bool = False) -> None:
        """form: of PACKED. fixed: nobody trains the network, whatever of it could be."""
        self.network, self.form, self.fixed = network, form, fixed
        self.body: Any = decoder(network)[1]
        self.products: dict[str, _Product] = {}

    def refresh(self) -> None:
        """Stores weights that are not stored yet, or were written into, and takes adapters as they are now."""
        places = self._places()
        missing = [name for name in places if not self._has(name)]
        with torch.inference_mode(), ThreadPoolExecutor(torch.get_num_threads()) as pool:
            made = pool.map(lambda name: _Product(places[name], self.form), missing)
            self.products |= dict(zip(missing, made, strict=True))
            for product in self.products.values():
                product.read_adapters()
        self.layers = [
            _Layer(layer, i, [self.products[f"{i}.{part}"] for part in ("qkv", "o", "gate_up", "down")])
            for i, layer in enumerate(self.body.layers)
        ]
        self.norm = _Norm.of(self.body.norm)

    def _has(self, name: str) -> bool:
        product = self.products.get(name)
        return product is not None and product.is_current and (self.fixed or not product.is_trained)

    def _places(self) -> dict[str, list[nn.Module]]:
        found: dict[str, list[nn.Module]] = {"head": [self.network.get_output_embeddings()]}
        for i, layer in enumerate(self.body.layers):
            attention, block = layer.self_attn, layer.mlp
            found[f"{i}.qkv"] = [attention.q_proj, attention.k_proj, attention.v_proj]
            found[f"{i}.o"] = [attention.o_proj]
            found[f"{i}.gate_up"] = [block.gate_proj, block.up_proj]
            found[f"{i}.down"] = [block.down_proj]
        return found

    def next_logits(self, tokens: Tensor, decoding: Decoding) -> Tensor:
        """The logits of what follows each answer's new token, [rows, vocabulary] in float32. tokens: [rows]."""
        x = self.body.embed_tokens(tokens)
        cos, sin = (t[0, :, None, : t.shape[-1] // 2] for t in self.body.rotary_emb(x[None], decoding.positions[None]))
        for layer in self.layers:
            layer.add_to(x, cos, sin, decoding)
        return logits_of(self.products["head"](self.norm(x)), head_options(self.network))
