import asyncio
import time

import pytest

from moescope.deploy.admission import Admission, OutError
from moescope.deploy.target import Target
from moescope.server.audit import State
from moescope.server.errors import UnknownError
from moescope.tracer.errors import InputError

OLD, NEW = Target(State({"a": 1, "b": 1})), Target(State({"a": 2, "b": 1}))
NONE, ALL = frozenset(), None


def admitted(*steps, texts=("a",), patience_s=5.0):
    """What a request gets that comes first, before these steps are taken one after the other."""

    async def run():
        admission = Admission(patience_s)
        await admission.renew(time.monotonic() + 60)
        await admission.open(OLD)
        for step in steps[:1]:
            await step(admission)
        request = asyncio.create_task(admission.admit(texts))
        await asyncio.sleep(0.05)
        waits = not request.done()
        for step in steps[1:]:
            await step(admission)
        return waits, await request

    return asyncio.run(run())


def bar(names):
    return lambda admission: admission.bar(names)


def test_a_name_means_one_version():
    texts = ("a", "b", "a@1")
    assert admitted(texts=texts) == (False, {"a": "a@1", "b": "b@1", "a@1": "a@1"})


def test_who_names_a_changing_mask_gets_the_new_version():
    assert admitted(bar({"a"}), lambda a: a.open(NEW)) == (True, {"a": "a@2"})
    assert admitted(bar(ALL), lambda a: a.open(NEW), texts=()) == (True, {})


def test_who_names_another_does_not_wait():
    assert admitted(bar(frozenset({"a"})), texts=("b",)) == (False, {"b": "b@1"})
    assert admitted(bar(frozenset({"a"})), texts=()) == (False, {})


def test_a_version_is_not_there_before_all_have_it():
    with pytest.raises(UnknownError, match="no version 2, only 1"):
        admitted(texts=("a@2",))
    with pytest.raises(UnknownError, match="no mask c"):
        admitted(texts=("c",))
    with pytest.raises(InputError, match="names no mask"):
        admitted(texts=("a@0",))


def test_nothing_passes_a_replica_that_is_out():
    with pytest.raises(OutError, match="/v1/replicas"):
        admitted(lambda a: a.close(), patience_s=0.1)
    with pytest.raises(OutError):
        admitted(lambda a: a.renew(0.0), patience_s=0.1)
    assert admitted(lambda a: a.close(), lambda a: a.open(NEW)) == (True, {"a": "a@2"})


def test_a_lease_that_ends_closes_by_itself():
    async def run():
        admission = Admission(0.05)
        await admission.open(OLD)
        await admission.renew(time.monotonic() + 0.2)
        assert admission.serving
        await admission.admit(())
        await asyncio.sleep(0.25)
        assert not admission.serving
        with pytest.raises(OutError):
            await admission.admit(())

    asyncio.run(run())
