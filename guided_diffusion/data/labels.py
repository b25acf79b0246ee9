"""The classes of images: the rules that tell them, and the classes.json that later runs take over.

`tables` reads the tables. Without one, NAME.cls or NAME.json beside NAME.jpg is its label, as WebDataset keeps it in
tars, whose own names say nothing of classes.

Shapes: N images, K classes.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..config import CLASS_RULES
from ..runtime import files
from ..runtime.errors import DAMAGE, WHY, UserError, as_user_error, check_choice, listed, nearest, printable, refuse
from ..runtime.files import parse_json, read_classes
from ..runtime.labels import parse_classes
from .sources import LABEL_FILES, ImageSource, read_bytes
from .tables import LABEL_COLUMNS, Label, Table, beside, file_beside, find_table

ClassRow = tuple[int, str, int]  # id, name, number of images

CLS = "cls"  # the rule of NAME.cls
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
    source: ImageSource | Sequence[ImageSource],
    class_from: str = "auto",
    classes: Sequence[str] | str | None = None,
    num_classes: int | None = None,
    *,
    label_column: str = "",
) -> Labels:
    """The classes of the images by one of the rules `CLASS_RULES`; of several sources by name, whatever rule each has.

    Names get ids in the order of their text, as in openai/guided-diffusion. Numbers in a table are the ids themselves,
    and so are folders whose names are the numbers from 0 on.

    :param class_from: "auto" is a table where there is one (dataset.json, labels.csv, or metadata.csv or .jsonl with
        labels); else NAME.cls or NAME.json beside each image; else the file name up to its first "_" where all images
        lie in one folder, or every such prefix is the folder's name; else the folder.
    :param classes: names by id that were fixed before, or the path of a classes.json, whose rule "auto" then takes
        where the images are in no array.
    :param label_column: of the labels in a table that has several.
    """
    sources = [source] if isinstance(source, ImageSource) else list(source)
    if isinstance(classes, str):
        classes, rule = read_classes(classes)
        class_from = rule if class_from == "auto" and not any(source.array for source in sources) else class_from
    if class_from != ARRAY:
        check_choice("class_from", class_from, CLASS_RULES)
    known, rules, labels, notes = list(classes or ()), set[str](), list[Label](), list[str]()
    for source in sources:
        rule, new, remarks = _labels_of(source, class_from, label_column)
        rules, labels, notes = rules | {rule}, [*labels, *new], [*notes, *remarks]
    class_from = rule if len(rules) == 1 else "auto"
    images = [name for source in sources for name in source.images]
    for name in {*known, *(label for label in labels if isinstance(label, str))}:
        refuse((files.name_fault(name), f"the class {printable(name)} has {files.name_fault(name)}; give it another"))
    ids, names = _numbered(images, labels, known, num_classes, by_number=class_from == "folder")
    more = num_classes is not None and len(names) > num_classes
    refuse((more, f"{len(names)} classes are more than num_classes {num_classes}; set num_classes {len(names)}"))
    numbers = [f"id {i} is class {name}" for i, name in enumerate(names) if name.isdecimal() and int(name) != i]
    if numbers and not known and not rules & {*LABEL_FILES, CLS}:
        notes.append(f"ids follow the text of the names: {numbers[0]}; a table of labels can say others")
    return Labels(ids, names, class_from, notes)


def _labels_of(source: ImageSource, rule: str, label_column: str) -> tuple[str, list[Label], list[str]]:
    """The rule that is used, a label for each image, and lines for the user."""
    notes = list[str]()
    if rule in ("auto", ARRAY):
        rule, *notes = _choose_rule(source, label_column)
    tabular = rule in (*LABEL_FILES, CLS)
    idle = label_column and not tabular
    refuse((idle, f"label_column {label_column!r} has no effect with class_from {rule}: there is no table"))
    alone = rule == "json" and not find_table(source, LABEL_FILES["json"])
    if rule == CLS or (alone and file_beside(source, source.images[0], ".json")):
        labels, names = _of_files(source, f".{rule}", label_column), find_table(source, ("classes.json",))
        known = files.load_classes(source.path(names)) if names and ".tar/" in source.images[0] else []
        named = known and all(isinstance(label, int) and 0 <= label < len(known) for label in labels)
        return rule, [known[int(label)] for label in labels] if named else labels, notes
    labels, remarks = _of_table(source, rule, label_column) if tabular else _of_names(source, rule)
    return rule, labels, notes + remarks


def _numbered(
    images: Sequence[str], labels: Sequence[Label], known: list[str], num_classes: int | None, *, by_number: bool
) -> tuple[list[int], list[str]]:
    """(ids, names of all classes); with `by_number`, names that are the numbers from 0 on are ids."""
    names, ids = known, list[int]()
    if not known and not all(isinstance(label, int) for label in labels):
        names = sorted(set(map(str, labels)))
        if by_number and set(names) == set(map(str, range(len(names)))):
            names.sort(key=int)
    by_name = {name: number for number, name in enumerate(names)}
    limit = (len(names) or LARGEST_ID) if num_classes is None else num_classes
    for image, label in zip(images, labels, strict=True):
        number = by_name.get(str(label), label)
        if isinstance(number, str) or (names and not 0 <= number < len(names)):
            shown = listed(map(printable, names), 10)
            hint = nearest(str(label), names) or "; correct it, or leave out the known classes to number all anew"
            raise UserError(f"class {label!r} of {image!r} is none of the {len(names)} known ones ({shown}){hint}")
        if not 0 <= number < limit:
            remedy = f", or set num_classes to at least {number + 1}" * (number >= 0)
            raise UserError(
                f"class {label!r} (id {number}) of {image!r} does not fit num_classes {limit} (ids 0 to {limit - 1}); "
                f"correct it{remedy}"
            )
        ids.append(number)
    return ids, names or [str(number) for number in range(max(ids) + 1)]


def _class_folder(name: str) -> str:
    """The name of the folder that an image lies in, or of the zip."""
    return re.sub(r"\.zip$", "", os.path.basename(os.path.dirname(_in_tar(name))), flags=re.IGNORECASE)


def _in_tar(name: str) -> str:
    """The name within a tar."""
    return name[name.rfind(".tar/") + len(".tar/") :] if ".tar/" in name else name


def _prefix(name: str) -> str:
    return os.path.basename(name).partition("_")[0]


def _choose_rule(source: ImageSource, label_column: str) -> tuple[str, str]:
    """(rule, a line for the user)."""
    if source.array:
        return ARRAY, f"classes from the labels in {source.root}"
    for rule in LABEL_FILES:
        file = find_table(source, LABEL_FILES[rule])
        if file and (label_column or not os.path.basename(file).startswith("metadata") or _has_labels(source, file)):
            return rule, f"classes from {os.path.basename(file)}"
    first = source.images[0]
    if file_beside(source, first, ".cls"):
        return CLS, "classes from NAME.cls beside each image"
    if file_beside(source, first, ".json") and (label_column or _columns(source, first)):
        return "json", "classes from NAME.json beside each image"
    if len({os.path.dirname(_in_tar(name)) for name in source.images}) == 1:
        return "filename", "classes from the file names, up to the first '_': all images lie in one folder"
    if all(_prefix(name) == _class_folder(name) for name in source.images):
        return "filename", "classes from the file names, up to the first '_': each agrees with its folder"
    return "folder", "classes from the folders; --class_from filename takes the file names, as openai/guided-diffusion"


def _of_names(source: ImageSource, rule: str) -> tuple[list[Label], list[str]]:
    """One label per image by file name, by folder, or from beside an array; and lines for the user."""
    if rule == ARRAY:
        if source.ids is None:
            raise UserError(f"{source.root} holds images and no labels: give an npz of images arr_0 and labels arr_1")
        return list(source.ids), []
    if rule == "filename":
        bare = next((name for name in source.images if "_" not in os.path.basename(name)), "")
        if bare:
            raise UserError(
                f"the file name {bare!r} has no class before a '_'; name it CLASS_{os.path.basename(bare)}, use one "
                "folder per class with class_from folder, or write a labels.csv"
            )
        return [_prefix(name) for name in source.images], []
    folders: dict[str, set[str]] = {}
    for name in source.images:
        if "/" not in _in_tar(name):
            raise UserError(f"{name!r} lies in no folder below {source.root!r}: move it into the folder of its class")
        folders.setdefault(_class_folder(name), set()).add(printable(os.path.dirname(name)))
    united = sorted((name, places) for name, places in folders.items() if len(places) > 1)
    notes = [f"class {printable(name)} unites {', '.join(sorted(places))}" for name, places in united]
    return [_class_folder(name) for name in source.images], notes


def _columns(source: ImageSource, image: str) -> list[str]:
    """The keys of the NAME.json beside an image that are called like labels."""
    try:
        row = parse_json(read_bytes(source.path(file_beside(source, image, ".json"))))
        return [key for key in row if key.lower() in LABEL_COLUMNS and isinstance(row[key], str | int)]
    except (ValueError, OSError, TypeError, AttributeError):
        return []


def _of_files(source: ImageSource, extension: str, column: str) -> list[Label]:
    """The label in the file beside each image: all of a NAME.cls, a key of a NAME.json."""
    columns = [column] if column else _columns(source, source.images[0])
    unclear = extension == ".json" and len(columns) != 1
    refuse((unclear, f"NAME.json beside {source.images[0]!r} has no clear label: --label_column names the key"))
    labels = list[Any]()
    for image in source.images:
        file = file_beside(source, image, extension)
        with as_user_error(f"{file!r} in {source.root!r} cannot be used: {WHY}; correct it", *DAMAGE):
            content = read_bytes(source.path(file)).decode() if file else ""
            labels.append(parse_json(content)[columns[0]] if extension == ".json" and file else content.strip())
        if labels[-1] == "" or isinstance(labels[-1], bool) or not isinstance(labels[-1], str | int):
            raise UserError(f"{image!r} has no label: give it {beside(image, extension)[0]!r} with a class id or name")
    return _as_numbers(labels)


def _has_labels(source: ImageSource, file: str) -> bool:
    """Whether a table has more than captions."""
    try:
        return bool(Table(source, file).columns_called(LABEL_COLUMNS))
    except (ValueError, OSError):
        return True  # reading it says what is wrong


def _of_table(source: ImageSource, rule: str, column: str) -> tuple[list[Label], list[str]]:
    """The label of every image from the table of a rule, and lines for the user."""
    file = find_table(source, LABEL_FILES[rule])
    needed = f"class_from {rule} needs the file {' or '.join(LABEL_FILES[rule])} in {source.root!r}"
    refuse((not file, f"{needed}: write it, or choose another of {', '.join(CLASS_RULES)}"))
    with as_user_error(f"{file!r} in {source.root!r} cannot be used: {WHY}; correct it", ValueError, OSError):
        table = Table(source, file)
        column = table.label_column(column)
        labels, surplus = table.labels(column)
    unlabelled = [name for name in table.images if name not in labels]
    first = f"the first {next(iter(unlabelled), '')!r}"
    fault = f"{len(unlabelled)} of {len(table.images)} images have no label in {file!r}, {first}"
    remedy = f"add them, with paths as they are below that file, which begins with {table.first_row!r}"
    refuse((unlabelled, f"{fault}; {remedy}"))
    notes = [f"{file} labels {surplus} files that are not there"] * bool(surplus)
    notes += [f"labels are the column {column!r} of {', '.join(table.columns)}"] * (len(table.columns) > 2)
    return _as_numbers([labels[name] for name in table.images]), notes


def _as_numbers(labels: Sequence[Label]) -> list[Label]:
    """Labels as numbers if all are, ``2.0`` too, else all as text; more than 18 digits are text."""
    if all(isinstance(label, int) for label in labels):
        return list(labels)
    texts = [str(label).strip() for label in labels]
    matches = [re.fullmatch(r"(-?\d{1,18})(\.0*)?", text) for text in texts]
    return [int(match[1]) for match in matches if match] if all(matches) else list(texts)


def listed_classes(text: str, num_classes: int, names: Sequence[str] = ()) -> list[int]:
    """As `parse_classes`, of each line of a file where the text is @ and its path."""
    lines = files.lines_of(files.resolve(text[1:]), f"classes {text}", "class") if text.startswith("@") else [text]
    return [label for line in lines for label in parse_classes(line, num_classes, names)]


def save_classes(path: str, source: Any) -> None:
    """Write the classes of an `ImageStream` or of `Labels`, which validation, sampling and resuming take over."""
    rows = source.class_table()
    names, counts = [name for _, name, _ in rows], [count for _, _, count in rows]
    files.write_json(files.resolve(path), {"classes": names, "class_from": source.class_from, "counts": counts})
