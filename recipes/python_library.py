"""Teach a small chat model the Python standard library, on this machine, in a few minutes.

The rows are made here and now from the docstrings of the Python that runs this file: one question and answer for each
function, method and class that says what it does. A tenth is held out. The rest is an ordinary recipe: LoRA on all
linear layers, 130 steps.
"""

import argparse
import importlib
import inspect
import json
import math
import random
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from luthier.cli.run import run_on_screen
from luthier.data.examples import Chat, Message
from luthier.models.load import load
from luthier.pipeline.report import Sample, write_report
from luthier.pipeline.train import Summary
from luthier.recipe import load_recipe
from luthier.rollout.generate import Sampling, answers

RECIPE = """\
model: smollm2-135m
output: {output}
stages:
  - sft:
      data: {rows}
      eval_data: {held_out}
      adapter: {{type: lora, r: 16}}
      epochs: 1
      batch_size: 8
      max_length: 256
      learning_rate: 1.0e-3
      on_long: truncate
      max_steps: 130
      eval_every: 130
      save_every: 65
"""

MODULES = """
    argparse array ast asyncio base64 bisect calendar collections concurrent.futures configparser contextlib copy
    csv datetime decimal difflib email enum fileinput fnmatch fractions functools glob gzip hashlib heapq hmac html
    http.client inspect io ipaddress itertools json keyword linecache locale logging lzma math mimetypes numbers
    operator os os.path pathlib platform pprint queue random re sched secrets selectors shelve shlex shutil signal
    smtplib socket sqlite3 ssl statistics string struct subprocess sys tarfile tempfile textwrap threading time
    timeit token tokenize traceback types typing unicodedata unittest urllib.parse urllib.request uuid warnings
    weakref xml.dom.minidom xml.etree.ElementTree zipfile zlib
""".split()  # noqa: SIM905  a hundred quoted names would be harder to read


def documented(name: str) -> Iterator[tuple[str, str]]:
    """Names in a module with the first paragraph of their docstrings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module(name)
    for label, thing in sorted(vars(module).items()):
        if label.startswith("_") or not callable(thing):
            continue
        yield f"{name}.{label}", inspect.getdoc(thing) or ""
        if inspect.isclass(thing) and thing.__module__ == name:
            for method, function in sorted(vars(thing).items()):
                if not method.startswith("_") and callable(function):
                    yield f"{name}.{label}.{method}", inspect.getdoc(function) or ""


def rows(limit: int) -> list[dict[str, str]]:
    """Question and answer rows, shuffled with a fixed seed; no answer stands twice."""
    seen: dict[str, str] = {}
    for name in MODULES:
        for label, text in documented(name):
            first = " ".join(text.split("\n\n")[0].split())
            if 40 <= len(first) <= 400 and first not in seen:
                seen[first] = label
    made = [
        {"question": f"What does {label} do in Python?", "answer": f"`{label}`: {text}"} for text, label in seen.items()
    ]
    random.Random(0).shuffle(made)
    return made[:limit]


def write(path: Path, part: list[dict[str, str]]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")


def main() -> None:
    """Makes the rows, runs the recipe, shows what changed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/python-library"))
    parser.add_argument("--rows", type=int, default=1800)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    made = rows(options.rows)
    num_held_out = len(made) // 10
    data, held_out = options.output / "rows.jsonl", options.output / "held-out.jsonl"
    write(held_out, made[:num_held_out])
    write(data, made[num_held_out:])
    recipe_file = options.output / "python-library.yaml"
    recipe_file.write_text(RECIPE.format(output=options.output / "run", rows=data, held_out=held_out), encoding="utf-8")
    console = Console()
    console.print(f"{len(made)} rows from the docstrings of Python {sys.version.split()[0]}, {num_held_out} held out")
    recipe = load_recipe(recipe_file)
    (tuned,) = run_on_screen(recipe)
    console.print(learned(tuned))
    compare(console, Path(recipe.output), made[:3])


def learned(tuned: Summary) -> str:
    """How well held-out answers are predicted, before and after: perplexity is exp of the loss in nats a token."""
    if tuned.first_eval_loss is None or tuned.final_eval_loss is None:
        return "nothing was held out"
    before, after = math.exp(tuned.first_eval_loss), math.exp(tuned.final_eval_loss)
    return f"held-out perplexity {before:.2f} -> {after:.2f} ({after / before - 1:+.0%}) in {tuned.seconds:.0f} s"


def compare(console: Console, run: Path, held_out: list[dict[str, str]]) -> None:
    """Three held-out questions: the base model's answer, the tuned model's, and the docstring."""
    chats = [Chat((Message("user", row["question"]),)) for row in held_out]
    sampling = Sampling(max_new_tokens=60)
    before = list(answers(load("smollm2-135m"), chats, sampling))
    after = list(answers(load(str(run / "model")), chats, sampling))
    table = Table("question", "before", "after", "docstring", show_lines=True)
    for row, old, new in zip(held_out, before, after, strict=True):
        table.add_row(row["question"], old, new, row["answer"])
    console.print(table)
    samples = [Sample(row["question"], old, new) for row, old, new in zip(held_out, before, after, strict=True)]
    console.print(f"report: {write_report(run, samples=samples)}")


if __name__ == "__main__":
    main()
