"""Checkpoints: the files of one step of a run, or a single file of weights, found by any of their names.

A run folder holds config.json, classes.json and, for every saved step, modelNNNNNN.pt and ema_RATE_NNNNNN.pt (fp32
weights after N updates), optNNNNNN.pt (optimizer), stateNNNNNN.pt (everything else) and, written last, the manifest
setNNNNNN.json; runs with adapters also a folder loraNNNNNN. A folder shardsNNNNNN stands for all of them but the state.
Averages by power functions, power_WIDTH_NNNNNN.pt, stay when their checkpoint is removed. Older runs wrote no
manifests: of checkpoints before the first one, the files that must be there decide, of those after it, the manifest.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch as th

from .. import dist_util, logger
from ..networks.architecture import Weights, architecture
from ..runtime import files
from ..runtime.errors import DAMAGE, WHY, UserError, as_user_error, refuse
from ..runtime.files import exists, is_remote, isdir, join, load_classes, names_in
from ..runtime.options import HERE, Size, from_here, parse_size
from .manifests import manifest_fault
from .weights import State, difference, load as load, neighbours, pick, save as save, shapes

CONFIG, CLASSES, TOKENIZER = "config.json", "classes.json", "tokenizer.json"
SINGLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")  # the second is of diffusers
_PUBLISHED = (".ckpt", ".pt", ".pth", ".safetensors")  # endings of files of other programs
UNET, UPSAMPLER, CLASSIFIER = "diffusion model", "upsampler", "classifier"
_NAME = re.compile(
    r"(?:(?:(?P<kind>model|opt|state)_?|ema_(?P<rate>[\d.e-]+)_|power_(?P<width>[\d.e-]+)_)(?P<step>\d+)\.(?:pt|pth|safetensors)"
    r"|lora(?P<lora>\d{6,})(?:\.pt)?|shards(?P<shards>\d{6,})"
    r"|set(?P<manifest>\d+)\.json)$"
)


@dataclass
class Checkpoint:
    """The files of one step, '' where there is none; `step` is None where no name tells it.

    Its weights and what lies beside them are read when they are first asked for, and once.

    :param emas: rate, as it is written in the name -> path; `powers` the same, by width.
    :param path: the file whose weights are used; '' for the best.
    """

    step: int | None
    model: str = ""
    opt: str = ""
    state: str = ""
    lora: str = ""
    shards: str = ""
    emas: dict[str, str] = field(default_factory=dict)
    powers: dict[str, str] = field(default_factory=dict)
    manifest: str = ""
    path: str = ""

    @property
    def files(self) -> list[str]:
        """Every file of the set that is removed with it, those first without which it is never taken for complete."""
        every = (self.manifest, self.model, self.state, self.opt, self.lora, self.shards, *self.emas.values())
        return list(filter(None, dict.fromkeys(every)))

    @property
    def best(self) -> str:
        """The slowest moving average, else the model; '' where there is neither."""
        return self.emas[max(self.emas, key=float)] if self.emas else self.model

    @cached_property
    def flags(self) -> dict[str, Any]:
        """The flags of the run that made it, or that a published file shows; {} where there are none."""
        flags = config_beside(self.path)
        published = not flags and self.path.endswith(_PUBLISHED)
        return from_here(self.picked.flags, os.path.dirname(self.path)) if published else flags

    @cached_property
    def classes(self) -> Sequence[str]:
        """Names of its classes by id, [] where they are unknown."""
        names = classes_beside(self.path)
        return load_classes(names) if names else []

    @cached_property
    def picked(self) -> Weights:
        """Its weights, the flags that another program's file shows, and which of its weights these are."""
        return pick(self.path, self.best, _of_others)

    @property
    def weights(self) -> dict[str, th.Tensor]:
        """The state dict in its file."""
        return self.picked.state

    def fitting(self, network: th.nn.Module | State, flags: Mapping[str, Any]) -> dict[str, th.Tensor]:
        """Its weights, if a network takes them; it may be on the meta device, or its state dict alone.

        :param flags: that it was built from, of which the sizes name attention resolutions in messages.
        """
        weights, choice = self.picked.state, self.picked.sentence
        expected = network.state_dict() if isinstance(network, th.nn.Module) else network
        if choice:
            logger.log(choice)
        if shapes(weights) != shapes(expected):
            size = flags.get("large_size", flags.get("image_size"))
            raise UserError(f"{self.path} does not fit the flags: {difference(weights, expected, size)}")
        return weights

    def size_of_inputs(self, size: Size, flags: Mapping[str, Any]) -> Size:
        """The size of what its network works on for images of a size: latents, as its own flags say or else these."""
        factor = int(self.flags.get("latent_factor", flags.get("latent_factor", 1)))
        return size if factor == 1 else tuple(side // factor for side in parse_size(size))

    @property
    def kind(self) -> str:
        """UNET, UPSAMPLER or CLASSIFIER; '' for other networks. Where flags tell it, no weights are read."""
        for sign, kind in (("classifier_width", CLASSIFIER), ("large_size", UPSAMPLER), ("learn_sigma", UNET)):
            if sign in self.flags:
                return kind
        read = architecture(self.weights)
        if not read:
            return ""
        if not any(name.startswith("output_blocks.") for name in self.weights):
            return CLASSIFIER
        inputs = self.weights["input_blocks.0.0.weight"].shape[1]
        return UPSAMPLER if inputs == 2 * read["image_channels"] else UNET


def _of_others(content: Any, path: str) -> Weights | None:
    """The network in a file of another program; None where it is of none that is known."""
    from .diffusers_files import read_unet
    from .published import read_published, tensors_in

    return read_published(content, path) or read_unet(tensors_in(content), path)


def is_young(rate: str | float, updates: int) -> bool:
    """Whether an average, about 1 / (1 - rate) updates long, is longer than a run of so many updates."""
    return updates * (1 - float(rate)) < 1 - 1e-9  # 1 - 0.99 is a little more than a hundredth


def _number(match: re.Match[str]) -> int:
    return int(match[match.lastgroup or 0])


def step_of(path: str) -> int | None:
    """The number of updates that a file name tells, or None."""
    match = _NAME.search(os.path.basename(path))
    return _number(match) if match else None


def sets_in(folder: str) -> dict[int, Checkpoint]:
    """step -> the checkpoint of a folder, steps ascending; a manifest alone is none."""
    sets: dict[int, Checkpoint] = {}
    folder = files.resolve(folder)
    for match in filter(None, map(_NAME.match, names_in(folder))):
        entry = sets.setdefault(_number(match), Checkpoint(_number(match)))
        path = join(folder, match.string)
        if match["rate"]:
            entry.emas[match["rate"]] = path
        elif match["width"]:
            entry.powers[match["width"]] = path
        else:
            setattr(entry, match["kind"] or match.lastgroup or "", path)
    for entry in sets.values():  # a folder of parts has them all
        entry.model, entry.opt = entry.model or entry.shards, entry.opt or entry.shards
    return {step: sets[step] for step in sorted(sets) if {*sets[step].files} - {sets[step].manifest}}


def powers_in(folder: str) -> dict[tuple[int, float], str]:
    """(updates, width) -> path of the averages by power functions in a folder."""
    matches = filter(None, map(_NAME.match, names_in(folder := files.resolve(folder))))
    return {(_number(match), float(match["width"])): join(folder, match.string) for match in matches if match["width"]}


def is_run(path: str) -> bool:
    """Whether a path is a folder, and not one of a checkpoint's parts."""
    return isdir(path) and not re.fullmatch(r"shards\d{6,}", os.path.basename(path.rstrip("/")))


def _with_file(path: str, what: str) -> Checkpoint:
    """The checkpoint that a file belongs to.

    :param what: the file is, in messages.
    """
    if not path or not exists(path):
        hint = neighbours(path) or ": give the path of a checkpoint, or the folder of a run"
        raise FileNotFoundError(f"{what} {path!r} does not exist{hint}")
    step = step_of(path)
    return Checkpoint(None) if step is None else sets_in(os.path.dirname(path) or ".").get(step, Checkpoint(step))


def open_checkpoint(path: str, what: str = "the checkpoint") -> Checkpoint:
    """The checkpoint of a file, or of a run folder that with the newest moving average, else with the newest model.

    In a folder with one of the names SINGLE it is that file. Checkpoints with files of other sizes than their manifests
    name come last. Averages that are longer than the run count only if they were warmed up (--ema_warmup), or if there
    is nothing else.

    :param what: the path is, in messages.
    """
    path = files.resolve(path)
    if not is_run(path):
        return replace(_with_file(path, what), path=path)
    for single in filter(exists, (join(path, name) for name in SINGLE)):
        return Checkpoint(None, path=single)
    sets = sorted(
        sets_in(path).values(), key=lambda e: (not _damaged(e), bool(e.emas or e.shards), bool(e.model), e.step or 0)
    )
    bare = f"{what} {path} holds no ema_RATE_NNNNNN.pt or modelNNNNNN.pt: give a checkpoint or a run's folder"
    refuse((not sets or not sets[-1].best, f"{bare}, of diffusers one with {SINGLE[1]}, such as unet in a pipeline's"))
    taken, config = sets[-1], config_beside(path)
    warmed_up = config.get("ema_warmup") or config.get("ema_start")
    old = {rate: name for rate, name in taken.emas.items() if warmed_up or not is_young(rate, taken.step or 0)}
    return replace(taken, path=replace(taken, emas=old).best or taken.best)


def config_beside(path: str) -> dict[str, Any]:
    """The flags that the run of a checkpoint (or run folder) was made with, from its header or the config.json there.

    {} where there is neither. The places of an autoencoder and of a text encoder are those from here.
    """
    text, file_path = files.safetensors_header(files.resolve(path)).get(CONFIG), _in_folder_of(path, CONFIG)
    if not text and not exists(file_path):
        return {}
    fault = f"{file_path} is no config of a run ({WHY}): repair it, or move it away and give the flags"
    with as_user_error(fault, *DAMAGE):
        config = files.parse_json(text or files.read_file(file_path))
        flags = {} if "_class_name" in config else config["flags"]  # that one is of diffusers
        return from_here(flags, os.path.dirname(file_path))


def from_folder(path: str, folder: str) -> str:
    """A local path as the config.json in a folder says it, so that both can be moved together."""
    relative = os.path.relpath(os.path.realpath(path), os.path.realpath(folder or "."))
    return relative if relative.startswith(HERE) else os.path.join(os.curdir, relative)


def classes_beside(path: str) -> str:
    """What `load_classes` reads: a checkpoint itself, or the classes.json beside it; '' if there is none."""
    if CLASSES in files.safetensors_header(path := files.resolve(path)):
        return path
    file_path = _in_folder_of(path, CLASSES)
    return file_path if exists(file_path) else ""


def tokenizer_beside(path: str) -> str:
    """The tokenizer, as JSON, of a text encoder that was trained along, from the header of weights or beside them."""
    text, file_path = files.safetensors_header(files.resolve(path)).get(TOKENIZER), _in_folder_of(path, TOKENIZER)
    others = "for latent-diffusion's text-to-image model, from one of bert-base-uncased; for GLIDE, from one of gpt2"
    missing = f"{file_path} is missing, without which the network reads no text"
    refuse((not text and not exists(file_path), f"{missing}: copy it from the run's folder ({others})"))
    return str(text or files.read_file(file_path).decode(errors="replace"))


def _in_folder_of(path: str, name: str) -> str:
    path = files.resolve(path)
    return join(path if is_run(path) else os.path.dirname(path) or ".", name)


def _damaged(entry: Checkpoint, *, checksums: bool = False) -> str:
    return manifest_fault(entry.manifest, checksums=checksums, missing_is_fine=True) if entry.manifest else ""


def fault(entry: Checkpoint, sets: Mapping[int, Checkpoint], *, checksums: bool = False) -> str:
    """Why a checkpoint of a folder is not complete; '' if it is.

    :param sets: all of the folder.
    :param checksums: read all that a manifest names; else only sizes are compared.
    """
    if entry.manifest:
        return manifest_fault(entry.manifest, checksums=checksums)
    if entry.shards or any(other.manifest and step < (entry.step or 0) for step, other in sets.items()):
        return "it was not finished: it has no manifest"
    written = [kind for kind in ("state", "opt") if any(getattr(other, kind) for other in sets.values())]
    absent = [kind for kind in ("model", *written[:1]) if not getattr(entry, kind)]
    return f"it has no {absent[0]} file" if absent else _cut(entry.files)


def _cut(file_paths: Sequence[str]) -> str:
    """Which local zip files, as torch writes them, lack their end."""
    for path in file_paths:
        with open(os.devnull if is_remote(path) or isdir(path) else path, "rb") as file:
            if file.read(2) == b"PK" and not zipfile.is_zipfile(file):
                return f"{os.path.basename(path)} is cut short"
    return ""


def newest(folder: str, *, checksums: bool = False) -> tuple[Checkpoint | None, list[str]]:
    """The newest complete checkpoint of a folder, which is the newest weights where nothing but weights lies.

    :return: it, and a sentence for each newer one that is not complete.
    """
    sets = sets_in(folder)
    faults: list[str] = []
    for step, entry in reversed(sets.items()):
        reason = fault(entry, sets, checksums=checksums)
        if not reason:
            return entry, faults
        faults.append(f"the checkpoint of step {step} is passed over: {reason}")
    return None, faults


def find_set(path: str, *, checksums: bool = False) -> Checkpoint:
    """The checkpoint that a file belongs to, or the newest complete one of a folder, to go on from.

    :param checksums: read the files, and refuse altered ones.
    """
    path = files.resolve(path)
    if is_run(path):
        complete, faults = newest(path, checksums=checksums)
        if complete is None:
            fault = f"no complete checkpoint, {', '.join(faults)}" if faults else "no modelNNNNNN.pt to go on from"
            raise UserError(f"{path} holds {fault}; give the folder or a checkpoint of a run")
        return complete
    entry, match = _with_file(path, "the checkpoint"), _NAME.search(os.path.basename(path))
    reason = _damaged(entry, checksums=checksums)
    refuse((reason, f"{path} belongs to a damaged checkpoint, {reason}: copy it again, or give the run's folder"))
    if match is None or match["kind"] == "model" or (match["rate"] and not entry.model):
        entry.model = path
    if not entry.model:
        raise UserError(f"{path} has no model{entry.step:06d}.pt beside it: there are no weights to go on from")
    return entry


def choose(path: str, *, auto: bool = False) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to resume from, the same on all ranks: rank 0 chooses it, and reads its files for their checksums.

    :param path: any file of it, or a run's folder; '' for none.
    :param auto: none is no mistake.
    :return: the checkpoint, and a line for each newer one that is not complete.
    """
    chosen: tuple[Checkpoint | None, list[str]] = None, []
    if dist_util.rank() == 0 and path:
        chosen = newest(path, checksums=True)
        if chosen[0] is None and not auto:
            chosen = find_set(path, checksums=True), []
    return dist_util.broadcast_object(chosen)


def keep_last(folder: str, count: int, every: int = 0, best: int = 0) -> None:
    """Remove all complete checkpoints but the newest `count`, and what is not complete before them; 0 keeps all.

    :param every: complete ones at multiples of so many steps stay as well, and that of step `best`; 0: none.
    :raises OSError: naming a file that cannot be removed.
    """
    sets = sets_in(folder)
    complete = [step for step, entry in sets.items() if not fault(entry, sets)] if count else []
    for step, entry in sets.items():
        stays = step in complete[-count:] or (step in complete and (step == best or (every and step % every == 0)))
        if complete and step < complete[-1] and not stays:
            remove(entry)


def remove(entry: Checkpoint) -> None:
    """Remove the files of a checkpoint, in an order that never leaves a part that passes for complete."""
    for path in entry.files:
        if not isdir(path):
            files.remove(path)
            continue
        for name in names_in(path):
            if name.startswith("adapter_") or path == entry.shards:
                files.remove(join(path, name))
        with suppress(OSError):  # files of others may lie there, and a bucket has no folders
            os.rmdir(path)


def sweep(folder: str) -> None:
    """Remove what processes that were killed while writing have left of their temporary files."""
    for name in [] if is_remote(folder) else names_in(folder):
        target, part, _ = name.partition(".part-")
        if part and (_NAME.match(target) or target in (CONFIG, CLASSES)):
            files.remove(join(folder, name))
