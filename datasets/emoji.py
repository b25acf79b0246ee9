"""emoji64.zip from its sources: the drawings of Noto Emoji and Twemoji on white, 64x64.

SOURCE holds emoji.json, the table of names and categories, as the package emoji-datasource-google does.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Collection, Iterator
from typing import Any

from PIL import Image

from conversion.command import converter
from conversion.config import EmojiConfig
from conversion.images import Item, Source, bad
from guided_diffusion.data.crops import center_crop_arr
from guided_diffusion.data.decoding import decode
from guided_diffusion.runtime import files as untrusted
from guided_diffusion.runtime.errors import UserError, reason

SIZE = 64
CLASSES = {
    "Activities": "activities",
    "Animals & Nature": "animals",
    "Flags": "flags",
    "Food & Drink": "food",
    "Objects": "objects",
    "People & Body": "people",
    "Smileys & Emotion": "smileys",
    "Symbols": "symbols",
    "Travel & Places": "travel",
}
STYLES = ("google", "twitter")
PLACES = ("img/{style}/64", "package/img/{style}/64", "png/128", "assets/72x72", "")  # of the drawings in a folder
LICENSE = """\
Pictures in this archive, 64x64, drawn on white:
*_google-*.png   from Noto Emoji, (c) Google, Apache License 2.0 (github.com/googlefonts/noto-emoji), through \
emoji-datasource-google 16.0.0
*_twitter-*.png  from Twemoji, (c) Twitter and other contributors, CC-BY 4.0 (github.com/jdecked/twemoji), through \
emoji-datasource-twitter 16.0.0
Names and categories: Unicode CLDR / emoji-data (MIT, Cal Henderson).
"""

Code = tuple[int, ...]  # code points but U+FE0F, which some file names have and some have not


def read(config: EmojiConfig) -> Source:
    """One style after the other, by code points."""
    if config.size or config.format or config.crop != "center":
        raise UserError("emoji are drawn to PNG of 64x64: leave out --size, --crop and --format")
    table = _table(config.source)
    files = {style: _drawings(getattr(config, style) or config.source, style) for style in STYLES}

    def extras(written: Collection[str]) -> list[tuple[str, bytes]]:
        named = [(_file(style, row), row) for style in STYLES for row in table]
        captions = {name: _caption(row) for name, row in named if name in written}
        text = json.dumps(captions, ensure_ascii=False, indent=0)
        return [("captions.json", text.encode()), ("LICENSE.txt", LICENSE.encode())]

    items = (item for style in STYLES for item in _items(style, table, files[style]))
    return Source(items, len(STYLES) * len(table), extras)


def _table(source: str) -> list[dict[str, Any]]:
    """The emoji that both styles draw, by code points."""
    names = [os.path.join(source, name) for name in ("emoji.json", "package/emoji.json")]
    path = source if os.path.isfile(source) else next((name for name in names if os.path.isfile(name)), "")
    if not path:
        raise UserError(f"{source} has no emoji.json: give the package emoji-datasource-google, unpacked")
    try:
        rows = untrusted.parse_json(untrusted.read_file(path))
        drawn = [row for row in rows if row["has_img_google"] and row["has_img_twitter"] and row["category"] in CLASSES]
        return sorted(drawn, key=lambda row: str(row["unified"]).lower())
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no table of emoji ({reason(error)}): fetch it again") from error


def _drawings(folder: str, style: str) -> dict[Code, str]:
    """Code points -> file."""
    places = [os.path.join(folder, place.format(style=style)) for place in PLACES]
    for place in filter(os.path.isdir, places):
        codes = {_code(name): os.path.join(place, name) for name in sorted(os.listdir(place))}
        if codes.keys() - {()}:
            return codes
    raise UserError(f"--{style} {folder} holds no drawings: give a checkout, or emoji-datasource-{style} unpacked")


def _code(name: str) -> Code:
    """Of 1f1e6-1f1e8.png or emoji_u1f1e6_1f1e8.png; () for other names."""
    match = re.fullmatch(r"(?:emoji_u)?([0-9a-f]{2,6}(?:[-_][0-9a-f]{2,6})*)(?:\.png)?", name.lower())
    points = [int(word, 16) for word in re.split("[-_]", match[1])] if match else []
    return tuple(point for point in points if point != 0xFE0F)


def _file(style: str, row: dict[str, Any]) -> str:
    return f"{CLASSES[row['category']]}_{style}-{row['unified']}.png".lower()


def _items(style: str, table: list[dict[str, Any]], files: dict[Code, str]) -> Iterator[Item]:
    for row in table:
        code, label = str(row["unified"]).lower(), CLASSES[row["category"]]
        path = files.get(_code(code))
        if path is None:
            yield bad(f"{style}/{code}", f"--{style} has no drawing of it", label)
            continue
        yield Item(f"{style}/{code}", label, lambda path=path: _draw(path), f"{style}-{code}")  # type: ignore[misc]


def _caption(row: dict[str, Any]) -> dict[str, str]:
    return {
        "name": str(row["name"]).lower(),
        "short_name": re.sub("[_-]", " ", str(row["short_name"])),
        "subcategory": str(row["subcategory"]),
        "emoji": "".join(chr(int(point, 16)) for point in str(row["unified"]).split("-")),
    }


def _draw(path: str) -> bytes:
    """A PNG of the drawing on white."""
    content = untrusted.read_file(path)
    try:
        picture = decode(content, "", 3).picture
    except Exception as error:  # Pillow does not say what it raises on a damaged file
        raise UserError(reason(error)) from error
    assert isinstance(picture, Image.Image)
    if picture.size != (SIZE, SIZE):
        picture = Image.fromarray(center_crop_arr(picture, SIZE))
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()


main = converter("emoji", read)

if __name__ == "__main__":
    main()
