"""What a classifier takes for what, over all validation images, and after which step it did best.

Shapes: N images on all ranks together, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch as th

from .. import dist_util, logger
from ..runtime.files import exists, join, parse_json, read_file, write_json, writing
from ..runtime.log_writers import csv_text
from .batches import Cond, Part, measured
from .noise import Draw

if TYPE_CHECKING:
    from ..train_util import ClassifierTrainLoop

CONFUSION, BEST = "confusion.csv", "best.json"


def judge(loop: ClassifierTrainLoop, folder: str) -> None:
    """Measure every validation image once; rank 0 writes confusion.csv and, of the best step so far, best.json.

    The checkpoint of that step stays, whatever keep_last says. Every rank calls it.
    """
    data, step, steps = loop.validation.data, loop.updates, loop.diffusion.num_timesteps
    position = data.state_dict()
    data.load_state_dict({"batches": 0})
    values = _measured(loop)
    data.load_state_dict(position)
    if loop.failures.sentences or dist_util.rank() > 0:
        return
    labels, guesses, t = (values[name].long().cpu() for name in ("label", "guess", "t"))
    right, count = (labels == guesses).float(), int(values["classes"][0])
    quarters = [round(right[t * 4 // steps == quarter].mean().item(), 4) for quarter in (t * 4 // steps).unique()]
    names = [*data.classes, *map(str, range(len(data.classes), count))]
    table = th.bincount(labels * count + guesses, minlength=count**2).view(count, count).tolist()
    with writing(join(folder, CONFUSION)) as file:
        rows = [["class", *names], *([name, *row] for name, row in zip(names, table, strict=True))]
        file.write(csv_text(rows).encode())
    result: dict[str, Any] = {
        "step": step,
        "acc@1": right.mean().item(),
        "loss": values["loss"].mean().item(),
        "quarters": quarters,
    }
    best: Any = parse_json(read_file(join(folder, BEST))) if exists(join(folder, BEST)) else {}
    if (result["acc@1"], -result["loss"]) > (best.get("acc@1", -1), -best.get("loss", 0)):
        write_json(join(folder, BEST), best := result)
    loop.saver.best = best["step"]
    logger.log(
        f"all {len(t)} validation images after {step} steps: acc@1 {result['acc@1']:.4f}, over the quarters of t "
        f"{quarters}; the best so far is {best['acc@1']:.4f}, at step {best['step']}"
    )


def _measured(loop: ClassifierTrainLoop) -> dict[str, th.Tensor]:
    """Loss, label, guess and t of every image, and K; of those before it where an image cannot be read."""
    data = loop.validation.data
    size, total = data.global_batch, len(data.dataset)

    def parts() -> Iterator[Part]:
        for key in range(-(-total // size)):
            batch = loop.failures.keep(next, data)
            if loop.failures.tell() or batch is None:
                return
            images, cond = batch
            yield Part(key, images, cond, min(size, total - key * size))

    def terms(images: th.Tensor, cond: Cond, draw: Draw, model: Any) -> dict[str, th.Tensor]:
        logits: list[th.Tensor] = []

        def network(*args: Any, **keywords: Any) -> th.Tensor:
            logits.append(model(*args, **keywords))
            return logits[0]

        loss, guess = loop.compute_losses(images, cond, draw, cast(Any, network))["loss"], logits[0].argmax(dim=1)
        return {"loss": loss, "label": cond["y"], "guess": guess, "classes": th.full_like(guess, logits[0].shape[1])}

    with loop.evaluation_model() as model:
        return measured(parts(), loop._draw, terms, model, loop.microbatch)
