"""What each kind of server is asked, what it answers, and what its log-probabilities are of.

vLLM answers POST /v1/completions with the tokens beside the text when asked to (`return_token_ids`, or older, as words
`token_id:17`). SGLang gives tokens by its own POST /generate, llama.cpp by its own POST /completion; both lie beside
/v1. Any other OpenAI-compatible server gives text alone. All that decides the draws is sent, since servers take what is
left out from the model's generation_config.json or their own command line.
"""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.recipe.rollout_servers import LogprobsMode, ServerKind
from luthier.rollout.requests import Sampling

__all__ = ["NO_ANSWER", "SERVERS", "Asked", "Drawn", "ServerProtocol"]

NO_ANSWER = (AttributeError, LookupError, OverflowError, TypeError, ValueError)
"""What reading JSON of another shape raises."""

_ROUNDING = 1e-3  # a log-probability may be so much above 0
_LLAMA_CPP_FINISH = {"eos": "stop", "word": "stop", "limit": "length"}
_ALL = -1  # top_k that keeps every token, in vLLM, SGLang and llama.cpp alike


@dataclass(frozen=True, slots=True)
class Asked:
    """What is drawn in one request. seeds: one for each answer, consecutive. adapter: what the server knows it by."""

    model: str
    adapter: str | None
    prompt_ids: list[int]
    seeds: list[int]
    ends: tuple[int, ...]
    sampling: Sampling


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """What a server says of one answer: text, tokens and their log-probabilities, None where it says none.

    token_ids: [tokens] int64. logprobs: [tokens] float32, nan for a token that has none; they may be fewer. finish:
    stop, length, or whatever else ended it.
    """

    text: str
    finish: str
    token_ids: NDArray[np.int64] | None = None
    logprobs: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class ServerProtocol:
    """How a kind of server is spoken to. path: below /v1, or beside it where it is `native`.

    body: what is sent. read: the answers in the JSON that came back; raises one of NO_ANSWER where that is nothing such
    a server says. tells: whether its log-probabilities are those that `rollout.requests.Sample` holds. together: it
    draws several answers in one request, each by its own seed. lacks: what of Sampling it does not know.
    """

    path: str
    _: KW_ONLY
    body: Callable[[Asked], dict[str, Any]]
    read: Callable[[Any], list[Drawn]]
    tells: Callable[[Sampling, LogprobsMode], bool]
    native: bool = False
    together: bool = True
    lacks: tuple[str, ...] = ()


def _openai_body(asked: Asked) -> dict[str, Any]:
    """Only what every such server knows; without stop, since the text would come back as if it had ended without."""
    return {
        "model": asked.adapter or asked.model,
        "prompt": asked.prompt_ids,
        "n": len(asked.seeds),
        "seed": asked.seeds[0],
        "max_tokens": asked.sampling.max_new_tokens,
        "temperature": asked.sampling.temperature,
        "top_p": asked.sampling.top_p,
    }


def _vllm_body(asked: Asked) -> dict[str, Any]:
    """Of n answers, vLLM draws answer i with the seed + i."""
    return {
        **_openai_body(asked),
        **_cuts(asked.sampling),
        "repetition_penalty": asked.sampling.repetition_penalty,
        "stop": list(asked.sampling.stop),
        "include_stop_str_in_output": True,
        "stop_token_ids": list(asked.ends),
        "logprobs": 1,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }


def _sglang_body(asked: Asked) -> dict[str, Any]:
    """The prompt once for each answer: `n` would draw all of them with one seed. Its cache computes the prompt once."""
    sampling = {
        **_cuts(asked.sampling),
        "max_new_tokens": asked.sampling.max_new_tokens,
        "temperature": asked.sampling.temperature,
        "top_p": asked.sampling.top_p,
        "repetition_penalty": asked.sampling.repetition_penalty,
        "stop": list(asked.sampling.stop),
        "stop_token_ids": list(asked.ends),
    }
    adapter = {} if asked.adapter is None else {"lora_path": asked.adapter}
    return {
        "input_ids": [asked.prompt_ids] * len(asked.seeds),
        "sampling_params": [{**sampling, "sampling_seed": seed} for seed in asked.seeds],
        "return_logprob": True,
        **adapter,
    }


def _llama_cpp_body(asked: Asked) -> dict[str, Any]:
    """One answer: a server with fewer slots than answers refuses to draw them together.

    The samplers are named, since by default others stand among them and the temperature comes last.
    """
    return {
        **_cuts(asked.sampling),
        "model": asked.model,
        "prompt": asked.prompt_ids,
        "seed": asked.seeds[0],
        "n_predict": asked.sampling.max_new_tokens,
        "temperature": asked.sampling.temperature,
        "top_p": asked.sampling.top_p,
        "repeat_penalty": asked.sampling.repetition_penalty,
        "repeat_last_n": -1,
        "samplers": ["penalties", "temperature", "top_k", "top_p", "min_p"],
        "stop": list(asked.sampling.stop),
        "n_probs": 1,
        "return_tokens": True,
    }


def _cuts(sampling: Sampling) -> dict[str, Any]:
    return {"top_k": sampling.top_k or _ALL, "min_p": sampling.min_p}


def _read_choices(value: Any) -> list[Drawn]:
    return [_choice(choice) for choice in sorted(value["choices"], key=lambda choice: choice.get("index", 0))]


def _choice(choice: Mapping[str, Any]) -> Drawn:
    logprobs = choice.get("logprobs") or {}
    token_ids = choice.get("token_ids")
    words = logprobs.get("tokens") or []
    if token_ids is None and words and all(word.startswith("token_id:") for word in words):
        token_ids = [int(word.removeprefix("token_id:")) for word in words]
    return _drawn(choice["text"], choice["finish_reason"], token_ids, logprobs.get("token_logprobs"))


def _read_sglang(value: Any) -> list[Drawn]:
    return [
        _generated(answer["text"], answer["meta_info"]) for answer in (value if isinstance(value, list) else [value])
    ]


def _generated(text: str, meta: Mapping[str, Any]) -> Drawn:
    """Tokens as they were drawn stand beside their log-probabilities: [log-probability, token, text or null]."""
    drawn = meta["output_token_logprobs"]
    logprobs, token_ids = [logprob for logprob, _, _ in drawn], [token for _, token, _ in drawn]
    return _drawn(text, meta["finish_reason"]["type"], token_ids, logprobs)


def _read_llama_cpp(value: Any) -> list[Drawn]:
    """Log-probabilities lack the tokens of a stop text and those that end within a character: then they are too few.

    What ran out of the context may have forgotten its prompt on the way, and is no answer.
    """
    finish = "truncated" if value.get("truncated") else _LLAMA_CPP_FINISH[value["stop_type"]]
    said = value.get("completion_probabilities") or []
    return [_drawn(value["content"], finish, value["tokens"], [token["logprob"] for token in said])]


def _drawn(text: Any, finish: Any, token_ids: Any, logprobs: Any) -> Drawn:
    if not isinstance(text, str):
        raise TypeError
    return Drawn(
        text, str(finish), None if token_ids is None else _ids(token_ids), None if logprobs is None else _logs(logprobs)
    )


def _ids(values: Any) -> NDArray[np.int64]:
    ids = np.asarray(values)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not ids.size:
        raise ValueError
    return ids.astype(np.int64)


def _logs(values: Any) -> NDArray[np.float32]:
    logs = np.asarray(values, dtype=np.float64)  # null becomes nan
    if logs.ndim != 1 or (logs > _ROUNDING).any():
        raise ValueError
    return logs.clip(np.finfo(np.float32).min, 0.0).astype(np.float32)


def _tells_vllm(sampling: Sampling, mode: LogprobsMode) -> bool:
    """raw_logprobs are of the model as it is; processed_logprobs of what was left to draw from, at the temperature."""
    return _tells_untempered(sampling, mode) if mode == "raw_logprobs" else _is_uncut(sampling)


def _tells_untempered(sampling: Sampling, _: LogprobsMode) -> bool:
    return sampling.temperature in (0.0, 1.0)


def _tells_tempered(sampling: Sampling, _: LogprobsMode) -> bool:
    """SGLang takes them behind the temperature (1 where it is 0), before cuts, but behind the repetition penalty."""
    return sampling.repetition_penalty == 1.0


def _is_uncut(sampling: Sampling) -> bool:
    return (sampling.top_k, sampling.top_p, sampling.min_p, sampling.repetition_penalty) == (0, 1.0, 0.0, 1.0)


SERVERS: dict[ServerKind, ServerProtocol] = {
    "vllm": ServerProtocol("/completions", body=_vllm_body, read=_read_choices, tells=_tells_vllm),
    "sglang": ServerProtocol("/generate", native=True, body=_sglang_body, read=_read_sglang, tells=_tells_tempered),
    "llama_cpp": ServerProtocol(
        "/completion",
        native=True,
        together=False,
        body=_llama_cpp_body,
        read=_read_llama_cpp,
        tells=_tells_untempered,
    ),
    "openai": ServerProtocol(
        "/completions",
        body=_openai_body,
        read=_read_choices,
        tells=lambda sampling, mode: False,
        lacks=("top_k", "min_p", "repetition_penalty"),
    ),
}
