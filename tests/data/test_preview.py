"""The runs that are coloured are the text, whole, however tokens cut its characters."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from luthier.data.examples import Origin
from luthier.data.preview import Span, preview
from luthier.data.sequences import TokenSequence

VOCABULARY = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
BACKEND = Tokenizer(models.BPE(VOCABULARY, []))
BACKEND.pre_tokenizer, BACKEND.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
BACKEND.add_special_tokens(["<end>"])
TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=BACKEND, eos_token="<end>")


def sequence(text: str, trained: list[bool]) -> TokenSequence:
    ids = TOKENIZER.encode(text)
    flags = np.resize(np.asarray(trained, dtype=np.bool_), len(ids))
    return TokenSequence(np.asarray(ids, dtype=np.int32), flags, Origin("rows.jsonl", 1))


def test_runs_are_cut_where_training_starts_and_ends() -> None:
    spans = preview(sequence("ask: yes<end>", [False] * 5 + [True] * 4), TOKENIZER)
    assert spans == [Span("ask: ", False), Span("yes<end>", True)]


def test_a_character_on_a_border_belongs_to_the_later_run() -> None:
    """A euro sign has three bytes, here three tokens; training starts at the second."""
    assert preview(sequence("a€b", [False, False, True, True, True]), TOKENIZER) == [Span("a", False), Span("€b", True)]


def test_nothing_makes_no_runs() -> None:
    assert preview(sequence("", [False]), TOKENIZER) == []


@given(text=st.text() | st.text("€\ufffd\U0001f600a"), trained=st.lists(st.booleans(), min_size=1))
def test_the_runs_put_together_are_the_whole_text(text: str, trained: list[bool]) -> None:
    assert "".join(span.text for span in preview(sequence(text, trained), TOKENIZER)) == text
