"""report.html: what a training has done so far, in one file to open in a browser, to copy or to mail.

It is drawn from the files of the run's folder, so that a resumed run shows its whole history.
"""

from __future__ import annotations

import base64
import io
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from html import escape
from pathlib import Path

from PIL import Image

from .. import dist_util, logger
from ..runtime.atomic import replacing
from ..runtime.errors import sentence
from ..runtime.log_writers import CSVOutputFormat, KeyValues, KVWriter, read_rows
from .charts import CHART_STYLE, Curves, chart, short

NAME, TABLE, EVALUATION = "report.html", "progress.csv", "evaluation.csv"
PAUSE = 10.0  # seconds between two reports, at least
SHARE = 0.005  # of the time of a training that may go into reports
SHOWN, LATEST, EARLIER = 12, 1024, 384  # grids of a folder that are shown, and pixels of the last and the others
SMALL = 2**18  # bytes up to which a picture of these pixels is inlined as it is

# title, columns of progress.csv, scale of the axis, explanation
CHARTS = (
    ("Loss", r"(train_|val_)?loss", "auto", ""),
    ("Loss per quarter of the timesteps", r"(train_)?loss_q\d", "auto", "q0: little noise, q3: nearly nothing else"),
    ("Validation loss per quarter", r"val_loss_q\d", "auto", ""),
    ("Accuracy", r"(train_|val_)acc@\d+", "zero", ""),
    ("Learning rate", r"lr", "zero", ""),
    ("Norm of the gradient", r"grad_norm", "auto", ""),
    ("Images per second", r"images_per_second", "zero", "of all processes together"),
    ("Share of the time spent waiting for data", r"data_wait", "zero", "0 is best: else more --num_workers"),
)
NOT_DRAWN = r"step|samples|eval_.*|dummy"
PICTURES = (("previews", "Samples of the moving average"), ("reconstructions", "Images above their reconstructions"))

STYLE = (
    """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#1c2430;--soft:#667080;--line:#e4e7ec;
--c0:#2166c4;--c1:#d9730d;--c2:#12885e;--c3:#b4459b;--c4:#7a6ae0}
@media(prefers-color-scheme:dark){:root{--page:#12151a;--card:#1b2027;--ink:#e4e8ee;--soft:#97a1b0;--line:#2d343e;
--c0:#6aa5f5;--c1:#f0a04b;--c2:#4cc59a;--c3:#e48ad0;--c4:#a79bf7}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1400px;padding:1.2rem 1rem 3rem;background:var(--page);color:var(--ink);
font:15px/1.45 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;margin:0}h2{font-size:1.15rem;margin:2rem 0 .7rem}h3{font-size:1rem;margin:0}
p,figcaption{color:var(--soft);font-size:.86rem;margin:.15rem 0}
a{color:var(--c0)}
.tiles,.charts{display:grid;gap:.8rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,350px),1fr))}
.tiles{grid-template-columns:repeat(auto-fit,minmax(130px,1fr));margin:1rem 0}
.card,.tiles>div{margin:0;padding:.8rem .9rem;background:var(--card);border:1px solid var(--line);border-radius:10px}
.tiles b{display:block;font-size:1.3rem}.tiles span{color:var(--soft);font-size:.82rem}
.keys{display:flex;flex-wrap:wrap;gap:.1rem 1rem;font-size:.86rem;margin:.3rem 0}
.strip{display:flex;gap:.8rem;overflow-x:auto;align-items:end}
.strip figure{margin:0;flex:none}.strip img{height:190px;width:auto;max-width:none}
img{display:block;max-width:100%;border-radius:6px}img.tiny{image-rendering:pixelated}
.latest{margin:0 0 1rem}.latest figure{margin:0}.latest img{width:min(100%,34rem)}
dl{columns:22rem;column-gap:2rem;font-size:.86rem;margin:0}
dl div{display:flex;gap:1rem;justify-content:space-between;padding:.2rem 0;border-bottom:1px solid var(--line)}
dl div{break-inside:avoid}
dt{flex:none}dd{margin:0;font-family:ui-monospace,monospace;text-align:right}
progress{width:100%;height:.5rem;accent-color:var(--c0)}
summary{cursor:pointer;margin:1rem 0 .6rem;font-weight:600}
"""
    + CHART_STYLE
)


class Report(KVWriter):
    """Writes the report when a row of the log is dumped, as often as its small share of the time allows.

    :param table: the run's progress.csv; its folder is that of the report.
    :param values: the run's flags; those that differ from `defaults` are shown first.
    :param limit: updates of the whole run, 0 if there is no end.
    """

    def __init__(self, table: str, values: KeyValues, defaults: KeyValues, *, title: str = "", limit: int = 0) -> None:
        self.table, self.folder, self.title, self.limit = table, Path(table).parent, title, limit
        self.values, self.defaults = values, defaults
        self._due = 0.0

    def writekvs(self, kvs: KeyValues) -> None:
        if time.monotonic() >= self._due:
            self.write()

    def write(self, outcome: str = "") -> None:
        """Write the report now.

        :param outcome: how the run ended, '' while it goes on.
        """
        start = time.monotonic()
        page = self.page(outcome)
        with replacing(str(self.folder / NAME)) as file:
            file.write(page.encode())
        end = time.monotonic()
        self._due = end + max(PAUSE, (end - start) / SHARE)

    def page(self, outcome: str = "") -> str:
        """The whole page."""
        rows = read_rows(self.table)
        title = escape(f"{self.title} {self.folder.resolve().name}".strip())
        refresh = "" if outcome else '<meta http-equiv="refresh" content="60">'
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        state = (
            f"{escape(outcome)}, {now}" if outcome else f"in training, seen at {now}; the page looks again every minute"
        )
        head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">{refresh}'
        parts = [
            f"<!doctype html><html lang=en><head>{head}<title>{title}</title><style>{STYLE}</style></head><body>",
            f"<header><h1>{title}</h1><p>{state}</p>{_tiles(rows, self.limit, done=bool(outcome))}</header>",
            *_charts(rows),
            *(section for folder, about in PICTURES for section in _pictures(self.folder / folder, about)),
            *_evaluations(self.folder / EVALUATION),
            *self._flags(),
            _files(self.folder),
            "</body></html>\n",
        ]
        return "\n".join(parts)

    def _flags(self) -> list[str]:
        changed = {name: value for name, value in self.values.items() if value != self.defaults.get(name)}
        return [
            "<h2>Flags</h2>",
            f'<div class="card">{_table(changed)}',
            f"<details><summary>all {len(self.values)} flags</summary>{_table(self.values)}</details></div>",
        ]


@contextmanager
def reporting(values: KeyValues, defaults: KeyValues, *, title: str = "", limit: int = 0) -> Iterator[None]:
    """Keep the report of the current run inside the block; there is none without a progress.csv."""
    current = logger.get_current()
    tables = [writer.filename for writer in current.output_formats if isinstance(writer, CSVOutputFormat)]
    if not tables or dist_util.rank() > 0:
        yield
        return
    report = Report(tables[0], values, defaults, title=title, limit=limit)
    before = current.output_formats
    current.output_formats = [*before, report]
    try:
        yield
    except BaseException as error:
        interrupted = isinstance(error, SystemExit | KeyboardInterrupt)
        with suppress(OSError):  # the error that ended the run is the one to tell
            report.write("interrupted" if interrupted else f"ended by an error: {sentence(error)}")
        raise
    else:
        report.write("complete")
    finally:
        current.output_formats = before


def _columns(rows: Sequence[Mapping[str, float]]) -> dict[str, list[tuple[float, float]]]:
    """The (step, value) of each column, in the order of their names."""
    names = sorted({name for row in rows for name in row})
    return {name: [(row["step"], row[name]) for row in rows if name in row] for name in names}


def _tiles(rows: Sequence[Mapping[str, float]], limit: int, *, done: bool) -> str:
    """Where the run stands, in a few numbers."""
    latest = {name: value for row in rows for name, value in row.items()}
    step, speed = latest.get("step", 0.0), latest.get("images_per_second", 0.0)
    tiles = [(f"of {limit:,} steps" if limit else "steps", f"{step:,.0f}")]
    tiles += [
        (name.replace("_", " "), short(latest[name])) for name in ("loss", "train_loss", "val_loss") if name in latest
    ]
    tiles += [("images per second", short(speed))] if speed else []
    tiles += [("of the time waiting for data", f"{latest['data_wait']:.0%}")] if "data_wait" in latest else []
    if limit > step > 0 and speed > 0 and not done:
        minutes = (limit - step) * latest.get("samples", 0.0) / step / speed / 60
        tiles.append(("to go at this speed", f"{minutes / 60:.1f} h" if minutes >= 90 else f"{minutes:.0f} min"))
    bar = f'<progress max="{limit}" value="{min(step, limit):.0f}"></progress>' if limit else ""
    shown = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in tiles)
    return f'<div class="tiles">{shown}</div>{bar}'


def _charts(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """The curves of the log: the chosen ones, and all others folded away, those of a name and its quarters together."""
    columns = {name: points for name, points in _columns(rows).items() if not re.fullmatch(NOT_DRAWN, name)}
    figures, others = [], dict[str, list[str]]()
    for title, pattern, scale, note in CHARTS:
        curves = [(name, columns.pop(name)) for name in list(columns) if re.fullmatch(pattern, name)]
        figures.append(chart(title, curves, scale=scale, note=note))
    for name in columns:
        others.setdefault(
            re.sub(r"^(train_|val_)|_q\d$", "", name) + "_q" * bool(re.search(r"_q\d$", name)), []
        ).append(name)
    more = [chart(names[0], [(name, columns[name]) for name in names]) for names in others.values()]
    folded = (
        f"<details><summary>{len(more)} more</summary><div class=charts>{''.join(more)}</div></details>" if more else ""
    )
    return ["<h2>Curves</h2>", f'<div class="charts">{"".join(figures)}</div>', folded]


def _evaluations(path: Path) -> list[str]:
    """The curves of evaluation.csv, of the evaluations with as many samples as the last one."""
    rows = read_rows(path) if path.exists() else []
    rows = [row for row in rows if row.get("samples") == rows[-1].get("samples")]
    groups: list[Curves] = [
        [item] for item in _columns(rows).items() if not re.match(r"step$|samples$|.* standard error", item[0])
    ]
    figures = [chart(curves[0][0], curves, scale="linear") for curves in groups]
    about = f"<p>of {rows[-1].get('samples', 0):,.0f} samples</p>" if rows else ""
    return ["<h2>Evaluation</h2>", about, f'<div class="charts">{"".join(figures)}</div>'] if rows else []


def _pictures(folder: Path, about: str) -> list[str]:
    """The newest grid of a folder, and others evenly over the run before it."""
    names = sorted(path.name for path in folder.glob("*.png") if path.stem.isdigit()) if folder.is_dir() else []
    count = min(SHOWN, len(names))
    chosen = [names[round(index * (len(names) - 1) / max(count - 1, 1))] for index in range(count)]
    figures = [_figure(folder / name, LATEST if name == names[-1] else EARLIER) for name in chosen]
    if not any(figures):
        return []
    *earlier, latest = filter(None, figures)
    strip = f'<div class="strip">{"".join(earlier)}</div>' if earlier else ""
    return [f"<h2>{about}</h2><div class=card><div class=latest>{latest}</div>{strip}</div>"]


def _figure(path: Path, side: int) -> str:
    """A picture that is named for its step, '' of one that cannot be read."""
    with suppress(OSError):
        data, width = _inlined(str(path), path.stat().st_mtime_ns, side)
        link = f"{path.parent.name}/{path.name}"
        picture = f'<img src="{data}" alt="{link}"{" class=tiny" * (width < 300)}>'
        return f'<figure><a href="{link}">{picture}</a><figcaption>step {int(path.stem):,}</figcaption></figure>'
    return ""


@lru_cache(maxsize=4 * SHOWN)
def _inlined(path: str, changed: int, side: int) -> tuple[str, int]:
    """A picture as an address of its own, and its width; large ones are scaled down.

    :param changed: when the file was written, so that another picture of that name is read again.
    """
    with Image.open(path) as picture:
        if max(picture.size) <= side and os.path.getsize(path) <= SMALL:
            kind, content = "png", Path(path).read_bytes()
        else:
            picture.thumbnail((side, side))
            picture.convert("RGB").save(buffer := io.BytesIO(), "JPEG", quality=88)
            kind, content = "jpeg", buffer.getvalue()
        return f"data:image/{kind};base64,{base64.b64encode(content).decode()}", picture.width


def _table(values: KeyValues) -> str:
    pairs = (f"<div><dt>{escape(name)}<dd>{escape(str(value)) or '&nbsp;'}</div>" for name, value in values.items())
    return f"<dl>{''.join(pairs)}</dl>"


def _files(folder: Path) -> str:
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if path.name != NAME)
    links = " &middot; ".join(f'<a href="{escape(name)}">{escape(name)}</a>' for name in names if ".part-" not in name)
    return f'<h2>Files</h2><div class="card"><p><b>{escape(str(folder.resolve()))}</b></p><p>{links}</p></div>'
