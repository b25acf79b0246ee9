"""Cut a zip of emoji in two: ``python split.py SOURCE TRAIN HELD_OUT``. All drawings of one emoji lie on one side.

A tenth of the emoji is held out, the one that datasets/emoji.py keeps for tests. With the config.json of a model as a
fourth argument, the split is recorded in it.
Samples of a model of TRAIN are compared with HELD_OUT, which it has never seen in any style of drawing.
"""

import json
import sys
import zipfile
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "datasets"))
from emoji import split_of


def held_out(name: str) -> bool:
    """Whether the emoji of a file such as flags_google-1f1e6-1f1e8.png is held out."""
    return split_of(Path(name).stem.partition("-")[2]) == "test"


def split(source: str, train: str, rest: str) -> None:
    """Write both parts, each with its captions and the licences."""
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(train, "w") as ours, zipfile.ZipFile(rest, "w") as theirs:
        names = archive.namelist()
        captions = json.loads(archive.read("captions.json")) if "captions.json" in names else {}
        for part, side in ((ours, False), (theirs, True)):
            taken = [name for name in names if name.endswith(".png") and held_out(name) is side]
            for name in taken:
                part.writestr(zipfile.ZipInfo(name), archive.read(name))  # of one time: the same bytes every time
            texts = {name: captions[name] for name in taken if name in captions}
            part.writestr(zipfile.ZipInfo("captions.json"), json.dumps(texts, ensure_ascii=False, indent=0))
            if "LICENSE.txt" in names:
                part.writestr(zipfile.ZipInfo("LICENSE.txt"), archive.read("LICENSE.txt"))
            print(f"{part.filename}: {len(taken)} pictures")


def record(train: str, rest: str, config: str) -> None:
    """Write into a config.json how many pictures each side has, and the code points of the emoji held out."""
    sides = [[name for name in zipfile.ZipFile(path).namelist() if name.endswith(".png")] for path in (train, rest)]
    emoji = " ".join(sorted({Path(name).stem.partition("-")[2] for name in sides[1]}))
    content = json.loads(Path(config).read_text())
    content["split"] = {"by": "emoji", "training": len(sides[0]), "held_out": len(sides[1]), "held_out_emoji": emoji}
    Path(config).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        raise SystemExit("usage: python split.py SOURCE TRAIN HELD_OUT [CONFIG]")
    split(*sys.argv[1:4])
    if sys.argv[4:]:
        record(*sys.argv[2:])
