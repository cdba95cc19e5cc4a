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
from luthier.data.sequences import TokenGroup, TokenSequence, sequences_of
from luthier.errors import DataError
from luthier.recipe import SFT, Pretrain
from luthier.recipe.preference import DPO, KTO, ORPO, OnAnswers, Reward

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
    letters = [tokenizer.decode(s.token_ids) for s in sequences_of(prepared.train)]
    assert sum(text.count("a") for text in letters) == 100
    assert sum(text.count("b") for text in letters) >= 64


def pairs(path: Path, lengths: list[int]) -> str:
    lines = (json.dumps({"prompt": f"{i}", "chosen": "a" * n, "rejected": "b"}) for i, n in enumerate(lengths))
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def verdicts(path: Path, labels: list[bool]) -> str:
    lines = (json.dumps({"prompt": f"q{i}", "completion": f"a{i}", "label": one}) for i, one in enumerate(labels))
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize("stage", [DPO, ORPO, Reward])
def test_stages_that_prefer_train_on_groups_of_answers(
    stage: type[OnAnswers], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    data = pairs(tmp_path / "pairs.jsonl", [1] * 7 + [200])
    prepared = prepare(stage(data=data, eval_fraction=0.25, max_length=128), tokenizer)
    counts = prepared.counts
    items = [*prepared.train, *prepared.evaluation]
    assert all(isinstance(item, TokenGroup) and len(item.sequences) == 2 for item in items)
    assert counts.rows == counts.examples == len(items) + counts.dropped_long == 8
    assert counts.tokens == sum(map(len, prepared.train))
    with pytest.raises(DataError, match="train on it with kto"):
        prepare(stage(data=verdicts(tmp_path / "verdicts.jsonl", [True])), tokenizer)


def test_kto_trains_on_answers_with_a_verdict_and_another_rows_answer(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    prepared = prepare(KTO(data=verdicts(tmp_path / "rows.jsonl", [True, False] * 4), eval_fraction=0.25), tokenizer)
    groups = [item for item in [*prepared.train, *prepared.evaluation] if isinstance(item, TokenGroup)]
    assert (len(prepared.train), len(prepared.evaluation), len(groups)) == (6, 2, 8)
    assert [group.desirable for group in sorted(groups, key=lambda one: one.origin.line)] == [True, False] * 4
    assert all(group.mismatched is not None for group in groups)


@pytest.mark.parametrize("label", [True, False])
def test_kto_refuses_data_with_one_verdict_alone(
    label: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    data = verdicts(tmp_path / "rows.jsonl", [label] * 5)
    with pytest.raises(DataError, match=f"all 5 answers are {'' if label else 'un'}desirable"):
        prepare(KTO(data=data), tokenizer)


def test_kto_refuses_to_hold_out_a_single_row(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    data = verdicts(tmp_path / "rows.jsonl", [True, False] * 4)
    with pytest.raises(DataError, match="hold out two rows or more"):
        prepare(KTO(data=data, eval_fraction=0.1), tokenizer)


def test_pairs_that_a_cut_makes_equal_are_dropped_and_counted(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    lines = [{"prompt": "q", "chosen": f"{i}" + "a" * 99, "rejected": f"{i}" + "a" * 99 + "b"} for i in range(2)]
    lines += [{"prompt": "q", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(20)]
    lines += [{"prompt": "q", "chosen": "a" * 99, "rejected": "b"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = DPO(data=str(tmp_path / "rows.jsonl"), max_length=100, on_long="truncate")
    counts = prepare(settings, tokenizer).counts
    assert (counts.rows, counts.sequences, counts.dropped_long, counts.truncated) == (23, 21, 2, 1)
