"""The models that have a name: which there are, what is known of them, fetching and checking their files."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

from ..runtime.errors import UserError, nearest, refuse
from .entry import entry
from .flags import Flags
from .tool_sections import DownloadConfig, ModelsConfig


def models(flags: Flags) -> None:
    """List the models, show one, fetch it or check its file."""
    config = flags.part(ModelsConfig)
    refuse(
        (config.action == "list" and config.name, "list takes no name: write show NAME"),
        (config.action != "list" and not config.name, f"{config.action} needs the name of a model: list names them"),
    )
    work = {"list": _list, "show": _show, "download": download, "verify": _verify}
    work[config.action](flags)


def _list(_: Flags) -> None:
    from . import presets

    rows = [("name", "kind", "parameters", "is here", "")]
    for preset in presets.all_presets().values():
        here = "yes" if os.path.exists(preset.place) else "download" if preset.file else "in a checkout"
        count = f"{preset.parameters / 1e6:.0f} M" if preset.parameters else ""
        rows.append((preset.name, preset.kind, count, here, preset.about))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _show(flags: Flags) -> None:
    from . import presets

    preset = presets.get(flags.part(ModelsConfig).name)
    facts: dict[str, Any] = {"about": preset.about, "kind": preset.kind, "path": preset.place}
    if preset.file:
        size = str(preset.bytes) if preset.bytes else f"{'about' if preset.flags else 'at least'} {preset.least}"
        facts |= {"address": preset.source.urls[0], "bytes": size, "sha256": preset.sha256 or "none is published"}
    facts |= {"parameters": preset.parameters, "classifier": preset.companion("classifier")}
    facts |= {"upsampler": preset.companion("upsampler"), "classifier_scale": preset.classifier_scale}
    facts |= {"cfg_scale": preset.cfg_scale, "sampler": preset.sampler}
    facts |= {"steps": preset.steps, "flags": " ".join(f"--{name} {value}" for name, value in preset.flags.items())}
    facts |= {"licence": preset.facts["licence"], "paper": preset.facts["paper"]}
    for name, fact in facts.items():
        if fact:
            print(f"{name + ':':<18}{fact}")
    for scores in preset.results:
        numbers = ", ".join(f"{name} {value}" for name, value in scores.items() if name != "of")
        print(f"{'results:':<18}{scores['of']}: {numbers}")
    for note in preset.facts["notes"]:
        print(f"{'note:':<18}{note}")


def download(flags: Flags) -> None:
    """Fetch the file that the flags name."""
    from ..evaluation.weights import SOURCES
    from ..runtime.downloads import fetch
    from . import presets

    config, source, preset = flags.part(DownloadConfig), None, presets.find(flags.part(DownloadConfig).name)
    if config.name in SOURCES:
        source = SOURCES[config.name]
    elif preset is not None:
        source = preset.source if preset.file else None
        if source is None:
            print(f"{preset.path}: it comes with the checkout")
            return
    if source is None:
        names = [*presets.all_presets(), *SOURCES]
        hint = nearest(config.name, names) or f": it is none of {', '.join(SOURCES)}, and none that models list prints"
        raise UserError(f"{config.name!r} is unknown{hint}")
    fetch(source.at(config.mirror), config.out)
    for name in (preset.classifier, preset.upsampler) if preset else ():
        if name and not os.path.exists(presets.get(name).place):
            print(f"{name} goes with it: guided-diffusion models download {name}")


def _verify(flags: Flags) -> None:
    """Compare a file with what is published of it, and its weights with its network."""
    from . import presets

    preset = presets.get(flags.part(ModelsConfig).name)
    path = preset.path
    preset.check(checksum=True)
    import torch as th

    from .common import described, network_of, section_of

    source = "classifier_path" if preset.kind == presets.CLASSIFIER else "model_path"
    flags = Flags(presets.COMMANDS_OF.get(preset.kind, "image_sample"), {**preset.flags, source: path})
    checkpoint, flags = described(flags, source)
    config = flags.part(section_of(flags, source))
    with th.device("meta"):
        network = network_of(config, flags.values["learn_sigma"], checkpoint)
    checkpoint.fitting(network, asdict(config))
    count = sum(parameter.numel() for parameter in network.parameters())
    checked = "sha256 as published" if preset.sha256 else "no sha256 of it is published"
    print(f"{path}: {count} parameters, which fit its network; {checked if preset.file else 'bundled'}")


main = entry("models", models)
