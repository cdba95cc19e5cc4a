"""Prompt tuning: learned embeddings before those of every text.

The adapter sits on the whole body: it lengthens what goes in, and takes the prompt's positions out of what comes back,
so that nobody else sees that they were there. With a cache, the prompt goes in while the cache is empty; from then on
the cache holds it, and later tokens stand behind it. In a left-padded batch it stands between padding and text, so that
a row is what it is alone. With PEFT the padding lies between the two, and counts in positions and windows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import Cache

from luthier.adapters.adapted import Base, bare
from luthier.adapters.base import Adapter, PeftForm, Start
from luthier.adapters.targets import decoder
from luthier.errors import AdapterError
from luthier.kernels.streams import STREAM_MULTIPLE, Segments, put_before_each, take_out

__all__ = ["Prompt", "starting_tokens", "whole_body"]


class Prompt(Adapter):
    """[P; embed(x)] with P trained alone        Lester et al. 2021, section 2

    P: [virtual tokens, embedding size].
    """

    peft = PeftForm("PROMPT_TUNING", {"num_virtual_tokens": "num_virtual_tokens"})

    @classmethod
    def places(cls, network: nn.Module, settings: Any) -> dict[str, nn.Module]:
        return whole_body(network)

    def create(self) -> None:
        self.length: int = self.settings.num_virtual_tokens
        size = self.place.get_input_embeddings().weight.shape[1]
        self.prompt_embeddings = Parameter(torch.zeros(self.length, size, device=self.device))

    @torch.no_grad()
    def initialize(self, start: Start) -> None:
        """The embeddings of a text or of random tokens; or normal, with the deviation of those of random tokens."""
        embed = self.place.get_input_embeddings()
        chosen = embed(starting_tokens(self.settings, start, num_embeddings=len(embed.weight)).to(self.device)).float()
        if self.settings.init == "random":
            chosen = torch.empty(chosen.shape).normal_(generator=start.generator).to(chosen.device) * chosen.std()
        self.prompt_embeddings.copy_(chosen)

    def key(self, name: str) -> str:
        """PEFT's file names no module."""
        return name

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        base: Base,
        inputs_embeds: Tensor | None = None,
        segments: Segments | None = None,
        **options: Any,
    ) -> Any:
        """As the body: of one stream of sequences, [1, tokens], or of a padded batch, [sequences, tokens]. options:
        what else transformers gives to a body. Raises AdapterError for a mask or a cache that has no room for a prompt.
        """
        given = inputs_embeds if input_ids is None else input_ids
        assert given is not None, "a body is called with input_ids or inputs_embeds"
        cache = options.get("past_key_values")
        past = 0 if cache is None else self._checked(cache).get_seq_length()
        first = None
        if (mask := options.get("attention_mask")) is not None:
            self._check_mask(mask, past, given.shape[1])
            first = (mask.cumsum(1) == 0).sum(1, keepdim=True)
            options["attention_mask"] = _put_between(mask.new_ones(len(mask), self.length), mask, first)
        if options.get("position_ids") is not None:
            options["position_ids"] = options["position_ids"] + self.length
        if past:
            return base(input_ids=input_ids, inputs_embeds=inputs_embeds, **options)
        embeds = self.place.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if segments is None:
            return self._in_batch(embeds, first, base, options)
        return self._in_stream(embeds, segments, base, options)

    def _checked(self, cache: Cache) -> Cache:
        if cache.is_compileable:
            raise AdapterError(f"{self.name}: a cache of fixed size has no room for a prompt; use a dynamic one")
        return cache

    def _check_mask(self, mask: Tensor, past: int, num_tokens: int) -> None:
        """mask: [sequences, text so far]."""
        if mask.dim() != 2:
            raise AdapterError(f"{self.name}: a prompt lengthens masks of one row a sequence; give such a one")
        if past and past + num_tokens < mask.shape[1] + self.length:  # more where another prompt stands there too
            raise AdapterError(f"{self.name}: the cache does not hold the prompt and the text so far; start without it")

    def _in_batch(self, embeds: Tensor, first: Tensor | None, base: Base, options: dict[str, Any]) -> Any:
        """first: as `_put_between` has it, None for no padding."""
        if first is None:
            first = torch.zeros(len(embeds), 1, dtype=torch.long, device=embeds.device)
        if (positions := options.get("position_ids")) is not None:
            positions = positions.expand(len(embeds), -1)
            of_text = positions.gather(1, first.clamp(max=positions.shape[1] - 1))
            own = of_text - self.length + torch.arange(self.length, device=positions.device)
            options["position_ids"] = _put_between(own, positions, first)
        prompt = self.prompt_embeddings.to(embeds.dtype).expand(len(embeds), -1, -1)
        output = base(inputs_embeds=_put_between(prompt, embeds, first), **options)
        return _of_text(output, lambda states: states[:, self.length :])

    def _in_stream(self, embeds: Tensor, segments: Segments, base: Base, options: dict[str, Any]) -> Any:
        longer = segments.longer_by(self.length)
        made_up = -sum(longer.lengths) % STREAM_MULTIPLE
        options["segments"] = longer.and_one_more(made_up) if made_up else longer
        if (positions := options.get("position_ids")) is not None:
            own = positions.amin(1, keepdim=True) - self.length + torch.arange(self.length, device=positions.device)
            options["position_ids"] = put_before_each(own, positions, segments, dim=1, num_behind=made_up)
        prompt = self.prompt_embeddings.to(embeds.dtype)[None]
        longer_embeds = put_before_each(prompt, embeds, segments, dim=1, num_behind=made_up)
        output = base(inputs_embeds=longer_embeds, **options)
        return _of_text(output, lambda states: take_out(states, self.length, segments, dim=1))


def whole_body(network: nn.Module) -> dict[str, nn.Module]:
    """The one place of an adapter that sits on the whole body, by dotted name."""
    name, body = decoder(network)
    return {name: bare(body)}


def _put_between(rows: Tensor, batch: Tensor, first: Tensor) -> Tensor:
    """The batch [sequences, padding and text, ...], longer by `rows` [sequences, few, ...] between padding and text.

    first: where each text begins, [sequences, 1]. The text moves behind the rows, and they over the padding.
    """
    longer = torch.cat([torch.zeros_like(rows), batch], dim=1)
    slots = first + torch.arange(rows.shape[1], device=first.device)
    return longer.scatter_(1, slots[(...,) + (None,) * (rows.dim() - 2)].expand_as(rows), rows)


def _of_text(output: Any, cut: Callable[[Tensor], Tensor]) -> Any:
    """What a body returned, its states cut to those of the text."""
    output.last_hidden_state = cut(output.last_hidden_state)
    if output.hidden_states is not None:
        output.hidden_states = tuple(map(cut, output.hidden_states))
    return output


def starting_tokens(settings: Any, start: Start, *, num_embeddings: int) -> Tensor:
    """The tokens that virtual ones start as, [virtual tokens]: those of a text, repeated or cut, or random ones.

    Raises AdapterError for a text without a tokenizer, or without tokens.
    """
    wanted: int = settings.num_virtual_tokens
    if settings.init != "text":
        return torch.randint(num_embeddings, (wanted,), generator=start.generator)
    if start.encode is None:
        raise AdapterError("init: text needs the model's tokenizer, and none was given; choose init: vocabulary")
    ids = start.encode(settings.init_text)
    if not ids:
        raise AdapterError(f'init_text: "{settings.init_text}" has no tokens; choose another text')
    return torch.tensor([ids[i % len(ids)] for i in range(wanted)])
