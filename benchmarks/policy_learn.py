"""What SmolLM2-135M learns from a rule alone: sums of two numbers up to 20, made at run time, one in four held out.

The reward is 1 for an answer whose number is right. Told is the share of held-out prompts whose most likely answer is
right, before and after, with Wilson's 95% interval, and the time that it took.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import luthier as lt
from luthier.evaluate.significance import wilson_interval
from luthier.training.callbacks import read_metrics

HIGHEST, HELD_OUT = 20, 100


def rows_of(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Prompts with their answers, to learn on and to compare on; no sum stands in both."""
    pairs = [(a, b) for a in range(1, HIGHEST + 1) for b in range(1, HIGHEST + 1)]
    random.Random(seed).shuffle(pairs)
    rows = [{"prompt": f"What is {a} + {b}? Answer with the number only.", "answer": str(a + b)} for a, b in pairs]
    return rows[HELD_OUT:], rows[:HELD_OUT]


def written(rows: list[dict[str, str]], path: Path) -> str:
    """The rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def main() -> None:
    """Trains, prints what came of it, and keeps the curve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="grpo", help="a policy stage's word")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--output", type=Path, help="a JSON file for the curve")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, (train, held_out) = Path(place), rows_of(given.seed)
        stage = {
            **{
                "data": written(train, folder / "train.jsonl"),
                "eval_data": written(held_out, folder / "held_out.jsonl"),
            },
            **{"reward": "numeric", "batch_size": 8, "group_size": 8, "max_new_tokens": 16, "dtype": given.dtype},
            **{"learning_rate": given.learning_rate, "max_steps": given.steps, "epochs": 100, "seed": given.seed},
            **{"eval_every": 10, "eval_prompts": HELD_OUT, "save_every": None},
        }
        started = time.perf_counter()
        lt.run_recipe(
            lt.Recipe(model="smollm2-135m", output=str(folder / "run"), stages=[{given.method: stage}])  # type: ignore
        )
        minutes = (time.perf_counter() - started) / 60
        lines = read_metrics(folder / "run" / f"00-{given.method}" / "metrics.jsonl")
    curve = [(line["step"], line["eval_reward"]) for line in lines if "eval_reward" in line]
    for step, share in (curve[0], curve[-1]):
        low, high = wilson_interval(round(share * HELD_OUT), HELD_OUT)
        print(f"step {step}: {100 * share:.0f}% of {HELD_OUT} right ({100 * low:.0f} to {100 * high:.0f})")
    print(f"{given.method}: {minutes:.1f} minutes, {curve[-1][1] / max(curve[0][1], 1e-9):.1f} times as many")
    if given.output:
        kept = json.loads(given.output.read_text()) if given.output.exists() else {}
        told = [
            {name: line[name] for name in ("step", "reward", "entropy", "completions/mean_length")}
            for line in lines
            if "reward" in line
        ]
        kept[given.method] = {"minutes": minutes, "held_out": curve, "steps": told}
        given.output.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
