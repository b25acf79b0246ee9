"""CelebA: img_align_celeba, of one class, or of the two that an attribute makes."""

from __future__ import annotations

import os

from conversion.command import converter
from conversion.config import CelebaConfig
from conversion.folder import folder_source, listing_of
from conversion.images import Source
from guided_diffusion.runtime import files as untrusted
from guided_diffusion.runtime.errors import UserError, nearest, printable, quoted

TABLE = "list_attr_celeba.txt"


def read(config: CelebaConfig) -> Source:
    """All faces."""
    listing = listing_of(config.source)
    if not config.attribute:
        return folder_source(listing, [config.prefix or "celeba"] * len(listing.images))
    marks = _marks(_table_path(config), config.attribute)
    files = [os.path.basename(name) for name in listing.images]
    missing = next((file for file in files if file not in marks), None)
    if missing:
        raise UserError(f"{TABLE} has no line for {quoted(missing)}: give that of these images")
    words = {"1": config.attribute, "-1": f"not {config.attribute}"}
    return folder_source(listing, [words[marks[file]] for file in files])


def _table_path(config: CelebaConfig) -> str:
    folder = os.path.abspath(config.source)
    places = [config.attribute_file] if config.attribute_file else []
    places += [os.path.join(place, TABLE) for place in (folder, os.path.dirname(folder))]
    path = next((place for place in places[: 1 if config.attribute_file else None] if os.path.isfile(place)), None)
    if path is None:
        raise UserError(f"--attribute {config.attribute} needs {TABLE}, not found at {', '.join(places)}: fetch it too")
    return path


def _marks(path: str, attribute: str) -> dict[str, str]:
    """File -> "1" or "-1". The table has the number of lines, the names, then a line per file."""
    lines = untrusted.read_file(path).decode(errors="replace").splitlines()
    names = lines[1].split() if len(lines) > 1 else []
    if attribute not in names:
        shown = ", ".join(names[:5])
        raise UserError(f"{path} has no attribute {attribute!r} (but {shown}, ...){nearest(attribute, names)}")
    column = names.index(attribute) + 1
    rows = [line.split() for line in lines[2:] if line.strip()]
    wrong = next((row[0] for row in rows if len(row) != len(names) + 1 or row[column] not in ("1", "-1")), None)
    if wrong is not None:
        raise UserError(f"the line of {printable(wrong)} in {path} is damaged: fetch it again")
    return {row[0]: row[column] for row in rows}


main = converter("celeba", read)

if __name__ == "__main__":
    main()
