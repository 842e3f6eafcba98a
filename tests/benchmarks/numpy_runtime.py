"""A runtime in NumPy alone, for processes that the harness starts: one layer of causal attention with its cache.

It lives in a module of its own so that a fresh process can import it. Byte-level: token = byte, id 256 ends a text.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence

import numpy as np

from edgekd.errors import MissingExtra

VOCAB = 257
WIDTH = 32


class NumpySession:
    vocab_size = VOCAB

    def __init__(self, context_length: int) -> None:
        rng = np.random.default_rng(0)
        self.context_length = context_length
        self.embedding = rng.standard_normal((VOCAB, WIDTH)).astype(np.float32)
        self.position = rng.standard_normal((context_length, WIDTH)).astype(np.float32)
        self.query, self.key, self.value = rng.standard_normal((3, WIDTH, WIDTH)).astype(np.float32) / WIDTH**0.5
        self.reset()

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""

    def reset(self) -> None:
        self.keys = np.empty((0, WIDTH), np.float32)
        self.values = np.empty((0, WIDTH), np.float32)

    def prefill(self, ids: Sequence[int], *, all_logits: bool = False) -> np.ndarray:
        start = len(self.keys)
        if not 0 < len(ids) <= self.context_length - start:
            raise ValueError("no room")
        x = self.embedding[list(ids)] + self.position[start : start + len(ids)]
        self.keys = np.vstack([self.keys, x @ self.key])
        self.values = np.vstack([self.values, x @ self.value])
        scores = (x @ self.query) @ self.keys.T / WIDTH**0.5
        later = np.arange(len(self.keys)) > np.arange(start, start + len(ids))[:, None]
        scores = np.where(later, -np.inf, scores)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = x + weights / weights.sum(-1, keepdims=True) @ self.values
        logits = mixed @ self.embedding.T
        return logits if all_logits else logits[-1]

    def decode(self, token: int) -> np.ndarray:
        return self.prefill([token])

    def close(self) -> None:
        self.reset()


def open_numpy(artifact, *, threads=None):
    return NumpySession(artifact.manifest.contract.context_length)


def open_slow(artifact, *, threads=None):
    """Known times: 0.1 s to load, 1 ms a prefilled token, 4 ms a decoded one; 64 MiB of memory."""
    session = open_numpy(artifact)
    session.ballast = np.ones(64 * 2**20 // 8)
    time.sleep(0.1)
    prefill = session.prefill

    def slow_prefill(ids):
        time.sleep(0.001 * len(ids))
        return prefill(ids)

    def slow_decode(token):
        time.sleep(0.004)
        return prefill([token])

    session.prefill, session.decode = slow_prefill, slow_decode
    return session


def open_by_context(artifact, *, threads=None):
    """Runs out of memory on an artifact of an odd context."""
    if artifact.manifest.contract.context_length % 2:
        raise MemoryError
    return open_numpy(artifact)


def open_and_die(artifact, *, threads=None):
    os.kill(os.getpid(), signal.SIGILL)


def open_and_exit(artifact, *, threads=None):
    os._exit(7)


def open_without_extra(artifact, *, threads=None):
    raise MissingExtra("some-runtime", "some")


def open_and_raise(artifact, *, threads=None):
    raise RuntimeError("unknown opcode 7")


def open_and_hang(artifact, *, threads=None):
    """Says who it is, then never returns."""
    (artifact.folder / "pid").write_text(str(os.getpid()))
    time.sleep(600)
    sys.exit(1)


def open_named(artifact, *, threads=None):
    """A token takes 9 ms, and 12 of an artifact called slowed."""
    session = open_numpy(artifact)
    decode, pause = session.decode, 0.012 if artifact.manifest.name == "slowed" else 0.009

    def slow_decode(token):
        time.sleep(pause)
        return decode(token)

    session.decode = slow_decode
    return session
