"""The shared memory between the engine and the writer process: one producer, one consumer.

    0        header: 64-bit words, each on a cache line of its own (table below)
    2048     text of the writer's failure, UTF-8, zero-terminated
    4096     columns, each `capacity` rows long:
               request uint32 | position int32 | token int32 | experts [L*k] | weights float16 [L*k]
    ...      messages: a byte ring of  length uint32, JSON  (begin and finish of requests)

Both tails say what the writer is done with. It may die, and another takes up from there.

The engine owns the *head* words and the writer the *tail* words. Both only grow; row i lies at
i % capacity. The producer fills the columns first and moves the head last, the consumer copies
first and moves the tail last, with a memory fence between, so neither ever sees a row that is
half there. The memory is an anonymous file (memfd): it needs no /dev/shm, and the kernel frees it
when both processes are gone, however they died.
"""

import json
import mmap
import os
import threading
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from moescope.tracer.format import MoeShape

HEADER_BYTES = 4096
_FAILURE_AT = 2048
MAGIC = 0x6D6F6573636F7065

# Header words, by index into a uint64 array; 8 words are a cache line.
HEAD, TAIL, MESSAGE_HEAD, MESSAGE_TAIL = 8, 16, 24, 32
SYNC_ASKED, SYNC_DONE = 40, 48  # the engine asks by counting up, the writer answers
CLOSED = 56  # 1: the engine has sent its last row
STATE = 64  # of the writer: one of the four below
DROPPED_ROWS, DROPPED_REQUESTS = 72, 80  # what the engine had to let go
# What the writer reports (ring_watch.py). Times are in ns of the machine's monotonic clock.
LOOKED_AT = 88  # when it last looked for rows
WAITING_SINCE = 96  # since when finished requests wait for their file; 0: none does
BEGUN, FILES, ROWS, BYTES = 104, 112, 120, 128  # requests begun; what is on disk
WRITER = 136  # the writer's process id
SETTLED = 144  # rows that are on disk, or that nothing more is to be done with
LOST_ROWS = 152  # rows that writers had taken and not put on disk when they died
STARTING, RUNNING, FINISHED, FAILED = range(4)

_fence_lock = threading.Lock()


def _fence() -> None:
    """A full memory barrier: taking a lock is one on every processor (plain stores aren't)."""
    with _fence_lock:
        pass


@dataclass(slots=True)
class Rows:
    """Equally long columns of rows; see format.py. `experts` and `weights` are [rows, L*k]."""

    request: NDArray[np.uint32]
    position: NDArray[np.int32]
    token: NDArray[np.int32]
    experts: NDArray[Any]
    weights: NDArray[np.float16]

    def __len__(self) -> int:
        return len(self.request)

    def __getitem__(self, part: slice | NDArray[Any]) -> "Rows":
        return Rows(*(column[part] for column in self.columns()))

    def columns(self) -> tuple[NDArray[Any], ...]:
        """The columns, in the format's order."""
        return self.request, self.position, self.token, self.experts, self.weights

    @classmethod
    def empty(cls, rows: int, shape: MoeShape) -> "Rows":
        """Columns of `rows` uninitialised rows."""
        return cls(*(np.empty((rows, *tail), dtype) for dtype, tail in _columns(shape)))


def _columns(shape: MoeShape) -> list[tuple[np.dtype[Any], tuple[int, ...]]]:
    return [
        (np.dtype(np.uint32), ()),
        (np.dtype(np.int32), ()),
        (np.dtype(np.int32), ()),
        (shape.id_dtype, (shape.num_routes,)),
        (np.dtype(np.float16), (shape.num_routes,)),
    ]


class Ring:
    """The shared ring, seen from either side."""

    def __init__(self, fd: int, shape: MoeShape, capacity: int, message_bytes: int) -> None:
        self.fd, self.shape, self.capacity = fd, shape, capacity
        self._map = mmap.mmap(fd, self.size(shape, capacity, message_bytes))
        self.words = np.frombuffer(self._map, np.uint64, _FAILURE_AT // 8)
        at, columns = HEADER_BYTES, []
        for dtype, tail in _columns(shape):
            count = capacity * int(np.prod(tail, dtype=int))
            column = np.frombuffer(self._map, dtype, count, at)
            columns.append(column.reshape(capacity, *tail))
            at += column.nbytes + -column.nbytes % 64
        self._rows = Rows(*columns)
        self._messages = np.frombuffer(self._map, np.uint8, message_bytes, at)
        # Rows handed out to be filled; the engine's own count, ahead of HEAD while copies run.
        self.reserved = int(self.words[HEAD])
        self._read_to = int(self.words[MESSAGE_TAIL])  # the writer's, ahead of the tail

    @staticmethod
    def size(shape: MoeShape, capacity: int, message_bytes: int) -> int:
        """Bytes of the whole mapping."""
        sizes = [
            capacity * dtype.itemsize * int(np.prod(t, dtype=int)) for dtype, t in _columns(shape)
        ]
        return HEADER_BYTES + sum(size + -size % 64 for size in sizes) + message_bytes

    @classmethod
    def create(cls, shape: MoeShape, capacity: int, message_bytes: int = 1 << 22) -> Self:
        """A new ring of `capacity` rows in anonymous shared memory."""
        fd = os.memfd_create("moescope-ring")
        os.ftruncate(fd, cls.size(shape, capacity, message_bytes))
        ring = cls(fd, shape, capacity, message_bytes)
        ring.words[0] = MAGIC
        return ring

    def close(self) -> None:
        """Give the file descriptor back; the mapping goes with the last array on it."""
        os.close(self.fd)

    def word(self, index: int) -> int:
        """A header word, read after everything it guards."""
        value = int(self.words[index])
        _fence()
        return value

    def set_word(self, index: int, value: int) -> None:
        """Publish a header word, after everything written so far."""
        _fence()
        self.words[index] = value

    # The engine's side.

    @property
    def address(self) -> int:
        """Where the mapping begins in this process."""
        return self.words.ctypes.data

    @property
    def nbytes(self) -> int:
        """Bytes of the whole mapping."""
        return len(self._map)

    @property
    def columns(self) -> Rows:
        """All of the ring's rows, for those who register the memory."""
        return self._rows

    @property
    def free(self) -> int:
        """Rows that can be reserved now."""
        return self.capacity - self.reserved + self.word(TAIL)

    def reserve(self, rows: int) -> list[tuple[slice, slice]]:
        """Where the next `rows` (<= free) go: one part, or two around the ring's end.

        Each is (the part of the source, the part of `columns` to fill). `publish` makes them
        visible, in the order in which they were reserved.
        """
        at = self.reserved % self.capacity
        self.reserved += rows
        first = min(rows, self.capacity - at)
        parts = [(slice(0, first), slice(at, at + first))]
        if first < rows:
            parts.append((slice(first, rows), slice(0, rows - first)))
        return parts

    def publish(self, rows: int) -> None:
        """Make the next `rows` rows visible to the writer."""
        self.set_word(HEAD, int(self.words[HEAD]) + rows)

    def send(self, message: dict[str, Any]) -> bool:
        """Queue a message for the writer; False when there is no room for it now."""
        payload = json.dumps(message, separators=(",", ":")).encode()
        framed = len(payload).to_bytes(4, "little") + payload
        head, size = int(self.words[MESSAGE_HEAD]), len(self._messages)
        if head + len(framed) - self.word(MESSAGE_TAIL) > size:
            return False
        sent, at = np.frombuffer(framed, np.uint8), head % size
        first = min(len(sent), size - at)
        self._messages[at : at + first] = sent[:first]
        self._messages[: len(sent) - first] = sent[first:]
        self.set_word(MESSAGE_HEAD, head + len(framed))
        return True

    # The writer's side.

    def available(self) -> list[Rows]:
        """The rows not yet released, without copying: one block, or two around the ring's end."""
        tail, head = int(self.words[TAIL]), self.word(HEAD)
        at, rows = tail % self.capacity, head - tail
        first = min(rows, self.capacity - at)
        blocks = (self._rows[at : at + first], self._rows[: rows - first])
        return [block for block in blocks if len(block)]

    def release(self, rows: int) -> None:
        """Let the engine overwrite the oldest `rows` rows."""
        self.set_word(TAIL, int(self.words[TAIL]) + rows)

    def receive(self) -> list[tuple[int, dict[str, Any]]]:
        """Every message sent since the last call, with the place where it begins."""
        start, head = self._read_to, self.word(MESSAGE_HEAD)
        if head == start:
            return []
        data = self._messages[np.arange(start, head) % len(self._messages)].tobytes()
        messages, at = [], 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 4], "little")
            messages.append((start + at, json.loads(data[at + 4 : at + 4 + length])))
            at += 4 + length
        self._read_to = head
        return messages

    def forget(self, place: int | None = None) -> None:
        """Let the engine overwrite the messages before `place`, or all that were received."""
        self.set_word(MESSAGE_TAIL, self._read_to if place is None else place)

    def fail(self, reason: str) -> None:
        """Leave the reason of the writer's failure for the engine to report."""
        text = reason.encode()[: HEADER_BYTES - _FAILURE_AT - 1] + b"\0"
        self._map[_FAILURE_AT : _FAILURE_AT + len(text)] = text
        self.set_word(STATE, FAILED)

    @property
    def failure(self) -> str:
        """What `fail` left."""
        return self._map[_FAILURE_AT:HEADER_BYTES].split(b"\0", 1)[0].decode(errors="replace")
