"""The `luthier` command. A command's module is imported only when that command runs, so `--help` needs neither torch
nor transformers.

Errors that the user can mend, a mistyped command line and files that cannot be used among them, are printed as one
sentence, with exit code 1; `--debug` prints the traceback. Ctrl-C ends a run with exit code 130 and SIGTERM with 143,
after a checkpoint, and the same command goes on from there.
"""

import gc
import importlib
import logging
import os
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import click
from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from luthier import __version__
from luthier.cli.signals import heard
from luthier.errors import LuthierError
from luthier.files import is_full, not_written
from luthier.training.stopping import Stop

__all__ = ["COMMANDS", "main"]

COMMANDS: dict[str, tuple[str, str]] = {  # word -> module below luthier.cli, one line of help
    "run": ("run", "Run a recipe, or go on with it where it stopped."),
    "sft": ("train", "Fine-tune on conversations."),
    "pretrain": ("train", "Go on pretraining on plain text, with general text mixed in."),
    "dpo": ("train", "Learn from pairs of answers, against a reference model."),
    "ipo": ("train", "Learn from pairs of answers, towards a bounded margin."),
    "kto": ("train", "Learn from single answers that are desirable or not."),
    "orpo": ("train", "Imitate the better answers and avoid the worse, without a reference model."),
    "simpo": ("train", "Learn from pairs of answers by their mean log-probabilities."),
    "cpo": ("train", "Learn from pairs of answers and imitate the better, without a reference model."),
    "reward": ("train", "Train a reward model on pairs of answers."),
    "process-reward": ("train", "Train a reward model on answers whose steps are labelled."),
    "iterative-dpo": ("train", "Sample answers, let a judge rank them, learn from the pairs, and again."),
    "rlaif": ("train", "Sample answers, let a language model rank them, learn from the pairs, and again."),
    "ppo": ("train", "Learn from rewards, with a value head that says what was to be expected."),
    "grpo": ("train", "Learn from rewards, each answer compared with others to its prompt."),
    "dr-grpo": ("train", "GRPO without its biases of length and difficulty."),
    "dapo": ("train", "GRPO for long answers: decoupled clipping, dynamic sampling."),
    "gspo": ("train", "GRPO by the ratios of whole answers."),
    "rloo": ("train", "Learn from rewards by plain policy gradients, leave-one-out baselines."),
    "reinforce-pp": ("train", "Learn from rewards without a baseline, advantages whitened."),
    "generate": ("generate", "Answer prompts."),
    "chat": ("chat", "Talk with a model."),
    "adapters": ("adapters", "Say what each type of adapter costs on a model; fuse several into one."),
    "merge": ("merge", "Merge an adapter into its model."),
    "data": ("data", "Look at data (preview, validate, stats), convert it, or sample it from a model."),
    "plan": ("plan", "Say how much memory a stage will take, and what to change where it does not fit."),
    "doctor": ("doctor", "Look for what would spoil a run: on this machine, in a recipe, in data."),
    "verify": ("verify", "Show that a promise holds on your recipe: loss, resume, template."),
    "report": ("report", "Write a run's report.html, also while the run is going; compare several runs."),
    "models": ("models", "List the models that have a short name."),
}


@contextmanager
def _uncollected() -> Iterator[None]:
    """For imports: of the million objects that they make none is garbage, and looking for it takes a fifth of their
    time. Nor is it looked for among them afterwards.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            from luthier.recipe.problems import unknown  # costs time that `--help` need not spend

            ctx.fail(f"{cmd_name}: {unknown('command', cmd_name, list(COMMANDS))}")
        name = f"luthier.cli.{COMMANDS[cmd_name][0]}"
        with nullcontext() if name in sys.modules else _uncollected():
            module = importlib.import_module(name)
        command: click.Command = module.command(cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(word, text) for word, (_, text) in COMMANDS.items()])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.version_option(__version__, prog_name="luthier")
@click.option("--debug", is_flag=True, help="Show tracebacks and every log line.")
@click.pass_context
def luthier(ctx: click.Context, debug: bool) -> None:
    """Fine-tune, align, compress, evaluate and serve language models from one recipe."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.INFO,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False, show_time=False)],
    )
    if not debug:
        logging.getLogger("transformers").setLevel(logging.ERROR)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and ends the process with its exit code."""
    given, stop = list(sys.argv[1:] if arguments is None else arguments), Stop()
    try:
        with heard(stop) as signals:
            sys.exit(luthier.main(given, prog_name="luthier", standalone_mode=False, obj=stop) or 0)
    except (click.Abort, KeyboardInterrupt):
        _say(signals.sentence())
        _exit(signals.exit_code)
    except Exception as error:
        mendable = isinstance(error, click.ClickException | LuthierError | OSError)
        if not (mendable or stop.cut_in):
            raise
        if "--debug" in given:
            traceback.print_exc()
        if stop.cut_in:
            _say(signals.sentence())
            _exit(signals.exit_code)
        _say(_sentence(error))
        sys.exit(1)


def _exit(code: int) -> None:
    """Without waiting for threads that still wait for a server."""
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _sentence(error: Exception) -> str:
    match error:
        case click.UsageError(ctx=click.Context() as ctx):
            return f"{error.format_message().rstrip('.')} (see {ctx.command_path} --help)"
        case click.ClickException():
            return error.format_message()
        case OSError(filename=str(name)) if is_full(error):
            return not_written(Path(name), error, mend=" and run the same command again")
        case OSError():
            mend = "make room and run the same command again" if is_full(error) else "check the path and who may use it"
            return f"{error.filename}: {error.strerror}; {mend}" if error.filename else f"{error}; {mend}"
    return str(error)


def _say(sentence: str) -> None:
    Console(stderr=True).print(Text.assemble(("luthier: ", "bold red"), sentence), soft_wrap=True)


if __name__ == "__main__":
    main()
