"""edgekd: a large language model made small, for a person's own device, with the proof of what it does."""

import os

from .privacy import silence

silence()
# OpenMP reads them when torch or a runtime is imported. Threads that spin while they wait take the time of every other
# process, and that of torch's own threads where these are more than the free cores: a training fell to a twentieth of
# its speed. Threads that sleep at once are woken for every operator: llama.cpp then decoded a small model at an
# eighteenth of its speed. So they spin for microseconds (GNU's count; other OpenMPs know the policy alone).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
