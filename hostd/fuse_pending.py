"""Questions of the kernel's that have not been answered yet, where the next server finds them.

A FUSE file system lives as long as somebody holds its ``/dev/fuse`` descriptor. A server that is killed loses no more
than the questions it had read and not answered: the kernel does not ask them again, and whoever asked would wait for
ever. So each question is read straight into memory that is shared with the process that holds the descriptor, and
stays there until it has been answered; the next server answers what it finds.

What it must never do: forget a question before its answer has been given. Answering one twice is harmless: the kernel
does not know the number any more and says so.

Stands between ``hostd/fuse_wire.py`` and ``hostd/lower.py``.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
import threading

from hostd.fuse_wire import BUFFER_BYTES, Question, length_of, question_in

NAME = "cargo-lower"
"""Of the memory, as it shows in ``/proc/PID/fd``."""
RECORD_BYTES = 384
"""The longest question that is answered later than at once: a READ has 80 bytes, a LOOKUP of 255 bytes 296."""
RECORDS = 16384
"""Reads that may wait at once. The memory is taken only as it is used; the first record says how far that is."""


class Pending:
    """``areas`` receive questions, one for each serving thread; records keep those that are answered later."""

    def __init__(self, threads: int, descriptor: int = -1) -> None:
        """``descriptor`` is the memory of a server before this one; -1 makes it. Raises OSError."""
        size = threads * BUFFER_BYTES + RECORDS * RECORD_BYTES
        self.descriptor = descriptor
        if descriptor < 0:
            self.descriptor = os.memfd_create(NAME, os.MFD_CLOEXEC)
            os.ftruncate(self.descriptor, size)
        memory = memoryview(mmap.mmap(self.descriptor, size))
        self.areas = [memory[number * BUFFER_BYTES : (number + 1) * BUFFER_BYTES] for number in range(threads)]
        self._records = memory[threads * BUFFER_BYTES :]
        self._lock = threading.Lock()
        self._free = list(range(RECORDS - 1, 0, -1))
        self._kept: dict[int, int] = {}

    def left_over(self) -> list[Question]:
        """What servers before this one have read and perhaps not answered. Call once, before anything else."""
        found = {}
        used = [number for number in range(1, length_of(self._records) + 1) if length_of(self._record(number))]
        for place in [*map(self._record, used), *self.areas]:
            if length_of(place):
                question = question_in(place)
                found[question.number] = question
        for question in found.values():
            self._keep_anew(question, used)
        return list(found.values())

    def _keep_anew(self, question: Question, used: list[int]) -> None:
        """Know the record of a question again, or move it from the area that it was received in to one."""
        for number in used:
            if question_in(self._record(number)).number == question.number:
                self._free.remove(number)
                self._kept[question.number] = number
                return
        self.keep(question)

    def keep(self, question: Question) -> None:
        """Remember it beyond the area it was received in. Raises OSError when too many wait."""
        raw = question.raw
        if len(raw) > RECORD_BYTES:
            return  # of a kind that is answered at once
        with self._lock:
            if question.number in self._kept:
                return
            if not self._free:
                raise OSError(errno.EAGAIN, "too many reads wait")
            number = self._free.pop()
            self._kept[question.number] = number
            if number > length_of(self._records):
                self._records[0:4] = number.to_bytes(4, sys.byteorder)
        record = self._record(number)
        # The length, which says that there is something, comes last.
        record[4 : len(raw)] = raw[4:]
        record[0:4] = raw[0:4]

    def forget(self, question: Question) -> None:
        """It has been answered."""
        with self._lock:
            number = self._kept.pop(question.number, None)
            if number is None:
                return
            clear(self._record(number))
            self._free.append(number)

    def _record(self, number: int) -> memoryview:
        return self._records[number * RECORD_BYTES : (number + 1) * RECORD_BYTES]


def clear(place: memoryview) -> None:
    """There is nothing in it any more."""
    place[0:4] = b"\0\0\0\0"
