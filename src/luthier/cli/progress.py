"""What a terminal shows of a run: a bar with loss, tokens a second, time left and memory; elsewhere plain lines."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from luthier.pipeline.train import Summary
from luthier.training.callbacks import Metrics

__all__ = ["Screen", "show_summary"]

_PLAIN_EVERY_SECONDS = 15.0
_SHOWN = {"eval_perplexity": "perplexity", "eval_rewards/accuracies": "accuracy", "eval_reward": "reward"}


class Screen:
    """A callback that draws the run on a console."""

    def __init__(self, console: Console, title: str) -> None:
        self.console, self.title = console, title
        self.said = 0.0
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=console,
        )

    def on_start(self, step: int, num_steps: int) -> None:
        self.num_steps = num_steps
        for earlier in self.bar.task_ids:  # the run has gone back
            self.bar.remove_task(earlier)
        self.task = self.bar.add_task(self.title, total=num_steps, completed=step, text="")
        if self.console.is_terminal:
            self.bar.start()

    def on_metrics(self, metrics: Metrics) -> None:
        if "eval_loss" in metrics:
            text = f"held-out loss {metrics['eval_loss']:.4f}"
            for name, word in _SHOWN.items():
                text += f", {word} {metrics[name]:.2f}" if name in metrics else ""
            self.bar.console.print(f"{self.title} step {metrics['step']}: {text}")
            return
        learned = f"reward {metrics['reward']:.3f}" if "reward" in metrics else f"loss {metrics['loss']:.4f}"
        text = f"{learned}  {metrics['tokens_per_second']:.0f} tokens/s  {metrics['memory_bytes'] / 1e9:.2f} GB"
        self.bar.update(self.task, completed=metrics["step"], text=text)
        if not self.console.is_terminal and time.monotonic() - self.said > _PLAIN_EVERY_SECONDS:
            self.said = time.monotonic()
            self.console.print(f"{self.title} step {metrics['step']}/{self.num_steps}: {text}")

    def on_end(self) -> None:
        if self.console.is_terminal:
            self.bar.stop()


def show_summary(console: Console, title: str, summary: Summary) -> None:
    """A table of what a stage did."""
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in {
        "steps": str(summary.steps),
        "time": f"{summary.seconds:.0f} s, {summary.milliseconds_per_step:.0f} ms a step",
        "tokens": f"{summary.tokens:,}",
        "trained parameters": f"{summary.trained_parameters:,}",
        "final loss": f"{summary.final_loss:.4f}",
        "held-out loss": _held_out(summary),
        **({} if summary.energy_joules is None else {"energy": f"{summary.energy_joules / 3600:,.3g} Wh"}),
    }.items():
        table.add_row(name, value)
    console.print(table)


def _held_out(summary: Summary) -> str:
    if summary.first_eval_loss is None or summary.final_eval_loss is None:
        return "not measured"
    return (
        f"{summary.first_eval_loss:.4f} before, {summary.final_eval_loss:.4f} after, best {summary.best_eval_loss:.4f}"
    )
