"""Models by name: published checkpoints, of presets.json, and those in models/ of a checkout.

A bundled model is a folder models/NAME as a training leaves it (config.json, classes.json, ema_RATE_NNNNNN.safetensors
or modelNNNNNN.safetensors), with its classifier, if it has one, in models/NAME/classifier, and an upsampler that is
its alone in models/NAME/upsampler. Nothing here imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..runtime.downloads import Source
from ..runtime.errors import UserError, nearest
from ..runtime.files import parse_json

HERE = Path(__file__).parent
BUNDLED = HERE.parents[1] / "models"
DIFFUSION, UPSAMPLER, CLASSIFIER = "diffusion model", "upsampler", "classifier"
COMMANDS_OF = {UPSAMPLER: "super_res_sample", CLASSIFIER: "classifier_sample"}  # as --classifier_path


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model that has a name.

    :param origin: of these its address, licence, paper and notes.
    :param file: in the cache; '' for one that is bundled.
    :param remote: its name at the address, where that is another one; a .zip holds it as model.ckpt.
    :param bytes: its size, 0 where it is not known.
    :param parameters: how many numbers its network holds.
    :param flags: of the network and the process, as a command line would say them; none where the file tells them.
    :param classifier: and `upsampler`: the names of those that go with it, '' for none.
    :param classifier_scale: and `cfg_scale`, `sampler` and `steps`: what its authors recommend, 0 or '' for none.
    :param classes: whose names they are: "imagenet", or ''.
    :param results: published scores: what of, fid, sfid, precision, recall.
    """

    name: str
    about: str
    kind: str = DIFFUSION
    origin: str = "guided-diffusion"
    file: str = ""
    remote: str = ""
    bytes: int = 0
    sha256: str = ""
    parameters: int = 0
    flags: Mapping[str, Any] = field(default_factory=dict)
    classifier: str = ""
    upsampler: str = ""
    classifier_scale: float = 0.0
    cfg_scale: float = 0.0
    sampler: str = ""
    steps: int = 0
    classes: str = ""
    results: tuple[Mapping[str, Any], ...] = ()

    @property
    def source(self) -> Source:
        """Where it is published."""
        address = f"{self.facts['address']}{self.remote or self.file}"
        member = "model.ckpt" if address.endswith(".zip") else ""
        return Source((address,), self.file, self.sha256, self.bytes, 0 if member else self.least, member)

    @property
    def least(self) -> int:
        """Bytes that its weights take; where only the file tells its flags, that may be of 16 bits."""
        return (4 if self.flags else 2) * self.parameters

    @property
    def facts(self) -> Mapping[str, Any]:
        """Address, licence, paper and notes of its origin."""
        facts: Mapping[str, Any] = _table()["origins"][self.origin]
        return facts

    @property
    def place(self) -> str:
        """The path where it is looked for: in the cache, or in the checkout."""
        return self.source.cached if self.file else str(BUNDLED / self.name)

    @property
    def path(self) -> str:
        """The same, where it is there.

        :raises UserError: saying how to get it.
        """
        if os.path.exists(self.place):
            self.check()
            return self.place
        if self.file:
            size = f"{'' if self.flags else 'at least '}{self.least / 1e9:.1f} GB"
            remedy = f"fetch it with 'guided-diffusion models download {self.name}' ({size}), or put it there"
            raise UserError(f"the model {self.name} is not at {self.place}: {remedy}")
        raise UserError(
            f"the model {self.name} comes with a checkout of the repository, not with the package, and is not at "
            f"{self.place}: run this in a checkout, or give the path of its folder"
        )

    def check(self, *, checksum: bool = False) -> None:
        """Refuse what is at `place` if it is not what is published, by its size or the bytes themselves."""
        source = self.source if checksum else replace(self.source, sha256="")
        if self.file and (fault := source.fault_of(self.place)):
            remedy = f"remove it, and fetch it again with 'guided-diffusion models download {self.name}'"
            raise UserError(f"{self.place} is not {self.file}, {fault}: {remedy}")

    def companion(self, role: str) -> str:
        """The path or name of its classifier or upsampler, '' where it has none."""
        folder = os.path.join(self.place, role)
        return folder if not self.file and os.path.isdir(folder) else str(getattr(self, role))


@cache
def _table() -> Any:
    return parse_json((HERE / "presets.json").read_bytes())


def all_presets() -> dict[str, Preset]:
    """Every model by name: those of the table, and what lies in models/ of a checkout."""
    table = {name: Preset(name=name, **facts) for name, facts in _table()["models"].items()}
    found = [path.parent.name for path in sorted(BUNDLED.glob("*/config.json"))]
    return table | {name: Preset(name=name, about="in models/ of this checkout") for name in found if name not in table}


def find(name: str) -> Preset | None:
    """The model of this name, or whose file is called so; None where there is none."""
    presets = all_presets()
    by_file = {os.path.splitext(preset.file)[0]: preset for preset in presets.values() if preset.file}
    return presets.get(name) or by_file.get(name)


def get(name: str) -> Preset:
    """The same, or a UserError with the nearest names."""
    preset = find(name)
    if preset is None:
        hint = nearest(name, all_presets()) or ": 'guided-diffusion models list' prints their names"
        raise UserError(f"there is no model {name!r}{hint}")
    return preset


def class_names(name: str) -> list[str]:
    """The names of a model's classes by id, [] where nothing but its own folder can say them.

    :param name: of the model; '' for none.
    """
    classes = get(name).classes if name else ""
    return (HERE / f"{classes}_classes.txt").read_text(encoding="utf-8").splitlines() if classes else []


def given(name: str, command: str, known: Collection[str], words: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of a command line that names a model: those of the model, under its own words.

    :param known: flags of the command.
    :raises UserError: if there is no such model, the command is for others, or a file of it is missing.
    """
    preset = get(name)
    if (preset.kind == UPSAMPLER) != (command == "super_res_sample") or preset.kind == CLASSIFIER:
        use = {UPSAMPLER: "use super_res_sample", CLASSIFIER: "give the preset of a diffusion model"}
        article = "an" if preset.kind == UPSAMPLER else "a"
        raise UserError(f"the model {name} is {article} {preset.kind}: {use.get(preset.kind, 'use image_sample')}")
    flags = {flag: value for flag, value in preset.flags.items() if flag in known}
    if "model_path" not in words:
        flags["model_path"] = preset.path
    if preset.cfg_scale:
        flags["cfg_scale"] = preset.cfg_scale
    guides = "classifier_path" in known and preset.companion("classifier") and words.get("guidance") != "cfg"
    if guides and "classifier_path" not in words:
        flags |= {**classifier_flags(preset.companion("classifier")), "classifier_scale": preset.classifier_scale}
    return {**{flag: value for flag, value in flags.items() if flag in known}, **words}


def classifier_flags(source: str) -> dict[str, Any]:
    """The flags of a classifier: the path that is given, or those of a model of this name."""
    preset = find(source)
    if preset is None:
        return {"classifier_path": source}
    flags = {flag: value for flag, value in preset.flags.items() if flag.startswith("classifier_")}
    return {**flags, "classifier_path": preset.path}
