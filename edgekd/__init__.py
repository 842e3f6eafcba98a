"""edgekd: a large language model made small, for a person's own device, with the proof of what it does."""

from .privacy import silence

silence()
