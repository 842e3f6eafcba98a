"""Peers measured beside edgekd, in one run on one machine."""
