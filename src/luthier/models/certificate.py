"""The export certificate: a written model is loaded again and says what the live one says, or is refused.

The live model is the base with its adapter on it, both in float32. The two are loaded one after the other, so one whole
model must fit into memory; whoever streams a model that does not fit has no certificate and is told so. What a reward
model says is the chance that a reward of r is better than one of 0, sigmoid(r).
"""

import gc
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from luthier.adapters.peft_format import SavedAdapter, read_adapter
from luthier.adapters.switch import adapters_off
from luthier.errors import ExportError
from luthier.models.adapted import load_adapted
from luthier.models.heads import trains_head
from luthier.models.load import HEAD, Model, gives_rewards, load_either
from luthier.models.rewards import load_reward

__all__ = ["Certificate", "certify", "fits_in_memory"]

_TEXT = """Water boils at 100 degrees Celsius at sea level. Why does it boil earlier on a mountain?
The air presses less there, so the vapour needs less heat to push back.
def mean(values: list[float]) -> float:
    return sum(values) / len(values)
"""
_NUM_TOKENS = 64


# Mean KL in nats a token. In float32 a merge differs from its adapter by the order of sums: 1e-11 on a model of 135M
# parameters. There all weights rounded to bf16 were 1e-4 away.
_KL_BOUND, _KL_BOUND_ROUNDED = 1e-6, 5e-3


@dataclass(frozen=True, slots=True)
class Certificate:
    """How far the written model is from the live one, over the positions of a text.

    kl: KL(live || written), mean and largest, in nats. kl_of_base: KL(live || base alone), which is what the adapter
    does; of a reward model, base and a new head. kl_bound: what the mean may be at most. greedy_agreement: share of
    positions with the same likeliest token, or of rewards with the same sign.
    """

    kl: float
    kl_largest: float
    kl_of_base: float
    kl_bound: float
    greedy_agreement: float
    num_tokens: int

    def write(self, folder: Path) -> None:
        """Leaves the numbers beside the model."""
        (folder / "certificate.json").write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def certify(base: Path, adapter: Path, written: Path, *, rounded: bool, rank: int | None = None) -> Certificate:
    """Compares the model in `written` with that in `base` under the adapter.

    rounded: the written weights have 16 bits. rank: the adapter's that was merged, where it has several.  Raises
    ExportError where the two differ by more than the rounding may, or by more than half of what the adapter does.
    """
    saved = read_adapter(adapter)
    text = "".join(saved.settings.new_tokens) + _TEXT
    live, kl_of_base = _live(base, adapter, rank, text)
    rounded = rounded or saved.base_dtype != "fp32"
    kl = _kl(live, other := _logprobs(load_either(str(written)), text))
    certificate = Certificate(
        kl=float(kl.mean()),
        kl_largest=float(kl.max()),
        kl_of_base=kl_of_base,
        kl_bound=max(_KL_BOUND, min(_KL_BOUND_ROUNDED, kl_of_base / 2)) if rounded else _KL_BOUND,
        greedy_agreement=float((live.argmax(-1) == other.argmax(-1)).double().mean()),
        num_tokens=len(live),
    )
    if not certificate.kl <= certificate.kl_bound:  # nan is refused too
        raise ExportError(
            f"the merged model is not base and adapter: KL {certificate.kl:.2g} nats a token, over the bound of "
            f"{certificate.kl_bound:.2g}; {'store it in fp32' if rounded else 'keep the adapter beside the model'}"
        )
    return certificate


def _live(base: Path, adapter: Path, rank: int | None, text: str) -> tuple[Tensor, float]:
    """Log-probabilities of the text under the adapter, and how far they are from the base's, mean KL in nats; the base
    is asked of what it knows, which new tokens are not. The model is gone afterwards.
    """
    model = _adapted(str(base), read_adapter(adapter, rank=rank))
    model.network.float()
    live = _logprobs(model, text)
    known = live if text == _TEXT else _logprobs(model, _TEXT)
    with adapters_off(model.network):
        alone = _logprobs(model, _TEXT)
    del model
    gc.collect()  # modules refer to themselves
    return live, float(_kl(known[:, : alone.shape[1]].log_softmax(-1), alone).mean())


def _adapted(base: str, saved: SavedAdapter) -> Model:
    if not trains_head(saved.settings):
        return load_adapted(base, saved.folder, rank=saved.rank)
    dtype = saved.base_dtype if saved.quantize_base else "fp32"
    return load_reward(base, adapter=saved.folder, rank=saved.rank, dtype=dtype)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """[tokens], from log-probabilities [tokens, vocabulary]."""
    return (p.exp() * (p - q)).masked_fill(p.isneginf(), 0).sum(-1)


def fits_in_memory(num_parameters: int) -> bool:
    """Whether a model of this size in float32, and a tenth more for all else, fits into what is free now."""
    return 1.1 * 4 * num_parameters <= psutil.virtual_memory().available


@torch.no_grad()
def _logprobs(model: Model, text: str) -> Tensor:
    """[tokens, vocabulary] over the text's beginning, in float64, so that taking the logarithm adds no difference. Of a
    reward model [tokens, 2]: is the text up to a token better, or worse, than one of reward 0.
    """
    ids = torch.tensor([model.tokenizer(text).input_ids[:_NUM_TOKENS]], device=model.device)
    if gives_rewards(model.config):
        hidden = model.network.base_model(ids).last_hidden_state[0]
        reward = model.network.get_submodule(HEAD)(hidden).cpu().double()
        return logsigmoid(torch.cat([reward, -reward], dim=-1))
    logits: Tensor = model.network(ids).logits[0]
    return logits.cpu().double().log_softmax(-1)
