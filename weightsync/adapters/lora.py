"""The routes, common to vLLM and SGLang, for LoRA adapters that a server serves beside its base model.

`POST …/load_lora_adapter {"lora_name", "lora_path"}` has every worker of the server read a directory as peft saves it.
`POST …/unload_lora_adapter {"lora_name"}` forgets it. `GET /v1/models` lists each with the base model as its `parent`.
vLLM (0.32) has the first two under /v1, with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1. It unloads at once,
and running requests keep the LoRA adapter that they began with. SGLang (0.5.23) has them with --enable-lora. While it
unloads a LoRA adapter it takes no new request for it, and it answers when the last running one has ended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightsync.errors import EngineError, EngineRefused

if TYPE_CHECKING:
    from weightsync.adapters.http import EngineHttp

__all__ = ["LoraRoutes"]


class LoraRoutes:
    """One server's LoRA routes. Every method raises as `EngineHttp` does."""

    def __init__(self, http: EngineHttp, prefix: str, flags: str) -> None:
        """The routes lie under `prefix`. `flags`, for an error's hint, says how to start a server that has them."""
        self._http, self._prefix, self._flags = http, prefix, flags

    async def names(self, *, deadline: float) -> list[str]:
        """Return the names of the LoRA adapters that are loaded. Raises `EngineRefused` if the server takes none."""
        if not await self._http.has("POST", f"{self._prefix}/load_lora_adapter", deadline=deadline):
            what = f"engine {self._http.engine} takes no LoRA adapters"
            raise EngineRefused(what, engine=self._http.engine, hint=f"start it {self._flags}")
        answer = await self._http.get("/v1/models", deadline=deadline)
        cards = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(cards, list):
            raise EngineError("/v1/models answered without a list of models", engine=self._http.engine)
        return [str(card.get("id")) for card in cards if isinstance(card, dict) and card.get("parent")]

    async def load(self, name: str, path: str, *, deadline: float) -> None:
        """Load the directory `path`, a path on the server's side, as `name`. It is loaded when this returns."""
        await self._http.post(
            f"{self._prefix}/load_lora_adapter", {"lora_name": name, "lora_path": path}, deadline=deadline
        )
        if name not in await self.names(deadline=deadline):
            what = f"engine {self._http.engine} does not list {name!r} after it has loaded it"
            raise EngineError(what, engine=self._http.engine)

    async def unload(self, name: str, *, deadline: float) -> None:
        """Unload `name`."""
        await self._http.post(f"{self._prefix}/unload_lora_adapter", {"lora_name": name}, deadline=deadline)
