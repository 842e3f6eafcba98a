"""Whose turn it is."""

from __future__ import annotations

import asyncio

import pytest

from edgekd.generation import Generator, Piece, Sampling
from edgekd.serve.worker import MOST_WAITING, Busy, Job, Turns, Worker
from scripted import END, Scripted


def job(name: str) -> Job:
    loop = asyncio.new_event_loop()
    loop.close()
    return Job([ord(letter) for letter in name], Sampling(9), loop=loop)


def test_clients_take_turns_and_each_ones_own_keep_their_order() -> None:
    turns = Turns()
    for name in ("a1", "a2", "a3", "b1", "c1", "b2"):
        turns.put(name[0], job(name))
    taken = turns.get()
    turns.put("a", job("a4"))
    order = [taken, *(turns.get() for _ in range(len(turns)))]
    assert ["".join(map(chr, one.ids)) for one in order if one] == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]


def test_whoever_had_a_turn_goes_behind_whoever_had_none() -> None:
    turns = Turns()
    turns.put("a", job("a1"))
    assert turns.get()
    for name in ("a2", "b1", "c1"):
        turns.put(name[0], job(name))
    assert ["".join(map(chr, one.ids)) for _ in range(3) if (one := turns.get())] == ["b1", "c1", "a2"]
    for number in range(1000):
        turns.put(str(number), job("x"))
        assert turns.get()
    assert len(turns._turn) < 300


def test_too_many_are_refused() -> None:
    turns = Turns()
    for number in range(MOST_WAITING):
        turns.put(str(number), job("x"))
    with pytest.raises(Busy, match="64 requests wait"):
        turns.put("z", job("x"))


def test_the_end_reaches_those_who_wait() -> None:
    async def wait() -> tuple[list[object], list[object]]:
        session = Scripted(lambda prompt: "x" * 40)
        session.held.clear()
        worker = Worker(Generator(session, [END]))
        given, queued = Job([7, 8], Sampling(30)), Job([7, 8], Sampling(30))
        worker.submit("a", given)
        await given.take()  # its first piece: the worker holds it
        worker.submit("b", queued)
        assert worker.waiting == 1 and worker.busy
        worker.stop()
        session.held.set()
        late = Job([7, 8], Sampling(30))
        worker.submit("c", late)
        for left in (given, late):
            while await left.take():
                pass
        worker.close()
        return await queued.take(), await queued.take()

    assert asyncio.run(wait()) == ([], [])


def test_a_reader_that_is_slow_gets_several_pieces_and_one_that_is_quick_none_twice() -> None:
    """Every piece wakes the reader, also one that was taken along with the piece before."""

    async def read() -> list[str]:
        made = Job([7, 8], Sampling(9))
        for letter in "abc":
            made.put(Piece(letter))
        taken = [await made.take()]
        asyncio.get_running_loop().call_later(0.05, made.put, Piece("d"))
        taken.append(await made.take())
        made.end()
        return ["".join(piece.text for piece in pieces) for pieces in [*taken, await made.take()]]

    assert asyncio.run(read()) == ["abc", "d", ""]
