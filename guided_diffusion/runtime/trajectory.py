"""Films: the predicted images of every step, as a strip and as an animation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch as th
from PIL import Image

from .files import replacing
from .pictures import Pixels, grid, to_uint8

FILM_IMAGES = 8
GIF_ROW = 4  # images side by side in the animation
SECONDS = 5.0  # of the animation, within the limits of a frame
FASTEST, SLOWEST, LAST = 60, 400, 2500  # milliseconds of a frame, and of the last one


class Film:
    """The first images of a batch on their way from noise.

    ``film = Film(every=5)``, a sampling loop with ``callback=film.collect``, then ``film.save("a.png", "a.gif")``.

    :param every: how many steps from one frame to the next.
    """

    def __init__(self, every: int = 1, images: int = FILM_IMAGES) -> None:
        self.every, self.images = every, images
        self.steps = 0
        self._frames: list[tuple[str, Pixels]] = []
        self._sample = th.empty(0)

    def collect(self, index: int, output: Mapping[str, Any]) -> None:
        """Take in a step's output: its pred_xstart where a frame is due, and its sample, which may be the last."""
        if self.steps % self.every == 0:
            self._frames.append((f"step {self.steps + 1}", to_uint8(output["pred_xstart"][: self.images])))
        self.steps += 1
        self._sample = output["sample"][: self.images]

    def frames(self) -> list[tuple[str, Pixels]]:
        """Title and images uint8 [N, H, W, C] of every frame; the last one shows the finished images."""
        return [*self._frames, ("image", to_uint8(self._sample))]

    def save(self, strip: str, animation: str) -> None:
        """Write a PNG with a row per image and a column per frame, and a GIF with the frames one after the other."""
        frames = self.frames()
        rows = np.stack([images for _, images in frames], axis=1)
        titles = [title for title, _ in frames]
        picture = grid(rows.reshape(-1, *rows.shape[2:]), len(frames), titles=titles, gap=0)
        with replacing(strip) as file:
            picture.save(file, format="PNG")
        columns = min(GIF_ROW, len(frames[0][1]))
        first, *others = [_paletted(grid(images, columns, titles=[title])) for title, images in frames]
        pace = round(min(max(1000 * SECONDS / len(frames), FASTEST), SLOWEST))
        times = [pace] * len(others) + [LAST]
        with replacing(animation) as file:
            first.save(file, format="GIF", save_all=True, append_images=others, duration=times, loop=0, optimize=False)


def _paletted(picture: Image.Image) -> Image.Image:
    """256 colours of the picture's own, undithered: dots that change from frame to frame would flicker."""
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    if picture.mode == "L":
        return picture
    return picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
