"""Prompt tuning: learned embeddings before those of every text.

The adapter sits on the whole body: it lengthens what goes in, and takes the prompt's positions out of what comes back,
so that nobody else sees that they were there. With a cache, the prompt goes in while the cache is empty; from then on
the cache holds it, and later tokens stand behind it. In a left-padded batch the padding lies between prompt and text,
as it does with PEFT, and counts where attention sees a window alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import Cache

from luthier.adapters.adapted import Base, bare
from luthier.adapters.base import Adapter, PeftForm, Start
from luthier.adapters.targets import decoder
from luthier.errors import AdapterError
from luthier.kernels.streams import STREAM_MULTIPLE, put_before_each, take_out

__all__ = ["Prompt", "starting_tokens"]


class Prompt(Adapter):
    """[P; embed(x)] with P trained alone        Lester et al. 2021, section 2

    P: [virtual tokens, embedding size].
    """

    peft = PeftForm("PROMPT_TUNING", {"num_virtual_tokens": "num_virtual_tokens"})

    @classmethod
    def places(cls, network: nn.Module, settings: Any) -> dict[str, nn.Module]:
        name, body = decoder(network)
        return {name: bare(body)}

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
        segment_lengths: Sequence[int] | None = None,
        **options: Any,
    ) -> Any:
        """As the body: of one stream of sequences, [1, tokens], or of a padded batch, [sequences, tokens]. options:
        what else transformers gives to a body. Raises AdapterError for a mask or a cache that has no room for a prompt.
        """
        given = inputs_embeds if input_ids is None else input_ids
        assert given is not None, "a body is called with input_ids or inputs_embeds"
        cache = options.get("past_key_values")
        past = 0 if cache is None else self._checked(cache).get_seq_length()
        if (mask := options.get("attention_mask")) is not None:
            options["attention_mask"] = self._lengthened(mask, past, given.shape[1])
        if options.get("position_ids") is not None:
            options["position_ids"] = options["position_ids"] + self.length
        if past:
            return base(input_ids=input_ids, inputs_embeds=inputs_embeds, **options)
        embeds = self.place.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        return self._with_prompt(embeds, segment_lengths, base, options)

    def _checked(self, cache: Cache) -> Cache:
        if cache.is_compileable:
            raise AdapterError(f"{self.name}: a cache of fixed size has no room for a prompt; use a dynamic one")
        return cache

    def _lengthened(self, mask: Tensor, past: int, num_tokens: int) -> Tensor:
        """The mask [sequences, text so far] with the prompt before the text."""
        if mask.dim() != 2:
            raise AdapterError(f"{self.name}: a prompt lengthens masks of one row a sequence; give such a one")
        if past and past + num_tokens < mask.shape[1] + self.length:  # more where another prompt stands there too
            raise AdapterError(f"{self.name}: the cache does not hold the prompt and the text so far; start without it")
        return torch.cat([mask.new_ones(len(mask), self.length), mask], dim=1)

    def _with_prompt(
        self, embeds: Tensor, segment_lengths: Sequence[int] | None, base: Base, options: dict[str, Any]
    ) -> Any:
        lengths = (embeds.shape[1],) if segment_lengths is None else segment_lengths
        made_up = 0
        if segment_lengths is not None:
            longer = [self.length + n for n in lengths]
            made_up = -sum(longer) % STREAM_MULTIPLE
            options["segment_lengths"] = (*longer[:-1], longer[-1] + made_up)
        if (positions := options.get("position_ids")) is not None:
            own = positions.amin(1, keepdim=True) - self.length + torch.arange(self.length, device=positions.device)
            options["position_ids"] = put_before_each(own, positions, lengths, dim=1, num_behind=made_up)
        prompt = self.prompt_embeddings.to(embeds.dtype).expand(len(embeds), -1, -1)
        longer_embeds = put_before_each(prompt, embeds, lengths, dim=1, num_behind=made_up)
        output = base(inputs_embeds=longer_embeds, **options)
        output.last_hidden_state = take_out(output.last_hidden_state, self.length, lengths, dim=1)
        if output.hidden_states is not None:
            output.hidden_states = tuple(take_out(h, self.length, lengths, dim=1) for h in output.hidden_states)
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
