"""Bits per dimension of images under a diffusion model, by the variational bound (Ho et al. 2020, eq. 5)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from guided_diffusion import cli
from guided_diffusion.commands._entry import entry
from guided_diffusion.config import DiffusionConfig, LikelihoodConfig, RunConfig, UNetConfig

if TYPE_CHECKING:
    import torch as th

    from guided_diffusion.commands._common import Restored
    from guided_diffusion.image_datasets import ImageDataset

TERMS = ("vb", "mse", "xstart_mse")
BPD_FILE = "bpd.npz"


def measure(flags: cli.Flags) -> None:
    """Measure every image once, whatever the number of ranks, and write what `report` says.

    :raises ValueError: naming the flag that is wrong.
    """
    import torch as th

    from guided_diffusion import dist_util, logger
    from guided_diffusion.commands import _common as common
    from guided_diffusion.script_util import build_diffusion

    common.start(flags)
    if os.path.exists(os.path.join(logger.get_dir(), BPD_FILE)):
        raise ValueError(f"{logger.get_dir()} holds the likelihoods of another run: give another --log_dir")
    model = common.restore_unet(flags)
    dataset = images_of(model)
    wanted = model.flags.part(LikelihoodConfig).num_samples
    if wanted > len(dataset):
        logger.log(f"{len(dataset)} images are there, not {wanted}: each is measured once")
    process = build_diffusion(model.flags.part(DiffusionConfig))
    rank, world_size = dist_util.rank(), dist_util.world_size()
    count = min(wanted, len(dataset))
    rows, sums = likelihoods(process, model, dataset, count, rank=rank, world_size=world_size)
    every_row, every_sum = th.cat(dist_util.gather(rows)), th.cat(dist_util.gather(sums[None])).sum(dim=0)
    if rank == 0:
        report(every_row, every_sum / count, logger.get_dir())


def images_of(model: Restored) -> ImageDataset:
    """The images of --data_dir as they are: neither mirrored nor cropped at random."""
    from guided_diffusion import checkpoint
    from guided_diffusion.image_datasets import load_data

    config, options = model.flags.part(UNetConfig), model.flags.part(LikelihoodConfig)
    labels: dict[str, Any] = {"class_from": options.class_from}
    if config.class_cond:
        labels |= {"num_classes": config.num_classes, "classes": checkpoint.classes_beside(model.path) or None}
    return load_data(
        data_dir=options.data_dir,
        batch_size=1,
        image_size=config.image_size,
        class_cond=config.class_cond,
        random_flip=False,
        image_channels=config.image_channels,
        rank=0,
        world_size=1,
        **labels,
    ).dataset


def likelihoods(
    process: Any, model: Restored, dataset: ImageDataset, count: int, *, rank: int = 0, world_size: int = 1
) -> tuple[th.Tensor, th.Tensor]:
    """One rank's share: rows (index, total_bpd, prior_bpd) per image, and the sums over images of `TERMS` [3, T]."""
    import numpy as np
    import torch as th

    from guided_diffusion import dist_util, logger
    from guided_diffusion.seeds import seeded

    options, device = model.flags.part(LikelihoodConfig), dist_util.dev()
    seed, size = model.flags.part(RunConfig).seed, options.batch_size
    rows, sums = [np.empty((0, 3))], th.zeros(len(TERMS), process.num_timesteps, dtype=th.float64)
    batches = range(rank, -(-count // size), world_size)
    for batch in logger.progress_bar(shown=rank == 0, iterable=batches, desc="measuring", unit="batch"):
        indices = range(batch * size, min((batch + 1) * size, count))
        images, labels = zip(*[dataset[index] for index in indices], strict=True)
        cond = {name: th.tensor(np.stack([label[name] for label in labels]), device=device) for name in labels[0]}
        with seeded(seed, batch, device):  # the noise of an image is that of its batch
            out = process.calc_bpd_loop(
                model.network, th.tensor(np.stack(images), device=device), options.clip_denoised, cond
            )
        bpd = [out[name].double().cpu().numpy() for name in ("total_bpd", "prior_bpd")]
        rows.append(np.stack([np.array(indices, dtype=np.float64), *bpd], axis=1))
        sums += th.stack([out[name].double().sum(dim=0).cpu() for name in TERMS])
    return th.from_numpy(np.concatenate(rows)), sums


def report(rows: th.Tensor, means: th.Tensor, folder: str) -> None:
    """Write bpd.npz (total and prior by image) and TERM_terms.npz (means, noisiest t first), and say the mean."""
    import numpy as np

    from guided_diffusion import logger
    from guided_diffusion.npz import save_npz

    rows = rows[rows[:, 0].argsort()]
    total, prior = rows[:, 1].numpy(), rows[:, 2].numpy()
    for name, mean in zip(TERMS, means, strict=True):
        save_npz(os.path.join(folder, f"{name}_terms.npz"), mean.numpy())
    save_npz(os.path.join(folder, BPD_FILE), total, prior)
    error = f" +- {np.std(total, ddof=1) / np.sqrt(len(total)):.4f}" if len(total) > 1 else ""
    logger.log(
        f"{len(total)} images: {total.mean():.4f}{error} bits per dimension (mean and standard error); in {folder}"
    )


main = entry("image_nll", measure)
