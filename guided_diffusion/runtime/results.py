"""What a folder was made for: the request.json beside results, so that none mixes with another's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .files import parse_json, printable, read_file, reason

REQUEST = "request.json"


def read_request(path: str, *, what: str = "samples") -> dict[str, Any]:
    """The request that a folder's results are of.

    :param what: the results, in words.
    :raises ValueError: if the file does not say.
    """
    try:
        request = parse_json(read_file(path))
        if not isinstance(request, dict):
            raise ValueError("it names nothing")
        return request
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} does not say whose {what} lie there ({reason(error)}): give another --log_dir, or remove it"
        ) from error


def refuse_another(
    there: Mapping[str, Any],
    now: Mapping[str, Any],
    folder: str,
    *,
    what: str = "samples",
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Refuse to mix results with those of other settings.

    :param defaults: values that an older request, which does not name them, had.

    :raises ValueError: naming what differs between the request of a folder and the one of now.
    """
    there = {**{key: value for key, value in (defaults or {}).items() if key in now}, **there}
    differing = [key for key in {**there, **now} if there.get(key) != now.get(key)]
    if differing:
        words = ", ".join(
            f"{printable(key)} was {_shown(there.get(key))} and is {_shown(now.get(key))}" for key in differing[:4]
        )
        more = f", and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise ValueError(f"{folder} holds the {what} of another request ({words}{more}): give another --log_dir")


def _shown(value: Any) -> str:
    return printable(str(value)) or "''"
