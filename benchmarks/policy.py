"""Learning from rewards with SmolLM2-135M: Luthier's GRPO against TRL's, and its sampling against transformers'.

`--part step`: both answer the same prompts, give the same reward (the share of vowels), and train the same LoRA; a step
is sampling, scoring and learning. `--part decode`: answers of a fixed length to one prompt, tokens a second, in batches
of several sizes. `--part memory`: peak memory of sampling by group size. Each contender runs in a process of its own,
one after another; --rounds 2 runs all of them twice.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from luthier.data.examples import Chat, Message
from luthier.models.load import load
from luthier.models.sources import resolve
from luthier.pipeline.plan import FIRST_MICRO_BATCH_TOKENS
from luthier.pipeline.prepare import prepare_data, prepare_network
from luthier.pipeline.train import make_run
from luthier.recipe.policy import GRPO
from luthier.recipe.settings import settings_from
from luthier.rollout.engine import LocalEngine
from luthier.rollout.generate import request_for
from luthier.rollout.requests import Request, Sampling
from luthier.training.loop import train_step
from luthier.training.memory import keep_freed_memory

MODEL, RATE = "smollm2-135m", 1e-5
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
THINGS = ("the sea", "a lost dog", "two sisters", "a cold winter", "an old clock", "a long train ride", "the first day")
REWARD = (
    "def vowels(prompt, completion, row):\n    return sum(c in 'aeiou' for c in completion) / max(1, len(completion))\n"
)

Result = dict[str, Any]


def prompts_of(number: int) -> list[str]:
    """Prompts that have long answers."""
    return [f"Write a long story about {THINGS[i % len(THINGS)]}, part {i + 1}." for i in range(number)]


def luthier_step(given: argparse.Namespace) -> Result:
    """A policy stage's own loop, rollouts included."""
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "vowels.py").write_text(REWARD)
        rows = [json.dumps({"prompt": prompt}) for prompt in prompts_of(given.prompts * given.steps)]
        (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")
        settings = settings_from(
            GRPO,
            {
                **{"data": str(folder / "prompts.jsonl"), "reward": f"{folder}/vowels.py:vowels", "beta": given.beta},
                **{"batch_size": given.prompts, "group_size": given.group, "max_new_tokens": given.tokens},
                **{"learning_rate": RATE, "warmup_ratio": 0.0, "dtype": given.dtype, "seed": 1},
                **{"rollout_weights": given.weights, "rollout_rows": given.prompts * given.group},
            },
        )
        model = load(MODEL, dtype=given.dtype)
        prepared = prepare_data(settings, model, folder)
        adapters = prepare_network(settings, model)
        tokens = given.micro_batch_tokens or FIRST_MICRO_BATCH_TOKENS[model.device.type]
        run = make_run("grpo", settings, model, prepared, folder, adapters=adapters, micro_batch_tokens=tokens)
        lines = [train_step(run) for _ in range(given.steps)]
    return {
        "seconds": [line["seconds"] for line in lines],
        "sampling": [line["rollout/seconds"] for line in lines],
        "lengths": [line["completions/mean_length"] for line in lines],
        "rewards": [line["reward"] for line in lines],
    }


def trl_step(given: argparse.Namespace) -> Result:
    """TRL's trainer, at its own defaults but for what must be equal."""
    import peft
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.moments: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.moments.append(time.perf_counter())

    def vowels(completions: list[Any], **_: Any) -> list[float]:
        texts = [one[0]["content"] for one in completions]
        return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in texts]

    warnings.simplefilter("ignore")
    folder, clock = resolve(MODEL).folder, Clock()
    rows = [{"prompt": [{"role": "user", "content": p}]} for p in prompts_of(given.prompts * given.steps)]
    with tempfile.TemporaryDirectory() as place:
        arguments = GRPOConfig(
            output_dir=place,
            per_device_train_batch_size=given.prompts * given.group,
            num_generations=given.group,
            max_completion_length=given.tokens,
            max_steps=given.steps,
            beta=given.beta,
            loss_type="grpo",
            learning_rate=RATE,
            lr_scheduler_type="constant",
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=1,
            report_to=[],
            save_strategy="no",
        )
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[given.dtype]),
            reward_funcs=vowels,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(folder),
            callbacks=[clock],
            peft_config=peft.LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS, task_type="CAUSAL_LM"),
        )
        started = time.perf_counter()
        trainer.train()
    lines = [line for line in trainer.state.log_history if "reward" in line]
    return {
        "seconds": np.diff([started, *clock.moments]).tolist(),
        "lengths": [line["completions/mean_length"] for line in lines],
        "rewards": [line["reward"] for line in lines],
    }


def _long_prompt(tokens: int) -> Any:
    """A prompt of so many tokens, of one word."""
    return np.full(tokens, 253, dtype=np.int32)


def luthier_decode(given: argparse.Namespace) -> Result:
    """Tokens a second of `--group` answers to one prompt; the model and its packed weights are there already."""
    keep_freed_memory()
    model = load(MODEL, dtype=given.dtype)
    weights = "dense" if given.weights == "auto" else given.weights
    engine = LocalEngine(model, weights=weights, max_rows=given.group, fixed=True)
    request = request_for(model, Chat((Message("user", prompts_of(1)[0]),)), count=given.group)
    if given.part == "memory":
        request = Request(_long_prompt(given.prompt_tokens), given.group)
    engine.sample([request], Sampling(4, 1.0))
    seconds, rate = [], []
    for i in range(given.steps):
        started = time.perf_counter()
        (samples,) = engine.sample([request], Sampling(given.tokens, 1.0, seed=i))
        seconds.append(time.perf_counter() - started)
        rate.append(sum(len(one.token_ids) for one in samples) / seconds[-1])  # type: ignore[union-attr]
    return {"seconds": seconds, "rate": rate}


def transformers_decode(given: argparse.Namespace) -> Result:
    """The same by `generate`."""
    from transformers import GenerationConfig

    model = load(MODEL, dtype=given.dtype, attention="sdpa")
    prompt = request_for(model, Chat((Message("user", prompts_of(1)[0]),))).prompt_ids
    if given.part == "memory":
        prompt = _long_prompt(given.prompt_tokens)
    inputs = torch.tensor(prompt.tolist()).repeat(given.group, 1)
    seconds, rate = [], []
    for i in range(given.steps + 1):
        torch.manual_seed(i)
        config = GenerationConfig(
            max_new_tokens=given.tokens if i else 4, do_sample=True, top_k=0, eos_token_id=2, pad_token_id=2
        )
        started = time.perf_counter()
        with torch.inference_mode():
            found = model.network.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=config)
        written = found[:, inputs.shape[1] :]
        ends = (written == 2).int().cumsum(1)
        if i:
            seconds.append(time.perf_counter() - started)
            rate.append(float(((ends == 0).sum() + (ends.amax(1) > 0).sum()) / seconds[-1]))
    return {"seconds": seconds, "rate": rate}


CONTENDERS: dict[str, dict[str, Callable[[argparse.Namespace], Result]]] = {
    "step": {"luthier": luthier_step, "trl": trl_step},
    "decode": {"luthier": luthier_decode, "transformers": transformers_decode},
    "memory": {"luthier": luthier_decode, "transformers": transformers_decode},
}


def contend(name: str, options: argparse.Namespace, **changed: Any) -> Result:
    """Runs one contender in a process of its own; adds its peak memory."""
    values = vars(options) | changed
    own = ("only", "rounds", "output", "sizes")
    same = [f"--{key.replace('_', '-')}={value}" for key, value in values.items() if key not in own]
    done = subprocess.run(
        [sys.executable, __file__, f"--only={name}", *same], check=False, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def compare_steps(options: argparse.Namespace) -> list[Result]:
    """Seconds a step and peak memory, and their ratios."""
    rounds = [{name: contend(name, options) for name in CONTENDERS["step"]} for _ in range(options.rounds)]
    kept = []
    for name in CONTENDERS["step"]:
        runs = [one[name] for one in rounds]
        seconds = statistics.median(s for run in runs for s in run["seconds"][1:])
        kept.append({"who": name, "seconds": seconds, "peak_bytes": max(run["peak_bytes"] for run in runs)})
        lengths = statistics.fmean(length for run in runs for length in run["lengths"])
        sampling = statistics.median(s for run in runs for s in run.get("sampling", [0.0])[1:] or [0.0])
        print(
            f"{name:8} {seconds:6.2f} s a step  {kept[-1]['peak_bytes'] / 1e9:5.2f} GB  mean length {lengths:.1f}  "
            f"sampling {sampling:.2f} s  rewards {runs[0]['rewards'][0]:.3f} to {runs[0]['rewards'][-1]:.3f}"
        )
    ours, theirs = kept
    print(
        f"speed over trl: {theirs['seconds'] / ours['seconds']:.2f}x, memory "
        f"{ours['peak_bytes'] / theirs['peak_bytes']:.2f}"
    )
    return kept


def compare_decoding(options: argparse.Namespace) -> list[Result]:
    """Tokens a second, or peak memory, by size of the batch."""
    kept = []
    for size in options.sizes:
        forms = ("dense", "fp16", "int8") if options.part == "decode" else ("dense",)
        found = {f"luthier {form}": contend("luthier", options, group=size, weights=form) for form in forms}
        found["transformers"] = contend("transformers", options, group=size)
        for name, result in found.items():
            rate = statistics.median(result["rate"])
            ratio = rate / statistics.median(found["transformers"]["rate"])
            kept.append({"who": name, "size": size, "tokens_per_second": rate, "peak_bytes": result["peak_bytes"]})
            print(
                f"{size:3} {name:14} {rate:7.1f} tok/s  {ratio:5.2f}x  {result['peak_bytes'] / 1e9:5.2f} GB", flush=True
            )
    return kept


def main() -> None:
    """Prints a table and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(CONTENDERS), default="step")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--prompts", type=int, default=1, help="prompts a step")
    parser.add_argument("--group", type=int, default=8, help="answers to a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="the longest answer")
    parser.add_argument("--prompt-tokens", type=int, default=200, help="of the memory part")
    parser.add_argument("--beta", type=float, default=0.0, help="weight of the divergence; 0 as in TRL")
    parser.add_argument(
        "--micro-batch-tokens", type=int, default=0, help="Luthier's; 0 for as many as a run starts with"
    )
    parser.add_argument("--weights", default="auto", help="Luthier's rollout_weights")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 8, 32], help="batches of the decode part")
    parser.add_argument("--only", help="run this contender and print its numbers as JSON")
    parser.add_argument("--output", type=Path, help="a JSON file that the numbers are added to")
    options = parser.parse_args()
    if options.only:
        result = CONTENDERS[options.part][options.only](options)
        result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(result))
        return
    found = compare_steps(options) if options.part == "step" else compare_decoding(options)
    if options.output:
        kept = json.loads(options.output.read_text()) if options.output.exists() else []
        same = {key: getattr(options, key) for key in ("part", "dtype", "prompts", "group", "tokens", "beta")}
        options.output.write_text(json.dumps([*kept, *({**same, **one} for one in found)], indent=1) + "\n")


if __name__ == "__main__":
    main()
