"""Chat templates that would spoil training in silence are refused, each with its reason."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from luthier.data.examples import Chat, Message, Origin
from luthier.data.masks import encode_chat
from luthier.errors import TemplateError

TURN = "{{ '<|im_start|>' + m.role + '\n' + %s + '<|im_end|>\n' }}"
START = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
GOOD = "{% for m in messages %}" + TURN % "m.content" + "{% endfor %}" + START
LONG = "It is a long answer, in which the last words matter as much as the first."


def tokenizer_with(template: str | None) -> PreTrainedTokenizerBase:
    """One token for each byte, ChatML's markers, and this template."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = template
    return tokenizer


def talk(*contents: str) -> Chat:
    return Chat(tuple(Message("assistant" if i % 2 else "user", text) for i, text in enumerate(contents)))


def encode(template: str | None, conversation: Chat) -> None:
    encode_chat(conversation, Origin("rows.jsonl", 3), tokenizer_with(template))


BROKEN = {
    "drops answers": (GOOD.replace("m.content", "(m.content if m.role == 'user' else '')"), "loses"),
    "drops earlier turns": (GOOD.replace("messages %}", "messages[-2:] %}"), "loses"),
    "uppercases": (GOOD.replace("m.content", "m.content | upper"), "changes"),
    "reorders": (GOOD.replace("messages %}", "messages | sort(attribute='role') %}"), "moves"),
    "truncates answers": (
        GOOD.replace("m.content", "(m.content[:40] if m.role == 'assistant' else m.content)"),
        "words",
    ),
    "cuts questions": (GOOD.replace("m.content", "(m.content[:40] if m.role == 'user' else m.content)"), "the user"),
    "squeezes white space": (GOOD.replace("m.content", "m.content.split() | join(' ')"), "the user"),
    "trims the first letter": (GOOD.replace("m.content", "m.content.lstrip('I')"), "answer's words"),
    "no end token": (GOOD.replace("<|im_end|>", ""), "no end-of-turn"),
    "end token before the words": (GOOD.replace(" + m.content + '<|im_end|>", "'<|im_end|>' + m.content + '"), ""),
    "end token in the next header": (
        "{% for m in messages %}{{ ('' if loop.first else '<|im_end|>') + m.role + '\n' + m.content }}{% endfor %}"
        + START.replace("<|im_start|>", "<|im_end|>"),
        "no end-of-turn",
    ),
    "another prompt than header": (GOOD.replace("assistant\n", "Assistant:\n"), "generation prompt"),
    "no generation prompt": (GOOD.removesuffix(START), "no generation prompt"),
    "random": (GOOD + "{{ range(10 ** 5) | random }}", "differently each time"),
    "the clock": ("{{ strftime_now('%f') }}" + GOOD, "differently each time"),
    "missing": (None, "no chat template"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_template_is_refused(fault: str) -> None:
    template, reason = BROKEN[fault]
    with pytest.raises(TemplateError, match=rf"rows.jsonl:3: .*{reason}"):
        encode(template, talk("Why so  long?\n" + LONG, LONG + "\n  Indented.", "And why?", "Because."))


def test_the_same_rows_pass_with_the_template_mended() -> None:
    encode(GOOD, talk("Why so  long?\n" + LONG, LONG + "\n  Indented.", "And why?", "Because."))
