"""What the benchmarks of speed share: flags, turns, the machine and its ceiling, tables, JSON, docs/benchmarks.md.

A benchmark is a module with a docstring, and a `main` like this:

    def main(argv=None):
        bench = Bench.begin(__doc__, "loader", argv)
        turns = bench.turns({"plain": slow, "ours": fast})  # seconds of each, taken in turns: A B A B ...
        rows = [[name, milliseconds(turns.seconds(name)), times(turns.ratio("plain", name))] for name in turns.names]
        bench.add("how pictures are read", ["way", "ms", "speed-up"], rows)
        bench.finish()

`bench.quick` asks for sizes that take a second or two in all; they show that it works, and measure nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch as th

import pages

DTYPES = {"fp32": th.float32, "fp16": th.float16, "bf16": th.bfloat16}

Ways = Mapping[str, Callable[[], object]]
Ceiling = dict[str, dict[str, float]]  # FLOP/s by precision, then by what was computed


@dataclass(frozen=True)
class Turns:
    """Seconds of several ways to do a thing, of which each was taken in every round."""

    rounds: Mapping[str, Sequence[float]]

    @property
    def names(self) -> list[str]:
        """The ways, in their order."""
        return list(self.rounds)

    def seconds(self, name: str) -> float:
        """The median over the rounds."""
        return statistics.median(self.rounds[name])

    def ratio(self, slow: str, fast: str) -> float:
        """How often the one fits into the other: the median of the rounds' own ratios, which drifts cancel in."""
        pairs = zip(self.rounds[slow], self.rounds[fast], strict=True)
        return statistics.median(one / other for one, other in pairs)


def in_turns(
    ways: Ways,
    *,
    rounds: int,
    warm_up: int = 1,
    lead: int = 0,
    device: th.device | str = "cpu",
    say: Callable[[str], object] = print,
) -> Turns:
    """Take every way once, then every way again, and so on.

    :param warm_up: rounds that are not measured.
    :param lead: how often a way is taken right before it is measured: a system takes memory back from what rests, and
        the first step of a way that holds gigabytes would pay for that.
    :param say: is told what each measured round took.
    """
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(warm_up + rounds):
        for name, way in ways.items():
            for _ in range(lead if number >= warm_up else 0):
                way()
            synchronize(device)
            began = time.perf_counter()
            way()
            synchronize(device)
            if number >= warm_up:
                found[name].append(time.perf_counter() - began)
        if number >= warm_up:
            say("  ".join(f"{name} {values[-1]:.4g} s" for name, values in found.items()))
    return Turns(found)


def synchronize(device: th.device | str) -> None:
    """Wait until a device has done what it was given."""
    if th.device(device).type == "cuda":
        th.cuda.synchronize(device)


def cpu_model() -> str:
    """What the processor calls itself, and whether it multiplies bfloat16 in tiles."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return (names[0] if names else platform.processor() or platform.machine()) + ", AMX" * ("amx_bf16" in text)


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(device: th.device) -> dict[str, Any]:
    """What the numbers depend on."""
    about = {"cpu": cpu_model(), "cores": cores(), "threads": th.get_num_threads()}
    about |= {"python": platform.python_version(), "torch": th.__version__, "device": str(device)}
    return about | ({"gpu": th.cuda.get_device_name(device)} if device.type == "cuda" else {})


def in_words(about: Mapping[str, Any]) -> str:
    """`machine` as a sentence."""
    gpu = f"{about['gpu']}; " if "gpu" in about else ""
    return (
        f"{gpu}{about['cpu']}, {about['cores']} cores, {about['threads']} threads; torch {about['torch']}, "
        f"Python {about['python']}."
    )


def ceiling(device: th.device, precisions: Sequence[str], *, quick: bool = False, rounds: int = 3) -> Ceiling:
    """FLOP/s of a large matrix product and of a large convolution, in the layout that suits it better."""
    side, channels, batch = (256, 32, 1) if quick else (8192, 512, 32) if device.type == "cuda" else (3072, 256, 8)
    work = {"matrix product": 2.0 * side**3, "convolution": 2.0 * batch * 64**2 * channels**2 * 9}
    found: Ceiling = {}
    for precision in precisions:
        options = {"dtype": DTYPES[precision], "device": device}
        a, b = (th.randn(side, side, **options) for _ in range(2))
        ways = {"matrix product": partial(th.matmul, a, b)}
        for layout in (th.contiguous_format, th.channels_last):
            conv = th.nn.Conv2d(channels, channels, 3, padding=1).to(**options, memory_format=layout)
            images = th.randn(batch, channels, 64, 64, **options).to(memory_format=layout)
            ways[f"convolution {layout}"] = partial(conv, images)
        with th.no_grad():
            turns = in_turns(ways, rounds=rounds, device=device, say=lambda _: None)
        least = {kind: min(turns.seconds(name) for name in turns.names if name.startswith(kind)) for kind in work}
        found[precision] = {kind: work[kind] / least[kind] for kind in work}
    return found


def milliseconds(seconds: float) -> str:
    """With three significant digits."""
    value = 1000 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def times(ratio: float) -> str:
    """A ratio with two decimals."""
    return f"{ratio:.2f}x"


def megabytes(count: float) -> str:
    """Bytes in units of 10^6."""
    return f"{count / 1e6:,.0f}"


@dataclass
class Bench:
    """One run of a benchmark: what it was asked, and the tables it has made so far."""

    key: str
    given: argparse.Namespace
    command: str
    tables: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    page: Path | None = None  # in place of docs/benchmarks.md

    @classmethod
    def begin(
        cls,
        about: str | None,
        key: str,
        argv: Sequence[str] | None = None,
        *,
        parts: Sequence[str] = (),
        default: Sequence[str] = (),
        flags: Callable[[argparse.ArgumentParser], object] = lambda _: None,
    ) -> Bench:
        """Read the command line, and set threads and random numbers.

        :param about: the module's docstring: the help, of which the second line is the command in the page.
        :param key: of its section in docs/benchmarks.md, and the name of its file.
        :param parts: of the benchmark that --only may choose from.
        :param default: the parts that are measured without it; all of them.
        :param flags: adds flags of its own.
        """
        words = list(sys.argv[1:] if argv is None else argv)
        given = _parser(about, parts, default or parts, flags).parse_args(words)
        unknown = set(given.only.split(",")) - set(parts) if parts else ()
        if unknown:
            raise SystemExit(f"--only: {', '.join(sorted(unknown))} is no part of this: name some of {','.join(parts)}")
        if given.rounds < 1:
            raise SystemExit(f"--rounds {given.rounds} measures nothing: give 1 or more")
        if given.quick and given.write:
            raise SystemExit("--write contradicts --quick, which measures nothing: give one of the two")
        th.set_num_threads(given.threads or cores())
        th.manual_seed(0)
        shown = _without(words, "--json", "--write")
        return cls(key, given, " ".join(["python", f"benchmarks/{key}.py", *shown]))

    @property
    def quick(self) -> bool:
        """Whether sizes are to be small."""
        return bool(self.given.quick)

    @cached_property
    def device(self) -> th.device:
        """What networks run on."""
        default = "cuda" if th.cuda.is_available() else "cpu"
        return th.device(self.given.device or default)

    @property
    def rounds(self) -> int:
        """How often things are measured."""
        return 1 if self.quick else self.given.rounds

    @property
    def precisions(self) -> list[str]:
        """What our networks are measured in; a CPU has no fp16."""
        return ["fp32", "bf16", *(["fp16"] if self.device.type == "cuda" else [])]

    @property
    def plain_precisions(self) -> list[str]:
        """What the plain path is measured in: the originals' own."""
        return [precision for precision in self.precisions if precision != "bf16"]

    @property
    def base(self) -> str:
        """What all else is compared with: what the originals would be run in on such a device."""
        return f"plain {self.plain_precisions[-1]}"

    def wants(self, part: str) -> bool:
        """Whether a part is to be measured."""
        return part in self.given.only.split(",")

    def say(self, text: str) -> None:
        """Tell how it goes, on stderr."""
        print(f"    {text}", file=sys.stderr, flush=True)

    def turns(self, ways: Ways, *, rounds: int | None = None, warm_up: int = 1, lead: int = 0) -> Turns:
        """`in_turns` on this benchmark's device."""
        count = self.rounds if rounds is None or self.quick else rounds
        return in_turns(ways, rounds=count, warm_up=warm_up, lead=lead, device=self.device, say=self.say)

    @cached_property
    def ceiling(self) -> Ceiling:
        """What this machine can do, measured when first asked for and noted in the results."""
        found = ceiling(self.device, self.precisions, quick=self.quick)
        self.facts["ceiling"] = found
        return found

    def share(self, flops: float, seconds: float, precision: str) -> str:
        """What part of the ceiling so many operations in so many seconds are."""
        return f"{flops / seconds / max(self.ceiling[precision].values()):.0%}"

    def add(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], **facts: Any) -> None:
        """Print a table, and keep it for the file and the page.

        :param facts: what the JSON is to say beside it, such as all seconds of all rounds.
        """
        block = pages.table(columns, rows)
        print(f"\n{title}\n\n{block}", flush=True)
        found = {"title": title, "columns": list(columns), "rows": [list(row) for row in rows]}
        self.tables.append({**found, **facts})

    def note(self, text: str) -> None:
        """Say a sentence under the tables, and in the file and the page."""
        self.notes.append(text)

    def finish(self) -> None:
        """Print what it ran on, and write the file and the page where they are asked for."""
        about = machine(self.device)
        notes = [*self.notes, in_words(about), *self._ceiling_in_words()]
        print("\n" + "\n".join(notes), flush=True)
        if self.given.json:
            found = {
                "command": self.command,
                "machine": about,
                "notes": self.notes,
                **self.facts,
                "tables": self.tables,
            }
            Path(self.given.json).write_text(json.dumps(found, indent=2, default=str) + "\n", encoding="utf-8")
        if self.given.write:
            blocks = [f"{t['title']}:\n\n{pages.table(t['columns'], t['rows'])}" for t in self.tables]
            pages.write(
                self.page or pages.SPEED, self.key, "\n\n".join([f"    {self.command}", " ".join(notes), *blocks])
            )

    def _ceiling_in_words(self) -> list[str]:
        found: Ceiling = self.facts.get("ceiling", {})
        words = [
            f"{precision} " + ", ".join(f"{value / 1e9:,.0f} ({what})" for what, value in kinds.items())
            for precision, kinds in found.items()
        ]
        return [f"Ceiling in GFLOP/s: {'; '.join(words)}."] if words else []


def _parser(
    about: str | None, parts: Sequence[str], default: Sequence[str], flags: Callable[[argparse.ArgumentParser], object]
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes: to see that it works")
    if parts:
        parser.add_argument("--only", default=",".join(default), help=f"some of {','.join(parts)}")
    parser.add_argument("--rounds", type=int, default=3, help="how often each way is measured (3)")
    parser.add_argument("--device", default="", help="cpu, cuda, cuda:1; the GPU where there is one")
    parser.add_argument("--threads", type=int, default=0, help="of the processor; one for each core")
    parser.add_argument("--json", default="", help="file to write")
    parser.add_argument("--write", action="store_true", help="write the section of docs/benchmarks.md")
    flags(parser)
    return parser


def _without(words: Sequence[str], valued: str, *plain: str) -> list[str]:
    """A command line without where its results go."""
    kept, skip = [], False
    for word in words:
        if not (skip or word == valued or word.startswith(f"{valued}=") or word in plain):
            kept.append(word)
        skip = word == valued
    return kept
