"""Answers by transformers' own generation, for networks that `LocalEngine` cannot decode: one prompt at a time."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import GenerationConfig

from luthier.data.templates import stop_token_ids
from luthier.models.load import Model
from luthier.rollout.requests import Request, Sample, Sampling

__all__ = ["sample_by_transformers"]


@torch.inference_mode()
def sample_by_transformers(
    model: Model, requests: Sequence[tuple[Request, int]], sampling: Sampling
) -> list[tuple[Sample, ...]]:
    """For each request, given with its longest answer, its answers, drawn by torch's own generator."""
    return [_answers(model, request, most, sampling) for request, most in requests]


def _answers(model: Model, request: Request, most: int, sampling: Sampling) -> tuple[Sample, ...]:
    stops = stop_token_ids(model.tokenizer)
    config = _config(sampling, most, stops)
    torch.manual_seed(np.random.SeedSequence((sampling.seed, request.seed)).generate_state(1)[0].item())
    inputs = torch.tensor(request.prompt_ids.tolist(), device=model.device).repeat(request.count, 1)
    found = model.network.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        generation_config=config,
        tokenizer=model.tokenizer if sampling.stop else None,
    )
    written = found.sequences[:, inputs.shape[1] :].tolist()
    logits = torch.stack(found.logits, dim=1).float()  # [answers, tokens, vocabulary], before any cut
    logprobs = torch.log_softmax(logits / (sampling.temperature or 1.0), -1)
    return tuple(_sample(model, ids, logprobs[i], sampling, stops) for i, ids in enumerate(written))


def _config(sampling: Sampling, most: int, stops: set[int]) -> GenerationConfig:
    sampled = sampling.temperature > 0
    drawn = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p or None,
    }
    return GenerationConfig(
        max_new_tokens=most,
        do_sample=sampled,
        eos_token_id=sorted(stops),
        pad_token_id=min(stops),
        repetition_penalty=sampling.repetition_penalty,
        stop_strings=list(sampling.stop) or None,
        return_dict_in_generate=True,
        output_logits=True,
        **(drawn if sampled else {}),
    )


def _sample(model: Model, ids: list[int], logprobs: torch.Tensor, sampling: Sampling, stops: set[int]) -> Sample:
    """What stands before the padding behind the first token that ends the answer."""
    end = next((i + 1 for i, token in enumerate(ids) if token in stops), len(ids))
    by_token = end > 0 and ids[end - 1] in stops
    text = model.tokenizer.decode(ids[: end - by_token])
    by_text = any(stop in text for stop in sampling.stop)
    own = logprobs[:end].gather(-1, torch.tensor(ids[:end], device=logprobs.device)[:, None]).squeeze(-1)
    return Sample(np.array(ids[:end], dtype=np.int32), own.float().cpu().numpy(), text.strip(), by_token or by_text)
