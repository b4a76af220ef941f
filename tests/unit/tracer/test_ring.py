import multiprocessing
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.tracer.format import MoeShape
from moescope.tracer.ring import Ring, Rows

SHAPE = MoeShape((0, 1), num_experts=300, top_k=2)


def numbered(start, count):
    rows = Rows.empty(count, SHAPE)
    rows.request[:] = np.arange(start, start + count)
    rows.position[:] = rows.request
    rows.token[:] = rows.request
    rows.experts[:] = (rows.request[:, None] * 3 + np.arange(4)) % 300
    rows.weights[:] = rows.request[:, None] % 7
    return rows


def put(ring, rows):
    for source, target in ring.reserve(len(rows)):
        mines = ring.columns[target].columns()
        for mine, theirs in zip(mines, rows.columns(), strict=True):
            mine[:] = theirs[source]
    ring.publish(len(rows))


def take(ring, most=None):
    got = []
    for block in ring.available():
        part = block[: None if most is None else most - len(got)]
        for i in range(len(part)):
            expected = numbered(int(part.request[i]), 1)
            assert (part.experts[i] == expected.experts[0]).all()
            assert (part.weights[i] == expected.weights[0]).all()
            got.append(int(part.request[i]))
    ring.release(len(got))
    return got


@pytest.fixture
def ring():
    ring = Ring.create(SHAPE, capacity=10, message_bytes=256)
    yield ring
    ring.close()


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10), st.integers(0, 10)), max_size=40))
def test_rows_come_out_once_in_order_whatever_the_pace(steps):
    ring = Ring.create(SHAPE, capacity=10, message_bytes=256)
    sent = received = 0
    for wanted_in, wanted_out in steps:
        count = min(wanted_in, ring.free)
        put(ring, numbered(sent, count))
        sent += count
        got = take(ring, wanted_out)
        assert got == list(range(received, received + len(got)))
        received += len(got)
        assert ring.free == 10 - (sent - received)
    assert take(ring) == list(range(received, sent))
    ring.close()


def test_nothing_is_visible_before_publish(ring):
    for source, target in ring.reserve(4):
        ring.columns[target].request[:] = 7
        assert source.stop - source.start == target.stop - target.start
    assert ring.available() == []


def test_messages_wrap_around_and_are_refused_when_full(ring):
    message = {"op": "begin", "text": "é" * 10}
    for _ in range(30):  # 30 messages in room for about 3: the bytes wrap many times
        assert ring.send(message)
        [(_, received)] = ring.receive()
        assert received == message
        ring.forget()
    sent = 0
    while ring.send(message):
        sent += 1
    assert 0 < sent < 10
    received = ring.receive()
    assert [message for _, message in received] == [message] * sent
    assert ring.receive() == []
    assert not ring.send(message)  # another writer would want to know of them, if this one died
    ring.forget(received[1][0])
    assert ring.send(message)


def test_a_failure_reaches_the_other_side(ring):
    ring.fail("no space left on device: ü")
    other = Ring(os.dup(ring.fd), SHAPE, 10, 256)
    assert other.failure == "no space left on device: ü"
    other.close()


def _produce(fd, total):
    ring = Ring(fd, SHAPE, 64, 256)
    sent = 0
    while sent < total:
        count = min(ring.free, 1 + sent % 50, total - sent)
        put(ring, numbered(sent, count))
        sent += count


def test_two_processes_lose_and_tear_nothing():
    ring = Ring.create(SHAPE, capacity=64, message_bytes=256)
    child = multiprocessing.get_context("fork").Process(target=_produce, args=(ring.fd, 20_000))
    child.start()
    received = []
    while len(received) < 20_000:
        received += take(ring)
    child.join()
    assert received == list(range(20_000))
    ring.close()
