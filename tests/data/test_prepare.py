"""Rows in are rows accounted for: trained on, held out, over the limit, or bad."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from luthier.data.blocks import blocks_of, mixed
from luthier.data.examples import Origin
from luthier.data.prepare import prepare
from luthier.data.sequences import TokenSequence
from luthier.errors import DataError
from luthier.recipe import SFT, Pretrain

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHATML
    return fast


def rows(path: Path, lengths: list[int]) -> str:
    lines = (json.dumps({"question": f"{i}", "answer": f"{i:03d}" * n}) for i, n in enumerate(lengths))
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def sequence(ids: list[int]) -> TokenSequence:
    return TokenSequence(np.array(ids, np.int32), np.array([False, *[True] * (len(ids) - 1)]), Origin("a", 1))


def test_every_row_is_counted_once(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    data = rows(tmp_path / "rows.jsonl", [1] * 9 + [200])
    prepared = prepare(SFT(data=data, eval_fraction=0.2, max_length=128), tokenizer)
    counts = prepared.counts
    assert counts.rows == counts.examples + counts.bad == 10
    assert counts.examples - counts.held_out == counts.sequences + counts.dropped_long
    assert len(prepared.evaluation) in (1, 2)


def test_what_is_held_out_is_never_trained_on(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    prepared = prepare(SFT(data=rows(tmp_path / "rows.jsonl", [1] * 20), eval_fraction=0.25), tokenizer)
    assert not {s.origin for s in prepared.train} & {s.origin for s in prepared.evaluation}
    assert len(prepared.train) + len(prepared.evaluation) == 20


def test_the_length_limit_follows_its_policy(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    data = rows(tmp_path / "rows.jsonl", [1] * 19 + [200])
    cut = prepare(SFT(data=data, max_length=128, on_long="truncate"), tokenizer)
    assert (cut.counts.truncated, max(map(len, cut.train)), len(cut.train)) == (1, 128, 20)
    with pytest.raises(DataError, match=r"rows\.jsonl:20: longer than max_length 128"):
        prepare(SFT(data=data, max_length=128, on_long="error"), tokenizer)
    with pytest.raises(DataError, match="every sequence is longer"):
        prepare(SFT(data=data, max_length=8), tokenizer)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(2, 16))
def test_blocks_lose_no_token_but_a_last_one_alone(lengths: list[int], size: int) -> None:
    documents = [sequence(list(range(n))) for n in lengths]
    blocks = blocks_of(documents, size)
    whole = np.concatenate([d.token_ids for d in documents])
    kept = np.concatenate([b.token_ids for b in blocks]) if blocks else np.array([], np.int32)
    assert np.array_equal(kept, whole[: len(kept)])
    assert len(whole) - len(kept) == (1 if len(whole) % size == 1 else 0)


@given(st.floats(0.05, 0.8), st.integers(0, 5))
def test_general_text_makes_up_its_share_of_the_tokens(share: float, seed: int) -> None:
    own, general = [sequence(list(range(10)))] * 50, {"general": [sequence(list(range(10)))] * 7}
    result = mixed(own, general, {"general": share}, seed)
    assert abs((len(result) - 50) / len(result) - share) < 1 / 50


def test_pretraining_reads_plain_text_in_blocks(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 100)
    (tmp_path / "b.txt").write_text("b" * 100)
    settings = Pretrain(data=str(tmp_path / "a.txt"), mix={str(tmp_path / "b.txt"): 0.5}, max_length=32)
    prepared = prepare(settings, tokenizer)
    letters = [tokenizer.decode(s.token_ids) for s in prepared.train]
    assert sum(text.count("a") for text in letters) == 100
    assert sum(text.count("b") for text in letters) >= 64
