"""Settings of the training stages: what all of them share, and what each adds.

A name means the same in a recipe, as a flag and in Python. A default that depends on another field (the learning rate
on whether an adapter is trained) is worked out when the settings are made, so resolved settings hold no gaps.
Settings that would have no effect together are refused here, before any model is loaded.
"""

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, Self

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, Field, model_validator

from luthier.recipe.adapters import AdaLoRA, AdapterSettings, LoRA
from luthier.recipe.guards import Forgetting, Watch
from luthier.recipe.optimizers import AdamW, NamedGroup, OptimizerSettings, ScheduleFree
from luthier.recipe.precision import FP8, DynamicScaling, LossScaling
from luthier.recipe.problems import Problem, Problems
from luthier.recipe.settings import Count, Names, Settings, Share, Word

__all__ = ["SFT", "DType", "Format", "OnChats", "OnError", "Pretrain", "Seed", "Tracker", "Training", "usual_rate"]

DType = Literal["bf16", "fp16", "fp32"]
Format = Literal["alpaca", "messages", "prompt_completion", "question_answer", "sharegpt", "text"]
Interval = Count | Literal["epoch"] | None
OnError = Literal["skip", "stop"]
Schedule = Literal["constant", "cosine", "linear", "wsd"]
Seed = Annotated[int, Ge(0), Lt(2**32)]
Tracker = Literal["mlflow", "tensorboard", "trackio", "wandb"]
_Positive = Annotated[float, Gt(0)]
_ShareOfTokens = Annotated[float, Gt(0), Lt(1)]


def usual_rate(*, adapter: float, full: float) -> Callable[[dict[str, Any]], float]:
    """The default of a learning rate. adapter: what LoRA learns with; other types learn with a multiple of it."""

    def usual(fields: dict[str, Any]) -> float:
        chosen = fields.get("adapter", LoRA())
        rate = full if chosen is None else adapter * float(chosen.rate_ratio)
        divisor = fields.get("optimizer", AdamW()).rate_divisor
        return float(f"{rate / divisor:.12g}")  # 4e-06 and not 4.000000000000001e-06

    return usual


def _usual_schedule(fields: dict[str, Any]) -> Schedule:
    return "constant" if isinstance(fields.get("optimizer"), ScheduleFree) else "cosine"


def _evaluation_interval(fields: dict[str, Any]) -> Interval:
    return "epoch" if fields.get("eval_data") or fields.get("eval_fraction") else None


def _counted(layers: bool | int | str) -> int | str:
    """A switch as a number of layers."""
    return layers if isinstance(layers, str) else int(layers)


class Training(Settings):
    """What every training stage knows."""

    model: Word = "smollm2-135m"
    """The model to train: an alias, a hub id, a folder or a .gguf file."""

    data: Word | Names
    """Files, folders or patterns (`docs/**/*.txt`) to train on; relative ones start at the current folder."""

    eval_data: Word | Names | None = None
    """Files with data that is never trained on, to evaluate on while training."""

    eval_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0
    """The share of the rows in `data` that is held out to evaluate on, chosen by the seed."""

    format: Word | None = None
    """The format of the rows; recognised from the columns where it is not named."""

    columns: dict[Word, Word] = Field(default={})
    """Which column stands for a name of the format: `prompt: question` reads the column `question` as the prompt."""

    output: Word = "runs/training"
    """The folder of the run: metrics, checkpoints, adapter, model and report."""

    seed: Seed = 42
    """Decides the order of the data, the start of the adapter and dropout."""

    adapter: AdapterSettings | None = LoRA()
    """The adapter to train beside the frozen model; none trains the model itself."""

    quantize_base: Literal["int8", "nf4"] | None = None
    """How the frozen weights are stored under an adapter: nf4 (4 bits, QLoRA), int8, or none for dense ones."""

    freeze: tuple[Word, ...] = ()
    """Parameters that full fine-tuning leaves as they are, as patterns of names (`*.embed_tokens.*`)."""

    epochs: Count = 3
    """How often the data is gone through."""

    max_steps: Count | None = None
    """Ends the training after so many steps, even within an epoch."""

    batch_size: Count = 16
    """Sequences (pairs, prompts) that the optimizer sees a step, over all devices and micro-batches."""

    micro_batch_tokens: Count | None = None
    """Tokens in one forward pass; decided from the memory plan where not given. Changes no gradient, only
    what an adapter's dropout draws."""

    max_length: Annotated[int, Ge(2)] = 2048
    """The longest sequence, in tokens."""

    packing: bool = True
    """Lays sequences end to end in one stream without padding; off computes each by itself: slower, the same result."""

    train_on: Word = "assistant"
    """Which tokens are learned."""

    optimizer: OptimizerSettings = AdamW()
    """What makes steps of gradients; lion's learning rate is by default a fifth of the others'."""

    learning_rate: _Positive = Field(default_factory=usual_rate(adapter=2e-4, full=2e-5))
    """The highest learning rate; by default 2e-4 with LoRA, more with adapters that are smaller, 2e-5 without."""

    schedule: Schedule = Field(default_factory=_usual_schedule)
    """How the learning rate goes on after warming up; wsd stays and then decays (Hu et al. 2024, MiniCPM). By default
    cosine, and constant with the optimizer schedule_free."""

    warmup_ratio: Share = 0.03
    """The share of the steps in which the learning rate rises from zero."""

    decay_ratio: Annotated[float, Gt(0), Le(1)] | None = Field(
        default_factory=lambda fields: 0.1 if fields.get("schedule") == "wsd" else None
    )
    """The share of the steps, at the end, in which the wsd schedule lets the learning rate fall; 0.1 by default."""

    layer_decay: Annotated[float, Gt(0), Le(1)] = 1.0
    """Each layer learns with so many times the rate of the next, embeddings as a layer before the first; 1: alike."""

    weight_decay: Annotated[float, Ge(0)] = 0.0
    """The decay of weights a step, times the learning rate; norms, biases and embeddings are spared."""

    parameter_groups: dict[Word, NamedGroup] = Field(default={})
    """What is otherwise for parameters by patterns of names, of which the first that fits counts: `"*.lora_B":
    {rate_ratio: 4}`. A number is the ratio."""

    offload_optimizer: Literal["disk", "memory"] | None = None
    """Where the masters and moments of a model that is trained itself lie: memory for that of the host, disk for a file
    in `output`, none beside the model."""

    max_grad_norm: _Positive | None = 1.0
    """Gradients with a greater norm are scaled down to it; none leaves them."""

    max_grad_spike: Annotated[float, Gt(1)] | None = None
    """Leaves out a step whose gradient's norm is over so many times the median of the 50 before it; none takes all."""

    dtype: DType = "bf16"
    """The type of the base weights and activations; what is trained and its optimizer state stay in fp32."""

    loss_scaling: LossScaling | None = Field(
        default_factory=lambda fields: DynamicScaling() if fields.get("dtype") == "fp16" else None
    )
    """How the loss is scaled against underflow: dynamic, the default of fp16, static, or none."""

    fp8: FP8 | None = None
    """Linear products of the layers in eight bits: delayed (scales from the steps before), current, or none."""

    gradient_checkpointing: Annotated[bool | Annotated[int, Ge(0)] | Literal["selective"], AfterValidator(_counted)] = 0
    """Computes every Nth layer a second time in the backward pass, or with selective the feed-forward part of each:
    less memory, more time; 0 keeps all activations."""

    offload_activations: bool = False
    """Moves what the backward pass needs from the GPU to the machine's memory meanwhile."""

    eval_every: Interval = Field(default_factory=_evaluation_interval)
    """Steps from one evaluation to the next, or epoch; by default epoch where there is data for it."""

    save_every: Interval = "epoch"
    """Steps from one checkpoint to the next, or epoch; none saves only the end."""

    keep_last: Count = 2
    """How many checkpoints are kept, the newest first; the best one is kept besides."""

    early_stopping: Count | None = None
    """Ends the training after so many evaluations in a row without a better loss."""

    forgetting: Forgetting | None = None
    """A guard against forgetting: files of general text, or settings; the training ends where it costs too much."""

    watch: Watch | None = None
    """Prompts that are answered at each evaluation, kept in watched.jsonl and looked through for signs of collapse."""

    report_to: tuple[Tracker, ...] = ()
    """Where metrics go besides metrics.jsonl: tensorboard, wandb (offline), mlflow, trackio; each is an extra."""

    deterministic: bool = False
    """Only operations that give the same bits each time, slower ones on a GPU; what has no such form is refused."""

    on_error: OnError = "stop"
    """What a row that does not fit does: stops the run, or is skipped, counted and put into quarantine.jsonl."""

    resume: bool = True
    """Goes on from the last checkpoint in `output`; off starts from the beginning."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        found = [
            *_evaluation_problems(self),
            *_schedule_problems(self),
            *_base_problems(self),
            *_optimizer_problems(self),
        ]
        found += _guard_problems(self)
        if self.freeze and self.adapter is not None:
            found.append(
                Problem(("freeze",), "an adapter leaves the whole model frozen; drop freeze or set adapter: none")
            )
        if found:
            raise Problems(found)
        return self


class OnChats(Training):
    """What stages that learn from conversations share."""

    chat_template: Word | None = None
    """A Jinja file that replaces the model's chat template, in training and in what is saved."""

    on_long: Literal["drop", "error", "truncate"] = "drop"
    """What happens to a conversation over max_length: dropped and counted, the run stopped, or its end cut off."""


class SFT(OnChats):
    """Supervised fine-tuning on conversations."""

    output: Word = "runs/sft"
    """The folder of the run: metrics, checkpoints, adapter, model and report."""

    format: Format | None = None
    """The format of the rows; recognised from the columns where it is not named."""

    train_on: Literal["all", "assistant", "last"] = "assistant"
    """Which tokens are learned: all turns of the assistant, its last turn, or everything."""


class Pretrain(Training):
    """Continued pretraining on plain text, cut into blocks of max_length."""

    output: Word = "runs/pretrain"
    """The folder of the run: metrics, checkpoints, adapter, model and report."""

    format: Literal["text"] = "text"
    """The format of the rows: a column `text`; files of plain text are rows of it."""

    mix: dict[Word, _ShareOfTokens] = Field(default={})
    """General text against forgetting: files, and the share of all tokens that comes from each."""

    epochs: Count = 1
    """How often the data is gone through."""

    train_on: Literal["all"] = "all"
    """Which tokens are learned: of plain text, all."""

    learning_rate: _Positive = Field(default_factory=usual_rate(adapter=1e-4, full=1e-5))
    """The highest learning rate; by default 1e-4 with LoRA, more with adapters that are smaller, 1e-5 without."""

    @model_validator(mode="after")
    def _leave_room(self) -> Self:
        if sum(self.mix.values()) >= 1:
            raise Problems([Problem(("mix",), "the shares leave nothing for data; let them add up to less than 1")])
        return self


def _evaluation_problems(settings: Training) -> Iterator[Problem]:
    if settings.eval_data and settings.eval_fraction:
        yield Problem(("eval_fraction",), "eval_data already names what to evaluate on; leave one of the two out")
    if settings.eval_every and not (settings.eval_data or settings.eval_fraction):
        yield Problem(("eval_every",), "there is nothing to evaluate on; give eval_data or eval_fraction")
    if settings.early_stopping and not settings.eval_every:
        yield Problem(("early_stopping",), "needs evaluations; give eval_data or eval_fraction, and eval_every")


def _guard_problems(settings: Training) -> Iterator[Problem]:
    for name in ("forgetting", "watch"):
        if getattr(settings, name) is not None and not settings.eval_every:
            yield Problem((name,), "needs evaluations; give eval_data or eval_fraction, and eval_every")


def _base_problems(settings: Training) -> Iterator[Problem]:
    if settings.quantize_base and settings.adapter is None:
        yield Problem(("quantize_base",), "a quantized model cannot be trained itself; give it an adapter")
    if settings.loss_scaling and settings.dtype != "fp16":
        yield Problem(("loss_scaling",), f"{settings.dtype} has the range of gradients; drop it or set dtype: fp16")
    if settings.fp8 and settings.quantize_base:
        because = f"the frozen weights are {settings.quantize_base} codes already, made dense again for each product"
        yield Problem(("fp8",), f"{because}; drop fp8 or quantize_base")
    if settings.fp8 and settings.dtype == "fp16":
        because = "scales each tensor by itself, and fp16 between them scales the loss against the same underflow"
        yield Problem(("fp8",), f"{because}; set dtype: bf16 or fp32")
    if not settings.quantize_base and isinstance(settings.adapter, LoRA) and settings.adapter.init == "loftq":
        yield Problem(("quantize_base",), "init: loftq makes good what quantizing takes away; set nf4 or int8")


def _optimizer_problems(settings: Training) -> Iterator[Problem]:
    averages = isinstance(settings.optimizer, ScheduleFree)
    if averages and settings.schedule != "constant":
        yield Problem(("schedule",), "schedule_free averages in place of one; leave it out, or choose optimizer: adamw")
    if averages and isinstance(settings.adapter, AdaLoRA):
        yield Problem(("optimizer",), "schedule_free would bring back the ranks that adalora takes out; choose adamw")
    if settings.offload_optimizer and settings.adapter is not None:
        yield Problem(("offload_optimizer",), "an adapter's moments are small; drop it or set adapter: none")


def _schedule_problems(settings: Training) -> Iterator[Problem]:
    if settings.schedule == "wsd" and settings.decay_ratio is None:
        yield Problem(("decay_ratio",), "the wsd schedule needs one; leave it out for 0.1")
    if settings.schedule != "wsd" and settings.decay_ratio is not None:
        yield Problem(("decay_ratio",), f"the {settings.schedule} schedule has none; drop it or choose schedule: wsd")
    if settings.warmup_ratio + (settings.decay_ratio or 0) > 1:
        yield Problem(("warmup_ratio",), "warm-up and decay together take more than all steps; lower one of them")
