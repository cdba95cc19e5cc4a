"""The engine answers as the adapted model, and leaves the model as it was."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from luthier.adapters.inject import adapter_parameters, inject
from luthier.adapters.new_tokens import numbered, with_tokens
from luthier.data.batches import collate
from luthier.data.examples import Origin
from luthier.data.sequences import TokenSequence
from luthier.models.load import Model
from luthier.models.score import score
from luthier.recipe.adapters import AnyAdapter, Bottleneck, DoRA, LoRA, Prefix
from luthier.rollout.engine import LocalEngine
from luthier.rollout.requests import Request, Sample, Sampling
from luthier.rollout.scoring import Failure

Factory = Callable[..., Model]

END = 257  # <|im_end|>
DRAWN = Sampling(max_new_tokens=12, temperature=1.0)
GREEDY = Sampling(max_new_tokens=12)


def requests(count: int = 1) -> list[Request]:
    draw = np.random.default_rng(7)
    prompts = [draw.integers(256, size=length, dtype=np.int32) for length in (5, 1, 17, 9, 40)]
    return [Request(prompt, count, place) for place, prompt in enumerate(prompts)]


def sampled(model: Model, asked: list[Request], sampling: Sampling, weights: str = "dense") -> list[Sample]:
    """All answers in one row; none may have failed."""
    found = LocalEngine(model, weights=weights).sample(asked, sampling)
    return [sample for some in found if not isinstance(some, Failure) for sample in some]


def ids(samples: list[Sample]) -> list[list[int]]:
    return [sample.token_ids.tolist() for sample in samples]


def generated(model: Model, request: Request) -> list[int]:
    """By transformers' own greedy generation, from one prompt, adapters beside."""
    prompt = torch.from_numpy(request.prompt_ids.astype(np.int64))[None]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": END, "eos_token_id": END}
    answer = model.network.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    written: list[int] = answer[0, prompt.shape[1] :].tolist()
    return written


def scored(model: Model, owners: list[Request], samples: list[Sample]) -> np.ndarray[Any, Any]:
    sequences = []
    for request, sample in zip(owners, samples, strict=True):
        whole = np.concatenate([request.prompt_ids, sample.token_ids])
        sequences.append(TokenSequence(whole, np.arange(len(whole)) >= len(request.prompt_ids), Origin("rows", 0)))
    with torch.no_grad():
        return score(model, collate(sequences)).logprobs.numpy()


def adapted(tiny: Factory, settings: AnyAdapter | None) -> Model:
    """With an adapter as if trained."""
    model = tiny()
    if settings is not None:
        model.tokenizer = with_tokens(model.tokenizer, settings.new_tokens)
        inject(model.network, numbered(settings, model.network, model.tokenizer), seed=0)
        for i, parameter in enumerate(adapter_parameters(model.network).values()):
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(i))
    return model


ADAPTERS = {
    "lora": LoRA(r=4),
    "dora": DoRA(r=4),
    "modules_to_save": LoRA(r=4, modules_to_save=("lm_head",)),
    "bottleneck": Bottleneck(size=4),
    "prefix": Prefix(num_virtual_tokens=3),
    "new_tokens": LoRA(r=4, new_tokens=("<think>", "</think>")),
}


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("weights", ["dense", "fp16"])
def test_the_adapted_model_answers_and_stays_as_it_was(tiny: Factory, name: str, weights: str) -> None:
    """Greedy, as transformers generates from it; float16's 11 bits change no choice here."""
    model, asked = adapted(tiny, ADAPTERS[name]), requests()
    expected, before = [generated(model, request) for request in asked], anatomy(model.network)
    assert expected != [generated(tiny(), request) for request in asked]
    assert ids(sampled(model, asked, GREEDY, weights)) == expected
    assert anatomy(model.network) == before


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_int8_answers_with_log_probabilities_of_what_it_computes(tiny: Factory, name: str) -> None:
    """Near the model's own, and not equal: weights are off by half of 1/127 at most, inputs and sums by 2^-8."""
    model, asked = adapted(tiny, ADAPTERS[name]), requests(4)
    samples = sampled(model, asked, DRAWN, "int8")
    owners = [request for request in asked for _ in range(4)]
    found, own = np.concatenate([sample.logprobs for sample in samples]), scored(model, owners, samples)
    assert 1e-4 < np.abs(found - own).max() < 0.3
    assert np.abs(found - own).mean() < 0.05


def anatomy(network: PreTrainedModel) -> list[tuple[Any, ...]]:
    """Every module and tensor by name and by what it is, with its values and mode."""
    found: list[tuple[Any, ...]] = [(n, id(m), m.training) for n, m in network.named_modules(remove_duplicate=False)]
    for name, tensor in (*network.named_parameters(remove_duplicate=False), *network.named_buffers()):
        found.append((name, id(tensor), tensor.requires_grad, tensor.is_inference(), tensor.detach().numpy().tobytes()))
    return [*found, id(network.generation_config), network.config.to_json_string()]


@pytest.mark.parametrize("weights", ["dense", "fp16", "int8"])
@pytest.mark.parametrize("name", [None, "lora", "dora", "bottleneck"])
def test_a_fault_in_the_middle_leaves_the_model_as_it_was(tiny: Factory, name: str | None, weights: str) -> None:
    """A network in training mode whose embedding fails at the fourth call, in the middle of answers."""
    model = adapted(tiny, None if name is None else ADAPTERS[name])
    model.network.train()
    before, calls = anatomy(model.network), []

    def failing(*_: object) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyError("in the middle")

    hook = model.network.model.embed_tokens.register_forward_hook(failing)
    with pytest.raises(KeyError, match="in the middle"):
        sampled(model, requests(), GREEDY, weights)
    hook.remove()
    assert anatomy(model.network) == before


@pytest.mark.parametrize("weights", ["dense", "fp16"])
@pytest.mark.parametrize("name", ["lora", "dora"])
def test_training_goes_on_as_if_nothing_had_been_sampled(tiny: Factory, name: str, weights: str) -> None:
    """The gradients of the next step, bit for bit: no tensor of inference mode, no cached number is left behind."""
    gradients = []
    for first in (False, True):
        model = adapted(tiny, ADAPTERS[name])
        model.network.train()
        if first:
            sampled(model, requests(), DRAWN, weights)
        prompt = torch.arange(1, 30)[None]
        model.network(prompt, labels=prompt, use_cache=False).loss.backward()
        gradients.append([p.grad for p in adapter_parameters(model.network).values()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_new_tokens_are_sampled(tiny: Factory) -> None:
    """Rows that an adapter adds behind the vocabulary, with the text that they were added for."""
    model, words = adapted(tiny, ADAPTERS["new_tokens"]), {258: "<think>", 259: "</think>"}
    samples = sampled(model, requests(6), Sampling(max_new_tokens=20, temperature=2.0))
    saying = [(words[token], sample.text) for sample in samples for token in sample.token_ids if token in words]
    assert saying
    assert all(word in text for word, text in saying)
