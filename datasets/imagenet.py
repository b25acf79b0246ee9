"""ImageNet (ILSVRC 2012): the training tar of tars, a folder of those tars, or the validation tar.

The tars in the tar are read where they lie, so that nothing is unpacked to the disk. Classes are wnids: n01440764.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import IO

from conversion.command import converter
from conversion.config import ImagenetConfig
from conversion.folder import folder_name
from conversion.images import EMPTY_CLASS, Item, Source, bad
from guided_diffusion.data.tars import Member, members
from guided_diffusion.runtime import files
from guided_diffusion.runtime.errors import UserError, printable, quoted, reason

Classify = Callable[[str], str]  # file name -> class; ValueError where there is none
LARGEST_TAR = 2**40  # bytes of a tar in the tar, which is never read as a whole


def read(config: ImagenetConfig) -> Source:
    """The images in the order of the tars."""
    classify = _from_ground_truth(config) if config.ground_truth else _from_name
    if not os.path.isdir(config.source):
        return Source(_closing(config.source, classify))
    names = sorted(name for name in os.listdir(config.source) if name.endswith(".tar"))
    if not names:
        raise UserError(f"{config.source} holds no tar: for a folder of unpacked images there is folder.py")
    return Source(item for name in names for item in _closing(os.path.join(config.source, name), classify, name))


def _closing(path: str, classify: Classify, name: str = "") -> Iterator[Item]:
    with files.open_file(path) as file:
        yield from (
            _class_tar(file, name) if re.fullmatch(r"n\d+\.tar", name) else _tar(file, folder_name(path), classify)
        )


def _tar(file: IO[bytes], name: str, classify: Classify) -> Iterator[Item]:
    """A tar of images, of tars of images, or of both."""
    try:
        for member in members(file, largest=LARGEST_TAR):
            if member.name.endswith(".tar") and not member.fault:
                with member.open() as inner:
                    yield from _class_tar(inner, member.name)
            elif member.fault or not _is_hidden(member.name):
                yield _image(member, member.name, classify)
    except ValueError as error:
        yield bad(name, str(error))


def _class_tar(file: IO[bytes], name: str) -> Iterator[Item]:
    """The images of one class."""
    label, empty = os.path.basename(name)[: -len(".tar")], True
    try:
        for member in members(file):
            empty = False
            yield _image(member, f"{name}/{member.name}", lambda _: label)
    except ValueError as error:
        empty = False
        yield bad(name, str(error), label)
    if empty:
        yield bad(name, EMPTY_CLASS, label)


def _is_hidden(name: str) -> bool:
    return os.path.basename(name).startswith(".")


def _image(member: Member, key: str, classify: Classify) -> Item:
    try:
        return Item(printable(key), classify(os.path.basename(member.name)), member.read)
    except ValueError as error:
        return bad(printable(key), member.fault or reason(error))


def _from_name(name: str) -> str:
    """n01440764 of n01440764_18.JPEG."""
    label, separator, _ = name.partition("_")
    if not separator or not re.fullmatch(r"n\d+", label):
        raise UserError("its name begins with no wnid: for the validation tar, give --ground_truth")
    return label


def _from_ground_truth(config: ImagenetConfig) -> Classify:
    lines = _lines(config.ground_truth)
    table = _solution(lines) if lines and "," in lines[0] else _by_number(lines)
    names = _synsets(config.synsets) if config.synsets else []

    def classify(name: str) -> str:
        label = table(name.partition(".")[0])
        if not names:
            return label
        if not label.isdecimal() or not 0 < int(label) <= len(names):
            raise UserError(f"its class {quoted(label)} is none of the {len(names)} in {config.synsets}")
        return names[int(label) - 1]

    if not names and lines and lines[0].isdecimal():
        raise UserError(
            f"{config.ground_truth} gives classes by number: give --synsets too, a file whose line N starts with the "
            "wnid of class N"
        )
    return classify


def _solution(lines: list[str]) -> Classify:
    """LOC_val_solution.csv: ``ILSVRC2012_val_00048981,n03995372 85 1 499 272``."""
    table = {}
    for line in lines[1:]:
        stem, _, rest = line.partition(",")
        table[stem] = (rest.split() or [""])[0]

    def classify(stem: str) -> str:
        if not table.get(stem):
            raise UserError("--ground_truth has no class for it")
        return table[stem]

    return classify


def _by_number(lines: list[str]) -> Classify:
    def classify(stem: str) -> str:
        number = re.search(r"_(\d{1,9})$", stem)
        if number is None or not 0 < int(number[1]) <= len(lines):
            raise UserError(f"--ground_truth has {len(lines)} lines, none of them for it")
        return lines[int(number[1]) - 1]

    return classify


def _synsets(path: str) -> list[str]:
    return [line.split()[0] for line in _lines(path)]


def _lines(path: str) -> list[str]:
    text = files.read_file(path).decode(errors="replace")
    return [line.strip() for line in text.splitlines() if line.strip()]


main = converter("imagenet", read)

if __name__ == "__main__":
    main()
