import asyncio
from types import SimpleNamespace

import pytest

from moescope.server.engine import VllmEngine
from moescope.tracer.errors import InputError, TracerError, UnsupportedModelError
from moescope.tracer.mask import SignatureError


class Client:
    """vLLM's client, with workers that answer as told."""

    def __init__(self, *answers, error=None):
        self.answers, self.error = answers, error
        self.input_processor = SimpleNamespace()
        self.called = []

    async def collective_rpc(self, method, args=()):
        salt = getattr(self.input_processor, "moescope_salt", None)
        self.called.append((method, args, salt))
        if self.error is not None:
            raise self.error
        return list(self.answers)


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
