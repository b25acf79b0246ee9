"""Fetch weights to the cache: ``models download`` under its older name."""

from .entry import entry

main = entry("download", "models.download")
