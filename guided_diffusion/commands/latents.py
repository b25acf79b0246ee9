"""Latents in place of images in a stream: encoded batch by batch, or once for all and kept in a file.

Shapes: N batch, [N, C, H, W] images, latents and moments as in `networks.first_stage`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch as th
from numpy.typing import NDArray

from .. import dist_util, logger
from ..config import LoaderConfig, RunConfig
from ..data.crops import Draws
from ..data.items import Crop, ImageDataset, batches
from ..data.sources import split_archive
from ..runtime import files
from ..runtime.atomic import replacing
from ..runtime.errors import UserError
from ..runtime.jobs import RestartableJob
from ..runtime.npz import save_npz
from ..runtime.options import parse_size
from ..runtime.pictures import to_unit
from ..runtime.seeds import image_seed, to_device
from .flags import Flags
from .sections import LatentTrainConfig

if TYPE_CHECKING:
    from ..image_datasets import ImageStream
    from ..networks.first_stage import FirstStage

CACHE = "latents"  # in a run's folder
ENCODING = 3 << 64  # added to the seed: other numbers than those of training, validation and sampling
MOMENTS = "moments.npy"
AT_ONCE = 64  # images in a shard


@dataclass(frozen=True)
class Encoder:
    """Makes latents of the batches of a stream.

    :param cached: batches are moments already.
    """

    stage: FirstStage
    seed: int
    device: th.device
    cached: bool = False

    @th.no_grad()
    def __call__(self, images: th.Tensor, numbers: Sequence[int]) -> th.Tensor:
        """Latents drawn by (seed, number), one number for each image [N, C, H, W] in bytes or in [-1, 1]."""
        images = to_device(images, self.device)
        moments = images if self.cached else self.stage.moments(to_unit(images))
        return self.stage.latents(moments, self._noise(moments, numbers) if self.stage.draws else None)

    def _noise(self, moments: th.Tensor, numbers: Sequence[int]) -> th.Tensor:
        shape, generator = (self.stage.channels, *moments.shape[2:]), th.Generator(self.device)
        seeds = [image_seed(self.seed + ENCODING, number) for number in numbers]
        return th.stack([th.randn(shape, generator=generator.manual_seed(seed), device=self.device) for seed in seeds])


class CachedImages(ImageDataset):
    """A data set whose items are moments instead of images.

    :param moments: [N, M, ...], M = 2 where the images are mirrored too.
    """

    def __init__(self, images: ImageDataset, moments: NDArray[np.float32]) -> None:
        classes, flips = images.local_classes, images.random_flip
        super().__init__(
            images.resolution, images.local_images, classes, random_flip=flips, options=plain_options(images)
        )
        self.options, self.moments = images.options, moments

    def _crop(self, index: int, draws: Draws) -> Crop:
        mirrored = self.random_flip and draws.random() < 0.5  # the one draw that a crop in the middle takes
        moments = np.array(self.moments[index, int(mirrored)])
        classes = self.local_classes
        return moments, {} if classes is None else {"y": np.array(classes[index], dtype=np.int64)}

    def stacked(self, arrays: Sequence[NDArray[Any]]) -> th.Tensor:
        """Moments as they are."""
        return th.from_numpy(np.stack(arrays))


def plain_options(images: ImageDataset) -> Any:
    """The options of a data set without a cache of images, for which one that cannot be read is an error."""
    fast = images.options.fast_decode
    loading = asdict(LoaderConfig(fast_decode=fast))
    return replace(images.options, on_bad_image="error", pairing=None, captioning=None, **loading)


@dataclass(frozen=True, kw_only=True)
class Encoding(RestartableJob):
    """Encodes every image of a data set once, and its mirror image where these are trained on."""

    images: ImageDataset
    stage: FirstStage

    what: ClassVar[str] = "latents"

    @property
    def size(self) -> int:
        """Number of images."""
        return len(self.images)

    @property
    def arrays(self) -> list[tuple[tuple[int, ...], Any]]:
        """Moments of an image, and of its mirror image."""
        shape = self.stage.moments_shape((self.stage.image_channels, *parse_size(self.images.resolution)))
        return [((1 + self.images.random_flip, *shape), np.float32)]

    def encode(self, missing: Sequence[int], num_workers: int, device: th.device) -> Iterator[NDArray[np.float32]]:
        """The rows of the batches of these numbers."""
        paths, options = self.images.local_images, plain_options(self.images)
        plain = ImageDataset(self.images.resolution, paths, random_flip=False, options=options)
        keys = [[(0, index) for index in self.rows(batch)] for batch in missing]
        for batch in batches(plain, keys, num_workers):
            if isinstance(batch, ValueError):
                raise UserError(str(batch))
            yield self._moments(batch.images, device)

    @th.no_grad()
    def _moments(self, images: th.Tensor, device: th.device) -> NDArray[np.float32]:
        images = to_unit(to_device(images, device))
        sides = [images, images.flip(3)] if self.images.random_flip else [images]
        moments = th.stack([self.stage.moments(side) for side in sides], dim=1)
        if not bool(moments.isfinite().all()):
            raise UserError(f"the latents of images are not finite: {self.stage.path} is damaged, or of other images")
        rows: NDArray[np.float32] = moments.cpu().numpy()
        return rows

    def merge(self) -> None:
        """Write the moments of all images into one file, which can be read in any order."""
        [(shape, kind, chunks)] = self.merged()
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(kind)), "fortran_order": False, "shape": shape}
        with replacing(self.file(MOMENTS)) as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.writelines(np.ascontiguousarray(chunk, kind).data for chunk in chunks)


def manifest(stream: ImageStream, data_dir: str) -> str:
    """64 hex digits that stand for names, sizes and dates of the files of a stream's images, and for its settings."""
    images, digest = stream.dataset, hashlib.sha256()

    @cache
    def stat(path: str) -> tuple[int, float]:
        status = files.stat(path)
        return status.size, status.mtime

    for path in images.local_images:
        archive = split_archive(path)
        digest.update(f"{path.removeprefix(data_dir)} {stat(archive[0] if archive else path)}\n".encode())
    options = images.options
    settings = [parse_size(images.resolution), images.random_flip, options.data_range, options.fast_decode]
    digest.update(json.dumps(settings).encode())
    return digest.hexdigest()


def attach(stage: FirstStage | None, flags: Flags, *streams: ImageStream | None) -> None:
    """Let streams give latents, encoded batch by batch or, with --cache_latents, once."""
    cached = stage is not None and flags.part(LatentTrainConfig).cache_latents
    folders = [flags.values["data_dir"], flags.values["val_data_dir"]]
    for stream, data_dir in zip(streams, folders, strict=True) if stage else ():
        if stream is None or stage is None:
            continue
        if cached:
            folder = os.path.join(logger.get_dir(), CACHE)
            stream.source = cached_images(stream, stage, data_dir, folder, log=logger.log)
            stream.num_workers = 0
        stream.encoder = Encoder(stage, flags.part(RunConfig).seed, dist_util.dev(), cached=cached)


def cached_images(
    stream: ImageStream, stage: FirstStage, data_dir: str, folder: str, *, log: Callable[[str], None]
) -> CachedImages:
    """The data set of moments of a stream's images, which are encoded where a folder does not hold them yet.

    Every rank calls it, and sees the same folder.
    """
    images = stream.dataset
    request = {"autoencoder": stage.fingerprint, "images": manifest(stream, data_dir)}
    name = hashlib.sha256(json.dumps(request).encode()).hexdigest()[:16]
    job = Encoding(out_dir=os.path.join(folder, name), batch_size=AT_ONCE, request=request, images=images, stage=stage)
    path, device = job.file(MOMENTS), next(stage.network.parameters()).device
    finished = dist_util.decide(lambda: job.claim(request, [MOMENTS, "shards"]) and os.path.exists(path))
    if not finished:
        log(f"encoding {len(images)} images{' and their mirror images' * images.random_flip} once, to {path}")
        missing = job.missing(dist_util.rank(), dist_util.world_size(), log=log)
        shown, total = dist_util.rank() == 0, len(missing)
        with logger.progress_bar(shown=shown, total=total, desc="encoding", unit="batch") as bar:
            for batch, rows in zip(missing, job.encode(missing, stream.num_workers, device), strict=True):
                save_npz(job.shard(batch), rows)
                bar.update()
        dist_util.barrier()
        dist_util.decide(job.merge)
    if dist_util.rank() == 0:
        job.tidy(MOMENTS)
    log(f"  the latents are those in {path}")
    return CachedImages(images, np.load(path, mmap_mode="r"))
