"""Flags from files: a table of names and values in YAML or JSON, or the config.json of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..config import resolved_path
from ..runtime.errors import WHY, UserError, as_user_error
from ..runtime.options import from_here

# never taken from an earlier run, nor from an earlier part of one
OF_A_PROCESS = ("log_dir", "device", "dist_timeout", "plugin", "resume_checkpoint")


def read_table(path: str) -> dict[str, Any]:
    """The table in a file: JSON where it ends in .json, else YAML, of which JSON is a part.

    :raises UserError: where it holds no table, or cannot be read.
    """
    from ..runtime.files import parse_json, read_file, refuse_missing

    refuse_missing(resolved_path(path), path, "give a file of flags, .yaml or .json")
    with as_user_error(f"{path} cannot be used ({WHY})", OSError, ValueError, RecursionError):
        content = read_file(resolved_path(path))
        table = (parse_json if path.lower().endswith(".json") else _read_yaml)(content)
    if not isinstance(table, dict):
        raise UserError(f"{path} cannot be used (it holds no table): write NAME: VALUE lines, or a JSON object")
    return {str(name): value for name, value in table.items()}


def _read_yaml(content: bytes) -> Any:
    with as_user_error("YAML needs a package: run `pip install pyyaml`, or write JSON, in a file .json", ImportError):
        import yaml
    try:
        return yaml.safe_load(content)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}" if mark else ""
        raise UserError(f"no YAML: {getattr(error, 'problem', None) or 'it cannot be decoded'}{place}") from error


def flags_in(path: str) -> tuple[dict[str, Any], bool]:
    """Flag -> value in a file, and whether it is a run's config.json.

    Of a run there are all flags but those that belong to the process that ran.
    """
    table = read_table(path)
    if "command" in table and isinstance(table.get("flags"), dict):
        flags = {name: value for name, value in table["flags"].items() if name not in OF_A_PROCESS}
        return from_here(flags, os.path.dirname(path)), True
    return table, False


def as_words(flags: Mapping[str, Any]) -> list[str]:
    """The words of a command line that give these flags; a list becomes a text with commas."""
    return [f"--{name}={_text(name, value)}" for name, value in flags.items()]


def _text(name: str, value: Any) -> str:
    if value is None or isinstance(value, dict):
        remedy = "write '' for none" if value is None else "write a number, a text or a list"
        raise UserError(f"{name} has {'no value' if value is None else 'a table for its value'}: {remedy}")
    return ",".join(_text(name, item) for item in value) if isinstance(value, list) else str(value)
