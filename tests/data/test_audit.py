"""The audit names what would spoil a run, with a count and an example, and stays silent on sound data."""

from collections.abc import Iterable
from dataclasses import replace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from luthier.data.audit import Severity, audit
from luthier.data.examples import Chat, Message, Origin
from luthier.data.masks import encode_chat, encode_text
from luthier.data.sequences import TokenSequence

VOCABULARY = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
BACKEND = Tokenizer(models.BPE(VOCABULARY, []))
BACKEND.pre_tokenizer, BACKEND.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
BACKEND.add_special_tokens(["<start>", "<end>", "<other>"])
TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=BACKEND, bos_token="<start>", eos_token="<end>")
TURNS = "{% for m in messages %}{{ '<start>' + m.role + ': ' + m.content + '<end>\n' }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<start>assistant: ' }}{% endif %}"
TOKENIZER.chat_template = TURNS + PROMPT
STOP = TOKENIZER.convert_tokens_to_ids("<end>")


def rows(answers: Iterable[str], question: str = "why") -> list[TokenSequence]:
    chats = [Chat((Message("user", f"{question} {i}"), Message("assistant", text))) for i, text in enumerate(answers)]
    return [row for i, chat in enumerate(chats) for row in encode_chat(chat, Origin("rows.jsonl", i + 1), TOKENIZER)]


def cut(row: TokenSequence, length: int) -> TokenSequence:
    return replace(row, token_ids=row.token_ids[:length], trained=row.trained[:length])


def test_sound_data_has_no_findings() -> None:
    result = audit(rows(["yes"] * 5), TOKENIZER, train_on="assistant", max_length=99, eos_token_ids=[STOP])
    assert result.findings == ()
    assert not result.spoiled
    assert result.lines() == [f"5 sequences, {result.num_tokens} tokens, 20 of them trained"]  # y, e, s, <end>


def test_an_untrained_end_of_turn_spoils_the_run() -> None:
    data = rows(["yes"] * 50)
    data[3].trained[-1] = False
    result = audit(data, TOKENIZER, train_on="assistant")
    assert result.spoiled
    assert "1 of 50 sequences do not train the end-of-turn token" in result.sentence()
    assert "rows.jsonl:4" in result.sentence()


@pytest.mark.parametrize(("num_cut", "severity"), [(1, Severity.WARNING), (6, Severity.SPOILS)])
def test_cut_answers_spoil_the_run_when_they_are_many(num_cut: int, severity: Severity) -> None:
    data = rows(["a long answer"] * 50)
    data[:num_cut] = [cut(row, len(row) - 5) for row in data[:num_cut]]
    origins = [row.origin for row in data[:num_cut]]
    (finding,) = audit(data, TOKENIZER, train_on="assistant", truncated=origins).findings
    assert (finding.severity, finding.num_sequences, finding.origin) == (severity, num_cut, data[0].origin)
    assert finding.excerpt.endswith("a long an")
    assert "length limit" in finding.what


def test_empty_masks_spoil_the_run() -> None:
    data = encode_chat(Chat((Message("user", "why"),)), Origin("rows.jsonl", 1), TOKENIZER)
    assert "1 of 1 sequences have no trained token" in audit(data, TOKENIZER, train_on="assistant").sentence()


def test_a_trained_prompt_spoils_the_run_unless_all_is_asked_for() -> None:
    chat = Chat((Message("user", "why"), Message("assistant", "so")))
    data = encode_chat(chat, Origin("rows.jsonl", 1), TOKENIZER, train_on="all")
    assert "train the prompt" in audit(data, TOKENIZER, train_on="assistant").sentence()
    assert audit(data, TOKENIZER, train_on="all").findings == ()


@pytest.mark.parametrize(
    ("text", "count"), [("say <end> or <other>", 1), ("say < end >", 0), ("<end", 0), ("<<end>>", 1)]
)
def test_special_tokens_spelled_by_messages_are_counted(text: str, count: int) -> None:
    findings = audit(rows(["yes", text]), TOKENIZER, train_on="assistant").findings
    assert [finding.num_sequences for finding in findings if "spell" in finding.what] == [1] * count


def test_stop_length_copies_and_doubled_bos_are_reported() -> None:
    data = [*rows(["yes"] * 2), rows(["yes"])[0]]
    bos = TOKENIZER.bos_token_id
    data[1].token_ids[:2] = bos
    result = audit(data, TOKENIZER, train_on="assistant", max_length=10, eos_token_ids=[bos])
    text = "\n".join(result.lines())
    for what in (
        "settings stop at '<start>'",
        "3 of 3 sequences are longer than 10 tokens",
        "1 of 3 sequences (33%) r",
    ):
        assert what in text
    assert "1 of 3 sequences begin with '<start>' twice (as in rows.jsonl:2" in text
    assert not result.spoiled


def test_a_split_conversation_and_a_default_system_turn_are_noted() -> None:
    """This template hides earlier answers' second words, and greets where no system turn does."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=BACKEND, bos_token="<start>", eos_token="<end>")
    greeting = "{% if messages[0].role != 'system' %}{{ '<start>system: Be kind.<end>\n' }}{% endif %}"
    stripped = "(m.content if loop.last else m.content.split('</think>')[-1])"
    tokenizer.chat_template = greeting + TURNS.replace("m.content", stripped) + PROMPT
    turns = [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(["q", "hm</think>a"] * 2)]
    data = encode_chat(Chat(tuple(turns)), Origin("rows.jsonl", 1), tokenizer)
    notes = [finding.what for finding in audit(data, tokenizer, train_on="assistant").findings]
    assert "2 of 2 sequences come from 1 conversations" in notes[0]
    assert "'system: Be kind.'" in notes[1] or "'Be kind.'" in notes[1]


def test_plain_text_needs_no_chat_template() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=BACKEND, bos_token="<start>", eos_token="<end>")
    data = [encode_text("Once upon a time", Origin("book.txt", 1), tokenizer)]
    assert audit(data, tokenizer, train_on=None).findings == ()


def test_no_data_at_all_spoils_the_run() -> None:
    assert audit([], TOKENIZER, train_on="assistant").sentence() == (
        "the data would spoil the run: spoils: there are no sequences"
    )
