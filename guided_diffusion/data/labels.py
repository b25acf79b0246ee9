"""The classes of images: the rules that find them, their ids, and the table that later runs take over.

Shapes: N images, K classes.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

from ..config import CLASS_RULES
from ..runtime import paths
from ..runtime.files import name_fault, parse_json, printable, read_file, reason, replacing
from ..runtime.options import nearest
from . import label_tables
from .label_tables import Label
from .sources import LABEL_FILES, Listing

ClassRow = tuple[int, str, int]  # id, name, number of images

ARRAY = "array"  # the rule of labels that lie in an npz beside the images, which is never asked for
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
    *,
    label_column: str = "",
) -> Labels:
    """The classes of a listing by one of the rules `CLASS_RULES`.

    Names get ids in the order of their text, as in openai/guided-diffusion. Numbers in a table are the ids themselves,
    and so are folders whose names are the numbers from 0 on.

    :param class_from: "auto" is a table where there is one (dataset.json, labels.csv, or metadata.csv or .jsonl with
        labels); else the file name up to its first "_" where all images lie in one folder, or every such prefix is the
        folder's name; else the folder.
    :param classes: names by id that were fixed before, or the path of a classes.json, whose rule "auto" then takes.
    :param label_column: of the labels in a table that has several.
    :raises ValueError: if an image has no class, an unknown one, or one that does not fit `num_classes`.
    """
    if class_from not in (*CLASS_RULES, ARRAY):
        rules = ", ".join(CLASS_RULES)
        raise ValueError(f"class_from {class_from!r} is none of {rules}{nearest(class_from, CLASS_RULES)}")
    known, class_from = _known_classes(classes, class_from)
    notes = []
    if class_from in ("auto", ARRAY):
        class_from, note = _choose_rule(listing, label_column)
        notes.append(note)
    if label_column and class_from not in LABEL_FILES:
        raise ValueError(f"label_column {label_column!r} has no effect with class_from {class_from}: there is no table")
    found, remarks = _found(listing, class_from, label_column)
    _check_names([*known, *(label for label in found if isinstance(label, str))])
    ids, names = _number(listing.images, found, known, num_classes, by_number=class_from == "folder")
    remarks += [] if known or class_from in LABEL_FILES else _remarks_on_numbers(names)
    if num_classes is not None and len(names) > num_classes:
        raise ValueError(f"{len(names)} classes are more than num_classes {num_classes}; set num_classes {len(names)}")
    return Labels(ids, names, class_from, notes + remarks)


def _check_names(names: Iterable[str]) -> None:
    for name in dict.fromkeys(names):
        if name_fault(name):
            raise ValueError(f"the class {printable(name)} has {name_fault(name)}; give it another")


# ---- labels -> ids


def _number(
    files: Sequence[str], found: Sequence[Label], known: Sequence[str], num_classes: int | None, *, by_number: bool
) -> tuple[list[int], list[str]]:
    """(ids, names of all classes).

    :param by_number: names that are the numbers from 0 on are ids.
    """
    numbers = [label for label in found if isinstance(label, int)]
    if not known and len(numbers) == len(found):
        _check_range(files, found, numbers, LARGEST_ID if num_classes is None else num_classes)
        return numbers, [str(label) for label in range(max(numbers) + 1)]
    names = list(known) or in_order(set(map(str, found)), by_number=by_number)
    ids = _look_up(files, found, names)
    _check_range(files, found, ids, len(names) if num_classes is None else num_classes)
    return ids, names


def in_order(names: Collection[str], *, by_number: bool) -> list[str]:
    """Names in the order of their text, or of their numbers where they are exactly those from 0 on."""
    numbers = {str(number) for number in range(len(names))}
    return sorted(names, key=int) if by_number and set(names) == numbers else sorted(names)


def _remarks_on_numbers(names: Sequence[str]) -> list[str]:
    """What is said of classes that are called by numbers, and of other numbers than their ids."""
    numbers = [(number, name) for number, name in enumerate(names) if name.isdecimal()]
    other = next(((number, name) for number, name in numbers if int(name) != number), None)
    if other:
        return [
            f"ids follow the text of the names, as in openai/guided-diffusion: id {other[0]} is class {other[1]}; a "
            "table of labels, or a classes.json, can say others"
        ]
    return ["the names of the classes are numbers, and these are their ids"] * (0 < len(numbers) == len(names))


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


def _choose_rule(listing: Listing, label_column: str) -> tuple[str, str]:
    if listing.array:
        return ARRAY, f"classes from the labels in {listing.root}"
    rule, file = label_tables.find_any(listing, label_column)
    if rule:
        return rule, f"classes from {os.path.basename(file)}"
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


def _from_array(listing: Listing) -> tuple[list[Label], list[str]]:
    if listing.ids is None:
        raise ValueError(f"{listing.root} holds images and no labels: give an npz of images arr_0 and labels arr_1")
    return list(listing.ids), []


_READERS: dict[str, Callable[[Listing], tuple[list[Label], list[str]]]] = {
    "filename": _from_filename,
    "folder": _from_folder,
    ARRAY: _from_array,
}


def _found(listing: Listing, rule: str, column: str) -> tuple[list[Label], list[str]]:
    return label_tables.read(listing, rule, column) if rule in LABEL_FILES else _READERS[rule](listing)


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
    where = paths.resolve(path)
    with paths.new_blob(where) if paths.is_remote(where) else replacing(where) as file:
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
    if value not in [*CLASS_RULES, ARRAY]:
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
