"""Has a server answer with the model as it is after an update, where the server can take that.

vLLM and SGLang load LoRA adapters from a folder while they run. A name stands for what it was first loaded with, so
each version gets a name of its own, and the one before is unloaded once the new one is there. SGLang also reads the
whole model anew from a folder. Other servers take nothing, and training on their answers is refused unless it is asked
for: after the first update they are another model's.
"""

import logging
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from luthier.data.strict_json import parse_json
from luthier.errors import DataError, ModelError, RecipeError, TrainingError
from luthier.files import written_whole
from luthier.recipe.rollout_servers import RolloutServer, ServerKind
from luthier.rollout.endpoint import Endpoint
from luthier.rollout.scoring import Failure

__all__ = ["Pusher", "check_updates", "pusher_of"]

_NEEDS: dict[ServerKind, str] = {
    "vllm": "vLLM needs --enable-lora, a --max-lora-rank that suffices and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1",
    "sglang": "SGLang needs --enable-lora, and --max-lora-rank and --lora-target-modules that fit",
}
_SHORTEST_SECONDS = 120.0  # that loading a model may take

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Pusher:
    """Sends what training has saved. endpoint: where loading is asked for; its url ends before the path.

    adapter_name: None where the whole model is sent. needs: what the server may lack. shared_folder: where both
    machines see a copy, the server as `server_folder`; None where the server reads the given folder itself.
    """

    endpoint: Endpoint
    adapter_name: str | None
    needs: str
    shared_folder: Path | None = None
    server_folder: str | None = None
    loaded: str | None = field(default=None, init=False)

    def push(self, folder: Path, version: int) -> str | None:
        """What the new model is called there, or None for its usual name. The folder must stay until the next push.

        Raises ModelError where the folder does not hold what is pushed, TrainingError where the server refuses it.
        """
        expected = "config.json" if self.adapter_name is None else "adapter_config.json"
        if not (folder / expected).is_file():
            raise ModelError(f"{folder}: holds no {expected}, so it cannot be pushed; save the model there first")
        name = f"{self.adapter_name or 'model'}-{version}"
        fault = self._load(name, self._shown(folder, name))
        if fault is not None:
            said = ": ".join(filter(None, (fault.reason, fault.detail)))
            raise TrainingError(
                f"{self.endpoint.url}: does not take version {version} from {folder} ({said}); {self.needs}, and must "
                "see that folder, else set shared_folder"
            )
        self._forget(previous=self.loaded, name=name)
        self.loaded = name
        return None if self.adapter_name is None else name

    def _load(self, name: str, path: str) -> Failure | None:
        """An adapter of that name, left by a run that was stopped or by a request that timed out, is replaced."""
        if self.adapter_name is None:
            return self._send("/update_weights_from_disk", {"model_path": path})
        asked = {"lora_name": name, "lora_path": path}
        fault = self._send("/load_lora_adapter", asked)
        if fault is not None and fault.reason == "HTTP 400" and self._unload(name) is None:
            return self._send("/load_lora_adapter", asked)
        return fault

    def _forget(self, *, previous: str | None, name: str) -> None:
        """What was loaded before costs the server memory; that it stays is no reason to stop."""
        if previous is None or previous == name:
            return
        fault = None if self.adapter_name is None else self._unload(previous)
        if fault is not None:
            _log.warning("%s: keeps the adapter %s: %s %s", self.endpoint.url, previous, fault.reason, fault.detail)
        if self.shared_folder is not None:
            shutil.rmtree(self.shared_folder / previous, ignore_errors=True)

    def _unload(self, name: str) -> Failure | None:
        return self._send("/unload_lora_adapter", {"lora_name": name}, retries=0)

    def _send(self, path: str, asked: dict[str, Any], *, retries: int | None = None) -> Failure | None:
        endpoint = self.endpoint if retries is None else replace(self.endpoint, retries=retries)
        answer = endpoint.post(path, asked)
        if isinstance(answer, Failure):
            return answer
        return Failure("refused", "the server says that it has failed") if _says_no(answer) else None

    def _shown(self, folder: Path, name: str) -> str:
        """The folder's path on the server's machine."""
        if self.shared_folder is None:
            return str(folder.resolve())
        try:
            with written_whole(self.shared_folder / name) as copy:
                shutil.copytree(folder, copy, dirs_exist_ok=True)
        except OSError as error:
            raise ModelError(f"{self.shared_folder}: cannot hold a copy of {folder} ({error}); make room") from error
        return f"{self.server_folder or self.shared_folder.resolve()}/{name}"


def pusher_of(settings: RolloutServer, endpoint: Endpoint) -> Pusher | None:
    """How this server is updated, or None where it is not."""
    if settings.push is None:
        return None
    by_adapter = settings.push == "adapter"
    patient = replace(endpoint, timeout_seconds=max(endpoint.timeout_seconds, _SHORTEST_SECONDS))
    return Pusher(
        patient if settings.kind == "vllm" else patient.beside_v1(),
        settings.adapter_name if by_adapter else None,
        _NEEDS[settings.kind] if by_adapter else "SGLang needs a model of the shape that it was started with",
        None if settings.shared_folder is None else Path(settings.shared_folder),
        settings.server_folder,
    )


def check_updates(settings: RolloutServer) -> None:
    """Raises RecipeError where a policy would be trained on answers that are not its own, without being told to."""
    if settings.push is None and not settings.allow_stale:
        raise RecipeError(
            f"push: {settings.url} is never updated, so from the second update on its answers would be another "
            "model's; choose a server of kind vllm or sglang, or set allow_stale: true"
        )


def _says_no(answer: bytes) -> bool:
    """SGLang tells by {"success": false}; vLLM's answer is a sentence, and its status says all."""
    try:
        value = parse_json(answer.decode())
    except (UnicodeDecodeError, DataError):
        return False
    return isinstance(value, dict) and value.get("success") is False
