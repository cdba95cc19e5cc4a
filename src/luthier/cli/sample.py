"""`luthier data sample`: prompts answered several times, and the good answers written as examples for `luthier sft`."""

from typing import Any

import click
from rich.console import Console
from rich.table import Table

from luthier.cli.options import settings_of, settings_options
from luthier.pipeline.pick import SampleCounts
from luthier.pipeline.sample import sample_answers
from luthier.recipe.sampling import AnswerSampling

__all__ = ["command"]

_HELP = "Answer prompts several times and write the answers with the best rewards, to be learned with sft."


def command(word: str) -> click.Command:
    """The command `sample`, with the settings as flags."""

    def run(**given: Any) -> None:
        settings: Any = settings_of(AnswerSampling, given)  # type: ignore[arg-type]  # typed for stages alone
        console = Console(highlight=False)
        console.print(_table(sample_answers(settings)))
        console.print(f"written to {settings.output}", markup=False)

    parameters = [*settings_options(AnswerSampling)]  # type: ignore[arg-type]
    return click.Command(word, callback=run, params=[*parameters], help=_HELP)


def _table(counts: SampleCounts) -> Table:
    table = Table("", "", show_header=False)
    rows = {"bad rows": counts.bad_rows, "rows that repeat a prompt": counts.repeated, "prompts": counts.prompts}
    rows |= {f"not answered: {reason}": count for reason, count in counts.unanswered.items()}
    rows |= {"answers": counts.answers, "scored": counts.scored}
    rows |= {f"not scored: {reason}": count for reason, count in counts.failed.items()}
    rows |= {"kept": counts.kept} | {f"dropped: {reason}": count for reason, count in counts.dropped.items()}
    for name, count in rows.items():
        table.add_row(name, f"{count:,}")
    table.add_row("mean reward, all answers", f"{counts.mean_reward:.3f}")
    table.add_row("mean reward, kept", f"{counts.mean_kept_reward:.3f}")
    return table
