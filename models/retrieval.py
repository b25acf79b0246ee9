"""Whether pictures show what their captions say: ``python retrieval.py TRAIN HELD_OUT OUT`` trains a pair of encoders.

A picture and a caption become two vectors of one space, in which those that belong together are near (a contrastive
loss, Radford et al. 2021). For captions that is the frozen all-MiniLM-L6-v2 (of the extra `text`) and a linear map, for
pictures a small convolutional network. The score of pictures: how often is the own caption the nearest of twenty?

Shapes: N pictures of S x S pixels, E numbers a vector.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch as th
import torch.nn.functional as F
from measure import SIZE, Pixels, pictures

from guided_diffusion.data.captions import read_captions
from guided_diffusion.data.sources import find_images
from guided_diffusion.networks.context import FolderEncoder, minilm_folder
from guided_diffusion.runtime.pictures import planes
from guided_diffusion.unet import EncoderUNetModel

WIDTH, SHIFT = 64, 3  # E, pixels by which training moves a picture
CANDIDATES, MAX_TOKENS = 20, 32
STEPS, BATCH, RATE = 800, 64, 1e-3
COLUMNS = "name,short_name"


def captioned(path: str) -> tuple[Pixels, list[list[str]]]:
    """The pictures of a zip, uint8 [N, S, S, 3], and the captions of each."""
    return pictures(path)[0], read_captions(find_images(path), COLUMNS).texts


class Pair(th.nn.Module):
    """The two encoders; a vector has length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures = EncoderUNetModel(
            SIZE, 3, 32, WIDTH, 1, (8,), channel_mult=(1, 2, 4), num_head_channels=64, pool="adaptive"
        )
        self.texts = th.nn.Linear(384, WIDTH)
        self.log_scale = th.nn.Parameter(th.tensor(2.5))
        self._reader, self._known = FolderEncoder(minilm_folder(), MAX_TOKENS), dict[str, th.Tensor]()

    def of_pictures(self, images: th.Tensor) -> th.Tensor:
        """[N, E] of pictures [N, 3, S, S] in [-1, 1]."""
        return F.normalize(self.pictures(images, th.zeros(len(images))), dim=1)

    def of_texts(self, texts: Sequence[str]) -> th.Tensor:
        """[N, E] of texts, by the mean of MiniLM's vectors."""
        for text in set(texts) - self._known.keys():
            context, mask = self._reader.encode([text])
            self._known[text] = F.normalize(context[0, mask[0]].mean(dim=0), dim=0)
        return F.normalize(self.texts(th.stack([self._known[text] for text in texts])), dim=1)

    def state_dict(self, *args: object, **options: object) -> dict[str, th.Tensor]:
        """Without MiniLM, which is frozen."""
        state = super().state_dict(*args, **options)
        return {name: value for name, value in state.items() if not name.startswith("_reader.")}


def moved(images: th.Tensor, generator: th.Generator) -> th.Tensor:
    """Each picture moved by some pixels, its edge repeated, with its colours a little stronger or weaker."""
    shifts = th.randint(-SHIFT, SHIFT + 1, (len(images), 2), generator=generator).tolist()
    wide = F.pad(images, [SHIFT] * 4, mode="replicate")
    parts = [wide[i, :, SHIFT + y :, SHIFT + x :][:, :SIZE, :SIZE] for i, (y, x) in enumerate(shifts)]
    gain = 1 + 0.3 * (th.rand(len(images), 3, 1, 1, generator=generator) - 0.5)
    return (th.stack(parts) * gain).clamp(-1, 1)


def train(path: str, seed: int = 0) -> Pair:
    """Encoders trained on the pictures and captions of a zip."""
    th.manual_seed(seed)
    images, texts = captioned(path)
    pair, inputs, generator = Pair(), planes(images), th.Generator().manual_seed(seed)
    parameters = [p for name, p in pair.named_parameters() if not name.startswith("_reader.")]
    optimizer = th.optim.AdamW(parameters, RATE, weight_decay=0.05)
    schedule = th.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    own_caption = th.arange(BATCH)
    for step in range(STEPS):
        rows = th.randperm(len(images), generator=generator)[:BATCH].tolist()
        captions = [texts[row][step % len(texts[row])] for row in rows]
        same = th.tensor([[a == b for a in captions] for b in captions]) & ~th.eye(BATCH, dtype=th.bool)
        vectors = pair.of_pictures(moved(inputs[rows], generator)), pair.of_texts(captions)
        scores = (vectors[0] @ vectors[1].T * pair.log_scale.exp()).masked_fill(same, -th.inf)
        loss = (F.cross_entropy(scores, own_caption) + F.cross_entropy(scores.T, own_caption)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(step, f"{loss.item():.3f}", flush=True)
    return pair.eval()


@th.no_grad()
def retrieval(pair: Pair, images: Pixels, captions: Sequence[str], seed: int = 0) -> float:
    """How often the own caption is the nearest of twenty, of which nineteen are other captions of these pictures."""
    generator, names = np.random.default_rng(seed), sorted(set(captions))
    pictures = th.cat([pair.of_pictures(part) for part in planes(images).split(100)])
    right = 0
    for picture, caption in zip(pictures, captions, strict=True):
        others = generator.permutation([name for name in names if name != caption])[: CANDIDATES - 1]
        right += int((pair.of_texts([caption, *others]) @ picture).argmax()) == 0
    return right / len(captions)


def open_pair(path: str | Path) -> Pair:
    """The encoders in a file."""
    pair = Pair()
    pair.load_state_dict(th.load(path, weights_only=True), strict=False)
    return pair.eval()


def main(train_zip: str, held_out: str, out: str) -> None:
    """Train, save, and print how well real pictures are told apart."""
    pair = train(train_zip)
    th.save(pair.state_dict(), out)
    for path in (train_zip, held_out):
        images, texts = captioned(path)
        print(json.dumps({"pictures": path, "retrieval": retrieval(pair, images, [each[0] for each in texts])}))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit("usage: python retrieval.py TRAIN HELD_OUT OUT")
    main(*sys.argv[1:])
