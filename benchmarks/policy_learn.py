"""What SmolLM2-135M learns from rewards alone, on held-out prompts, and how far it goes from where it started.

`--task sums`: sums of two numbers up to 20, made at run time, one in four held out; the reward is 1 for an answer whose
number is right, and the held-out reward is the share of prompts whose most likely answer is right, with Wilson's 95%
interval. `--task persona`: a reward model is trained on pairs of one-word answers (../shared/data), and the policy
learns from it on prompts that neither of the two has seen answers to; the held-out reward is the reward model's.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import luthier as lt
from luthier.evaluate.significance import wilson_interval
from luthier.training.callbacks import read_metrics

MODEL, HIGHEST, HELD_OUT, NUM_PAIRS = "smollm2-135m", 20, 100, 480
PERSONA = Path("../shared/data/persona_prefs/train.jsonl")

Rows = list[dict[str, Any]]


def sums(seed: int) -> tuple[Rows, Rows]:
    """Prompts with their answers, to learn on and to compare on; no sum stands in both."""
    pairs = [(a, b) for a in range(1, HIGHEST + 1) for b in range(1, HIGHEST + 1)]
    random.Random(seed).shuffle(pairs)
    rows = [{"prompt": f"What is {a} + {b}? Answer with the number only.", "answer": str(a + b)} for a, b in pairs]
    return rows[HELD_OUT:], rows[:HELD_OUT]


def persona(seed: int) -> tuple[Rows, Rows, Rows]:
    """Pairs for the reward model, and prompts to learn on and to compare on, all of them apart."""
    rows = [json.loads(line) for line in PERSONA.read_text(encoding="utf-8").splitlines()]
    random.Random(seed).shuffle(rows)
    pairs = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows[:NUM_PAIRS]]
    prompts = [{"prompt": row["prompt"]} for row in rows[NUM_PAIRS:]]
    return pairs, prompts[HELD_OUT:], prompts[:HELD_OUT]


def written(rows: Rows, path: Path) -> str:
    """The rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def of_task(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The stage's data and reward; a reward model is trained first where there is one."""
    if given.task == "sums":
        train, held_out = sums(given.seed)
        own: dict[str, Any] = {"reward": "numeric", "max_new_tokens": 16}
    else:
        pairs, train, held_out = persona(given.seed)
        of_model = {"data": written(pairs, folder / "pairs.jsonl"), "learning_rate": 1e-3, "batch_size": 8}
        run(folder / "reward", "reward", {**of_model, "dtype": given.dtype, "seed": given.seed})
        beside = str(folder / "reward" / "00-reward" / "adapter")  # the policy's weights are the reward model's too
        own = {"reward": {"type": "model", "adapter": beside}, "max_new_tokens": 4}
    files = {"data": written(train, folder / "train.jsonl"), "eval_data": written(held_out, folder / "held_out.jsonl")}
    return {**files, **own}


def run(output: Path, word: str, stage: dict[str, Any]) -> None:
    """A recipe of one stage."""
    lt.run_recipe(lt.Recipe(model=MODEL, output=str(output), stages=[{word: stage}]))  # type: ignore[arg-type, list-item]


def main() -> None:
    """Trains, prints what came of it, and keeps the curve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["sums", "persona"], default="sums")
    parser.add_argument("--method", default="grpo", help="a policy stage's word")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--further", type=json.loads, default={}, help="settings of the stage, as JSON")
    parser.add_argument("--output", type=Path, help="a JSON file for the curve")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        stage = {
            **of_task(given, folder),
            **{"batch_size": 8, "dtype": given.dtype, "learning_rate": given.learning_rate, "seed": given.seed},
            **{"max_steps": given.steps, "epochs": 100, "eval_every": 10, "eval_prompts": HELD_OUT, "save_every": None},
            **({"group_size": 8} if given.method not in ("ppo", "reinforce_pp") else {"batch_size": 32}),
            **given.further,
        }
        started = time.perf_counter()
        run(folder / "policy", given.method, stage)
        minutes = (time.perf_counter() - started) / 60
        lines = read_metrics(folder / "policy" / f"00-{given.method}" / "metrics.jsonl")
    curve = [(line["step"], line["eval_reward"]) for line in lines if "eval_reward" in line]
    for step, reward in (curve[0], curve[-1]):
        low, high = wilson_interval(round(reward * HELD_OUT), HELD_OUT) if given.task == "sums" else (reward, reward)
        print(f"step {step}: held-out reward {reward:.3f} ({low:.2f} to {high:.2f})")
    last = next(line for line in reversed(lines) if "kl" in line or "reward" in line)
    print(f"{given.task}, {given.method}: {minutes:.1f} minutes, KL {last.get('kl', float('nan')):.3f} nats a token")
    if given.output:
        kept = json.loads(given.output.read_text()) if given.output.exists() else {}
        names = ("step", "reward", "kl", "entropy", "completions/mean_length")
        told = [{name: line[name] for name in names if name in line} for line in lines if "reward" in line]
        kept[f"{given.task}, {given.method}"] = {"minutes": minutes, "held_out": curve, "steps": told}
        given.output.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
