"""Preference alignment of SmolLM2-135M with LoRA: Luthier against TRL on the same pairs, in one run.

Prompts and answers have fixed lengths and are made of common words; token ids, batch, model, type, adapter, learning
rate and reference are the same. TRL runs in two settings, all pairs of a step in one padded batch and one pair at a
time with accumulation, and the better one counts. Each contender runs in a process of its own, with --rounds 2 all of
them twice, one after another, since a machine may be slower for some minutes. Luthier's time includes the reference
model's log-probabilities, which it computes once beforehand and TRL in every step. The losses are printed side by side.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from luthier.data.batches import StepPlan
from luthier.data.examples import Origin
from luthier.data.sequences import TokenGroup, TokenSequence
from luthier.models.load import Model, load
from luthier.models.sources import resolve
from luthier.pipeline.plan import FIRST_MICRO_BATCH_TOKENS
from luthier.pipeline.prepare import fresh_state, prepare_network
from luthier.pipeline.reference import referred
from luthier.pipeline.stages import STAGES
from luthier.recipe.preference import WithReference
from luthier.recipe.settings import settings_from
from luthier.recipe.stages import STAGE_SETTINGS
from luthier.training.loop import train_step
from luthier.training.memory import keep_freed_memory
from luthier.training.run import Run

MODEL, RATE, BETA = "smollm2-135m", 1e-4, 0.1
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WORDS = (
    *("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world"),
    *("school", "state", "family", "student", "group", "country"),
)

Pair = dict[str, str]


def pairs_of(num_pairs: int, prompt: int, answer: int) -> list[Pair]:
    """Texts of single-token words; the answers differ from their first word on."""
    draw = np.random.default_rng(0)

    def text(length: int, first: str) -> str:
        return "".join(f" {word}" for word in (first, *draw.choice(WORDS[2:], length - 1)))

    return [
        {"prompt": text(prompt, "time"), "chosen": text(answer - 1, WORDS[0]), "rejected": text(answer - 1, WORDS[1])}
        for _ in range(num_pairs)
    ]


def group_of(pair: Pair, model: Model, word: str, number: int, other: Pair) -> TokenGroup:
    """The token ids that TRL makes: prompt and answer in one text, and the end token behind."""

    def sequence(start: str, answer: str) -> TokenSequence:
        before = model.tokenizer(start)["input_ids"]
        ids = [*model.tokenizer(start + answer)["input_ids"], model.tokenizer.eos_token_id]
        trained = np.arange(len(ids)) >= len(before)
        return TokenSequence(np.asarray(ids, dtype=np.int32), trained, Origin("pairs", number + 1))

    if word == "kto":
        good = number % 2 == 0
        own = sequence(pair["prompt"], pair["chosen" if good else "rejected"])
        mismatched = sequence(pair["prompt"], other["rejected" if good else "chosen"])
        return TokenGroup((own,), desirable=good, mismatched=mismatched)
    return TokenGroup((sequence(pair["prompt"], pair["chosen"]), sequence(pair["prompt"], pair["rejected"])))


def run_luthier(word: str, dtype: str, pairs: Sequence[Pair], batch_size: int) -> dict[str, Any]:
    """Luthier's own loop, the reference included."""
    keep_freed_memory()
    given = {"data": "-", "batch_size": batch_size, "learning_rate": RATE, "dtype": dtype, "adapter": {"type": "lora"}}
    further = {"center_rewards": 0.0} if word == "reward" else {"beta": BETA}
    settings = settings_from(STAGE_SETTINGS[word], {**given, **further, "schedule": "constant", "warmup_ratio": 0.0})
    model = load(MODEL, dtype=dtype)  # type: ignore[arg-type]
    prepare_network(settings, model)
    before = [pairs[-1], *pairs[:-1]]
    items: list[Any] = [group_of(p, model, word, i, b) for i, (p, b) in enumerate(zip(pairs, before, strict=True))]
    tokens = FIRST_MICRO_BATCH_TOKENS[model.device.type]
    started = time.perf_counter()
    if isinstance(settings, WithReference):
        with tempfile.TemporaryDirectory() as folder:
            items = referred(items, model, Path(folder), name=None, micro_batch_tokens=tokens)
    of_reference = time.perf_counter() - started
    method = STAGES[word].method(settings)
    plan = _InOrder(items, batch_size, 1, 0)
    run = Run(fresh_state(settings, model), plan, method.objective, settings, tokens, prepare=method.prepare)
    seconds, losses = [], []
    for _ in range(plan.num_steps):
        started = time.perf_counter()
        losses.append(train_step(run)["loss"])
        seconds.append(time.perf_counter() - started + of_reference / plan.num_steps)
    return {"seconds": seconds, "losses": losses}


class _InOrder(StepPlan):
    def step(self, index: int) -> list[Any]:
        return list(self.items[index * self.batch_size : (index + 1) * self.batch_size])


def run_trl(word: str, dtype: str, pairs: Sequence[Pair], batch_size: int, *, micro_batch: int) -> dict[str, Any]:
    """TRL's trainer of this method, at its own defaults but for what must be equal."""
    import peft
    from datasets import Dataset
    from transformers import AutoTokenizer

    warnings.simplefilter("ignore")
    tokenizer = AutoTokenizer.from_pretrained(resolve(MODEL).folder)
    kind, config_kind, further = _trl_classes(word)
    clock = _clock()
    of_reward = word == "reward"
    with tempfile.TemporaryDirectory() as place:
        arguments = config_kind(
            output_dir=place,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=batch_size // micro_batch,
            max_steps=len(pairs) // batch_size,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            max_length=4096,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            train_sampling_strategy="sequential",
            **further,
        )
        trainer = kind(
            model=_plain_network(word, dtype, tokenizer.pad_token_id),
            args=arguments,
            train_dataset=Dataset.from_list([_row(word, pair, i) for i, pair in enumerate(pairs)]),
            processing_class=tokenizer,
            callbacks=[clock],
            peft_config=peft.LoraConfig(
                r=16,
                lora_alpha=32,
                target_modules=LINEARS,
                task_type="SEQ_CLS" if of_reward else "CAUSAL_LM",
                modules_to_save=["score"] if of_reward else None,
            ),
        )
        started = time.perf_counter()
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {"seconds": np.diff([started, *clock.moments]).tolist(), "losses": losses}


def _clock() -> Any:
    """Remembers when each step was over."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.moments: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.moments.append(time.perf_counter())

    return Clock()


def _plain_network(word: str, dtype: str, padding_id: int) -> nn.Module:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    folder, loading = resolve(MODEL).folder, {"dtype": DTYPES[dtype]}
    if word != "reward":
        network: nn.Module = AutoModelForCausalLM.from_pretrained(folder, **loading)
        return network
    return AutoModelForSequenceClassification.from_pretrained(  # type: ignore[no-any-return]
        folder, num_labels=1, pad_token_id=padding_id, **loading
    )


def _trl_classes(word: str) -> tuple[Any, Any, dict[str, Any]]:
    import trl

    if word == "dpo":
        return trl.DPOTrainer, trl.DPOConfig, {"beta": BETA}
    if word == "kto":
        return trl.KTOTrainer, trl.KTOConfig, {"beta": BETA}
    if word == "reward":
        return trl.RewardTrainer, trl.RewardConfig, {}
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return ORPOTrainer, ORPOConfig, {"beta": BETA}


def _row(word: str, pair: Pair, number: int) -> dict[str, Any]:
    if word == "reward":
        return {name: pair["prompt"] + pair[name] for name in ("chosen", "rejected")}
    if word == "kto":
        good = number % 2 == 0
        return {"prompt": pair["prompt"], "completion": pair["chosen" if good else "rejected"], "label": good}
    return dict(pair)


CONTENDERS: dict[str, Callable[[str, str, Sequence[Pair], int], dict[str, Any]]] = {
    "luthier": run_luthier,
    "trl, whole steps": lambda word, dtype, pairs, size: run_trl(word, dtype, pairs, size, micro_batch=size),
    "trl, few at a time": lambda word, dtype, pairs, size: run_trl(
        word, dtype, pairs, size, micro_batch=2 if word == "kto" else 1
    ),
}


def contend(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Runs one contender in a process of its own; adds its peak memory."""
    own = ("only", "without", "rounds", "output")
    same = [f"--{key.replace('_', '-')}={value}" for key, value in vars(options).items() if key not in own]
    command = [sys.executable, __file__, f"--only={name}", *same]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Prints a table of pairs a second, peak memory, losses and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["dpo", "kto", "orpo", "reward"], default="dpo")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--prompt", type=int, default=200, help="tokens of a prompt")
    parser.add_argument("--answer", type=int, default=80, help="tokens of an answer")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", choices=list(CONTENDERS), help="run this one and print its numbers as JSON")
    parser.add_argument("--without", choices=list(CONTENDERS), action="append", default=[])
    parser.add_argument("--output", type=Path, help="a JSON file that the numbers are added to")
    options = parser.parse_args()
    pairs = pairs_of(options.batch_size * options.steps, options.prompt, options.answer)
    if options.only:
        result = CONTENDERS[options.only](options.method, options.dtype, pairs, options.batch_size)
        result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(result))
        return
    names = [name for name in CONTENDERS if name not in options.without]
    rounds = [{name: contend(name, options) for name in names} for _ in range(options.rounds)]
    results = rounds[0]
    seconds = {name: [s for one in rounds for s in one[name]["seconds"][1:]] for name in names}
    speed = {name: options.batch_size / statistics.median(seconds[name]) for name in names}
    lengths = f"prompt {options.prompt} + 2 x {options.answer}"
    print(f"{options.method}, {options.dtype}, {lengths}, steps of {options.batch_size}")
    for name, result in results.items():
        losses = " ".join(f"{loss:.4f}" for loss in result["losses"])
        print(f"{name:18} {speed[name]:6.3f} pairs/s  {result['peak_bytes'] / 1e9:5.2f} GB  losses {losses}")
    best = max((name for name in results if name != "luthier"), key=lambda name: speed[name])
    ours = results["luthier"]["peak_bytes"]
    print(f"speed over {best}: {speed['luthier'] / speed[best]:.2f}x")
    for name in results:
        if name != "luthier":
            print(f"memory over {name}: {ours / results[name]['peak_bytes']:.2f}")
    if options.output:
        kept = json.loads(options.output.read_text()) if options.output.exists() else []
        same = {key: getattr(options, key) for key in ("method", "dtype", "prompt", "answer", "batch_size")}
        for name, r in results.items():
            kept.append({**same, "who": name, "pairs_per_second": speed[name], "peak_bytes": r["peak_bytes"]})
        options.output.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
