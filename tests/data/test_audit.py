"""The audit names what would spoil a run, with a count and an example, and stays silent on sound data."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from luthier.data.audit import Severity, audit
from luthier.data.examples import Chat, Feedback, Message, Origin, Preference
from luthier.data.masks import encode_chat, encode_text
from luthier.data.pairs import encode_feedback, encode_preference
from luthier.data.sequences import TokenGroup, TokenSequence

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


def pairs(answers: Iterable[Sequence[str]]) -> list[TokenGroup]:
    """One prompt for all of them."""
    made = [tuple((Message("assistant", text),) for text in texts) for texts in answers]
    examples = [Preference((Message("user", "why"),), answer) for answer in made]
    return [encode_preference(one, Origin("pairs.jsonl", i), TOKENIZER) for i, one in enumerate(examples, start=1)]


def verdicts(num_desirable: int, num_rows: int) -> list[TokenGroup]:
    chats = [Chat((Message("user", f"why {i}"), Message("assistant", "so"))) for i in range(num_rows)]
    made = [Feedback(chat, i < num_desirable) for i, chat in enumerate(chats)]
    return [encode_feedback(one, Origin("kto.jsonl", i), TOKENIZER) for i, one in enumerate(made, start=1)]


def test_sound_pairs_of_one_prompt_have_no_findings() -> None:
    data = pairs([(f"{i} yes", f"{i} no") if i % 2 else (f"{i} no", f"{i} yes") for i in range(40)])
    result = audit(data, TOKENIZER, train_on="last", max_length=99, eos_token_ids=[STOP])
    assert result.findings == ()
    assert (result.num_sequences, result.num_tokens) == (80, sum(map(len, data)))


def test_repeated_pairs_are_noted() -> None:
    (finding,) = audit(pairs([("a", "b"), ("b", "a"), ("a", "b")]), TOKENIZER, train_on="last").findings
    assert (finding.severity, finding.what) == (Severity.NOTE, "1 of 3 rows (33%) repeat another")


@pytest.mark.parametrize(("num_same", "severity"), [(1, Severity.WARNING), (4, Severity.SPOILS)])
def test_answers_that_are_the_same_tokens_spoil_the_run_when_they_are_many(num_same: int, severity: Severity) -> None:
    data = pairs([(f"{i} a", f"{i} {'a' if i < num_same else 'b'}") for i in range(20)])
    (finding,) = audit(data, TOKENIZER, train_on="last").findings
    assert (finding.severity, finding.num_sequences, finding.origin) == (severity, num_same, Origin("pairs.jsonl", 1))
    assert "become the same tokens" in finding.what


@pytest.mark.parametrize(("num_longer", "word"), [(16, "longer"), (15, None), (10, None), (5, None), (4, "shorter")])
def test_a_length_that_gives_the_better_answer_away_is_noted(num_longer: int, word: str | None) -> None:
    """Beyond three quarters of the 20 rows; 5 rows with answers of one length do not count."""
    uneven = [(f"{i} yes", f"{i} n") if i < num_longer else (f"{i} n", f"{i} yes") for i in range(20)]
    findings = audit(pairs([*uneven, *((f"{i} a", f"{i} b") for i in range(5))]), TOKENIZER, train_on="last").findings
    assert [
        f"in 16 of 20 rows whose answers differ in length (80%) the best is {word}" in f.what for f in findings
    ] == ([True] if word else [])


@pytest.mark.parametrize(
    ("num_desirable", "setting"), [(1, "desirable_weight"), (2, None), (18, None), (19, "undesirable_weight")]
)
def test_verdicts_that_are_nearly_all_alike_are_a_warning(num_desirable: int, setting: str | None) -> None:
    findings = audit(verdicts(num_desirable, 20), TOKENIZER, train_on="last").findings
    assert [finding.severity for finding in findings] == [Severity.WARNING] * (setting is not None)
    assert all(f"raise {setting}" in finding.what for finding in findings)
