"""edgekd: a large language model made small, for a person's own device, with the proof of what it does."""

import os

from .privacy import silence

silence()
# OpenMP reads it when torch is imported. Threads that spin while they wait take the time of every other process, and
# that of torch's own threads where these are more than the free cores: a training fell to a twentieth of its speed.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
