"""A run in eight bits: scales move once a step, are told, survive a stop, and the run learns as one without."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.adapters.inject import inject
from luthier.data.batches import TokenBatch, collate
from luthier.kernels.float8 import E5M2, scale_for
from luthier.models.attention import ATTENTION, register_attention
from luthier.models.float8 import float8_layers, in_float8
from luthier.models.fuse import fuse
from luthier.objectives.loss import Loss
from luthier.recipe.adapters import LoRA
from luthier.recipe.precision import FP8, CurrentFP8, DelayedFP8
from luthier.training.callbacks import Callback, Metrics, MetricsFile, read_metrics
from luthier.training.checkpoints import Checkpoints
from luthier.training.float8 import ScalesFile
from luthier.training.footprint import step_footprint
from luthier.training.loop import fit, train_step
from luthier.training.run import Run

RunOf = Callable[..., Run]
MEASURED = {"seconds", "tokens_per_second", "memory_bytes"}
FULL = {"adapter": None, "schedule": "constant", "learning_rate": 3e-3}
KINDS = [DelayedFP8(window=3), CurrentFP8()]


def network(fp8: FP8 | None = None, *, adapter: bool = False, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The same weights each time."""
    register_attention()
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, attn_implementation=ATTENTION)
    made = LlamaForCausalLM(config).train()
    if dtype != torch.float32:
        made.to(dtype)
    fuse(made)
    if fp8 is not None:
        in_float8(made, fp8)
    if adapter:
        inject(made.requires_grad_(False), LoRA(r=4), seed=0)
    return made


def seen(run: Run) -> dict[str, Tensor]:
    return {name: windows.seen.clone() for name, windows in float8_layers(run.state.network).items()}


def test_a_step_moves_each_window_once_and_tells_of_the_scales_that_it_used(run_of: RunOf) -> None:
    run = run_of(network=network(DelayedFP8(window=2)), micro_batch_tokens=32, **FULL)
    assert len(run.cut(0)) > 1
    peaks = []
    for _ in range(3):
        before = seen(run)
        told = train_step(run)
        peaks.append(torch.stack([windows.seen[:, 0] for windows in float8_layers(run.state.network).values()]))
    assert all(torch.equal(value[:, 0], peaks[1][i]) for i, value in enumerate(before.values()))
    greatest = torch.maximum(peaks[0], peaks[1])[:, 2]
    assert told["fp8/gradient_scale_min"] == scale_for(greatest, E5M2).min()
    assert told["fp8/gradient_scale_max"] == scale_for(greatest, E5M2).max()
    assert 0 <= told["fp8/input_cut_off"] < 0.1


def test_without_eight_bits_nothing_is_told_of_them(run_of: RunOf) -> None:
    told = train_step(run_of(network=network(), **FULL))
    assert not [name for name in told if name.startswith("fp8/")]


@pytest.mark.parametrize("fp8", KINDS)
@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_a_step_that_is_left_out_leaves_no_infinity_in_the_windows(run_of: RunOf, fp8: FP8, broken: float) -> None:
    """The spoilt gradient comes into the last layer and goes through all before it."""
    run = run_of(network=network(fp8), **FULL)
    train_step(run)
    start, weight = seen(run), run.state.network.model.layers[0].mlp.up_proj.weight.clone()
    hook = run.state.network.model.norm.register_full_backward_hook(lambda m, i, o: (i[0] * broken,))
    assert not math.isfinite(train_step(run)["grad_norm"])
    hook.remove()
    for name, value in seen(run).items():
        assert torch.equal(value[2], start[name][2])
        assert value.isfinite().all()
    assert torch.equal(weight, run.state.network.model.layers[0].mlp.up_proj.weight)
    assert math.isfinite(train_step(run)["grad_norm"])


def test_from_the_second_step_on_scales_do_not_depend_on_how_a_step_is_cut(run_of: RunOf) -> None:
    """The first has no window yet, so each micro-batch goes by its own greatest entries; here both do."""
    runs = [run_of(network=network(DelayedFP8()), micro_batch_tokens=tokens, **FULL) for tokens in (None, 48)]
    train_step(runs[0])
    runs[1].state.restore(runs[0].state.tensors(), replace(runs[0].state.progress))
    one, other = (train_step(run) for run in runs)
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    assert other["fp8/input_scale_min"] == one["fp8/input_scale_min"]


def test_a_step_that_is_tried_again_in_smaller_pieces_notes_nothing_of_the_first_try(run_of: RunOf) -> None:
    """The first try's gradients are of a sum and not of a mean, so twenty times as large, when memory runs out."""

    def failing(network: nn.Module, batch: TokenBatch) -> Loss:
        loss = objective(network, batch)
        if batch.num_tokens > 40:
            loss.per_unit.sum().backward(retain_graph=True)
            torch.empty(2**56)
        return loss

    ample, short = (run_of(network=network(DelayedFP8()), **FULL) for _ in range(2))
    objective, short.objective = short.objective, failing
    train_step(short)
    ample.state.progress.micro_batch_tokens = short.state.progress.micro_batch_tokens
    train_step(ample)
    assert all(torch.equal(value, seen(ample)[name]) for name, value in seen(short).items())


@pytest.mark.parametrize(("fp8", "adapter"), [(KINDS[0], False), (KINDS[1], True)])
def test_a_run_that_goes_on_is_the_uninterrupted_one_to_the_bit(
    run_of: RunOf,
    rows_of: Callable,
    stop_at: Callable[[int | None], Callback],
    tmp_path: Path,
    fp8: FP8,
    adapter: bool,
) -> None:
    def ended(folder: Path, *stops: int | None) -> tuple[dict[str, Tensor], list[list[Metrics]]]:
        for at in stops:
            made = network(fp8, adapter=adapter)
            files = [MetricsFile(folder / "metrics.jsonl"), ScalesFile(folder / "fp8.jsonl", made)]
            saved = Checkpoints(folder / "checkpoints", keep_last=2, fingerprint="one")
            given = {"eval_fraction": 0.1, "eval_every": 2, "save_every": 2, "eval_items": rows_of(4)}
            run = run_of(network=made, checkpoints=saved, callbacks=[*files, stop_at(at)], **given)
            if found := saved.latest():
                saved.load(found, run.state)
            if at is None:
                fit(run)
            else:
                with pytest.raises(KeyboardInterrupt):
                    fit(run)
        lines = [read_metrics(folder / name) for name in ("metrics.jsonl", "fp8.jsonl")]
        return run.state.tensors(), [[{k: v for k, v in x.items() if k not in MEASURED} for x in y] for y in lines]

    whole, stopped = ended(tmp_path / "whole", None), ended(tmp_path / "stopped", 1, 3, None)
    assert sum(name.startswith("float8/") for name in whole[0]) == 14
    assert all(torch.equal(value, stopped[0][name]) for name, value in whole[0].items())
    assert stopped[1] == whole[1]


def test_the_table_tells_of_every_layer_at_each_evaluation_and_at_the_end(
    run_of: RunOf, rows_of: Callable, tmp_path: Path
) -> None:
    made = network(DelayedFP8(window=4))
    given = {"eval_fraction": 0.1, "eval_every": 4, "eval_items": rows_of(4)}
    run = run_of(network=made, callbacks=[ScalesFile(tmp_path / "fp8.jsonl", made)], **FULL, **given)
    fit(run)
    lines, layers = read_metrics(tmp_path / "fp8.jsonl"), float8_layers(made)
    assert [line["step"] for line in lines] == [4] * len(layers) + [6] * len(layers)
    last = {line["layer"]: line for line in lines[len(layers) :]}
    for name, windows in layers.items():
        assert last[name]["gradient_amax"] == windows.seen[2, 0]
        assert last[name]["gradient_scale"] == scale_for(windows.seen[2].amax(), E5M2)
        assert 0 <= last[name]["input_cut_off"] < 1


@pytest.mark.parametrize(("fp8", "adapter"), [(KINDS[0], False), (KINDS[1], True)])
def test_a_memory_plan_counts_what_a_step_holds(run_of: RunOf, fp8: FP8, adapter: bool) -> None:
    def footprint() -> object:
        run = run_of(network=network(fp8, adapter=adapter))
        return step_footprint(run.state, collate(run.plan.items[:8]), run.objective)

    real = footprint()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert footprint() == real


@pytest.fixture(scope="module")
def in_bf16(run_of: RunOf) -> list[float]:
    return losses(run_of, None)


def losses(run_of: RunOf, fp8: FP8 | None) -> list[float]:
    """Of a model that learns rows of random tokens by heart."""
    run = run_of(network=network(fp8, dtype=torch.bfloat16), epochs=10, **FULL)
    return [train_step(run)["loss"] for _ in range(run.plan.num_steps)]


@pytest.mark.parametrize("fp8", [DelayedFP8(), CurrentFP8(), DelayedFP8(margin=1, skip=("*.down_proj",))])
def test_the_model_itself_learns_as_in_bf16(run_of: RunOf, in_bf16: list[float], fp8: FP8) -> None:
    """Over an epoch's three steps at the end, to a hundredth of the way that the loss has gone."""
    start, end = in_bf16[0], sum(in_bf16[-3:]) / 3
    found = sum(losses(run_of, fp8)[-3:]) / 3
    assert end < start - 1
    assert abs(found - end) < (start - end) / 100
