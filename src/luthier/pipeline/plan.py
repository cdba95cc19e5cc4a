"""The memory plan of a stage: what it will hold at its worst moment, and what to change where that does not fit.

The stage's own data is read and encoded, its network is built without weights, and a step over its largest micro-batch
runs on tensors that have no values, every byte counted. To that come what the process holds already and what the C
library's allocator loses between blocks. Loading has a peak of its own: beside the weights, a file in float32 is mapped
while bfloat16 is made of it, and then there are the codes of what is quantized, or another model that is the reference.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from luthier.data.batches import StepPlan, TokenBatch, collate, cut
from luthier.data.prepare import Prepared
from luthier.data.sequences import Item, sequences_of
from luthier.models.load import Model, default_device, outline
from luthier.pipeline.disk import state_bytes
from luthier.pipeline.footprints import Stage, footprint_of
from luthier.pipeline.prepare import prepare_data
from luthier.pipeline.prompts import answered
from luthier.pipeline.rollout_memory import rollout_bytes
from luthier.recipe import LoRA
from luthier.recipe.optimizers import Adam8bit, AdamW
from luthier.recipe.policy import OnPolicy
from luthier.recipe.preference import RewardModel, WithReference
from luthier.recipe.training import Training
from luthier.training.footprint import Footprint
from luthier.training.memory import available_bytes, resident_bytes, resident_in_files
from luthier.training.offload_state import beside_model, room_in

__all__ = [
    "FIRST_MICRO_BATCH_TOKENS",
    "Change",
    "DeviceMemory",
    "MemoryPlan",
    "Planner",
    "largest_micro_batch",
    "plan_stage",
]

# On two cores LoRA in float32 ran 235 tokens a second in micro-batches of 512 tokens, 272 in 1,024 and 292 in 1,536.
FIRST_MICRO_BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}
SMALLEST_MICRO_BATCH_TOKENS = 64

# Measured with benchmarks/plan.py, over what the tensors take. Blocks that come and go leave holes between them, as a
# share of the activations; besides there are libraries that training imports, and compiled products. Those of
# fp16 are bf16's: not measured.
HOLES = {"fp32": 0.15, "bf16": 0.42, "fp16": 0.42}
BESIDE_BYTES = {"fp32": 340 * 10**6, "bf16": 170 * 10**6, "fp16": 170 * 10**6}
HOLES_ON_GPU = 0.05


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """micro_batch_tokens: the bound on a micro-batch. largest_tokens: of the largest that the data gives.
    parts: bytes of each part while a step runs. loading_bytes: the peak before the first step. available_bytes: what
    the device has for it. offloaded_bytes, offloaded_room_bytes: the same for what `offload_optimizer` puts elsewhere.
    state_bytes: of a checkpoint.
    """

    micro_batch_tokens: int
    largest_tokens: int
    parts: dict[str, int]
    loading_bytes: int
    available_bytes: int
    state_bytes: int
    offloaded_bytes: int = 0
    offloaded_room_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """The most that will be held at any moment."""
        return max(self.loading_bytes, sum(self.parts.values()))

    @property
    def fits(self) -> bool:
        """Whether that is there."""
        return self.peak_bytes <= self.available_bytes and self.offloaded_bytes <= self.offloaded_room_bytes

    def sentence(self, change: "Change | None") -> str:
        """What is wanted, what there is, and how to mend it."""
        if self.offloaded_bytes > self.offloaded_room_bytes:
            room = f"{self.offloaded_room_bytes / 1e9:.1f} GB are free there"
            return f"offload_optimizer takes {self.offloaded_bytes / 1e9:.1f} GB and {room}; set optimizer: adam8bit"
        mend = f"set {change.words} ({change.plan.peak_bytes / 1e9:.1f} GB)" if change else "take a smaller model"
        return (
            f"the stage takes {self.peak_bytes / 1e9:.1f} GB and {self.available_bytes / 1e9:.1f} GB are there; {mend}"
        )

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return {"peak_bytes": self.peak_bytes, "fits": self.fits, **asdict(self)}


@dataclass(frozen=True, slots=True)
class Change:
    """One setting changed, in a recipe's words, and the plan that follows."""

    words: str
    plan: MemoryPlan


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Where a stage shall run. process_bytes: what the process holds besides the network. available_bytes: what it may
    hold in all.
    """

    device: torch.device
    process_bytes: int
    available_bytes: int

    @classmethod
    def here(cls, device: torch.device, network: PreTrainedModel | None = None) -> "DeviceMemory":
        """This machine, with this process. network: one that the process has loaded already."""
        process = 0 if device.type != "cpu" else resident_bytes() - _resident_weights(network)
        return cls(device, process, available_bytes(device))


@dataclass(frozen=True, slots=True)
class Planner:
    """A stage whose memory is asked for, on one machine and the data at hand, for any settings. tokenizer: the model's,
    where that has been read already.
    """

    word: str
    model_name: str
    prepared: Prepared
    memory: DeviceMemory
    tokenizer: PreTrainedTokenizerBase | None = None

    def plan(self, settings: Training) -> MemoryPlan:
        """With the micro-batches that the settings name, else with the largest of the usual size and its halves that
        fit.
        """
        tokens = settings.micro_batch_tokens or FIRST_MICRO_BATCH_TOKENS.get(self.memory.device.type, 8192)
        planned = self._plan(settings, tokens)
        while not planned.fits and settings.micro_batch_tokens is None and tokens > self._smallest:
            tokens = max(tokens // 2, self._smallest)
            planned = self._plan(settings, tokens)
        return planned

    def cheapest_change(self, settings: Training) -> Change | None:
        """The first change of settings that makes the stage fit, tried from the cheapest on; None where none does."""
        for words, update in _candidates(settings, self._smallest):
            planned = self.plan(settings.model_copy(update=update))
            if planned.fits:
                return Change(words, planned)
        return None

    @property
    def _smallest(self) -> int:
        return max(SMALLEST_MICRO_BATCH_TOKENS, *map(len, (*self.prepared.train, *self.prepared.evaluation)))

    def _plan(self, settings: Training, tokens: int) -> MemoryPlan:
        batch = largest_micro_batch(settings, self.prepared, tokens)
        outlined, footprint = footprint_of(Stage(self.word, settings, self.model_name, self.tokenizer), batch)
        model, dense = outlined.model, outlined.dense_bytes
        written = state_bytes(settings, footprint)
        footprint, offloaded = beside_model(footprint, settings.offload_optimizer, self.memory.device)
        process, on_cpu = self.memory.process_bytes, self.memory.device.type == "cpu"
        mapped = sum(file.stat().st_size for file in model.source.folder.glob("*.safetensors"))
        also_mapped = mapped if on_cpu and settings.dtype != "fp32" else 0
        lost = self._lost_bytes(settings, footprint)
        return MemoryPlan(
            micro_batch_tokens=tokens,
            largest_tokens=batch.num_tokens,
            parts={
                "process": process,
                **{name: getattr(footprint, name) for name in Footprint.__slots__},
                "rollout": self._rollout_bytes(settings, model, footprint),
                "allocator": lost,
            },
            loading_bytes=process
            + dense
            + max(also_mapped, footprint.weights * bool(settings.quantize_base), _reference_bytes(settings)),
            available_bytes=self.memory.available_bytes,
            state_bytes=written,
            offloaded_bytes=offloaded,
            offloaded_room_bytes=room_in(settings.offload_optimizer, Path(settings.output)) if offloaded else 0,
        )

    def _rollout_bytes(self, settings: Training, model: Model, footprint: Footprint) -> int:
        """What sampling takes that a step of learning does not hold."""
        if not isinstance(settings, OnPolicy):
            return 0
        longest = max(map(len, self.prepared.train)) - settings.max_new_tokens
        of_step = footprint.activations + footprint.gradients
        return rollout_bytes(settings, model, longest_prompt=longest, step_bytes=of_step)

    def _lost_bytes(self, settings: Training, footprint: Footprint) -> int:
        """What is held besides tensors while training."""
        if self.memory.device.type != "cpu":
            return int(HOLES_ON_GPU * (footprint.activations + footprint.gradients))
        return int(BESIDE_BYTES[settings.dtype] + HOLES[settings.dtype] * footprint.activations)


def plan_stage(
    word: str, settings: Training, model_name: str, *, limit_bytes: int | None = None
) -> tuple[MemoryPlan, Change | None]:
    """The plan of a stage before anything is loaded, and the cheapest change that makes it fit where it does not.

    Raises what preparing its data raises.
    """
    prepared, tokenizer = _prepared(settings, model_name)
    memory = DeviceMemory.here(default_device())
    memory = replace(memory, available_bytes=limit_bytes or memory.available_bytes)
    planner = Planner(word, model_name, prepared, memory, tokenizer)
    planned = planner.plan(settings)
    return planned, None if planned.fits else planner.cheapest_change(settings)


def _reference_bytes(settings: Training) -> int:
    """Of another model that is the reference, which is there before the first step."""
    if not isinstance(settings, WithReference) or settings.reference is None:
        return 0
    with FakeTensorMode(allow_non_fake_inputs=True):
        other = outline(settings.reference, dtype=settings.dtype)
        return sum(p.nbytes for p in other.network.parameters())


def largest_micro_batch(settings: Training, prepared: Prepared, micro_batch_tokens: int) -> TokenBatch:
    """The one with the most tokens in the whole training; of a policy, whose answers are yet to come, a full one."""
    if isinstance(settings, OnPolicy):
        return collate(_fullest(settings, prepared, micro_batch_tokens))
    plan = StepPlan(prepared.train, settings.batch_size, settings.epochs, settings.seed, settings.max_steps)
    steps = (plan.step(i) for i in range(plan.num_steps))
    batches = (b for step in steps for b in cut(step, micro_batch_tokens, packing=settings.packing))
    return max(batches, key=lambda batch: (batch.num_tokens, batch.count("tokens")))


def _fullest(settings: OnPolicy, prepared: Prepared, micro_batch_tokens: int) -> list[Item]:
    """Groups of answers, the longest prompts first, of as many tokens as a micro-batch may have and a step can: which
    lengths come is not known, and there may be such as fill it. A single answer is never cut.
    """
    longest_first = sorted(sequences_of(prepared.train), key=len, reverse=True)
    filling: list[Item] = []
    left = max(micro_batch_tokens, len(longest_first[0]))
    for stand_in in longest_first[: settings.batch_size]:
        if left < 2 or (filling and not settings.packing):
            break
        filling.append(answered(stand_in, settings.group_size, most_tokens=left))
        left -= len(filling[-1])
    return filling


def _prepared(settings: Training, model_name: str) -> tuple[Prepared, PreTrainedTokenizerBase]:
    """The data, and the model's tokenizer without the tokens that the settings add, though with their template."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = outline(model_name, dtype=settings.dtype, either=isinstance(settings, RewardModel))
    tokenizer = model.tokenizer
    with tempfile.TemporaryDirectory() as folder:
        return prepare_data(settings, model, Path(folder)), tokenizer


def _resident_weights(network: PreTrainedModel | None) -> int:
    """What of a loaded network's weights the resident set counts: of those in a file, the pages that were touched."""
    if network is None:
        return 0
    mapped = resident_in_files(".safetensors")
    return mapped or sum(p.nbytes for p in network.parameters())


def _candidates(settings: Training, smallest_tokens: int) -> Iterator[tuple[str, dict[str, object]]]:
    """From what costs little time to what changes the method. Several settings together come last."""
    smallest: dict[str, object] = {"micro_batch_tokens": smallest_tokens}
    recomputed: dict[str, object] = {"gradient_checkpointing": 1}
    yield _in_words(smallest), smallest
    if settings.dtype == "fp32":
        yield "dtype: bf16", {"dtype": "bf16"}
    if settings.adapter is not None and settings.quantize_base is None and settings.fp8 is None:
        yield "quantize_base: nf4", {"quantize_base": "nf4"}
    yield "gradient_checkpointing: 1", recomputed
    if settings.adapter is None and isinstance(settings.optimizer, AdamW):
        yield "optimizer: adam8bit", {"optimizer": Adam8bit(**settings.optimizer.model_dump(exclude={"type"}))}
    dtype = "bf16" if settings.dtype == "fp32" else settings.dtype
    together = {**recomputed, **smallest, "dtype": dtype}
    yield _in_words(together), together
    if settings.adapter is None:
        together = {**together, "adapter": LoRA(), "freeze": (), "offload_optimizer": None}
        yield f"adapter: {{type: lora}}, {_in_words(recomputed)}, dtype: {dtype}", together


def _in_words(update: dict[str, object]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in update.items())
