"""Text becomes token ids, and only a chat template can write turn markers.

A marker is a string such as `<|im_end|>` that the tokenizer reads as one special id. Where a message says it, it has to
stay words: otherwise a row of data, or a user of the server, could end a turn or open another. Such a string is cut
after its first character before the template is rendered, and the pieces are encoded apart, so that no piece holds it
whole. The cut is half of a surrogate pair, which no valid text contains, and never reaches the tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from luthier.errors import DataError, TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CUT", "TextEncoder", "added_tokens", "any_of", "text_encoder"]

CUT = "\ud800"
_SURROGATE = re.compile("[\ud800-\udfff]")
_THINKING = ("<think>", "</think>")  # the assistant's own words, whatever the tokenizer calls them
_ANCHOR = "\uf8ff"  # a private character, which merges with no text that follows it


@dataclass(frozen=True, slots=True, eq=False)
class TextEncoder:
    """Encodes text in which the given markers may be written by the template alone.

    markers: their ids; marker_ids leaves out the unknown token, which any strange character may give.
    adds_prefix: the tokenizer puts a space before any text that it is given (as SentencePiece does), so a text that
    continues another must be encoded behind a character that is then dropped.
    """

    tokenizer: PreTrainedTokenizerBase
    markers: Mapping[str, int]
    marker_ids: frozenset[int]
    whole: re.Pattern[str]
    first_character: re.Pattern[str]
    adds_prefix: bool

    def guard(self, value: Any) -> Any:
        """A string, or any nest of lists and dicts of strings, with a `CUT` inside every marker.

        Raises DataError where text holds half a surrogate pair, which no tokenizer can encode.
        """
        if isinstance(value, str):
            if broken := _SURROGATE.search(value):
                raise DataError(f"a text holds half a surrogate pair ({broken[0]!r}); mend the file's encoding")
            return self.first_character.sub(rf"\g<0>{CUT}", value)
        if isinstance(value, dict):
            return {self.guard(key): self.guard(item) for key, item in value.items()}
        return [self.guard(item) for item in value] if isinstance(value, list | tuple) else value

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """Token ids of a text with cuts; `continues` says that it stands behind other text.

        Raises TemplateError if the tokenizer makes a marker of text that does not spell one.
        """
        ids: list[int] = []
        for piece in filter(None, text.split(CUT)):
            ids += self._encode_piece(piece, continues=continues or bool(ids))
        written = [marker for piece in text.split(CUT) for marker in self.whole.findall(piece)]
        if sum(map(self.marker_ids.__contains__, ids)) != sum(
            self.markers[text] in self.marker_ids for text in written
        ):
            raise TemplateError("the tokenizer reads message text as a turn marker, by normalizing it; drop the row")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens included, with every space as it is."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def imitations(self, ids: Iterable[int]) -> int:
        """How many markers stand in these ids as ordinary text."""
        text = self.decode(token for token in ids if token not in self.marker_ids)
        return len(self.whole.findall(text))

    def _encode_piece(self, piece: str, *, continues: bool) -> list[int]:
        if continues and self.adds_prefix:
            anchor = _encode(self.tokenizer, _ANCHOR)
            ids = _encode(self.tokenizer, _ANCHOR + piece)
            if ids[: len(anchor)] == anchor:
                return ids[len(anchor) :]
        return _encode(self.tokenizer, piece)


def text_encoder(tokenizer: PreTrainedTokenizerBase, *, written: str = "") -> TextEncoder:
    """An encoder that guards every special token, and every added token found in `written`, a template's own text."""
    return _text_encoder(tokenizer, len(tokenizer), written)


@lru_cache(maxsize=16)
def _text_encoder(tokenizer: PreTrainedTokenizerBase, num_tokens: int, written: str) -> TextEncoder:
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} - set(_THINKING)
    markers = {text: i for text, i in added_tokens(tokenizer).items() if text in special or text in written}
    return TextEncoder(
        tokenizer,
        markers,
        frozenset(markers.values()) - {tokenizer.unk_token_id},
        whole=any_of(markers),
        first_character=re.compile("|".join(map(_first_character, markers)) or "(?!)"),
        adds_prefix=_encode(tokenizer, "x") != _encode(tokenizer, "\nx")[-1:],
    )


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Finds the leftmost of these texts, and of several there the longest, as tokenizers do."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def _first_character(marker: str) -> str:
    return f"{re.escape(marker[0])}(?={re.escape(marker[1:])})"


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Added tokens that can be markers: not mere white space (as Gemma's), and long enough to be cut in two."""
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    return {text: index for text, index in added.items() if len(text) > 1 and not text.isspace()}


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))
