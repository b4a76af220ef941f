import asyncio
from types import SimpleNamespace

import pytest

from moescope.server.engine import VllmEngine
from moescope.tracer.errors import InputError, TracerError, UnsupportedModelError
from moescope.tracer.mask import SignatureError


class Client:
    """vLLM's client, with workers that answer as told: those of one replica, or `replicas`."""

    def __init__(self, *answers, replicas=None, error=None):
        self.replicas, self.error = replicas or [answers], error
        self.input_processor = SimpleNamespace()
        self.called = []
        self.vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(data_parallel_size=len(self.replicas))
        )
        self.asked = []

    @property
    def engine_core(self):
        return self

    async def call_utility_all_async(self, utility, method, timeout, args, kwargs):
        assert (utility, timeout, kwargs) == ("collective_rpc", None, None)
        salt = getattr(self.input_processor, "moescope_salt", None)
        self.called.append((method, args, salt))
        if self.error is not None:
            raise self.error
        return [list(answers) for answers in self.replicas]

    async def generate(self, prompt, params, request_id, data_parallel_rank):  # noqa: ARG002
        self.asked.append(data_parallel_rank)
        yield


def status(rank, attached, **counts):
    rest = {"live": 0, "steered": 0, "dropped_rows": 0, "silence": None}
    return {"rank": rank, "attached": attached} | rest | counts


def test_the_worker_that_records_speaks_for_all():
    engine = VllmEngine(Client(status(0, False), status(1, True)))
    assert asyncio.run(engine.status())["rank"] == 1
    engine = VllmEngine(Client(status(0, False), status(1, False)))
    assert asyncio.run(engine.status())["rank"] == 0


def test_stages_that_all_record_are_counted_together():
    stages = status(0, True, dropped_rows=3), status(1, True, dropped_rows=4, silence="layer 9")
    joined = asyncio.run(VllmEngine(Client(*stages)).sync())
    assert (joined["dropped_rows"], joined["silence"]) == (7, "layer 9")


def test_replicas_are_counted_together():
    rings = {"ring": "a"}, {"ring": "b"}, {"ring": "c"}
    first = status(0, True, live=2, dropped_rows=1) | rings[0], status(1, True, live=2) | rings[1]
    second = (status(0, True, live=3, dropped_rows=4) | rings[2],)
    seen = asyncio.run(VllmEngine(Client(replicas=[first, second])).sync())
    assert (seen["live"], seen["dropped_rows"], seen["attached"]) == (5, 5, True)
    assert seen["rings"] == [["a", "b"], ["c"]]
    # One that did not attach the store would lose its requests' rows in silence.
    second = (status(0, False),)
    assert not asyncio.run(VllmEngine(Client(replicas=[first, second])).status())["attached"]


def test_every_replica_is_proved():
    one = (status(0, True),)
    client = Client(replicas=[one, one, one])
    asyncio.run(VllmEngine(client).prove())
    assert client.asked == [0, 1, 2]
    client = Client(replicas=[one, (status(0, True, silence="layer 9"),)])
    with pytest.raises(UnsupportedModelError, match="layer 9"):
        asyncio.run(VllmEngine(client).prove())


def test_a_change_is_made_when_every_replica_has_made_it(mask):
    one, done, busy = mask("calm", 1), [{"busy": False}], [{"busy": True}]
    assert asyncio.run(VllmEngine(Client(replicas=[done, done])).load_mask(1, "k", one))
    assert not asyncio.run(VllmEngine(Client(replicas=[done, busy])).load_mask(1, "k", one))
    assert not asyncio.run(VllmEngine(Client(replicas=[busy, done])).unload([1]))
    refuses = [{"error": "InputError", "message": "why"}]
    with pytest.raises(InputError, match="why"):
        asyncio.run(VllmEngine(Client(replicas=[done, refuses])).set_global("k", one))


def test_a_model_that_no_worker_can_trace():
    engine = VllmEngine(Client({"attached": False}, {"reason": "it has no experts"}))
    with pytest.raises(UnsupportedModelError, match="no experts"):
        asyncio.run(engine.status())


@pytest.mark.parametrize(
    "error",
    [
        NotImplementedError("moescope_status"),
        Exception("Method 'moescope_status' is not implemented."),
    ],
)
def test_an_engine_without_our_plugin(error):
    with pytest.raises(TracerError, match="plugin"):
        asyncio.run(VllmEngine(Client(error=error)).status())


def test_other_errors_stay_what_they_are():
    with pytest.raises(KeyError):
        asyncio.run(VllmEngine(Client(error=KeyError("x"))).status())


@pytest.mark.parametrize("kind", [InputError, SignatureError, TracerError])
def test_an_error_of_one_worker_is_raised_here(kind, mask):
    engine = VllmEngine(Client({}, {"error": kind.__name__, "message": "why"}))
    with pytest.raises(kind, match="why"):
        asyncio.run(engine.load_mask(1, "calm@1", mask("calm", 1)))


def test_a_slot_is_loaded_when_it_is_in_every_worker(mask):
    one = mask("calm", 1)
    client = Client({"busy": False}, {"busy": False})
    assert asyncio.run(VllmEngine(client).load_mask(1, "calm@1", one))
    assert not asyncio.run(
        VllmEngine(Client({"busy": False}, {"busy": True})).load_mask(1, "k", one)
    )
    [(method, (slot, key, data), _)] = client.called
    assert (method, slot, key) == ("moescope_load_mask", 1, "calm@1")
    assert data == one.model_dump(mode="json")


def test_slots_are_empty_when_they_are_so_in_every_worker():
    client = Client({"busy": False}, {"busy": False})
    assert asyncio.run(VllmEngine(client).unload([1, 3]))
    assert client.called[0][:2] == ("moescope_unload_masks", ([1, 3],))
    assert not asyncio.run(VllmEngine(Client({"busy": True}, {"busy": False})).unload([1]))


def test_every_global_mask_has_a_prefix_cache_of_its_own(mask):
    client, salts = Client({}), []
    engine = VllmEngine(client)

    async def run():
        for key in ("calm@1", None, "calm@1"):
            await engine.set_global(key, None if key is None else mask("calm", 1))
            salts.append(client.input_processor.moescope_salt)
        client.error = KeyError("x")
        with pytest.raises(KeyError):
            await engine.set_global("calm@1", mask("calm", 1))
        salts.append(client.input_processor.moescope_salt)

    asyncio.run(run())
    # While the workers change, no request may share a prefix with any other.
    assert {salt for _, _, salt in client.called} == {"changing"}
    assert len(set(salts) | {"changing"}) == 5


def test_published_masks_are_a_copy():
    client, slots = Client(), {"calm@1": 1}
    VllmEngine(client).publish(slots)
    slots.clear()
    assert client.input_processor.moescope_masks == {"calm@1": 1}
