"""Any data set to a folder, a zip or tars of images that `load_data` reads, the class in the name: CLASS_NNNNNNN.png.

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
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from typing import Any

from guided_diffusion import logger
from guided_diffusion.data.archives import archives_of
from guided_diffusion.runtime import files
from guided_diffusion.runtime.atomic import explained, replacing
from guided_diffusion.runtime.errors import UserError, printable, quoted, reason

from .config import ConversionConfig
from .images import Encoded, Item, Recipe, Source, encode, end_with_parent
from .output import Entry, Journal, Sink, open_sink, part_of

AHEAD = 16  # images per worker that are handed out before the first is waited for
LONGEST_CLASS = 150  # bytes: with a number or a name behind it, a file name may have 255
SHOWN = 5
NOT_IN_RESULT = ("out", "workers", "skip_bad")  # flags that do not change the files

_UNFIT = re.compile(r'[\x00-\x20\x7f"*/:<>?\\|_]+')


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
            raise UserError(
                f"the class {quoted(label)} cannot stand in the name of a file: give it a short, plain name"
            )
        other = self._labels.setdefault(name, label)
        if other != label:
            raise UserError(
                f"the classes {quoted(other)} and {quoted(label)} would both be called {name!r} in the names of files: "
                "rename one of them"
            )
        return name

    def renamed(self) -> dict[str, str]:
        """Class in the source -> class in the names of files, where they differ."""
        return {label: name for name, label in sorted(self._labels.items()) if label != name}


@dataclass
class Tally:
    """What became of the items.

    :param taken: names of their own that images have, in place of numbers.
    """

    names: ClassNames = field(default_factory=ClassNames)
    classes: Counter[str] = field(default_factory=Counter)
    skipped: list[dict[str, str]] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)

    def add(self, entry: Entry) -> None:
        """Count an entry of the journal."""
        if entry["class"]:
            self.classes[entry["class"]] += "name" in entry
        if "fault" in entry:
            self.skipped.append({"item": entry["key"], "class": entry["class"], "reason": entry["fault"]})
        if "stem" in entry:
            self.taken.add(entry["stem"])

    def skips(self) -> str:
        """How many items were left out, and why."""
        if not self.skipped:
            return ""
        reasons = Counter(entry["reason"] for entry in self.skipped)
        detail = ", ".join(f"{text}: {count}" for text, count in reasons.most_common(SHOWN))
        return f"skipped {len(self.skipped)} ({detail}{', ...' if len(reasons) > SHOWN else ''})"

    def report(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The content of OUT.report.json."""
        return {
            "request": dict(request),
            "images": self.classes.total(),
            "classes": dict(sorted(self.classes.items())),
            "renamed_classes": self.names.renamed(),
            "empty_classes": sorted(name for name, count in self.classes.items() if not count),
            "skipped": self.skipped,
        }

    def summary(self, out: str) -> str:
        """The lines for the user."""
        empty = [name for name, count in self.classes.items() if not count]
        filled, more = len(self.classes) - len(empty), len(self.skipped) - SHOWN
        lines = [f"{out}: {self.classes.total()} images in {filled} classes, {self.skips() or 'nothing was skipped'}"]
        lines += [f"  skipped {quoted(entry['item'])}: {entry['reason']}" for entry in self.skipped[:SHOWN]]
        lines += [f"  and {more} more, all of them in {out}.report.json"] * (more > 0)
        return "\n".join([*lines, *[f"  no image is left of class {printable(name)}" for name in sorted(empty)]])


def convert(source: Source, config: ConversionConfig, script: str) -> None:
    """Write a data set to ``config.out``, going on with what a run that was killed has left there.

    :raises ValueError: naming the item, if one cannot be used and ``config.skip_bad`` is False; or if the source has
        changed since the first run, holds no image, or the output is there already.
    """
    out = config.out.rstrip("/") or config.out
    check_paths(config.source, out)
    options = {name: value for name, value in asdict(config).items() if name not in NOT_IN_RESULT}
    request = {"script": script, **options, "source": os.path.abspath(config.source)}
    if os.path.exists(out):
        _settle(out, request)
        return
    journal = Journal(out, request)
    with contextlib.closing(journal), contextlib.closing(open_sink(out)) as sink:
        done = journal.resume(sink, skip_bad=config.skip_bad)
        tally = _write(source, config, journal, sink, done)
        if not tally.classes.total():
            raise UserError(f"{config.source} holds no image that can be used: {tally.skips() or 'it is empty'}")
        _finish(out, tally.report(request), source, journal, sink)
    print(tally.summary(out))


def check_paths(source: str, out: str) -> None:
    """Refuse places that no data set can come from or go to, before anything is read.

    :raises ValueError: naming the place.
    """
    if not out:
        raise UserError("OUT '' is no name: give a folder to make, or a name that ends in .zip or .tars")
    if not (os.path.exists(source) or archives_of(source)):
        raise UserError(f"SOURCE {quoted(source)} is not there: give the path of the data set as it was fetched")
    folder = os.path.realpath(source)
    if os.path.isdir(folder) and os.path.realpath(out).startswith(os.path.join(folder, "")):
        raise UserError(f"OUT {quoted(out)} lies in SOURCE {quoted(source)}: choose a place outside")


def _settle(out: str, request: Mapping[str, Any]) -> None:
    """Nothing is left to do where the same command has made the output before."""
    try:
        same = files.parse_json(files.read_file(f"{out}.report.json"))["request"] == request
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise UserError(f"OUT {quoted(out)} is there already, and not from this command: remove it, or choose another")
    with contextlib.suppress(OSError):
        os.remove(f"{part_of(out)}.jsonl")
    print(f"{out} is complete already: nothing was done")


def _finish(out: str, report: Mapping[str, Any], source: Source, journal: Journal, sink: Sink) -> None:
    """Report, checksums, and last the name."""
    sums = [(entry["sha256"], entry["name"]) for entry in journal.entries() if "name" in entry]
    extras = [sink.add(*extra) for extra in source.extras({name for _, name in sums})]
    sums += [(entry["sha256"], entry["name"]) for entry in extras]
    _replace(f"{out}.report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    name = os.path.basename(out)
    lines = [f"{digest}  {name}{f'/{file}' * bool(file)}\n" for digest, file in sink.seal() or sums]
    _replace(f"{out}.sha256", "".join(lines))
    with explained(out):
        os.rename(part_of(out), out)
    journal.remove()


def _replace(path: str, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def _write(source: Source, config: ConversionConfig, journal: Journal, sink: Sink, done: int) -> Tally:
    tally, items = Tally(), iter(enumerate(source.items))
    for entry in journal.entries():
        _, item = next(items, (0, None))
        _check_unchanged(config, entry, item, tally.names)
        tally.add(entry)
    generator = isinstance(source.items, Generator)
    with (
        contextlib.closing(source.items) if generator else contextlib.nullcontext(),  # type: ignore[type-var]
        contextlib.closing(_encoded(items, config)) as results,
        logger.progress_bar(initial=done, total=source.total, unit=" images", desc=os.path.basename(config.out)) as bar,
    ):
        for index, item, result in results:
            entry = _entry(index, item, result, tally, sink)
            if "fault" in entry and not config.skip_bad:
                raise UserError(
                    f"{config.source}: {entry['key']} cannot be used, {entry['fault']}: repair it and give the command "
                    "again, which then goes on from here, or leave such items out with --skip_bad True"
                )
            journal.add(entry)
            tally.add(entry)
            bar.update()
    return tally


def _check_unchanged(config: ConversionConfig, entry: Entry, item: Item | None, names: ClassNames) -> None:
    """Refuse to go on with another source than the one begun with."""
    if item is None or (printable(item.key), names(item.label)) != (entry["key"], entry["class"]):
        present, part = "nothing" if item is None else quoted(item.key), part_of(config.out.rstrip("/"))
        raise UserError(
            f"{config.source} has changed since {part} was begun ({present} is where {quoted(entry['key'])} was): "
            f"remove {part} and {part}.jsonl to begin anew"
        )


def _entry(index: int, item: Item, result: Encoded | str, tally: Tally, sink: Sink) -> Entry:
    """Write an image; returns its line of the journal."""
    entry: Entry = {"key": printable(item.key), "class": tally.names(item.label)}
    if isinstance(result, str):
        return {**entry, "fault": result}
    stem = f"{entry['class']}_{item.name or f'{index:07d}'}"
    if item.name and stem in tally.taken:
        return {**entry, "fault": f"the name {stem} is another image's already"}
    if item.name:
        entry["stem"] = stem
    return {**entry, **sink.add(stem + result.extension, result.content, item.beside)}


class _ThisProcess(Executor):
    """Does work at once, where it is handed out."""

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = Future[Any]()
        future.set_result(function(*args, **kwargs))
        return future


def _encoded(
    items: Iterator[tuple[int, Item]], config: ConversionConfig
) -> Generator[tuple[int, Item, Encoded | str], None, None]:
    """(place, item, its output file or what is wrong with it), in the order of the source."""
    recipe = Recipe(config.size, config.crop, config.format, config.quality)
    waiting = deque[tuple[int, Item, Future[Encoded | str]]]()
    pool: Executor = _ThisProcess()
    if config.workers:  # new processes, as what threads of this one hold would be copied to forked ones
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(config.workers, mp_context=context, initializer=end_with_parent)
    try:
        for index, item in items:
            waiting.append((index, item, _submitted(pool, item, recipe)))
            if len(waiting) > AHEAD * config.workers:
                index, item, future = waiting.popleft()
                yield index, item, future.result()
        for index, item, future in waiting:
            yield index, item, future.result()
    except BrokenProcessPool as error:
        raise OSError(
            "a worker process was killed, most likely for want of memory: give fewer --workers; the same command goes "
            "on where this one ended"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _submitted(pool: Executor, item: Item, recipe: Recipe) -> Future[Encoded | str]:
    try:
        content = item.load()
    except (ValueError, OSError) as error:
        failed = Future[Encoded | str]()
        failed.set_result(reason(error))
        return failed
    return pool.submit(encode, content, recipe)
