"""The settings of an adapter as PEFT's adapter_config.json says them, and back.

Each type says in `Adapter.peft` which of its settings PEFT has and under which name. Settings that PEFT does not have
are kept beside: in the metadata of the weights' file for a type that PEFT knows, since PEFT warns of unknown words in
the configuration, else in the configuration itself. A file that asks for what this package does not have is refused by
name, because an adapter that is read in part is another adapter.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.adapters.base import PeftForm
from luthier.adapters.inject import ADAPTERS
from luthier.adapters.peft_files import OWN_FIELD
from luthier.errors import AdapterError, RecipeError
from luthier.recipe.adapters import ADAPTER_SETTINGS, AnyAdapter
from luthier.recipe.settings import settings_from

__all__ = ["settings_of_config", "words_of_config"]

logger = logging.getLogger(__name__)

_TOKENS = "trainable_token_indices"
_HEAD, _OTHER_HEAD = "score", "classifier"  # PEFT writes both names for a classifier, of which a network has one

_HARMLESS = {  # words of PEFT's that change nothing of what a saved adapter computes
    *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "inference_mode", "megatron_core"),
    *("megatron_config", "module_dropout", "peft_type", "peft_version", "qalora_group_size", "rank_dropout"),
    *("rank_dropout_scale", "revision", "runtime_config", "task_type", "init_weights", "init_lora_weights"),
    *("num_attention_heads", "num_layers", "num_transformer_submodules", "prompt_tuning_init", "token_dim"),
    *("encoder_hidden_size", "prefix_projection", "prompt_tuning_init_text", "tokenizer_kwargs"),
    *("tokenizer_name_or_path",),
    *("init_ia3_weights", "loftq_config", "eva_config", "corda_config", "layers_pattern", "projection_prng_key"),
}

_PLAIN_STARTS = (True, False, None, "eva", "gaussian", "orthogonal")  # with others PEFT changes the base while loading


def words_of_config(settings: AnyAdapter, base_model: str, extra: Mapping[str, object]) -> dict[str, Any]:
    """What adapter_config.json says. extra: words that the type adds, or says otherwise."""
    form = ADAPTERS[settings.type].peft
    task = "SEQ_CLS" if _HEAD in settings.modules_to_save else "CAUSAL_LM"
    shared = {"base_model_name_or_path": base_model, "inference_mode": True, "task_type": task}
    if form is None:
        kind = f"LUTHIER_{settings.type.upper()}"
        return {**shared, "peft_type": kind, OWN_FIELD: settings.model_dump(mode="json"), **extra}
    said = {theirs: _as_json(getattr(settings, ours)) for ours, theirs in form.fields.items()}
    return {**shared, "peft_type": form.kind, **form.fixed, **said, **extra}


def _as_json(value: object) -> object:
    if isinstance(value, tuple):
        return list(value) or None
    return dict(value) if isinstance(value, Mapping) else value


def settings_of_config(path: Path, config: Mapping[str, Any], own: Mapping[str, Any] | None) -> AnyAdapter:
    """The settings that a configuration means. own: what was kept beside, which says more; it counts as long as it says
    the same, for the configuration may have been edited.

    Raises AdapterError for a type or a word that cannot be read.
    """
    if OWN_FIELD in config:
        said = config[OWN_FIELD]
        if not isinstance(said, Mapping):
            raise AdapterError(f"{path}: {OWN_FIELD} holds no settings; save the adapter again")
        return _made(path, str(said.get("type")), said)
    tokens, config = _tokens(path, config), {name: value for name, value in config.items() if name != _TOKENS}
    if own is not None:
        settings = _made(path, str(own.get("type")), own)
        names = config.get("target_modules")
        same = settings.trainable_token_indices == tokens and _says_the_same(config, settings)
        if same and not isinstance(names, str):
            return settings if names is None else settings.model_copy(update={"target_modules": tuple(names)})
        if not same:
            logger.warning("%s: says something else than when the adapter was saved; what it says now counts", path)
    word, form = _type_of(path, config)
    known = {*form.fields.values(), *form.fixed, *form.unread, *_HARMLESS}
    asked = sorted(name for name, value in config.items() if value and name not in known)
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        asked.append(f"init_lora_weights: {config['init_lora_weights']}")
    if asked:
        raise _refusal(path, asked)
    given = {ours: config[theirs] for ours, theirs in form.fields.items() if config.get(theirs) is not None}
    if config.get("task_type") == "SEQ_CLS" and _HEAD in (whole := given.get("modules_to_save") or ()):
        given["modules_to_save"] = [name for name in whole if name != _OTHER_HEAD]
    missing = [f for f in form.fields.values() if f not in config and f in ("r", "lora_alpha", "target_modules")]
    if missing:
        raise AdapterError(f"{path}: does not say {missing[0]}; save the adapter again")
    names = given.get("target_modules")
    if isinstance(names, str) and names != "all-linear":
        raise AdapterError(f"{path.parent}: asks for target_modules as a pattern, which cannot be read; list the names")
    return _made(path, word, {"type": word, **given, _TOKENS: tokens})


def _tokens(path: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens whose rows are trained; they may be said for each layer, and must be the same for all."""
    said = config.get(_TOKENS) or ()
    by_layer = said if isinstance(said, Mapping) else {"": said}
    if not all(isinstance(indices, list | tuple) for indices in by_layer.values()):
        raise AdapterError(f"{path}: {_TOKENS} is no list of numbers; save the adapter again")
    lists = {tuple(indices) for indices in by_layer.values()}
    if len(lists) > 1:
        raise _refusal(path, [f"other tokens in {' than in '.join(by_layer)}"])
    return next(iter(lists), ())


def _says_the_same(config: Mapping[str, Any], settings: AnyAdapter) -> bool:
    """Whether this configuration is the one written for the settings; which layers are meant is written otherwise."""
    kind = ADAPTERS[settings.type]
    written = words_of_config(settings, "", kind.peft_words(settings, ()))
    unread = kind.peft.unread if kind.peft else frozenset()
    free = {"base_model_name_or_path", "target_modules", *unread}
    said = {name for name, value in config.items() if value and name not in _HARMLESS | unread}
    return said <= written.keys() and all(config.get(n) == value for n, value in written.items() if n not in free)


def _type_of(path: Path, config: Mapping[str, Any]) -> tuple[str, PeftForm]:
    kind = config.get("peft_type")
    every = {word: cls.peft for word, cls in ADAPTERS.items() if cls.peft is not None and not cls.peft.borrowed}
    forms = {word: form for word, form in every.items() if form.kind == kind}
    if not forms:
        readable = sorted({form.kind for form in every.values()})
        raise AdapterError(f"{path.parent}: adapters of type {kind} cannot be read; {', '.join(readable)} can")
    for word, form in forms.items():
        if all((config.get(name) or False) == value for name, value in form.fixed.items()):
            return word, form
    asked = sorted({n for form in forms.values() for n, v in form.fixed.items() if (config.get(n) or False) != v})
    raise _refusal(path, asked)


def _refusal(path: Path, asked: list[str]) -> AdapterError:
    return AdapterError(f"{path.parent}: asks for {', '.join(asked)}, which cannot be read; merge it with PEFT first")


def _made(path: Path, word: str, values: Mapping[str, Any]) -> AnyAdapter:
    if word not in ADAPTER_SETTINGS:
        raise AdapterError(
            f"{path}: holds an adapter of type {word}, which is not known; use the version that wrote it"
        )
    try:
        return settings_from(ADAPTER_SETTINGS[word], values)
    except RecipeError as error:
        raise AdapterError(f"{path}: not the settings of a {word} ({error}); save the adapter again") from error
