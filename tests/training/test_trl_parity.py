"""TRL's trainer and our step give the same loss and the same gradient norm on the same token ids and masks."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from luthier.data.batches import cut
from luthier.data.sequences import TokenSequence
from luthier.models.attention import ATTENTION, register_attention
from luthier.training.loop import step_gradients
from luthier.training.run import Run


def network() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0))


def trl_step(model: LlamaForCausalLM, rows: list[TokenSequence], batch_size: int, folder: Path) -> dict[str, float]:
    """What TRL logs of one step over all rows, `batch_size` of them in each forward pass, learning nothing."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    backend = Tokenizer(models.WordLevel({str(i): i for i in range(97)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="0", eos_token="1")
    columns = {
        "input_ids": [row.token_ids.tolist() for row in rows],
        "completion_mask": [row.trained.astype(int).tolist() for row in rows],
    }
    settings = trl.SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=len(rows) // batch_size,
        completion_only_loss=True,
        max_steps=1,
        logging_steps=1,
        learning_rate=0.0,
        max_length=None,
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(
        model, settings, train_dataset=datasets.Dataset.from_dict(columns), processing_class=tokenizer
    )
    trainer.train()
    return dict(trainer.state.log_history[0])


@pytest.mark.filterwarnings("ignore")  # the peer's own
@pytest.mark.parametrize("batch_size", [8, 2])
def test_loss_and_gradient_norm_equal_trls(
    rows_of: Callable[..., list[TokenSequence]], run_of: Callable[..., Run], tmp_path: Path, batch_size: int
) -> None:
    """The loss to 1e-5 and the norm to 1e-4 of itself: float32 sums of other order, over padded rows there."""
    rows, ours = rows_of(8), network()
    theirs = trl_step(deepcopy(ours), rows, batch_size, tmp_path)
    register_attention()
    ours.set_attn_implementation(ATTENTION)
    sums = step_gradients(ours, cut(rows, 40), run_of().objective)
    norm = torch.nn.utils.get_total_norm(p.grad for p in ours.parameters())
    assert sums["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    assert float(norm) == pytest.approx(theirs["grad_norm"], rel=1e-4)
