"""Eleven families of chat templates: what is trained is what is served, whatever the messages say."""

# ruff: noqa: RUF001 (DeepSeek writes its markers with a full-width bar)

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from luthier.data.examples import Chat, Message, Origin, Text, ToolCall
from luthier.data.masks import encode_chat, encode_prompt, encode_text
from luthier.data.sequences import TokenSequence
from luthier.data.templates import render, stop_token_ids
from luthier.errors import DataError, TemplateError

HERE = Path(__file__).parent / "chat_templates"
ORIGIN = Origin("rows.jsonl", 7)
CORPUS = ["Hello, what is this?", "\n\n", "It is the answer.\n", "the end of the system and the user\n"] * 4


@dataclass(frozen=True)
class Family:
    """Markers as the published tokenizers have them; the first special one is BOS, `stop` ends a turn."""

    special: str
    stop: str
    plain: str = ""  # added tokens that are not called special
    rstrip: bool = False


FAMILIES = {
    "chatml": Family("<|endoftext|> <|im_start|> <|im_end|>", "<|im_end|>"),
    "llama3": Family("<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>", "<|eot_id|>"),
    "llama2": Family("<s> </s>", "</s>"),
    "gemma": Family("<bos> <eos> <start_of_turn> <end_of_turn>", "<end_of_turn>", plain="\n\n"),
    "mistral_v3": Family(
        "<s> </s> [INST] [/INST] [TOOL_CALLS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS]",
        "</s>",
    ),
    "phi3": Family("<s> <|endoftext|> <|system|> <|user|> <|assistant|> <|end|>", "<|end|>", rstrip=True),
    "zephyr": Family("<s> </s>", "</s>"),
    "qwen25": Family("<|endoftext|> <|im_start|> <|im_end|>", "<|im_end|>", plain="<tool_call> </tool_call>"),
    "qwen3": Family(
        "<|endoftext|> <|im_start|> <|im_end|>", "<|im_end|>", plain="<tool_call> </tool_call> <think> </think>"
    ),
    "deepseek_v3": Family(
        "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>", plain="<｜User｜> <｜Assistant｜>"
    ),
    "deepseek_r1": Family(
        "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        plain="<｜User｜> <｜Assistant｜> <think> </think>",
    ),
}
each_family = pytest.mark.parametrize("name", FAMILIES)
MARKERS = sorted({marker for family in FAMILIES.values() for marker in (family.special + " " + family.plain).split()})
words = st.lists(
    st.sampled_from([*MARKERS, "<", "|im_end|>", "\n", " ", "é", "日本", "\U0001f600", "\uf8ff", "Hi", "\\"])
    | st.text(max_size=4)
).map("".join)


def _byte_level() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _metaspace() -> Tokenizer:
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁<|>[]/aeinorst", "▁a", "in", "▁<"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("i", "n"), ("▁", "<")]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    return backend


@cache
def tokenizer_of(name: str, *, metaspace: bool = False) -> PreTrainedTokenizerBase:
    """A tiny tokenizer with the family's markers: byte-level like GPT-2's, or with a prefix space like Llama 2's."""
    family = FAMILIES[name]
    backend = _metaspace() if metaspace else _byte_level()
    special = family.special.split()
    backend.add_special_tokens([AddedToken(text, rstrip=family.rstrip, special=True) for text in special])
    plain = family.plain.split() or [family.plain] * bool(family.plain)
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=special[0], eos_token=family.stop)
    tokenizer.chat_template = (HERE / f"{name}.jinja").read_text(encoding="utf-8")
    return tokenizer


def chat(*contents: str, system: str | None = None) -> Chat:
    """User and assistant in turns, after a system turn if there is one."""
    turns = [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(contents)]
    return Chat(tuple([Message("system", system)] * (system is not None) + turns))


def prompts(conversation: Chat) -> list[Chat]:
    """What comes before each turn of the assistant."""
    places = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
    return [Chat(conversation.messages[:i], conversation.tools) for i in places]


def runs(sequence: TokenSequence, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each run of trained tokens."""
    borders = np.flatnonzero(np.diff(sequence.trained, prepend=False, append=False)).reshape(-1, 2)
    return [tokenizer.decode(sequence.token_ids[start:end]) for start, end in borders.tolist()]


@each_family
def test_each_answer_is_trained_and_nothing_else(name: str) -> None:
    tokenizer, stop = tokenizer_of(name), FAMILIES[name].stop
    sequences = encode_chat(chat("q one", "a one", "q two", "a two", system="rules"), ORIGIN, tokenizer)
    texts = [text for sequence in sequences for text in runs(sequence, tokenizer)]
    written = [text.removeprefix("\n</think>\n\n").removeprefix("<think>\n\n</think>\n\n") for text in texts]
    assert [text.strip() for text in written] in ([f"a one{stop}", f"a two{stop}"], [f"a one {stop}", f"a two {stop}"])
    assert tokenizer.decode(sequences[-1].token_ids).count("rules") == 1


@each_family
def test_the_tokens_before_an_answer_are_what_a_server_feeds(name: str) -> None:
    tokenizer = tokenizer_of(name)
    conversation = chat("q one", "a one", "q two", "a two", system="rules")
    starts = []
    for sequence in encode_chat(conversation, ORIGIN, tokenizer):
        begins = [i for i in range(1, len(sequence)) if sequence.trained[i] and not sequence.trained[i - 1]]
        starts += [sequence.token_ids[:i].tolist() for i in begins]
    assert starts == [encode_prompt(prompt, tokenizer) for prompt in prompts(conversation)]


@each_family
def test_a_plain_prompt_has_the_ids_that_transformers_gives_it(name: str) -> None:
    tokenizer = tokenizer_of(name)
    turns = [{"role": "user", "content": "What is this?"}]
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert encode_prompt(chat("What is this?"), tokenizer) == expected


@each_family
def test_the_stop_token_is_the_one_that_ends_a_turn(name: str) -> None:
    tokenizer = tokenizer_of(name)
    assert stop_token_ids(tokenizer) == {tokenizer.convert_tokens_to_ids(FAMILIES[name].stop)}


@pytest.mark.parametrize("metaspace", [False, True])
@each_family
@settings(max_examples=50, deadline=None)
@given(question=words, answer=words, system=words)
def test_no_message_can_write_a_marker_or_lose_a_word(
    name: str, metaspace: bool, question: str, answer: str, system: str
) -> None:
    """A turn's markers are as many as with harmless words; the trained text is the answer and the end of the turn."""
    tokenizer, family = tokenizer_of(name, metaspace=metaspace), FAMILIES[name]
    answer = answer.replace("<think>", "").replace("</think>", "")  # an answer may think: another test
    (sequence,) = encode_chat(chat(question, answer, system=system), ORIGIN, tokenizer)
    (harmless,) = encode_chat(chat("q", "a", system="s"), ORIGIN, tokenizer)
    markers = [
        *family.special.split(),
        *(text for text in family.plain.split() if "tool" not in text and "think" not in text),
    ]
    for index in tokenizer.convert_tokens_to_ids(markers):
        assert (sequence.token_ids == index).sum() == (harmless.token_ids == index).sum()
    prompt = encode_prompt(chat(question, system=system), tokenizer)
    assert sequence.token_ids[: len(prompt)].tolist() == prompt
    assert not sequence.trained[: len(prompt)].any()
    assert sequence.trained[len(prompt) :].all()
    (text,) = runs(sequence, tokenizer)
    space = "▁" if metaspace else " "  # such tokenizers write a space so, and cannot tell the two apart
    assert answer.replace(space, " ").strip() in text
    assert sequence.token_ids[-1] == tokenizer.convert_tokens_to_ids(family.stop)


@pytest.mark.parametrize("name", ["chatml", "llama3", "llama2", "phi3", "deepseek_v3"])
@settings(max_examples=50, deadline=None)
@given(contents=st.lists(words, min_size=4, max_size=4))
def test_every_turn_of_a_long_conversation_is_served_as_it_was_trained(name: str, contents: list[str]) -> None:
    tokenizer, conversation = tokenizer_of(name), chat(*contents)
    served = [encode_prompt(prompt, tokenizer) for prompt in prompts(conversation)]
    sequences = encode_chat(conversation, ORIGIN, tokenizer)
    for place, prompt in enumerate(served):
        sequence = sequences[place if len(sequences) > 1 else 0]
        assert sequence.token_ids[: len(prompt)].tolist() == prompt
        assert sequence.trained[len(prompt)]
    assert len(sequences) in (1, 2)


@pytest.mark.parametrize(
    ("name", "num_sequences"), [("chatml", 1), ("qwen3", 2), ("deepseek_r1", 2), ("mistral_v3", 2)]
)
def test_a_conversation_is_split_only_where_earlier_turns_are_shown_otherwise(name: str, num_sequences: int) -> None:
    """Qwen 3 and DeepSeek-R1 drop the thinking of earlier turns; Mistral moves the system turn to the last question."""
    said = "<think>\nhm\n</think>\n\nyes"
    tokenizer = tokenizer_of(name)
    sequences = encode_chat(chat("q", said, "q", said, system="s"), ORIGIN, tokenizer)
    assert len(sequences) == num_sequences
    first = tokenizer.decode(sequences[0].token_ids[sequences[0].trained])
    assert first.startswith(
        "hm\n</think>\n\nyes" if name == "deepseek_r1" else (" <think>" if name[0] == "m" else "<think>")
    )


def test_an_answer_that_would_merge_with_its_header_is_trained_as_it_is_served() -> None:
    """Header and answer meet in two newlines: as history they are one token, served they are two."""
    tokenizer = tokenizer_of("chatml")
    assert len(tokenizer.encode("\n\n")) == 1
    conversation = chat("q", "\n\none", "q", "two")
    sequences = encode_chat(conversation, ORIGIN, tokenizer)
    assert [runs(sequence, tokenizer) for sequence in sequences] == [["\n\none<|im_end|>"], ["two<|im_end|>"]]
    for sequence, prompt in zip(sequences, prompts(conversation), strict=True):
        ids = encode_prompt(prompt, tokenizer)
        assert sequence.token_ids[: len(ids)].tolist() == ids


@each_family
def test_tool_turns_show_every_word_in_every_family(name: str) -> None:
    call = ToolCall("get_time", {"city": "Zürich", "exact": True, "digits": [2, 3]})
    tools = ({"type": "function", "function": {"name": "get_time", "description": "Says it", "parameters": {}}},)
    turns = (Message("user", "When?"), Message("assistant", "", (call,)), Message("tool", '{"t": 9}', name="get_time"))
    conversation = Chat((*turns, Message("assistant", "At nine.")), tools)
    tokenizer = tokenizer_of(name)
    texts = [text for sequence in encode_chat(conversation, ORIGIN, tokenizer) for text in runs(sequence, tokenizer)]
    assert all(word in texts[0] for word in ("get_time", "Zürich", "true", "[2, 3]"))
    assert "At nine." in texts[1]
    assert all(word in render(conversation, tokenizer) for word in ("Says it", '{"t": 9}', "When?"))


@pytest.mark.parametrize(("answered", "shown"), [((None, None), (0, 1)), (("b", "a"), (1, 0)), (("b", None), (1, 0))])
def test_a_result_is_shown_with_the_call_that_it_answers(answered: tuple[str | None, ...], shown: tuple[int]) -> None:
    """By its tool_call_id if it has one, in the order of the calls else; ids of Mistral's length are made for both."""
    calls = (ToolCall("f", {}, "a"), ToolCall("g", {}, "b"))
    results = [Message("tool", f'"{place}"', tool_call_id=answer) for place, answer in enumerate(answered)]
    turns = (Message("user", "?"), Message("assistant", "", calls), *results, Message("assistant", "So."))
    text = render(Chat(turns), tokenizer_of("mistral_v3"))
    for place, call in enumerate(shown):
        assert f'{{"content": "{place}", "call_id": "call{call:05d}"}}' in text


def test_a_turn_can_be_left_out_and_last_trains_only_the_last() -> None:
    tokenizer = tokenizer_of("chatml")
    turns = list(chat("q", "one", "q", "two", "q", "three").messages)
    turns[1] = Message("assistant", "one", trained=False)
    (all_turns,) = encode_chat(Chat(tuple(turns)), ORIGIN, tokenizer)
    assert runs(all_turns, tokenizer) == ["two<|im_end|>", "three<|im_end|>"]
    (last,) = encode_chat(Chat(tuple(turns)), ORIGIN, tokenizer, train_on="last")
    assert runs(last, tokenizer) == ["three<|im_end|>"]
    (full,) = encode_chat(chat("q", "one"), ORIGIN, tokenizer, train_on="all")
    assert full.num_trained == len(full) - 1


def test_a_conversation_without_an_answer_trains_nothing() -> None:
    (sequence,) = encode_chat(chat("q"), ORIGIN, tokenizer_of("chatml"))
    assert len(sequence) > 0
    assert sequence.num_trained == 0


def test_plain_text_is_trained_whole_and_ends_with_the_end_token() -> None:
    tokenizer = tokenizer_of("chatml")
    sequence = encode_text(Text("Read <|im_end|> and go on").text, ORIGIN, tokenizer)
    assert tokenizer.decode(sequence.token_ids) == "Read <|im_end|> and go on<|im_end|>"
    assert (sequence.token_ids == tokenizer.eos_token_id).sum() == 1
    assert sequence.num_trained == len(sequence) - 1


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        (chat("q", "half a pair: \ud83d"), "half a surrogate"),
        (Chat((Message("robot", "q"),)), "roles are"),
        (Chat(()), "no messages"),
        (Chat((Message("assistant", "hello"),)), "begins with the assistant"),
        (Chat((Message("user", "q", trained=True), Message("assistant", "a"))), "not the assistant's"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_with_its_place(conversation: Chat, reason: str) -> None:
    with pytest.raises(DataError, match=rf"rows.jsonl:7: .*{reason}"):
        encode_chat(conversation, ORIGIN, tokenizer_of("chatml"))


def test_a_template_that_refuses_a_row_says_why() -> None:
    turns = (Message("user", "a"), Message("user", "b"), Message("assistant", "c"))
    with pytest.raises(TemplateError, match=r"rows.jsonl:7: .*must alternate"):
        encode_chat(Chat(turns), ORIGIN, tokenizer_of("gemma"))
