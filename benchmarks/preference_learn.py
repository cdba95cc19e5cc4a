"""What each way of learning from preferences does to SmolLM2-135M on real pairs, in one pass over a few hundred.

Accuracy is the share of held-out pairs whose better answer has the higher log p a token (of the reward model: the
higher reward), with Wilson's 95% interval; before is the model that all start from. Perplexity is that of general text,
and shows what is forgotten. All learn the same pairs in the same order with LoRA in bfloat16; feedback is made of them
by taking the better answer of every second pair and the worse one of the others. Learning rates and ORPO's beta are
higher than the defaults, as such a small model and so few pairs want them. A method whose interval does not lie above
the accuracy before (of the reward model: above chance), or whose perplexity rises by more than 15%, ends the script
with exit code 1.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import luthier as lt
from luthier.data.batches import collate, cut, pack
from luthier.data.examples import Chat, Feedback, Origin, Preference
from luthier.data.masks import encode_text
from luthier.data.pairs import encode_preference
from luthier.data.reading import read_examples
from luthier.data.sequences import TokenSequence
from luthier.data.writing import write_examples
from luthier.evaluate.significance import wilson_interval
from luthier.models.load import Model
from luthier.models.rewards import rewards
from luthier.models.score import sequence_logprobs

SHARED = Path("../shared/data")
DATA = {
    "persona": "persona_prefs/train.jsonl",
    "hh": "hh_harmless_pairs.jsonl",
    "alpaca": "alpaca_eval_prefs/train.jsonl",
}
TEXT, TEXT_TOKENS = SHARED / "wikitext2_valid.txt", 16_000
METHODS: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.1},
    "ipo": {"beta": 0.1},
    "kto": {"beta": 0.1},
    "orpo": {"beta": 0.5},
    "simpo": {"beta": 2.0, "gamma": 1.0},
    "cpo": {"beta": 0.1},
    "reward": {},
}
RATE = {"persona": 1e-3, "hh": 1e-4, "alpaca": 1e-4}


def rows_of(name: str, num_train: int, num_held_out: int, folder: Path) -> tuple[dict[str, Path], list[Preference]]:
    """The files that each kind of stage learns from, and the pairs that are held out."""
    reading = read_examples(str(SHARED / DATA[name]), task="prefer", on_error="skip")
    pairs = [example for _, example in reading.examples if isinstance(example, Preference)]
    short = [p for p in pairs if sum(len(m.content) for a in (p.prompt, *p.answers) for m in a) < 1500]
    order = np.random.default_rng(0).permutation(len(short))
    chosen = [short[i] for i in order[: num_train + num_held_out]]
    train, held_out = chosen[num_held_out:], chosen[:num_held_out]
    verdicts = [Feedback(Chat((*p.prompt, *p.answers[i % 2]), p.tools), i % 2 == 0) for i, p in enumerate(train)]
    files = {"pairs": folder / "pairs.jsonl", "verdicts": folder / "verdicts.jsonl"}
    write_examples(train, files["pairs"])
    write_examples(verdicts, files["verdicts"])
    return files, held_out


@torch.no_grad()
def accuracy(model: Model, pairs: Sequence[Preference]) -> float:
    """By mean log p of the answers."""
    groups = [encode_preference(pair, Origin("-", i), model.tokenizer) for i, pair in enumerate(pairs)]
    won = 0
    for members in pack([len(g) for g in groups], 2048):
        batch = collate([groups[i] for i in members])
        means = sequence_logprobs(model.network, batch) / torch.tensor(batch.target_counts)
        won += int((means[batch.pairs[:, 0]] > means[batch.pairs[:, 1]]).sum())
    return won / len(groups)


def reward_accuracy(model: Model, pairs: Sequence[Preference]) -> float:
    """By the rewards of whole conversations."""
    better, worse = (rewards(model, [Chat((*p.prompt, *p.answers[i])) for p in pairs]) for i in (0, 1))
    return float(np.mean(np.array(better) > np.array(worse)))


@torch.no_grad()
def perplexity(model: Model) -> float:
    """Of the beginning of general text, in pieces of 512 tokens."""
    whole = encode_text(TEXT.read_text()[: 6 * TEXT_TOKENS], Origin(TEXT.name, 1), model.tokenizer)
    pieces = [
        TokenSequence(whole.token_ids[i : i + 512], whole.trained[i : i + 512], whole.origin)
        for i in range(0, TEXT_TOKENS, 512)
    ]
    losses = [-lt.score(model, batch).logprobs for batch in cut(pieces, 2048)]
    return math.exp(float(torch.cat(losses).mean()))


def run(method: str, data: str, files: dict[str, Path], held_out: list[Preference], folder: Path) -> dict[str, float]:
    """One stage from the untouched model on."""
    model = lt.load("smollm2-135m", dtype="bf16")
    started = time.perf_counter()
    file = files["verdicts" if method == "kto" else "pairs"]
    given = {"data": file, "adapter": lt.LoRA(r=16), "learning_rate": RATE[data], "batch_size": 8, "seed": 1}
    getattr(lt, method)(model, **given, **METHODS[method], output=folder / method)
    seconds = time.perf_counter() - started
    if method == "reward":
        return {"accuracy": reward_accuracy(model, held_out), "seconds": seconds}
    return {"accuracy": accuracy(model, held_out), "perplexity": perplexity(model), "seconds": seconds}


def untouched(held_out: list[Preference]) -> dict[str, float]:
    """What all start from."""
    model = lt.load("smollm2-135m", dtype="bf16")
    return {"accuracy": accuracy(model, held_out), "perplexity": perplexity(model)}


def line(method: str, found: dict[str, float], before: dict[str, float], num_held_out: int) -> str:
    """One row of the table."""
    low, high = wilson_interval(found["accuracy"] * num_held_out, num_held_out)
    change = f"{found['perplexity'] / before['perplexity'] - 1:+.1%}" if "perplexity" in found else ""
    return (
        f"| {method} | {start(method, before):.1%} | {found['accuracy']:.1%} ({low:.1%} to {high:.1%}) | {change} "
        f"| {found['seconds']:.0f} s |"
    )


def start(method: str, before: dict[str, float]) -> float:
    """The accuracy to rise above: a new reward model has none but chance."""
    return 0.5 if method == "reward" else before["accuracy"]


def main() -> None:
    """Prints a table row for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(DATA), default="persona")
    parser.add_argument("--train", type=int, default=480, help="pairs to learn from")
    parser.add_argument("--held-out", type=int, default=200, help="pairs to compare on")
    parser.add_argument("--only", action="append", choices=list(METHODS))
    parser.add_argument("--output", type=Path, help="A JSON file for the numbers; those that it has are not run again.")
    given = parser.parse_args()
    results = json.loads(given.output.read_text()) if given.output and given.output.exists() else {}
    print("| method | accuracy before | after | perplexity of general text | time |\n" + "| --- " * 5 + "|")
    for method in ("untouched", *(given.only or METHODS)):
        with tempfile.TemporaryDirectory() as name:
            files, held_out = rows_of(given.data, given.train, given.held_out, Path(name))
            if method not in results:
                made = (
                    untouched(held_out)
                    if method == "untouched"
                    else run(method, given.data, files, held_out, Path(name))
                )
                results[method] = made
        if method != "untouched":
            print(line(method, results[method], results["untouched"], len(held_out)), flush=True)
        if given.output:
            given.output.write_text(json.dumps(results, indent=1) + "\n")
    before, num = results.pop("untouched"), given.held_out
    bad = [m for m, r in results.items() if wilson_interval(r["accuracy"] * num, num)[0] <= start(m, before)]
    forgetful = [m for m, r in results.items() if r.get("perplexity", 0) > 1.15 * before["perplexity"]]
    if bad or forgetful:
        sys.exit(f"learned nothing: {bad}; forgot too much: {forgetful}")


if __name__ == "__main__":
    main()
