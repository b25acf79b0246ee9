"""emoji64.zip from its sources, and larger emoji: drawings on white of Noto Emoji, Twemoji and Fluent Emoji.

SOURCE holds emoji.json, the table of names and categories, as the package emoji-datasource-google does; or it is a
folder node_modules in which that package and those of `STYLES` lie.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image

from conversion.command import converter
from conversion.config import EmojiConfig
from conversion.images import Item, Source, bad
from guided_diffusion.data.crops import center_crop_arr
from guided_diffusion.data.decoding import decode
from guided_diffusion.runtime import files as untrusted
from guided_diffusion.runtime.errors import UserError, nearest, reason

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


@dataclass(frozen=True)
class Style:
    """Drawings of one hand.

    :param title: its name in captions.
    :param package: that has them, on npm.
    :param places: of the drawings in SOURCE or in the folder of the style: of files, or of an icons.json.
    :param licence: a line of LICENSE.txt.
    """

    title: str
    package: str
    places: tuple[str, ...]
    licence: str


def _datasource(style: str, title: str, licence: str) -> Style:
    package = f"emoji-datasource-{style}"
    inner = (f"img/{style}/64", f"package/img/{style}/64", f"{package}/img/{style}/64", "png/128", "assets/72x72", "")
    return Style(title, package, inner, f"*_{style}-*.png".ljust(17) + f"{licence}, through {package} 16.0.0")


STYLES = {
    "google": _datasource(
        "google", "Noto Emoji", "from Noto Emoji, (c) Google, Apache License 2.0 (github.com/googlefonts/noto-emoji)"
    ),
    "twitter": _datasource(
        "twitter",
        "Twemoji",
        "from Twemoji, (c) Twitter and other contributors, CC-BY 4.0 (github.com/jdecked/twemoji)",
    ),
    "noto": Style(
        "Noto Emoji",
        "@iconify-json/noto",
        ("@iconify-json/noto",),
        "*_noto-*.png     from Noto Emoji, (c) Google, Apache License 2.0 (github.com/googlefonts/noto-emoji), "
        "through @iconify-json/noto",
    ),
    "twemoji": Style(
        "Twemoji",
        "@iconify-json/twemoji",
        ("@iconify-json/twemoji",),
        "*_twemoji-*.png  from Twemoji, (c) Twitter and other contributors, CC-BY 4.0 (github.com/jdecked/twemoji), "
        "through @iconify-json/twemoji",
    ),
    "fluent": Style(
        "Fluent Emoji 3D",
        "@lobehub/fluent-emoji-3d",
        ("@lobehub/fluent-emoji-3d/assets",),
        "*_fluent-*.png   from Fluent Emoji, (c) Microsoft, MIT License (github.com/microsoft/fluentui-emoji), "
        "through @lobehub/fluent-emoji-3d, (c) LobeHub, MIT License",
    ),
}
BUNDLED = ("google", "twitter")  # the styles of emoji64.zip
TABLES = ("emoji.json", "package/emoji.json", "emoji-datasource-google/emoji.json")
KEYWORDS = "emojibase-data/en/data.json"

Code = tuple[int, ...]  # code points but U+FE0F, which some file names have and some have not


Drawing = Callable[[], bytes]  # gives a file of any format that Pillow reads


def read(config: EmojiConfig) -> Source:
    """One style after the other, by code points."""
    if config.format or config.crop != "center":
        raise UserError("emoji are drawn to PNG: leave out --crop and --format")
    if not isinstance(config.size, int):
        raise UserError(f"emoji are square: write a number as --size, not {config.size}")
    size, styles = config.size or SIZE, _styles(config.styles)
    table = [row for row in _table(config.source) if config.split in ("all", split_of(_code_of(row)))]
    words = {} if set(styles) <= set(BUNDLED) else _keywords(config.source)
    drawings = {style: _drawings(getattr(config, style, "") or config.source, style, size) for style in styles}

    def extras(written: Collection[str]) -> list[tuple[str, bytes]]:
        named = [(_file(style, row), style, row) for style in styles for row in table]
        captions = {name: _caption(row, style, words) for name, style, row in named if name in written}
        text = json.dumps(captions, ensure_ascii=False, indent=0)
        return [("captions.json", text.encode()), ("LICENSE.txt", _licence(styles, size, words).encode())]

    items = (item for style in styles for item in _items(style, table, drawings[style], size))
    return Source(items, len(styles) * len(table), extras)


def _styles(text: str) -> list[str]:
    styles = [word.strip() for word in text.split(",")]
    for word in styles:
        if word not in STYLES:
            raise UserError(f"--styles takes words of {', '.join(STYLES)}, got {word!r}{nearest(word, STYLES)}")
    return list(dict.fromkeys(styles))


def _licence(styles: list[str], size: int, words: Mapping[Code, Any]) -> str:
    lines = [f"Pictures in this archive, {size}x{size}, drawn on white:", *(STYLES[style].licence for style in styles)]
    keywords = "Captions: Unicode CLDR (Unicode License v3), through emojibase-data (MIT, Miles Johnson)."
    return "\n".join(
        [
            *lines,
            "Names and categories: Unicode CLDR / emoji-data (MIT, Cal Henderson).",
            *[keywords][: bool(words)],
            "",
        ]
    )


def _table(source: str) -> list[dict[str, Any]]:
    """The emoji that both styles draw, by code points."""
    names = [os.path.join(source, name) for name in TABLES]
    path = source if os.path.isfile(source) else next((name for name in names if os.path.isfile(name)), "")
    if not path:
        raise UserError(f"{source} has no emoji.json: give the package emoji-datasource-google, unpacked")
    try:
        rows = untrusted.parse_json(untrusted.read_file(path))
        drawn = [row for row in rows if row["has_img_google"] and row["has_img_twitter"] and row["category"] in CLASSES]
        return sorted(drawn, key=lambda row: str(row["unified"]).lower())
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no table of emoji ({reason(error)}): fetch it again") from error


def split_of(code: str) -> str:
    """Whether an emoji, by its code points, is one of the tenth that is kept for tests, in every style and size."""
    return "train" if int(hashlib.sha256(code.encode()).hexdigest(), 16) % 10 else "test"


def _keywords(source: str) -> dict[Code, tuple[str, list[str]]]:
    """Code points -> (name, keywords) of CLDR."""
    path = os.path.join(source, KEYWORDS)
    try:
        rows = untrusted.parse_json(untrusted.read_file(path))
        return {_code(row["hexcode"]): (str(row["label"]), list(map(str, row.get("tags", [])))) for row in rows}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} gives no captions ({reason(error)}): SOURCE must be the folder node_modules in which "
            "`npm install emojibase-data` was run"
        ) from error


def _drawings(folder: str, style: str, size: int) -> dict[Code, Drawing]:
    """Code points -> drawing."""
    for place in filter(os.path.isdir, (os.path.join(folder, place) for place in STYLES[style].places)):
        if os.path.isfile(os.path.join(place, "icons.json")):
            return _icons(place, size)
        codes: dict[Code, Drawing] = {
            _code(name): partial(untrusted.read_file, os.path.join(place, name)) for name in sorted(os.listdir(place))
        }
        if codes.keys() - {()}:
            return codes
    if style in BUNDLED:
        raise UserError(f"--{style} {folder} holds no drawings: give a checkout, or emoji-datasource-{style} unpacked")
    package = STYLES[style].package
    raise UserError(f"{folder} holds no {package}: run `npm install {package}` and give its folder node_modules")


def _icons(folder: str, size: int) -> dict[Code, Drawing]:
    """The drawings of a package @iconify-json: SVGs, which are drawn at the size itself."""
    try:
        from resvg_py import svg_to_bytes
    except ImportError as error:
        raise UserError(f"{folder} holds drawings in SVG, which need resvg-py: run `pip install resvg-py`") from error
    try:
        icons, names = (
            untrusted.parse_json(untrusted.read_file(os.path.join(folder, file)))
            for file in ("icons.json", "chars.json")
        )
        parents = {name: alias["parent"] for name, alias in icons.get("aliases", {}).items()}
        found = {code: {**icons, **icons["icons"][parents.get(name, name)]} for code, name in names.items()}
        draw = partial(svg_to_bytes, width=size, height=size, skip_system_fonts=True)
        return {_code(code): partial(draw, svg_string=_svg(icon)) for code, icon in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is no package of icons ({reason(error)}): fetch it again") from error


def _svg(icon: Mapping[str, Any]) -> str:
    """The SVG of an icon, in the middle of a square."""
    width, height = icon.get("width", 16), icon.get("height", 16)
    side = max(width, height)
    left, top = icon.get("left", 0) - (side - width) / 2, icon.get("top", 0) - (side - height) / 2
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {names} width="{side}" height="{side}" viewBox="{left} {top} {side} {side}">{icon["body"]}</svg>'


def _code(name: str) -> Code:
    """Of 1f1e6-1f1e8.png or emoji_u1f1e6_1f1e8.png; () for other names."""
    match = re.fullmatch(r"(?:emoji_u)?([0-9a-f]{2,6}(?:[-_][0-9a-f]{2,6})*)(?:\.png|\.webp)?", name.lower())
    points = [int(word, 16) for word in re.split("[-_]", match[1])] if match else []
    return tuple(point for point in points if point != 0xFE0F)


def _code_of(row: Mapping[str, Any]) -> str:
    return str(row["unified"]).lower()


def _file(style: str, row: Mapping[str, Any]) -> str:
    return f"{CLASSES[row['category']]}_{style}-{_code_of(row)}.png"


def _items(style: str, table: list[dict[str, Any]], drawings: dict[Code, Drawing], size: int) -> Iterator[Item]:
    for row in table:
        code, label = _code_of(row), CLASSES[row["category"]]
        drawing = drawings.get(_code(code))
        if drawing is None:
            flag = f"--{style}" if style in BUNDLED else STYLES[style].package
            yield bad(f"{style}/{code}", f"{flag} has no drawing of it", label)
            continue
        yield Item(f"{style}/{code}", label, partial(_draw, drawing, size), f"{style}-{code}")


def _caption(row: Mapping[str, Any], style: str, words: Mapping[Code, tuple[str, list[str]]]) -> dict[str, Any]:
    """The texts of a drawing; with CLDR's words, several captions, of which training draws one."""
    texts = {
        "name": str(row["name"]).lower(),
        "short_name": re.sub("[_-]", " ", str(row["short_name"])),
        "subcategory": str(row["subcategory"]),
        "emoji": "".join(chr(int(point, 16)) for point in str(row["unified"]).split("-")),
    }
    if not words:
        return texts
    name, keywords = words.get(_code(_code_of(row)), (texts["short_name"], []))
    captions = [name, f"{name}, {STYLES[style].title}", ", ".join(keywords)]
    return {**texts, "captions": list(filter(None, captions)), "style": style, "split": split_of(_code_of(row))}


def _draw(drawing: Drawing, size: int) -> bytes:
    """A PNG of the drawing on white."""
    content = drawing()
    try:
        picture = decode(content, "", 3).picture
    except Exception as error:  # Pillow does not say what it raises on a damaged file
        raise UserError(reason(error)) from error
    assert isinstance(picture, Image.Image)
    if min(picture.size) < size:
        raise UserError(f"its drawing has {picture.width} x {picture.height} pixels: give a --size of at most that")
    if picture.size != (size, size):
        picture = Image.fromarray(center_crop_arr(picture, size))
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()


main = converter("emoji", read)

if __name__ == "__main__":
    main()
