"""What the control plane asks of the engine: remote calls to its workers, typed.

A data-parallel engine has replicas, each with workers of its own, and each makes a change between
two of its own steps. An answer here is that of all of them.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Protocol
from uuid import uuid4

from moescope.tracer.errors import TracerError, UnsupportedModelError
from moescope.tracer.mask import Mask


class Engine(Protocol):
    """The engine, as the control plane sees it."""

    async def status(self) -> dict[str, Any]:
        """The model's facts, the router, the slots and the tracer's counters."""

    async def load_mask(self, slot: int, key: str, mask: Mask) -> bool:
        """Put a mask into a slot; False while requests run under what lies there."""

    async def unload(self, slots: Sequence[int]) -> bool:
        """Empty these slots; False while requests run under what lies in one, which stays."""

    async def set_global(self, key: str | None, mask: Mask | None) -> None:
        """The mask of requests that name none, from the next step on."""

    async def sync(self) -> dict[str, Any]:
        """Put every finished request on disk; returns the status."""

    def publish(self, slots: Mapping[str, int]) -> None:
        """Which masks requests may name from now on, and their slots."""


class VllmEngine:
    """An `Engine` behind vLLM's client."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def status(self) -> dict[str, Any]:
        """See `Engine`. UnsupportedModelError if the model can't be traced and steered."""
        replicas = await self._replicas("status")
        for answers in replicas:
            for answer in answers:
                if "reason" in answer:
                    raise UnsupportedModelError(answer["reason"])
        return _status_of(replicas)

    async def load_mask(self, slot: int, key: str, mask: Mask) -> bool:
        """See `Engine`."""
        answers = await self._call("load_mask", slot, key, mask.model_dump(mode="json"))
        return not any(answer.get("busy") for answer in answers)

    async def unload(self, slots: Sequence[int]) -> bool:
        """See `Engine`."""
        answers = await self._call("unload_masks", list(slots))
        return not any(answer["busy"] for answer in answers)

    async def set_global(self, key: str | None, mask: Mask | None) -> None:
        """See `Engine`."""
        from moescope.tracer.vllm_frontend import CHANGING, salt_of_global_mask

        # No request may find in the prefix cache what was computed under another global mask: one
        # that runs across the change computes under both. So every change gets a salt of its own.
        salt_of_global_mask(self._client, CHANGING)
        try:
            await self._call(
                "set_global", key, None if mask is None else mask.model_dump(mode="json")
            )
        finally:
            salt_of_global_mask(self._client, f"global {key} {uuid4()}")

    async def sync(self) -> dict[str, Any]:
        """See `Engine`."""
        return _status_of(await self._replicas("sync"))

    def publish(self, slots: Mapping[str, int]) -> None:
        """See `Engine`."""
        from moescope.tracer.vllm_frontend import set_loaded_masks

        set_loaded_masks(self._client, dict(slots))

    async def prove(self) -> None:
        """Run one token on every replica; refuse the model if a layer's routing does not arrive."""
        from vllm import SamplingParams

        one = SamplingParams(max_tokens=1, detokenize=False)
        prompt = {"prompt_token_ids": [1]}
        replicas = self._client.vllm_config.parallel_config.data_parallel_size
        for rank in range(replicas):
            name = f"moescope-{uuid4()}"
            async for _ in self._client.generate(prompt, one, name, data_parallel_rank=rank):
                pass
        silence = (await self.status())["silence"]
        if silence:
            raise UnsupportedModelError(silence)

    async def _call(self, method: str, *args: Any) -> list[dict[str, Any]]:
        """The answers of all workers of all replicas."""
        return list(chain.from_iterable(await self._replicas(method, *args)))

    async def _replicas(self, method: str, *args: Any) -> list[list[dict[str, Any]]]:
        """The answers of every replica's workers; raises what one of them raised."""
        from moescope.tracer.worker import NO_PLUGIN, check_answers

        # `AsyncLLM.collective_rpc` does the same, and hands on what the first replica answers.
        ask_all = self._client.engine_core.call_utility_all_async
        try:
            replicas = await ask_all("collective_rpc", f"moescope_{method}", None, args, None)
        except Exception as error:
            if isinstance(error, NotImplementedError) or "is not implemented" in str(error):
                raise TracerError(NO_PLUGIN) from error
            raise
        return [check_answers(answers) for answers in replicas]


def _status_of(replicas: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """One status of all replicas; `rings` has a list for each."""
    from moescope.tracer.worker import joined

    each = [joined(answers) for answers in replicas]
    return each[0] | {
        "attached": all(status["attached"] for status in each),
        "live": sum(status["live"] for status in each),
        "steered": sum(status["steered"] for status in each),
        "dropped_rows": sum(status["dropped_rows"] for status in each),
        "rings": [status["rings"] for status in each],
        "silence": next((status["silence"] for status in each if status["silence"]), None),
    }
