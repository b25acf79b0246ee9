"""The classes of images: the rules that tell them, their ids, and the classes.json that later runs take over.

Shapes: N images, K classes.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import CLASS_RULES
from ..runtime import files, paths
from ..runtime.errors import UserError
from ..runtime.files import parse_json, printable, reason
from ..runtime.options import nearest
from . import label_tables
from .label_tables import Label
from .sources import LABEL_FILES, ImageSource

ClassRow = tuple[int, str, int]  # id, name, number of images

ARRAY = "array"  # the rule of labels that lie in an npz beside the images, which is never asked for
LARGEST_ID = 65536  # of numbers given as labels without num_classes: what is above is no class id


@dataclass(frozen=True)
class Labels:
    """The class of every image of a source.

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
    source: ImageSource,
    class_from: str = "auto",
    classes: Sequence[str] | str | None = None,
    num_classes: int | None = None,
    *,
    label_column: str = "",
) -> Labels:
    """The classes of the images by one of the rules `CLASS_RULES`.

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
        raise UserError(
            f"class_from must be one of {', '.join(CLASS_RULES)}, got {class_from!r}{nearest(class_from, CLASS_RULES)}"
        )
    if isinstance(classes, str):
        known, rule = _saved_classes(classes)
        class_from = rule if class_from == "auto" else class_from
    else:
        known = list(classes or ())
    if len(set(known)) < len(known):
        raise UserError(f"classes {known} name a class twice; give each name once")
    notes = []
    if class_from in ("auto", ARRAY):
        class_from, note = _choose_rule(source, label_column)
        notes.append(note)
    if label_column and class_from not in LABEL_FILES:
        raise UserError(f"label_column {label_column!r} has no effect with class_from {class_from}: there is no table")
    if class_from in LABEL_FILES:
        labels, remarks = label_tables.read(source, class_from, label_column)
    else:
        labels, remarks = _of_names(source, class_from)
    for name in dict.fromkeys([*known, *(label for label in labels if isinstance(label, str))]):
        if files.name_fault(name):
            raise UserError(f"the class {printable(name)} has {files.name_fault(name)}; give it another")
    ids, names = _numbered(source.images, labels, known, num_classes, by_number=class_from == "folder")
    remarks += [] if known or class_from in LABEL_FILES else _remarks_on_numbers(names)
    if num_classes is not None and len(names) > num_classes:
        raise UserError(f"{len(names)} classes are more than num_classes {num_classes}; set num_classes {len(names)}")
    return Labels(ids, names, class_from, notes + remarks)


# ---- labels -> ids


def _numbered(
    images: Sequence[str], labels: Sequence[Label], known: Sequence[str], num_classes: int | None, *, by_number: bool
) -> tuple[list[int], list[str]]:
    """(ids, names of all classes); with `by_number`, names that are the numbers from 0 on are ids."""
    numbers = [label for label in labels if isinstance(label, int)]
    if not known and len(numbers) == len(labels):
        _check_range(images, labels, numbers, LARGEST_ID if num_classes is None else num_classes)
        return numbers, [str(label) for label in range(max(numbers) + 1)]
    names = list(known) or in_order(set(map(str, labels)), by_number=by_number)
    by_name = {name: number for number, name in enumerate(names)}
    for image, label in zip(images, labels, strict=True):
        if str(label) not in by_name and not (isinstance(label, int) and 0 <= label < len(names)):
            shown = ", ".join(map(printable, names[:10])) + (", ..." if len(names) > 10 else "")
            hint = nearest(str(label), names) or "; correct it, or leave out the known classes to number all anew"
            raise UserError(f"class {label!r} of {image!r} is none of the {len(names)} known ones ({shown}){hint}")
    ids = [by_name[str(label)] if str(label) in by_name else int(label) for label in labels]
    _check_range(images, labels, ids, len(names) if num_classes is None else num_classes)
    return ids, names


def in_order(names: Collection[str], *, by_number: bool) -> list[str]:
    """Names in the order of their text, or of their numbers where they are exactly those from 0 on."""
    numbers = {str(number) for number in range(len(names))}
    return sorted(names, key=int) if by_number and set(names) == numbers else sorted(names)


def _check_range(images: Sequence[str], labels: Sequence[Label], ids: Sequence[int], limit: int) -> None:
    for image, label, number in zip(images, labels, ids, strict=True):
        if not 0 <= number < limit:
            name = f"label {label}" if isinstance(label, int) else f"class {label!r} (id {number})"
            remedy = "correct it" if number < 0 else f"correct it, or set num_classes to at least {max(ids) + 1}"
            raise UserError(f"{name} of {image!r} does not fit num_classes {limit} (ids 0 to {limit - 1}); {remedy}")


def _remarks_on_numbers(names: Sequence[str]) -> list[str]:
    """A line about classes that are called by numbers."""
    numbers = [(number, name) for number, name in enumerate(names) if name.isdecimal()]
    other = next(((number, name) for number, name in numbers if int(name) != number), None)
    if other:
        return [
            f"ids follow the text of the names, as in openai/guided-diffusion: id {other[0]} is class {other[1]}; a "
            "table of labels, or a classes.json, can say others"
        ]
    return ["the names of the classes are numbers, and these are their ids"] * (0 < len(numbers) == len(names))


# ---- rules by the names of files


def _class_folder(name: str) -> str:
    """The name of the folder that an image lies in, or of the zip."""
    return re.sub(r"\.zip$", "", os.path.basename(os.path.dirname(name)), flags=re.IGNORECASE)


def _prefix(name: str) -> str:
    return os.path.basename(name).partition("_")[0]


def _choose_rule(source: ImageSource, label_column: str) -> tuple[str, str]:
    if source.array:
        return ARRAY, f"classes from the labels in {source.root}"
    rule, file = label_tables.find_any(source, label_column)
    if rule:
        return rule, f"classes from {os.path.basename(file)}"
    if len(set(map(os.path.dirname, source.images))) == 1:
        return "filename", "classes from the file names, up to the first '_': all images lie in one folder"
    if all(_prefix(name) == _class_folder(name) for name in source.images):
        return "filename", "classes from the file names, up to the first '_': each agrees with its folder"
    return "folder", (
        "classes from the folders, since the images lie in several; --class_from filename takes the file names up to "
        "the first '_' instead, as openai/guided-diffusion does"
    )


def _of_names(source: ImageSource, rule: str) -> tuple[list[Label], list[str]]:
    """One label per image by file name, by folder, or from beside an array; and lines for the user."""
    if rule == ARRAY:
        if source.ids is None:
            raise UserError(f"{source.root} holds images and no labels: give an npz of images arr_0 and labels arr_1")
        return list(source.ids), []
    for name in source.images:
        if rule == "filename" and "_" not in os.path.basename(name):
            raise UserError(
                f"the file name {name!r} has no class before a '_'; name it CLASS_{os.path.basename(name)}, "
                "use one folder per class with class_from folder, or write a labels.csv"
            )
        if rule == "folder" and "/" not in name:
            raise UserError(
                f"{name!r} lies in no folder below {source.root!r}, so that class_from folder finds no class for it; "
                "move it into the folder of its class, or use class_from filename"
            )
    if rule == "filename":
        return [_prefix(name) for name in source.images], []
    folders: dict[str, set[str]] = {}
    for name in source.images:
        folders.setdefault(_class_folder(name), set()).add(os.path.dirname(name))
    united = [(name, sorted(places)) for name, places in sorted(folders.items()) if len(places) > 1]
    notes = [f"class {printable(name)} unites {', '.join(map(printable, places))}" for name, places in united]
    return [_class_folder(name) for name in source.images], notes


# ---- classes.json


def save_classes(path: str, source: Any) -> None:
    """Write the classes of an `ImageStream` or of `Labels`, which validation, sampling and resuming take over."""
    rows = source.class_table()
    names, counts = [name for _, name, _ in rows], [count for _, _, count in rows]
    table = {"classes": names, "class_from": source.class_from, "counts": counts}
    with files.writing(paths.resolve(path)) as file:
        file.write(json.dumps(table, indent=1).encode())


def load_classes(path: str) -> list[str]:
    """The names by id that `save_classes` wrote.

    :raises ValueError: if the file is not there or holds something else.
    """
    return _saved_classes(path)[0]


def _saved_classes(path: str) -> tuple[list[str], str]:
    """The names by id, and the rule that they came from."""
    try:
        table = parse_json(files.read_file(path))
        names, rule = table["classes"], table.get("class_from", "auto")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError("classes are a list of names")
        if len(set(names)) < len(names) or rule not in [*CLASS_RULES, ARRAY]:
            raise UserError(f"a class is named twice, or class_from is none of {', '.join(CLASS_RULES)}")
        return names, rule
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        detail = f"{type(error).__name__}: {reason(error)}"
        raise UserError(
            f"{path!r} is no table of classes ({detail}); give a classes.json that training wrote"
        ) from error
