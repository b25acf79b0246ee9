"""Images as bytes and as numbers in [-1, 1], PNG files of them, labelled grids, and films of their making.

Images are uint8 [H, W, C], several of them [N, H, W, C], with C = 1 (grey), 3 (RGB) or 4 (RGBA).
"""

from __future__ import annotations

import math
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch as th
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from .atomic import replacing
from .errors import refuse
from .npz import read_npz

Pixels = npt.NDArray[np.uint8]
Numbers = TypeVar("Numbers", th.Tensor, npt.NDArray[np.float32])

HALF = 127.5  # levels of a byte from the middle to either end
LEVEL = 1 / HALF  # one level of a byte in [-1, 1]

DRAWN_CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
CELL = 64  # smaller images are enlarged to about this
PAD = 2
GROUP_GAP = 12
MARGIN = 6
LONGEST_NAME = 24
LETTER, LINE, CAPTION_LINES = 6, 12, 3  # pixels of a letter and of a line below an image, and most lines
LONGEST_STEM = 40  # characters of a prompt in the name of a file
GRID_IMAGES = 100


def levels(x: Numbers) -> Numbers:
    """[-1, 1] as levels 0 .. 255 of a byte, neither rounded nor clipped."""
    return (x + 1) * HALF


def to_uint8(x: th.Tensor) -> Pixels:
    """uint8 [N, H, W, C] from [N, C, H, W] in [-1, 1]: levels clamped and truncated; NaN becomes black."""
    rounded = levels(x.detach()).nan_to_num(nan=0.0).clamp(0, 255).to(th.uint8)
    pixels: Pixels = rounded.movedim(1, -1).contiguous().cpu().numpy()
    return pixels


def to_unit(images: th.Tensor) -> th.Tensor:
    """Bytes as float32 in [-1, 1], the same bits on every device; numbers of other types stay as they are."""
    if images.dtype != th.uint8:
        return images
    # CUDA would multiply by the inverse of a number of Python's; a tensor it divides by
    half = th.full((), HALF, device=images.device)
    return images.to(th.float32).div_(half).sub_(1)


def planes(pixels: Pixels) -> th.Tensor:
    """[N, C, H, W] in [-1, 1] of images uint8 [N, H, W, C]."""
    return to_unit(th.from_numpy(pixels).movedim(-1, 1))


def range_in_words(images: th.Tensor) -> str:
    """The least and the largest number of images in [-1, 1], and what to do where they use less than half of it."""
    low, high = images.min().item(), images.max().item()
    used = f"{low:.3g} to {high:.3g} of -1 to 1"
    if not -math.inf < high - low <= 1.1:
        return used
    return (
        f"{used}, which is little: if black and white are other numbers in the files, say which, such as --data_range "
        "0,1 for floats or 0,4095 for 12 bits"
    )


def can_draw(shape: Sequence[int]) -> bool:
    """Whether images of a shape (C, H, W) can be drawn."""
    return len(shape) == 3 and shape[0] in DRAWN_CHANNELS


def as_picture(image: Pixels) -> Image.Image:
    """An image [H, W, C] as a picture of PIL."""
    drawable = image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] in DRAWN_CHANNELS
    refuse((not drawable, f"{image.dtype} {image.shape} cannot be drawn: give uint8 [H, W, C] with C = 1, 3 or 4"))
    return Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[-1] == 1 else image))


def save_png(path: str, image: Pixels, **texts: str) -> None:
    """Write one image [H, W, C], with texts by their keywords in the file."""
    info = PngInfo()
    for keyword, text in texts.items():
        info.add_text(keyword, text)
    as_picture(image).save(path, format="PNG", pnginfo=info)


def save_picture(path: str, picture: Image.Image, kind: str = "PNG", **options: Any) -> None:
    """Write a picture of PIL, and the folder that it lies in where that is missing."""
    with replacing(path) as file:
        picture.save(file, format=kind, **options)


def save_grid(path: str, images: Pixels, columns: int, row_names: Sequence[str] = (), **options: Any) -> None:
    """Write the picture that `grid` makes."""
    save_picture(path, grid(images, columns, row_names, **options))


def grid(
    images: Pixels,
    columns: int,
    row_names: Sequence[str] = (),
    *,
    titles: Sequence[str] = (),
    captions: Sequence[str] = (),
    gap: int = GROUP_GAP,
    zoom: int = 0,
) -> Image.Image:
    """Images [N, H, W, C] side by side, row by row.

    :param row_names: written to the left of the rows.
    :param titles: written above groups of columns: ("unguided", "guided") halves the picture.
    :param captions: written below the images, of which they have the width.
    :param gap: how many pixels further apart than images these groups are set.
    :param zoom: how many pixels wide a pixel is drawn; 0 enlarges small images.
    """
    rows, groups = -(-len(images) // columns) if columns > 0 else 0, max(1, len(titles))
    given = f"{len(images)} images, {columns} columns, {groups} titles, {len(row_names)} names"
    refuse((rows == 0 or columns % groups or len(row_names) not in (0, rows), f"{given}: no grid"))
    zoom = zoom or max(1, CELL // min(images.shape[1:3]))
    height, width = (side * zoom + PAD for side in images.shape[1:3])
    lines = [textwrap.wrap(_latin(text), max(5, width // LETTER))[:CAPTION_LINES] for text in captions]
    below = LINE * max(map(len, lines), default=0)
    height += below
    font, names = ImageFont.load_default(), [_short(name) for name in row_names]
    left = round(max((font.getlength(name) for name in names), default=-MARGIN)) + MARGIN
    top = 2 * MARGIN + 8 if titles else 0
    size = left + columns * width + (groups - 1) * gap + PAD, top + rows * height + PAD
    sheet = Image.new(as_picture(images[0]).mode, size, "white")
    pen = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        place = left + PAD + column * width + column * groups // columns * gap, top + PAD + row * height
        sheet.paste(as_picture(image.repeat(zoom, axis=0).repeat(zoom, axis=1)), place)
        if lines:
            under = place[0] + width // 2, place[1] + height - below
            pen.multiline_text(under, "\n".join(lines[index]), "black", font, anchor="ma", spacing=1, align="center")
    for row, name in enumerate(names):
        pen.text((left - MARGIN // 2, top + PAD + row * height + height // 2), name, "black", font, anchor="rm")
    share = (sheet.width - left - 2 * PAD + gap) / groups
    for number, title in enumerate(titles):
        middle = left + PAD + number * share + (share - gap) / 2
        pen.text((middle, top // 2), _short(title), "black", font, anchor="mm")
    return sheet


def _short(text: str) -> str:
    """A name in one line."""
    text = _latin(text)
    return text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 3]}..."


def _latin(text: str) -> str:
    """A text of words in characters that PIL's own font has."""
    return " ".join(text.split()).encode("latin-1", "replace").decode("latin-1")


def draw_grid(path: str, samples: str, turns: Sequence[int] = (), class_names: Sequence[str] = ()) -> None:
    """Write the picture that `grid_of_classes` makes of the first images of an npz."""
    save_picture(path, grid_of_classes(next(read_npz(samples, "arr_0", GRID_IMAGES)), turns, class_names))


def grid_of_classes(images: Pixels, turns: Sequence[int] = (), class_names: Sequence[str] = ()) -> Image.Image:
    """The first images in one picture: a row for each class where they take turns, below each image its class else.

    :param turns: image i has the label turns[i % len(turns)]; empty where labels are random, or there are none.
    :param class_names: names by class id.
    """
    images = images[:GRID_IMAGES]
    known = dict(enumerate(class_names))
    names = [known.get(label, f"class {label}") for label in turns[: len(images)]] if len(turns) > 1 else []
    columns = len(images) // len(turns) if names else 0
    if columns < 2:
        captions = [names[index % len(names)] for index in range(len(images))] if names else []
        return grid(images, math.ceil(math.sqrt(len(images))), captions=captions)
    rows = np.arange(columns * len(turns)).reshape(columns, len(turns)).T
    return grid(images[rows.ravel()], columns, names)


def draw_each(
    folder: str,
    images: Iterable[Pixels],
    labels: Sequence[int] | npt.NDArray[np.int64] | None,
    *,
    rank: int = 0,
    world_size: int = 1,
    first: int = 0,
    names: Sequence[str] = (),
    prompts: Sequence[str] = (),
) -> None:
    """NNNNNN_yK_a-red-apple.png, or as `names` say, of every world_size-th image.

    :param first: number of the first image.
    :param prompts: for the images in turn; they stand in the files as the text "prompt".
    """
    for index, image in islice(enumerate(images), rank, None, world_size):
        texts = {"prompt": prompts[(first + index) % len(prompts)]} if prompts else {}
        suffix = "" if labels is None else f"_y{labels[index]}"
        # letters, digits and dashes alone, which every file system takes
        words = (re.sub(r"[^a-z0-9]+", "-", text.lower())[:LONGEST_STEM].strip("-") for text in texts.values())
        suffix += "".join(f"_{word}" for word in words if word)
        path = os.path.join(folder, names[index] if names else f"{first + index:06d}{suffix}.png")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        save_png(path, image, **texts)


FILM_IMAGES = 8
GIF_ROW = 4  # images side by side in the animation
SECONDS = 5.0  # of the animation, within the limits of a frame
FASTEST, SLOWEST, LAST = 60, 400, 2500  # milliseconds of a frame, and of the last one


class Film:
    """The first images of a batch on their way from noise.

    ``film = Film(every=5)``, a sampling loop with ``callback=film.collect``, then ``film.save("a.png", "a.gif")``.

    :param every: how many steps from one frame to the next.
    :param decode: makes images of what the loop makes.
    """

    def __init__(
        self,
        every: int = 1,
        images: int = FILM_IMAGES,
        decode: Callable[[th.Tensor], th.Tensor] = lambda images: images,
    ) -> None:
        self.every, self.images, self._decode = every, images, decode
        self.steps = 0
        self._frames: list[tuple[str, Pixels]] = []
        self._sample = th.empty(0)

    def collect(self, index: int, output: Mapping[str, Any]) -> None:
        """Take in a step's output: its pred_xstart where a frame is due, and its sample, which may be the last."""
        if self.steps % self.every == 0:
            self._frames.append((f"step {self.steps + 1}", self._shown(output["pred_xstart"])))
        self.steps += 1
        self._sample = output["sample"]

    def _shown(self, x: th.Tensor) -> Pixels:
        return to_uint8(self._decode(x[: self.images]))

    def frames(self) -> list[tuple[str, Pixels]]:
        """Title and images uint8 [N, H, W, C] of every frame; the last one shows the finished images."""
        return [*self._frames, ("image", self._shown(self._sample))]

    def save(self, strip: str, animation: str) -> None:
        """Write a PNG with a row per image and a column per frame, and a GIF with the frames one after the other."""
        frames = self.frames()
        rows = np.stack([images for _, images in frames], axis=1)
        titles = [title for title, _ in frames]
        save_picture(strip, grid(rows.reshape(-1, *rows.shape[2:]), len(frames), titles=titles, gap=0))
        columns = min(GIF_ROW, len(frames[0][1]))
        first, *others = [_paletted(grid(images, columns, titles=[title])) for title, images in frames]
        pace = round(min(max(1000 * SECONDS / len(frames), FASTEST), SLOWEST))
        times = [pace] * len(others) + [LAST]
        options = {"save_all": True, "append_images": others, "duration": times, "loop": 0, "optimize": False}
        save_picture(animation, first, "GIF", **options)


def _paletted(picture: Image.Image) -> Image.Image:
    """256 colours of the picture's own, undithered: dots that change from frame to frame would flicker."""
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    if picture.mode == "L":
        return picture
    return picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
