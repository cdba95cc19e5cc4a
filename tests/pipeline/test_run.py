"""A recipe from end to end on a tiny model: hand-over, going on, refusal, and what lies in the folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from luthier.adapters.peft_format import load_adapter
from luthier.errors import CheckpointError, DataError
from luthier.models.load import load
from luthier.pipeline.run import run_recipe
from luthier.recipe import Recipe, parse_recipe
from luthier.training.callbacks import Callback, read_metrics

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A two-layer model with a byte-level tokenizer and a ChatML template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHATML
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=fast.eos_token_id,
        bos_token_id=None,
        pad_token_id=fast.eos_token_id,
    )
    folder = tmp_path / "base"
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i}?", "answer": f"{i}{i}."}) + "\n" for i in range(24)))
    return path


def recipe(base: Path, rows: Path, output: Path, *stages: str) -> Recipe:
    lines = "".join(f"  - {stage}\n" for stage in stages).replace("ROWS", str(rows))
    return parse_recipe(f"model: {base}\noutput: {output}\ndtype: fp32\nstages:\n{lines}")


SFT = (
    "sft: {data: ROWS, epochs: 2, batch_size: 4, learning_rate: 0.01, eval_fraction: 0.25, save_every: 2, "
    "adapter: {r: 4}}"
)


def test_training_lowers_the_held_out_loss_and_leaves_the_run_folder(base: Path, rows: Path, tmp_path: Path) -> None:
    (summary,) = run_recipe(recipe(base, rows, tmp_path / "run", SFT))
    assert summary.steps == 10
    assert summary.final_eval_loss is not None
    assert summary.first_eval_loss is not None
    assert summary.final_eval_loss < summary.first_eval_loss
    for name in (
        "recipe.yaml",
        "manifest.json",
        "00-sft/metrics.jsonl",
        "00-sft/adapter",
        "model/model.safetensors",
        "report.html",
    ):
        assert (tmp_path / "run" / name).exists()


def test_the_saved_model_is_the_base_with_the_adapter(base: Path, rows: Path, tmp_path: Path) -> None:
    run_recipe(recipe(base, rows, tmp_path / "run", SFT))
    merged, adapted = load(str(tmp_path / "run" / "model")), load(str(base))
    load_adapter(adapted.network, tmp_path / "run" / "00-sft" / "adapter")
    ids = torch.arange(20)[None]
    torch.testing.assert_close(merged.network(ids).logits, adapted.network(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_second_stage_starts_from_the_merged_first(base: Path, rows: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten\n" * 20)
    pretrain = f"pretrain: {{data: {text}, max_length: 64, batch_size: 4, learning_rate: 0.01, adapter: {{r: 4}}}}"
    run_recipe(recipe(base, rows, tmp_path / "run", pretrain, SFT))
    first = read_metrics(tmp_path / "run" / "01-sft" / "metrics.jsonl")[0]
    alone = tmp_path / "alone"
    run_recipe(recipe(tmp_path / "run" / "00-pretrain" / "model", rows, alone, SFT))
    assert read_metrics(alone / "00-sft" / "metrics.jsonl")[0]["eval_loss"] == first["eval_loss"]


def test_an_interrupted_run_ends_as_the_uninterrupted_one_bit_for_bit(
    base: Path, rows: Path, tmp_path: Path, stop_at: Callable[[int], Callback]
) -> None:
    run_recipe(recipe(base, rows, tmp_path / "whole", SFT))
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(base, rows, tmp_path / "cut", SFT), listeners=lambda index, stage: [stop_at(5)])
    run_recipe(recipe(base, rows, tmp_path / "cut", SFT))
    for name in ("00-sft/adapter/adapter_model.safetensors", "model/model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    losses = [
        [m["loss"] for m in read_metrics(tmp_path / d / "00-sft" / "metrics.jsonl") if "loss" in m]
        for d in ("whole", "cut")
    ]
    assert losses[0] == losses[1]


def test_a_finished_run_is_not_done_again(base: Path, rows: Path, tmp_path: Path) -> None:
    plan = recipe(base, rows, tmp_path / "run", SFT)
    first = run_recipe(plan)
    shutil.rmtree(tmp_path / "run" / "00-sft" / "checkpoints")
    assert run_recipe(plan) == first
    assert not (tmp_path / "run" / "00-sft" / "checkpoints").exists()


def test_another_recipe_in_the_same_folder_is_refused(base: Path, rows: Path, tmp_path: Path) -> None:
    run_recipe(recipe(base, rows, tmp_path / "run", SFT))
    with pytest.raises(CheckpointError, match="another recipe"):
        run_recipe(recipe(base, rows, tmp_path / "run", SFT.replace("r: 4", "r: 2")))


def test_a_recipe_that_trained_nothing_may_be_corrected(base: Path, rows: Path, tmp_path: Path) -> None:
    good = rows.read_text()
    rows.write_text(good + '{"question": "no answer"}\n')
    with pytest.raises(DataError):
        run_recipe(recipe(base, rows, tmp_path / "run", SFT))
    (tmp_path / "run" / "00-sft").mkdir()
    (tmp_path / "run" / "00-sft" / "plan.json").write_text('{"micro_batch_tokens": 1}')
    rows.write_text(good)
    (summary,) = run_recipe(recipe(base, rows, tmp_path / "run", SFT.replace("epochs: 2", "epochs: 1")))
    assert summary.steps == 5
    assert json.loads((tmp_path / "run" / "00-sft" / "plan.json").read_text())["micro_batch_tokens"] > 1


def test_a_stage_that_is_done_on_data_that_changed_is_refused(base: Path, rows: Path, tmp_path: Path) -> None:
    run_recipe(recipe(base, rows, tmp_path / "run", SFT))
    rows.write_text(rows.read_text().replace("11.", "12."))
    with pytest.raises(CheckpointError, match=r"00-sft is done, but .*rows\.jsonl changed since then"):
        run_recipe(recipe(base, rows, tmp_path / "run", SFT))
    (summary,) = run_recipe(recipe(base, rows, tmp_path / "run", SFT.replace("epochs", "resume: false, epochs")))
    run_recipe(recipe(base, rows, tmp_path / "new", SFT))
    assert (
        read_metrics(Path(summary.folder) / "metrics.jsonl")[0]["eval_loss"]
        == (read_metrics(tmp_path / "new" / "00-sft" / "metrics.jsonl")[0]["eval_loss"])
    )


def test_what_decides_no_number_may_change_on_the_way(base: Path, rows: Path, tmp_path: Path) -> None:
    first = run_recipe(recipe(base, rows, tmp_path / "run", SFT))
    changed = recipe(base, rows, tmp_path / "run", SFT.replace("epochs", "on_error: skip, keep_last: 1, epochs"))
    assert run_recipe(changed) == first
    assert "keep_last: 1" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_resume_false_begins_that_stage_and_the_later_ones_anew(base: Path, rows: Path, tmp_path: Path) -> None:
    output, second = tmp_path / "run", SFT.replace("epochs: 2", "epochs: 1")
    before = run_recipe(recipe(base, rows, output, second, second, second))
    changed = second.replace("epochs: 1", "resume: false, epochs: 1").replace("r: 4", "r: 2")
    after = run_recipe(recipe(base, rows, output, second, changed, second))
    assert after[0] == before[0]
    assert after[1].trained_parameters * 2 == before[1].trained_parameters
    assert after[2].fingerprint != before[2].fingerprint
    with pytest.raises(CheckpointError, match="another recipe"):
        run_recipe(recipe(base, rows, output, second.replace("r: 4", "r: 2"), changed, second))


def test_full_fine_tuning_trains_what_is_not_frozen(base: Path, rows: Path, tmp_path: Path) -> None:
    stage = (
        "sft: {data: ROWS, epochs: 1, batch_size: 8, adapter: none, freeze: ['*.embed_tokens.*'], learning_rate: 0.001}"
    )
    run_recipe(recipe(base, rows, tmp_path / "run", stage))
    before, after = load(str(base)).network.state_dict(), load(str(tmp_path / "run" / "model")).network.state_dict()
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"])


def test_rows_that_do_not_fit_stop_the_run_or_land_in_quarantine(base: Path, rows: Path, tmp_path: Path) -> None:
    rows.write_text(rows.read_text() + '{"question": "no answer"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:25"):
        run_recipe(recipe(base, rows, tmp_path / "stop", SFT))
    run_recipe(recipe(base, rows, tmp_path / "skip", SFT.replace("epochs", "on_error: skip, epochs")))
    (line,) = (tmp_path / "skip" / "00-sft" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["line"] == 25
