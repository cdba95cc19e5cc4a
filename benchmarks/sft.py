"""LoRA SFT of SmolLM2-135M: Luthier against TRL on the same rows, in one run.

Token ids, masks, order, batch, model, type and adapter are the same. Each contender runs in a process of its own,
one after the other, so that its peak memory is its own; losses are printed side by side. Tokens are those of the rows,
padding not counted. The machine's own matrix-product rate is measured in the same run, and with it the share of it that
Luthier reached.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from luthier.adapters.inject import inject
from luthier.data.batches import StepPlan
from luthier.data.masks import encode_chat
from luthier.data.reading import read_examples
from luthier.data.sequences import Item, TokenSequence
from luthier.kernels.linear import linear
from luthier.models.fuse import fuse
from luthier.models.load import load
from luthier.models.trainable import freeze_base
from luthier.pipeline.methods import next_tokens
from luthier.pipeline.plan import FIRST_MICRO_BATCH_TOKENS
from luthier.recipe import SFT, LoRA
from luthier.training.loop import train_step
from luthier.training.memory import keep_freed_memory
from luthier.training.optimizers import make_optimizer
from luthier.training.run import Run
from luthier.training.state import Progress, TrainState

MODEL = "smollm2-135m"
RATE, BATCH_SIZE, MAX_LENGTH = 2e-4, 8, 512
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def steps_of(rows: Path, num_steps: int) -> list[list[TokenSequence]]:
    """The sequences of each step, the same for every contender."""
    tokenizer = load(MODEL).tokenizer
    encoded = [s for origin, row in read_examples(str(rows)).examples for s in encode_chat(row, origin, tokenizer)]
    fitting = [s for s in encoded if len(s) <= MAX_LENGTH]
    plan = StepPlan(fitting, BATCH_SIZE, 1, 42)
    return [plan.step(i) for i in range(num_steps)]


def run_luthier(dtype: str, steps: list[list[TokenSequence]]) -> dict[str, Any]:
    """Luthier's own loop."""
    keep_freed_memory()
    model = load(MODEL, dtype=dtype)  # type: ignore[arg-type]
    fuse(model.network)
    freeze_base(model.network)
    inject(model.network, LoRA(r=16, alpha=32), seed=0)
    model.network.train()
    settings = SFT(
        data="rows", batch_size=BATCH_SIZE, learning_rate=RATE, schedule="constant", warmup_ratio=0.0, max_grad_norm=1.0
    )
    plan = _Fixed([s for step in steps for s in step], BATCH_SIZE, 1, 0)
    run = Run(
        TrainState(model.network, make_optimizer(model.network, settings), Progress()),
        plan,
        next_tokens,
        settings,
        FIRST_MICRO_BATCH_TOKENS[model.device.type],
    )
    return _timed([lambda: float(train_step(run)["loss"]) for _ in steps])


class _Fixed(StepPlan):
    """Steps in the order given."""

    def step(self, index: int) -> list[Item]:
        return list(self.items[index * self.batch_size : (index + 1) * self.batch_size])


def run_trl(dtype: str, steps: list[list[TokenSequence]], *, packed: bool, micro_batch: int) -> dict[str, Any]:
    """TRL's SFTTrainer on the same token ids and masks; packed: its padding-free batches."""
    import peft
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback

    source = load(MODEL)
    network = AutoModelForCausalLM.from_pretrained(source.source.folder, dtype=DTYPES[dtype])
    rows = [
        {"input_ids": s.token_ids.tolist(), "completion_mask": s.trained.astype(int).tolist()}
        for step in steps
        for s in step
    ]
    moments: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            moments.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=BATCH_SIZE // micro_batch,
            max_steps=len(steps),
            learning_rate=RATE,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            weight_decay=0.0,
            max_length=None if packed else MAX_LENGTH,  # no row is longer; padding-free takes no limit
            padding_free=packed,
            completion_only_loss=True,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            shuffle_dataset=False,
            train_sampling_strategy="sequential",
        )
        trainer = trl.SFTTrainer(
            network,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=source.tokenizer,
            callbacks=[Clock()],
            peft_config=peft.LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS, task_type="CAUSAL_LM"),
        )
        started = time.perf_counter()
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {"seconds": np.diff([started, *moments]).tolist(), "losses": losses}


def _timed(calls: list[Callable[[], float]]) -> dict[str, Any]:
    seconds, losses = [], []
    for call in calls:
        started = time.perf_counter()
        losses.append(call())
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "losses": losses}


CONTENDERS: dict[str, Callable[[str, list[list[TokenSequence]]], dict[str, Any]]] = {
    "luthier": run_luthier,
    "trl padded": lambda dtype, steps: run_trl(dtype, steps, packed=False, micro_batch=BATCH_SIZE),
    "trl one by one": lambda dtype, steps: run_trl(dtype, steps, packed=False, micro_batch=1),
    "trl packed": lambda dtype, steps: run_trl(dtype, steps, packed=True, micro_batch=BATCH_SIZE),
}


def matmul_rate(dtype: str) -> float:
    """FLOP a second of the model's own largest product, median of 20, by the faster of PyTorch's way and ours."""
    x, w = torch.randn(1024, 576, dtype=DTYPES[dtype]), torch.randn(1536, 576, dtype=DTYPES[dtype])
    calls = (partial(torch.nn.functional.linear, x, w), partial(linear, x, w))
    medians = [statistics.median(_timed([lambda c=c: float(c()[0, 0])] * 25)["seconds"][5:]) for c in calls]
    return 2 * 1024 * 576 * 1536 / min(medians)


def flops(steps: list[list[TokenSequence]]) -> int:
    """Matrix products that LoRA SFT cannot avoid: 4 a body parameter a token, 4 an output parameter a trained token."""
    body, head = 106_168_320, 49_152 * 576
    return sum(4 * body * len(s) + 4 * head * s.num_trained for step in steps for s in step)


def contend(name: str, dtype: str, rows: Path, num_steps: int) -> dict[str, Any]:
    """Runs one contender in a process of its own; adds its peak memory."""
    command = [
        sys.executable,
        __file__,
        "--only",
        name,
        "--dtype",
        dtype,
        "--rows",
        str(rows),
        "--steps",
        str(num_steps),
    ]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def main() -> None:
    """Prints a table of tokens a second, peak memory, losses and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, default=Path("../shared/data/alpaca_en.jsonl"))
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", choices=list(CONTENDERS))
    options = parser.parse_args()
    steps = steps_of(options.rows, options.steps)
    if options.only:
        result = CONTENDERS[options.only](options.dtype, steps)
        result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(result))
        return
    tokens = [sum(map(len, step)) for step in steps]
    results = {name: contend(name, options.dtype, options.rows, options.steps) for name in CONTENDERS}
    speed = {
        n: statistics.median(t / s for t, s in zip(tokens[1:], r["seconds"][1:], strict=True))
        for n, r in results.items()
    }
    print(f"{options.dtype}, {options.steps} steps of {BATCH_SIZE} rows, {sum(tokens)} tokens")
    for name, result in results.items():
        losses = " ".join(f"{loss:.4f}" for loss in result["losses"][:4])
        print(f"{name:16} {speed[name]:7.1f} tokens/s  {result['peak_bytes'] / 1e9:5.2f} GB  losses {losses} ...")
    best = max((n for n in results if n != "luthier"), key=lambda n: speed[n])
    memory = min(r["peak_bytes"] for n, r in results.items() if n != "luthier")
    rate = matmul_rate(options.dtype)
    share = flops(steps) / sum(tokens) * speed["luthier"] / rate
    print(f"speed over {best}: {speed['luthier'] / speed[best]:.2f}x")
    print(f"memory over TRL's smallest: {results['luthier']['peak_bytes'] / memory:.2f}")
    print(f"matrix products run at {rate / 1e9:.0f} GFLOP/s here; Luthier reaches {share:.0%} of that")


if __name__ == "__main__":
    main()
