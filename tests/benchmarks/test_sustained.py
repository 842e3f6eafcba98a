"""Heat that slows: where it began is found within a slice, and noise alone is no change."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest

from edgekd.benchmarks.sustained import SLICES, change_point, sustained

pytestmark = pytest.mark.alone


@pytest.mark.parametrize("seed", range(20))
def test_a_drop_of_forty_percent_at_slice_12_is_found_within_one_slice(seed):
    rng = np.random.default_rng(seed)
    rates = 100 * np.where(np.arange(20) < 12, 1, 0.6) * rng.normal(1, 0.03, 20)
    found, factor = change_point(list(rates))
    assert abs(found - 12) <= 1 and factor == pytest.approx(0.6, abs=0.04)


def test_noise_is_no_change_and_neither_is_getting_faster():
    rng = np.random.default_rng(0)
    found = [change_point(list(100 * rng.normal(1, 0.03, 20)))[0] for _ in range(200)]
    assert found.count(None) >= 198
    assert change_point([100.0] * 10 + [150.0] * 10) == (None, 1.0)
    assert change_point([1.0, 0.5]) == (None, 1.0)


def test_a_real_session_that_slows_down(tmp_path):
    class Slowing:
        began = None

        def tokenize(self, text, *, start=True):
            return list(text.encode())

        def reset(self):
            pass

        def prefill(self, ids):
            self.began = self.began or time.monotonic()
            return np.zeros(4, np.float32)

        def decode(self, token):
            time.sleep(0.006 if time.monotonic() - self.began < 1.2 else 0.010)
            return np.zeros(4, np.float32)

        def close(self):
            pass

    zone = tmp_path / "sys/class/thermal/thermal_zone0"
    zone.mkdir(parents=True)
    (zone / "temp").write_text("71000\n")
    artifact = SimpleNamespace(manifest=SimpleNamespace(contract=SimpleNamespace(context_length=64)))
    found = sustained(lambda *_, **__: Slowing(), artifact, 1, 2.0, tmp_path)
    assert len(found.slices) == SLICES and found.slices[0].temperature_c == 71
    assert abs(found.change_slice - 12) <= 1 and found.factor == pytest.approx(0.62, abs=0.12)
