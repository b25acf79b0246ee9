"""A data set of the Hugging Face Hub: a parquet file, or a folder of them, with images as bytes in a column."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from conversion.command import converter
from conversion.config import ParquetConfig
from conversion.folder import folder_name
from conversion.images import Item, Source, bad
from conversion.planes import class_of
from guided_diffusion.runtime import files as untrusted
from guided_diffusion.runtime.errors import UserError, nearest, printable, reason

ROWS = 64  # read at a time
LABELS = ("label", "labels", "fine_label", "class", "target")


def read(config: ParquetConfig) -> Source:
    """The images of each file in its order, files by name."""
    return Source(item for path in _files(config.source) for item in _file(path, config))


def _files(source: str) -> list[str]:
    if os.path.isfile(source):
        return [source]
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(source) for name in names]
    files = sorted(path for path in paths if path.endswith(".parquet"))
    if not files:
        raise UserError(f"{source} holds no .parquet file: give the folder that does")
    return files


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError('parquet files need pyarrow: pip install "guided-diffusion[datasets]"') from error
    return pyarrow, parquet


def _file(path: str, config: ParquetConfig) -> Iterator[Item]:
    pyarrow, parquet = _pyarrow()
    name = os.path.relpath(path, config.source) if os.path.isdir(config.source) else os.path.basename(path)
    key, number = printable(name), 0
    try:
        untrusted.check_regular(path)
        with parquet.ParquetFile(path) as file:
            image, label = _columns(file.schema_arrow, config)
            names = _class_names(file.schema_arrow, label)
            for batch in file.iter_batches(ROWS, columns=[column for column in (image, label) if column]):
                for row in batch.to_pylist():
                    yield _item(f"{key}/{number}", row, (image, label), names, config)
                    number += 1
        if not number:
            yield bad(key, "it has no rows")
    except (pyarrow.ArrowException, OSError) as error:
        yield bad(key, reason(error))


def _item(key: str, row: dict[str, Any], columns: tuple[str, str], names: list[str], config: ParquetConfig) -> Item:
    image, label = columns
    content = row[image].get("bytes") if isinstance(row[image], dict) else row[image]
    try:
        text = _label(row[label], names) if label else config.prefix or folder_name(config.source)
    except ValueError as error:
        return bad(key, reason(error))
    if not isinstance(content, bytes):
        return bad(key, "the row has no bytes of an image", text)
    return Item(key, text, lambda: content)


def _label(value: Any, names: list[str]) -> str:
    if value is None:
        raise UserError("the row has no label")
    return value if isinstance(value, str) else class_of(value, names)


def _columns(schema: Any, config: ParquetConfig) -> tuple[str, str]:
    """(image, label) columns; '' for no label."""
    import pyarrow.types as kinds

    holders = [field.name for field in schema if _holds_images(field.type, kinds)]
    image = config.image_column or (holders[0] if len(holders) == 1 else "")
    if image not in holders:
        fault = f"no column {image!r}" if image else f"{len(holders)} columns"
        listed = ", ".join(holders) or "none"
        raise UserError(f"{config.source} has {fault} with images: give --image_column (bytes are in {listed})")
    label = config.label_column or next((name for name in LABELS if name in schema.names and not config.prefix), "")
    if label and label not in schema.names:
        others = ", ".join(schema.names)
        raise UserError(f"{config.source} has no column {label!r}, but {others}{nearest(label, schema.names)}")
    return image, label


def _holds_images(kind: Any, kinds: Any) -> bool:
    if kinds.is_struct(kind):
        return any(kind.field(place).name == "bytes" for place in range(kind.num_fields))
    return bool(kinds.is_binary(kind) or kinds.is_large_binary(kind))


def _class_names(schema: Any, label: str) -> list[str]:
    """The names that the Hub's own metadata has for the numbers of a column."""
    raw = (schema.metadata or {}).get(b"huggingface")
    if not raw or not label:
        return []
    try:
        feature = untrusted.parse_json(raw)["info"]["features"][label]
        names = feature.get("names", [])
        return [str(name) for name in names] if isinstance(names, list) else []
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


main = converter("parquet", read)

if __name__ == "__main__":
    main()
