"""How alike two sets of images are, image by image.

Shapes: N images [N, C, H, W] in [-1, 1]; each measure is [N].
"""

from __future__ import annotations

import torch as th
import torch.nn.functional as F

RANGE = 2.0  # of the numbers of an image
WINDOW, SIGMA = 11, 1.5  # pixels
K1, K2 = 0.01, 0.03


def psnr(images: th.Tensor, others: th.Tensor) -> th.Tensor:
    """Peak signal-to-noise ratio in dB; infinite for equal images."""
    error = (images.float() - others.float()).square().flatten(1).mean(1)
    return 10 * (RANGE**2 / error).log10()


def ssim(images: th.Tensor, others: th.Tensor) -> th.Tensor:
    """Structural similarity, the mean over channels and over windows within the images (Wang et al. 2004).

    Images with a side of less than 11 pixels are compared in windows as large as that side.
    """
    x, y = images.double() + 1, others.double() + 1  # as the paper has them, black is 0
    size = min(WINDOW, *x.shape[2:])

    def local(values: th.Tensor) -> th.Tensor:
        offsets = th.arange(size, dtype=values.dtype, device=values.device) - (size - 1) / 2
        weights = (-offsets.square() / (2 * SIGMA**2)).exp()
        weights = (weights / weights.sum()).expand(values.shape[1], 1, 1, -1)
        rows = F.conv2d(values, weights, groups=values.shape[1])
        return F.conv2d(rows, weights.transpose(2, 3), groups=values.shape[1])

    mean_x, mean_y = local(x), local(y)
    var_x, var_y = local(x * x) - mean_x**2, local(y * y) - mean_y**2
    covariance = local(x * y) - mean_x * mean_y
    c1, c2 = (K1 * RANGE) ** 2, (K2 * RANGE) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).flatten(1).mean(1).float()
