"""Artifacts timed on another machine: a phone by adb, a board by ssh, with the same figures as here."""
