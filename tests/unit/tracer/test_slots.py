import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.tracer.errors import SlotsFullError
from moescope.tracer.slots import SlotBook


def ready(book, key):
    lease = book.acquire(key)
    if lease.fresh:
        book.confirm(key)
    return lease


def test_a_mask_in_use_is_shared_and_an_idle_one_stays_until_it_is_needed():
    book = SlotBook(2)
    first = ready(book, "a")
    assert first.fresh
    assert not ready(book, "a").fresh
    ready(book, "b")
    with pytest.raises(SlotsFullError, match="all 2 mask slots"):
        book.acquire("c")
    book.release("a")
    with pytest.raises(SlotsFullError):
        book.acquire("c")  # the other request with it still runs
    book.release("a")
    assert book.loaded == {"a": 1, "b": 2}
    assert not ready(book, "a").fresh
    book.release("a")
    assert ready(book, "c").slot == first.slot
    assert book.loaded == {"b": 2, "c": 1}


def test_the_longest_idle_mask_goes_first():
    book = SlotBook(2)
    for key in ("a", "b"):
        ready(book, key)
    book.release("b")
    book.release("a")
    assert ready(book, "c").slot == 2


def test_idle_masks_can_be_let_go():
    book = SlotBook(3)
    for key in "abc":
        ready(book, key)
    for key in "ab":
        book.release(key)
    book.acquire("c")
    assert sorted(book.drop_idle()) == [1, 2]
    assert book.loaded == {"c": 3}
    assert ready(book, "a").fresh
    book.acquire("d")  # it is being loaded: no idle one
    assert book.drop_idle() == []


def test_a_mask_that_could_not_be_loaded_leaves_its_slot():
    book = SlotBook(1)
    assert book.acquire("a").fresh
    assert book.acquire("a").fresh  # a second request comes while it loads
    book.fail("a")
    book.fail("a")
    assert ready(book, "b").slot == 1


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans()), max_size=60))
def test_no_slot_is_lost_or_given_twice(steps):
    book, running = SlotBook(3), []
    for key, starts in steps:
        if starts:
            try:
                ready(book, key)
            except SlotsFullError:
                assert len(set(running)) == 3
                assert key not in running
            else:
                running.append(key)
        elif key in running:
            running.remove(key)
            book.release(key)
        assert book.leases == {k: running.count(k) for k in set(running)}
        slots = list(book.loaded.values())
        assert len(set(slots)) == len(slots) <= 3
        assert set(running) <= book.loaded.keys()
