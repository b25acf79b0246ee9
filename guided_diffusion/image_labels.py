"""The classes of images: the rules that find them, their ids, and the table that later runs take over.

Shapes: N images, K classes.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

import blobfile as bf

from .config import CLASS_RULES, nearest
from .image_files import LABEL_FILES, Listing, read_bytes
from .npz import replacing
from .untrusted import name_fault, parse_json, printable, read_file, reason

Label = str | int
ClassRow = tuple[int, str, int]  # id, name, number of images
Pairs = Iterable[tuple[Any, Any]]  # (file, label) as a label file has them

LONGEST_ID = 18  # characters of a number in a label file
LARGEST_ID = 65536  # of numbers given as labels without num_classes: what is above is no class id


@dataclass(frozen=True)
class Labels:
    """The class of every image of a listing.

    :param ids: [N], indices of `classes`.
    :param classes: [K] names.
    :param class_from: the rule that was used, never "auto".
    :param notes: lines for the user.
    """

    ids: list[int]
    classes: list[str]
    class_from: str
    notes: list[str]

    def class_table(self) -> list[ClassRow]:
        """Every class by id, those without images too."""
        counts = Counter(self.ids)
        return [(number, name, counts[number]) for number, name in enumerate(self.classes)]


def read_labels(
    listing: Listing,
    class_from: str = "auto",
    classes: Sequence[str] | str | None = None,
    num_classes: int | None = None,
) -> Labels:
    """The classes of a listing by one of the rules `CLASS_RULES`.

    Names get ids in the order of their text. Numbers in a label file are the ids themselves.

    :param class_from: "auto" is dataset.json or labels.csv where there is one; else the file name up to its first "_"
        where all images lie in one folder, or every such prefix is the folder's name; else the folder.
    :param classes: names by id that were fixed before, or the path of a classes.json, whose rule "auto" then takes.
    :raises ValueError: if an image has no class, an unknown one, or one that does not fit `num_classes`.
    """
    if class_from not in CLASS_RULES:
        rules = ", ".join(CLASS_RULES)
        raise ValueError(f"class_from {class_from!r} is none of {rules}{nearest(class_from, CLASS_RULES)}")
    known, class_from = _known_classes(classes, class_from)
    notes = []
    if class_from == "auto":
        class_from, note = _choose_rule(listing)
        notes.append(note)
    found, remarks = _READERS[class_from](listing)
    _check_names([*known, *(label for label in found if isinstance(label, str))])
    ids, names = _number(listing.images, found, known, num_classes)
    if num_classes is not None and len(names) > num_classes:
        raise ValueError(f"{len(names)} classes are more than num_classes {num_classes}; set num_classes {len(names)}")
    return Labels(ids, names, class_from, notes + remarks)


def _check_names(names: Iterable[str]) -> None:
    for name in dict.fromkeys(names):
        if name_fault(name):
            raise ValueError(f"the class {printable(name)} has {name_fault(name)}; give it another")


# ---- labels -> ids


def _number(
    files: Sequence[str], found: Sequence[Label], known: Sequence[str], num_classes: int | None
) -> tuple[list[int], list[str]]:
    """(ids, names of all classes)."""
    numbers = [label for label in found if isinstance(label, int)]
    if not known and len(numbers) == len(found):
        _check_range(files, found, numbers, LARGEST_ID if num_classes is None else num_classes)
        return numbers, [str(label) for label in range(max(numbers) + 1)]
    names = list(known) or sorted(set(map(str, found)))
    ids = _look_up(files, found, names)
    _check_range(files, found, ids, len(names) if num_classes is None else num_classes)
    return ids, names


def _check_range(files: Sequence[str], found: Sequence[Label], ids: Sequence[int], limit: int) -> None:
    for file, label, number in zip(files, found, ids, strict=True):
        if not 0 <= number < limit:
            name = f"label {label}" if isinstance(label, int) else f"class {label!r} (id {number})"
            remedy = "correct it" if number < 0 else f"correct it, or set num_classes to at least {max(ids) + 1}"
            raise ValueError(f"{name} of {file!r} does not fit num_classes {limit} (ids 0 to {limit - 1}); {remedy}")


def _look_up(files: Sequence[str], found: Sequence[Label], names: Sequence[str]) -> list[int]:
    """Ids of labels given as names, or as numbers where no name is that number."""
    ids = {name: number for number, name in enumerate(names)}
    for file, label in zip(files, found, strict=True):
        if str(label) not in ids and not (isinstance(label, int) and 0 <= label < len(names)):
            shown = ", ".join(map(printable, names[:10])) + (", ..." if len(names) > 10 else "")
            hint = nearest(str(label), names) or "; correct it, or leave out the known classes to number all anew"
            raise ValueError(f"class {label!r} of {file!r} is none of the {len(names)} known ones ({shown}){hint}")
    return [ids[str(label)] if str(label) in ids else int(label) for label in found]


# ---- the rules: listing -> one label per image, and lines for the user


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _class_folder(name: str) -> str:
    """The folder an image lies in, or the zip, by its own name."""
    folder = os.path.basename(_folder(name))
    return folder[:-4] if folder.lower().endswith(".zip") else folder


def _prefix(name: str) -> str:
    return os.path.basename(name).partition("_")[0]


def _choose_rule(listing: Listing) -> tuple[str, str]:
    for rule, file in LABEL_FILES.items():
        if _label_file(listing, file):
            return rule, f"classes from {file}"
    if len(set(map(_folder, listing.images))) == 1:
        return "filename", "classes from the file names, up to the first '_': all images lie in one folder"
    if all(_prefix(name) == _class_folder(name) for name in listing.images):
        return "filename", "classes from the file names, up to the first '_': each agrees with its folder"
    return "folder", (
        "classes from the folders, since the images lie in several; --class_from filename takes the file names up to "
        "the first '_' instead, as openai/guided-diffusion does"
    )


def _from_filename(listing: Listing) -> tuple[list[Label], list[str]]:
    for name in listing.images:
        if "_" not in os.path.basename(name):
            raise ValueError(
                f"the file name {name!r} has no class before a '_'; name it CLASS_{os.path.basename(name)}, "
                "use one folder per class with class_from folder, or write a labels.csv"
            )
    return [_prefix(name) for name in listing.images], []


def _from_folder(listing: Listing) -> tuple[list[Label], list[str]]:
    folders: dict[str, set[str]] = {}
    for name in listing.images:
        if "/" not in name:
            raise ValueError(
                f"{name!r} lies in no folder below {listing.root!r}, so that class_from folder finds no class for it; "
                "move it into the folder of its class, or use class_from filename"
            )
        folders.setdefault(_class_folder(name), set()).add(_folder(name))
    notes = [
        f"class {printable(name)} unites {', '.join(map(printable, sorted(of)))}"
        for name, of in sorted(folders.items())
        if len(of) > 1
    ]
    return [_class_folder(name) for name in listing.images], notes


def _label_file(listing: Listing, file: str) -> str | None:
    """A label file's name: at the root, or in the one folder that holds everything, as in a zip of a folder."""
    folders = [name.split("/")[:-1] for name in listing.images]
    pairs = zip(min(folders), max(folders), strict=False)
    shared = [part for part, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    places = ["/".join([*shared[:depth], file]) for depth in range(len(shared) + 1)]
    return next((place for place in places if place in listing.others), None)


def _from_file(rule: str, parse: Callable[[bytes, set[str]], Pairs], listing: Listing) -> tuple[list[Label], list[str]]:
    file = _label_file(listing, LABEL_FILES[rule])
    if file is None:
        raise ValueError(
            f"class_from {rule} needs the file {LABEL_FILES[rule]} in {listing.root!r}, which is not there; "
            f"write it, or choose another of {', '.join(CLASS_RULES)}"
        )
    start = len(file) - len(LABEL_FILES[rule])
    names = [name[start:] for name in listing.images]
    try:
        table = _table(parse(read_bytes(listing.path(file)), set(names)))
    except (ValueError, OSError) as error:
        raise ValueError(f"{file!r} in {listing.root!r} cannot be used: {reason(error)}; correct it") from error
    unlabelled = [name for name in names if name not in table]
    if unlabelled:
        raise ValueError(
            f"{len(unlabelled)} of {len(names)} images have no label in {file!r}, the first {unlabelled[0]!r}; "
            "add them, with paths as they are below that file"
        )
    surplus = len(table) - len(names)
    notes = [f"{file} labels {surplus} files that are not there"] if surplus else []
    return _as_numbers([table[name] for name in names]), notes


def _table(pairs: Pairs) -> dict[str, Label]:
    """The label of each file.

    :raises ValueError: if a label is none, or a file has two.
    """
    table: dict[str, Label] = {}
    for path, label in pairs:
        if not isinstance(path, str):
            raise ValueError(f"the path {printable(repr(path))} is no text")
        if isinstance(label, bool) or not isinstance(label, str | int):
            shown = printable(repr(label))
            raise ValueError(f"the label {shown} of {printable(path)!r} is neither a class id nor a name")
        if table.setdefault(path, label) != label:
            raise ValueError(f"{printable(path)!r} has two labels, {printable(str(table[path]))} and {label!r}")
    return table


def _as_numbers(labels: Sequence[Label]) -> list[Label]:
    """Labels as numbers if all are, else all as text."""
    texts = [label.strip() if isinstance(label, str) else label for label in labels]
    if not all(isinstance(text, int) or re.fullmatch(r"-?\d+", text) for text in texts):
        return [str(text) for text in texts]
    long = [text for text in texts if isinstance(text, str) and len(text) > LONGEST_ID]
    if long:
        raise ValueError(f"the label {printable(long[0])} is too large for a class id; correct it")
    return [int(text) for text in texts]


def _parse_json(content: bytes, names: set[str]) -> Pairs:
    """The pairs of EDM's ``{"labels": [[path, id], ...]}``."""
    try:
        labels = parse_json(content)["labels"] or []
        return list(labels.items()) if isinstance(labels, dict) else [(path, label) for path, label in labels]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'it is not {{"labels": [[path, id], ...]}} ({reason(error)})') from error


def _parse_csv(content: bytes, names: set[str]) -> Pairs:
    """The pairs of a table ``file,label``; its first line is a heading unless it names an image."""
    try:
        text = io.StringIO(content.decode("utf-8-sig"), newline=None)  # line ends of any system
        rows = [row for row in csv.reader(text) if row]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"it is no table of UTF-8 text ({reason(error)})") from error
    short = [row for row in rows if len(row) < 2]
    if short:
        raise ValueError(f"the line {printable(short[0][0])!r} is not 'file,label'; put a comma between the two")
    return [(row[0], row[1]) for row in (rows if rows and rows[0][0] in names else rows[1:])]


_READERS: dict[str, Callable[[Listing], tuple[list[Label], list[str]]]] = {
    "filename": _from_filename,
    "folder": _from_folder,
    "csv": lambda listing: _from_file("csv", _parse_csv, listing),
    "json": lambda listing: _from_file("json", _parse_json, listing),
}


# ---- classes.json


class SavedClasses(TypedDict):
    """What classes.json holds: names by id, the rule they came from, how many images each had."""

    classes: list[str]
    class_from: str
    counts: list[int]


class HasClasses(Protocol):
    """An image stream, or the labels of one."""

    @property
    def class_from(self) -> str: ...

    def class_table(self) -> list[ClassRow]: ...


def save_classes(path: str, source: HasClasses) -> None:
    """Write the classes that validation, sampling and resuming take over.

    :param source: an `ImageStream`, or `Labels`.
    """
    rows = source.class_table()
    names, counts = [name for _, name, _ in rows], [count for _, _, count in rows]
    table = SavedClasses(classes=names, class_from=source.class_from, counts=counts)
    content = json.dumps(table, indent=1).encode()
    with bf.BlobFile(path, "wb") if "://" in path else replacing(path) as file:
        file.write(content)


def load_classes(path: str) -> list[str]:
    """The names by id that `save_classes` wrote.

    :raises ValueError: if the file is not there or holds something else.
    """
    return _saved_classes(path)["classes"]


def _saved_classes(path: str) -> SavedClasses:
    try:
        table = parse_json(read_file(path))
        rule, counts = table.get("class_from", "auto"), table.get("counts", [])
        return SavedClasses(classes=_names(table["classes"]), class_from=_rule(rule), counts=counts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        detail = f"{type(error).__name__}: {reason(error)}"
        raise ValueError(
            f"{path!r} is no table of classes ({detail}); give a classes.json that training wrote"
        ) from error


def _names(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise TypeError("classes are a list of names")
    if len(set(value)) < len(value):
        raise ValueError("a class is named twice")
    return value


def _rule(value: Any) -> str:
    if value not in list(CLASS_RULES):
        raise ValueError(f"class_from is none of {', '.join(CLASS_RULES)}")
    return str(value)


def _known_classes(classes: Sequence[str] | str | None, class_from: str) -> tuple[Sequence[str], str]:
    if isinstance(classes, str):
        saved = _saved_classes(classes)
        return saved["classes"], saved["class_from"] if class_from == "auto" else class_from
    names = list(classes or ())
    if len(set(names)) < len(names):
        raise ValueError(f"classes {names} name a class twice; give each name once")
    return names, class_from
