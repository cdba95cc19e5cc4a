"""Rows of the embedding and of the output layer that an adapter trains: of new tokens, or of known ones.

No weight of the model changes or grows. The embedding looks the trained tokens up in the adapter's rows, and the output
layer's logits for them are products with these. Layers that share their weight share the rows. New tokens are added to
a copy of the tokenizer, whose next numbers they get; where the embedding has spare rows, as many do, these numbers may
be among them. Files have the form of PEFT's trainable tokens.
"""

from collections.abc import Mapping, Sequence
from copy import copy, deepcopy
from itertools import pairwise
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import AddedToken, PreTrainedTokenizerBase

from luthier.adapters.adapted import Adapted, Base, bare
from luthier.adapters.base import Adapter, Start
from luthier.adapters.targets import Linear, named_places
from luthier.errors import AdapterError, RecipeError
from luthier.kernels.logprobs import FurtherRows
from luthier.recipe.adapters import AnyAdapter

__all__ = ["TokenRows", "further_rows", "knowing", "numbered", "tie_rows", "token_words", "with_tokens"]

S = TypeVar("S", bound=AnyAdapter)


class TokenRows(Adapter):
    """E'[i] = R[i] for the trained tokens i, E'[i] = E[i] for all others; the output layer gives h E'^T

    R: [tokens, hidden], in the order of the settings' `trainable_token_indices`. Numbers from len(E) on are new rows.
    """

    ids: Tensor
    order: Tensor
    file_names: ClassVar = {"trainable_tokens_delta": "token_adapter.trainable_tokens_delta"}

    @classmethod
    def places(cls, network: nn.Module, settings: Any) -> dict[str, nn.Module]:
        """Embedding and output layer, in this order, where tokens are trained."""
        if not settings.trainable_token_indices:
            return {}
        layers = [bare(network.get_input_embeddings()), network.get_output_embeddings()]  # type: ignore[operator]
        names = {bare(place): name for name, place in named_places(network)}
        return {names[bare(layer)]: bare(layer) for layer in layers if layer is not None}

    @property
    def sees_rows(self) -> bool:
        return False

    def create(self) -> None:
        self.indices: tuple[int, ...] = self.settings.trainable_token_indices
        self.num_rows = len(self.place.weight)
        self.stored_as, self.is_stored = self.name, True
        new = sorted(index for index in self.indices if index >= self.num_rows)
        if new != list(range(self.num_rows, self.num_rows + len(new))):
            raise AdapterError(
                f"{self.name}: token {new[0]} cannot be trained, for the model has {self.num_rows} rows and those up "
                "to it would have no values; give the model whose tokenizer it is"
            )
        shape = (len(self.indices), self.place.weight.shape[1])
        self.trainable_tokens_delta = Parameter(torch.zeros(shape, device=self.device))
        order = sorted(range(len(self.indices)), key=self.indices.__getitem__)
        sorted_ids = torch.tensor(sorted(self.indices), device=self.device)
        self.register_buffer("ids", sorted_ids, persistent=False)
        self.register_buffer("order", torch.tensor(order, device=self.device), persistent=False)

    @torch.no_grad()
    def initialize(self, start: Start) -> None:
        """New tokens are the mean of the rows before theirs, known ones what they were."""
        known = self.place.weight.detach()
        if self.settings.new_tokens:
            self.trainable_tokens_delta.copy_(known[: min(self.indices)].mean(0, dtype=torch.float32))
            return
        if self.adds_rows:
            raise AdapterError(
                f"trainable_token_indices: {max(self.indices)} is no token of the model, which has {self.num_rows}; "
                "name tokens that are to be added as new_tokens"
            )
        self.trainable_tokens_delta.copy_(known[list(self.indices)])

    def forward(self, x: Tensor, base: Base, *, onto: Tensor | None = None) -> Tensor:
        """x: token ids [...] for the embedding, hidden states [..., hidden] for the output layer."""
        result = self._logits(x, base) if isinstance(self.place, Linear) else self._embedded(x, base)
        return result if onto is None else onto.add_(result)

    def _embedded(self, token_ids: Tensor, base: Base) -> Tensor:
        found = torch.searchsorted(self.ids, token_ids.contiguous()).clamp_(max=len(self.indices) - 1)
        own = self.ids[found] == token_ids
        known: Tensor = base(torch.where(own, 0, token_ids))
        embedding = copy(self.place)  # its own formula, for some scale what they look up
        embedding._parameters = {"weight": self.trainable_tokens_delta.to(known.dtype)}
        embedding.padding_idx = None  # is the number of another row here
        return torch.where(own[..., None], embedding(self.order[found]), known)

    def _logits(self, hidden: Tensor, base: Base) -> Tensor:
        rows = self.rows
        return rows.joined(base(hidden), rows.products(hidden, self.place.bias))

    @property
    def rows(self) -> FurtherRows:
        """As the output layer's log-probabilities take them."""
        return FurtherRows(self.trainable_tokens_delta[self.order], tuple(sorted(self.indices)))

    @property
    def adds_rows(self) -> bool:
        """Whether any of its tokens has no row in the model."""
        return max(self.indices) >= self.num_rows

    def merged_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (max(shape[0], max(self.indices) + 1), *shape[1:])

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        merged = weight.new_zeros(self.merged_shape(tuple(weight.shape)))
        merged[: len(weight)] = weight
        merged[list(self.indices)] = self.trainable_tokens_delta.detach().to(weight.dtype)
        return merged, bias if bias is None else torch.nn.functional.pad(bias, (0, len(merged) - len(bias)))

    def key(self, name: str) -> str:
        return f"base_model.model.{self.stored_as}.{self.file_names[name]}"

    @property
    def optional_keys(self) -> frozenset[str]:  # type: ignore[override]
        """PEFT may write the whole layers besides, whose other rows are the model's own, and tied rows twice."""
        own = f"base_model.model.{self.name}.token_adapter"
        again = {f"{own}.trainable_tokens_delta"} if self.stored_as != self.name else set()
        return frozenset({f"{own}.base_layer.weight", *again})

    def fit(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """PEFT may train known tokens in the embedding alone: the output layer then keeps its own rows."""
        self.is_stored = self.key("trainable_tokens_delta") in shapes or self.adds_rows

    def saved(self) -> dict[str, Tensor]:
        return super().saved() if self.is_stored else {}

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        if self.is_stored:
            super().fill(tensors)
        else:
            self.trainable_tokens_delta.copy_(self.place.weight[list(self.indices)])


def tie_rows(adapters: Sequence[Adapter]) -> None:
    """Layers that share their weight get the same rows, which are stored under the first one's name."""
    for first, second in pairwise(adapter for adapter in adapters if isinstance(adapter, TokenRows)):
        if first.place.weight is second.place.weight:
            second.trainable_tokens_delta, second.stored_as = first.trainable_tokens_delta, first.stored_as


def further_rows(head: nn.Module) -> FurtherRows | None:
    """What the active adapters of an output layer put beside its weight; of one token's several rows the last."""
    carried = [head.adapters[name] for name in head.active] if isinstance(head, Adapted) else []
    parts = [adapter.rows for adapter in carried if isinstance(adapter, TokenRows)]
    if len(parts) <= 1:
        return parts[0] if parts else None
    places = {column: place for place, column in enumerate(c for part in parts for c in part.columns)}
    columns = tuple(sorted(places))
    return FurtherRows(torch.cat([part.rows for part in parts])[[places[c] for c in columns]], columns)


def token_words(adapters: Sequence[Adapter]) -> dict[str, object]:
    """How PEFT's configuration says which rows an adapter trains, by layer; tied ones are one."""
    stored = [adapter for adapter in adapters if isinstance(adapter, TokenRows) and adapter.is_stored]
    by_layer = {adapter.stored_as.rpartition(".")[2]: list(adapter.indices) for adapter in stored}
    return {"trainable_token_indices": by_layer} if by_layer else {}


def numbered(settings: S, network: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> S:
    """The settings with the numbers of their new tokens: the tokenizer's, which may not know them yet, or else those
    that the settings say, or the first that the network has no row for.

    Raises RecipeError where settings and tokenizer differ, or the tokenizer cannot take the tokens.
    """
    tokens, ids = settings.new_tokens, settings.trainable_token_indices
    if not tokens:
        return settings
    if tokenizer is not None:
        known = tokenizer if tokenizer.get_vocab().keys() >= set(tokens) else with_tokens(tokenizer, tokens)
        found = _ids(known, tokens)
        if ids not in ((), found):
            raise RecipeError(f"trainable_token_indices: the new tokens have the numbers {list(found)}; leave it out")
        ids = found
    first = len(network.get_input_embeddings().weight)  # type: ignore[operator]
    return settings.model_copy(update={"trainable_token_indices": ids or tuple(range(first, first + len(tokens)))})


def with_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer that reads each of these as one token, or the tokenizer itself if there are none.

    Raises RecipeError for one that is in the vocabulary already, and for one that would not be read so.
    """
    if not tokens:
        return tokenizer
    vocabulary = tokenizer.get_vocab()
    if known := next((token for token in tokens if token in vocabulary), None):
        raise RecipeError(f'new_tokens: "{known}" is in the vocabulary already; leave it out')
    extended = deepcopy(tokenizer)
    extended.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    for token, index in zip(tokens, _ids(extended, tokens), strict=True):
        if index not in extended.encode(token, add_special_tokens=False):
            raise RecipeError(f'new_tokens: "{token}" is not read as one token by this tokenizer; choose another text')
    return extended


def knowing(tokenizer: PreTrainedTokenizerBase, settings: AnyAdapter) -> PreTrainedTokenizerBase:
    """The tokenizer with the new tokens that an adapter was trained with. Raises AdapterError where it would give them
    other numbers.
    """
    tokens, vocabulary = settings.new_tokens, tokenizer.get_vocab()
    extended = with_tokens(tokenizer, [token for token in tokens if token not in vocabulary])
    if tokens and _ids(extended, tokens) != settings.trainable_token_indices:
        raise AdapterError(
            f"new_tokens: this tokenizer gives them the numbers {list(_ids(extended, tokens))}, and they were trained "
            f"as {list(settings.trainable_token_indices)}; give the model that the adapter was trained on"
        )
    return extended


def _ids(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> tuple[int, ...]:
    vocabulary = tokenizer.get_vocab()
    return tuple(vocabulary[token] for token in tokens)
