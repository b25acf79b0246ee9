"""Any data set to a folder or zip of images that `load_data` reads, the class in the name: CLASS_NNNNNNN.png.

NNNNNNN counts the items of the source, from 0, those left out too. The result does not depend on the number of worker
processes, nor on how often a run was killed and begun again. Beside OUT lie OUT.sha256, for ``sha256sum -c``, and
OUT.report.json: how many images of which class, and what was left out and why.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from typing import Any

from guided_diffusion import logger
from guided_diffusion.runtime import files
from guided_diffusion.runtime.files import printable, quoted, reason

from .config import ConversionConfig
from .images import Content, Encoded, Item, Recipe, Source, encode_all, end_with_parent
from .output import Entry, Journal, Sink, open_sink, part_of

CHUNK = 16  # images that go to a worker at once ...
CHUNK_BYTES = 2**24  # ... and the bytes that are enough for it
LONGEST_CLASS = 150  # bytes: with a number or a name behind it, a file name may have 255
SHOWN = 5
NOT_IN_RESULT = ("out", "workers", "skip_bad")  # flags that do not change the files

_UNFIT = re.compile(r'[\x00-\x20\x7f"*/:<>?\\|_]+')


@dataclass
class Tally:
    """What became of the items."""

    classes: Counter[str] = field(default_factory=Counter)
    skipped: list[dict[str, str]] = field(default_factory=list)

    def add(self, entry: Entry) -> None:
        """Count an entry of the journal."""
        if entry["class"]:
            self.classes[entry["class"]] += "name" in entry
        if "fault" in entry:
            self.skipped.append({"item": entry["key"], "class": entry["class"], "reason": entry["fault"]})


class ClassNames:
    """The classes of a source as they stand in file names: what must not stand there, '_' above all, becomes '-'."""

    def __init__(self) -> None:
        self._labels: dict[str, str] = {}

    def __call__(self, label: str) -> str:
        """:raises ValueError: if nothing is left of the class, or another one is called the same."""
        if not label:
            return ""
        name = _UNFIT.sub("-", label).lstrip(".")
        if not name.strip("-.") or len(name.encode(errors="replace")) > LONGEST_CLASS or files.name_fault(name):
            raise ValueError(
                f"the class {quoted(label)} cannot stand in the name of a file: give it a short, plain name"
            )
        other = self._labels.setdefault(name, label)
        if other != label:
            raise ValueError(
                f"the classes {quoted(other)} and {quoted(label)} would both be called {name!r} in the names of files: "
                "rename one of them"
            )
        return name

    def renamed(self) -> dict[str, str]:
        """Class in the source -> class in the names of files, where they differ."""
        return {label: name for name, label in sorted(self._labels.items()) if label != name}


def convert(source: Source, config: ConversionConfig, script: str) -> None:
    """Write a data set to ``config.out``, going on with what a run that was killed has left there.

    :raises ValueError: naming the item, if one cannot be used and ``config.skip_bad`` is False; or if the source has
        changed since the first run, holds no image, or the output is there already.
    """
    out = config.out.rstrip("/") or config.out
    check_paths(config.source, out)
    request = _request(config, script)
    if os.path.exists(out):
        _settle(out, request)
        return
    journal = Journal(out, request)
    with contextlib.closing(journal), contextlib.closing(open_sink(out)) as sink:
        done = journal.resume(sink, skip_bad=config.skip_bad)
        tally, names = _write(source, config, journal, sink, done)
        _finish(out, request, tally, names, {"journal": journal, "sink": sink, "extras": source.extras})
    print(_summary(out, tally))


def _request(config: ConversionConfig, script: str) -> dict[str, Any]:
    options = {name: value for name, value in asdict(config).items() if name not in NOT_IN_RESULT}
    return {"script": script, **options, "source": os.path.abspath(config.source)}


def check_paths(source: str, out: str) -> None:
    """Refuse places that no data set can come from or go to, before anything is read.

    :raises ValueError: naming the place.
    """
    if not out:
        raise ValueError("OUT '' is no name: give a folder to make, or a file whose name ends in .zip")
    if not os.path.exists(source):
        raise ValueError(f"SOURCE {quoted(source)} is not there: give the path of the data set as it was fetched")
    here = os.path.realpath(source)
    if os.path.isdir(here) and os.path.realpath(out).startswith(os.path.join(here, "")):
        raise ValueError(f"OUT {quoted(out)} lies in SOURCE {quoted(source)}: choose a place outside")


def _settle(out: str, request: Mapping[str, Any]) -> None:
    """Nothing is left to do where the same command has made the output before."""
    try:
        report = files.parse_json(files.read_file(f"{out}.report.json"))
        same = report["request"] == request
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise ValueError(f"OUT {quoted(out)} is there already, and not from this command: remove it, or choose another")
    with contextlib.suppress(OSError):
        os.remove(f"{part_of(out)}.jsonl")
    print(f"{out} is complete already: nothing was done")


# ---- items -> files


def _write(
    source: Source, config: ConversionConfig, journal: Journal, sink: Sink, done: int
) -> tuple[Tally, ClassNames]:
    tally, names, items = Tally(), ClassNames(), iter(enumerate(source.items))
    for entry in journal.entries():
        _, item = next(items, (0, None))
        _check_unchanged(config, entry, item, names)
        tally.add(entry)
    taken = {name for entry in journal.entries() if (name := entry.get("stem"))}
    recipe = Recipe(config.size, config.crop, config.format, config.quality)
    with (
        contextlib.closing(_encoded(items, recipe, config.workers)) as results,
        logger.progress_bar(initial=done, total=source.total, unit=" images", desc=os.path.basename(config.out)) as bar,
    ):
        for index, item, result in results:
            entry = _entry(index, item, result, sink, names, taken)
            if "fault" in entry and not config.skip_bad:
                raise _refusal(config.source, entry)
            journal.add(entry)
            tally.add(entry)
            bar.update()
    return tally, names


def _check_unchanged(config: ConversionConfig, entry: Entry, item: Item | None, names: ClassNames) -> None:
    """Refuse to go on with another source than the one begun with."""
    if item is None or (printable(item.key), names(item.label)) != (entry["key"], entry["class"]):
        there = "nothing" if item is None else quoted(item.key)
        part = part_of(config.out.rstrip("/"))
        raise ValueError(
            f"{config.source} has changed since {part} was begun ({there} is where {quoted(entry['key'])} was): remove "
            f"{part} and {part}.jsonl to begin anew"
        )


def _entry(
    index: int, item: Item, result: Encoded | str, sink: Sink, names: ClassNames, taken: set[str]
) -> dict[str, Any]:
    """Write an image, and say what goes to the journal."""
    told: Entry = {"key": printable(item.key), "class": names(item.label)}
    if isinstance(result, str):
        return {**told, "fault": result}
    stem = f"{told['class']}_{item.name or f'{index:07d}'}"
    if item.name and stem in taken:
        return {**told, "fault": f"the name {stem} is another image's already"}
    if item.name:
        taken.add(stem)
        told["stem"] = stem
    return {**told, **sink.add(stem + result.extension, result.content)}


def _refusal(source: str, entry: Entry) -> ValueError:
    return ValueError(
        f"{source}: {entry['key']} cannot be used, {entry['fault']}: repair it and give the command again, which then "
        "goes on from here, or leave such items out with --skip_bad True"
    )


Placed = tuple[int, Item]
Chunk = list[tuple[int, Item, Content | str]]  # place in the source, item, its content or what is wrong with it


def _encoded(
    items: Iterator[Placed], recipe: Recipe, workers: int
) -> Generator[tuple[int, Item, Encoded | str], None, None]:
    """Every item with its output file, or with what is wrong with it, in the order of the source."""
    chunks = _chunks(items)
    results = _in_processes(chunks, recipe, workers) if workers else _here(chunks, recipe)
    for chunk, encoded in results:
        ready = iter(encoded)
        for index, item, content in chunk:
            yield index, item, content if isinstance(content, str) else next(ready)


def _chunks(items: Iterator[Placed]) -> Iterator[Chunk]:
    chunk, size = Chunk(), 0
    for index, item in items:
        content = _load(item)
        chunk.append((index, item, content))
        size += len(content) if isinstance(content, bytes | str) else content.nbytes
        if len(chunk) == CHUNK or size > CHUNK_BYTES:
            yield chunk
            chunk, size = Chunk(), 0
    if chunk:
        yield chunk


def _load(item: Item) -> Content | str:
    try:
        return item.load()
    except (ValueError, OSError) as error:
        return reason(error)


def _contents(chunk: Chunk) -> list[Content]:
    return [content for _, _, content in chunk if not isinstance(content, str)]


def _here(chunks: Iterable[Chunk], recipe: Recipe) -> Iterator[tuple[Chunk, list[Encoded | str]]]:
    for chunk in chunks:
        yield chunk, encode_all(_contents(chunk), recipe)


def _in_processes(chunks: Iterable[Chunk], recipe: Recipe, workers: int) -> Iterator[tuple[Chunk, list[Encoded | str]]]:
    """The same; the processes are new ones, since what threads of this one hold would be copied with it."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
        try:
            at_work = ((chunk, pool.submit(encode_all, _contents(chunk), recipe)) for chunk in chunks)
            yield from _in_order(at_work, 2 * workers)
        except BrokenProcessPool as error:
            raise OSError(
                "a worker process was killed, most likely for want of memory: give fewer --workers; the same command "
                "goes on where this one ended"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _in_order(
    at_work: Iterable[tuple[Chunk, Future[list[Encoded | str]]]], ahead: int
) -> Iterator[tuple[Chunk, list[Encoded | str]]]:
    """The results of futures, of which so many are begun before the first is waited for."""
    waiting = deque[tuple[Chunk, Future[list[Encoded | str]]]]()
    for pair in at_work:
        waiting.append(pair)
        if len(waiting) > ahead:
            chunk, future = waiting.popleft()
            yield chunk, future.result()
    for chunk, future in waiting:
        yield chunk, future.result()


# ---- the end


def _finish(out: str, request: Mapping[str, Any], tally: Tally, names: ClassNames, parts: Mapping[str, Any]) -> None:
    """Report, checksums, and last the name."""
    if not tally.classes.total():
        raise ValueError(f"{request['source']} holds no image that can be used: {_skipped(tally) or 'it is empty'}")
    journal, sink = parts["journal"], parts["sink"]
    sums = [(entry["sha256"], entry["name"]) for entry in journal.entries() if "name" in entry]
    sums += [
        (entry["sha256"], entry["name"])
        for entry in (sink.add(*extra) for extra in parts["extras"]({name for _, name in sums}))
    ]
    write_text(f"{out}.report.json", json.dumps(_report(request, tally, names), indent=1, ensure_ascii=False) + "\n")
    whole, name = sink.seal(), os.path.basename(out)
    lines = [f"{whole}  {name}\n"] if whole else [f"{digest}  {name}/{file}\n" for digest, file in sums]
    write_text(f"{out}.sha256", "".join(lines))
    with files.explained(out):
        os.rename(part_of(out), out)
    journal.remove()


def write_text(path: str, text: str) -> None:
    """Replace a file as a whole."""
    with files.replacing(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def _report(request: Mapping[str, Any], tally: Tally, names: ClassNames) -> dict[str, Any]:
    return {
        "request": dict(request),
        "images": tally.classes.total(),
        "classes": dict(sorted(tally.classes.items())),
        "renamed_classes": names.renamed(),
        "empty_classes": sorted(name for name, count in tally.classes.items() if not count),
        "skipped": tally.skipped,
    }


def _skipped(tally: Tally) -> str:
    if not tally.skipped:
        return ""
    reasons = Counter(entry["reason"] for entry in tally.skipped)
    detail = ", ".join(f"{text}: {count}" for text, count in reasons.most_common(SHOWN))
    return f"skipped {len(tally.skipped)} ({detail}{', ...' if len(reasons) > SHOWN else ''})"


def _summary(out: str, tally: Tally) -> str:
    empty = [name for name, count in tally.classes.items() if not count]
    filled = len(tally.classes) - len(empty)
    lines = [f"{out}: {tally.classes.total()} images in {filled} classes, {_skipped(tally) or 'nothing was skipped'}"]
    lines += [f"  skipped {quoted(entry['item'])}: {entry['reason']}" for entry in tally.skipped[:SHOWN]]
    more = len(tally.skipped) - SHOWN
    lines += [f"  and {more} more, all of them in {out}.report.json"] * (more > 0)
    return "\n".join([*lines, *[f"  no image is left of class {printable(name)}" for name in sorted(empty)]])
