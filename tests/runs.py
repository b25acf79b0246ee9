"""Runs as training leaves them, with small networks of random weights, for tests of what comes after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch as th

from guided_diffusion.commands import flags as cli
from guided_diffusion.config import ClassifierConfig, DiffusionConfig, SuperResConfig, UNetConfig
from guided_diffusion.runtime.files import write_json
from guided_diffusion.runtime.options import defaults
from guided_diffusion.runtime.pictures import to_uint8
from guided_diffusion.runtime.seeds import image_generator
from guided_diffusion.sampling.samplers import make_sampler
from guided_diffusion.script_util import build_diffusion, build_network
from guided_diffusion.training import checkpoints

Main = Callable[[list[str]], None]

SCRIPTS = Path(__file__).parents[1] / "scripts"
NAMES = ["cat", "dog", "owl"]
PROCESS = DiffusionConfig(diffusion_steps=40, noise_schedule="cosine", learn_sigma=True, timestep_respacing="4")
NETWORK: dict[str, Any] = {
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,1",
    "attention_resolutions": "4",
    "num_heads": 2,
    "num_classes": 3,
    "class_cond": True,
}
UNET = UNetConfig(image_size=8, **NETWORK)
UNCONDITIONAL = UNetConfig(image_size=8, **{**NETWORK, "class_cond": False})
GUIDED = UNetConfig(image_size=8, **NETWORK, null_class=True)
WEAK = UNetConfig(image_size=8, **{**NETWORK, "num_res_blocks": 2})
UPSAMPLER = SuperResConfig(large_size=8, small_size=4, **NETWORK)
CLASSIFIER = ClassifierConfig(
    image_size=8,
    num_classes=3,
    classifier_width=32,
    classifier_depth=1,
    classifier_channel_mult="1,2",
    classifier_attention_resolutions="4",
)
SAMPLING = ["--num_samples", "5", "--batch_size", "2", "--timestep_respacing", "4"]
TRAINED_BY = {UNetConfig: "image_train", SuperResConfig: "super_res_train", ClassifierConfig: "classifier_train"}


def scrambled(network: th.nn.Module) -> Any:
    """The network with random weights everywhere, also where training starts from zeros."""
    generator = th.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = 0.05 * th.randn(parameter.shape, generator=generator) + (parameter.ndim == 1)
    return network.eval()


def load_weights(network: th.nn.Module, path: str, **flags: Any) -> None:
    """Load a checkpoint into a network that was built from some flags."""
    network.load_state_dict(checkpoints.open_checkpoint(path).fitting(network, flags))


def write_run(folder: Path, command: str, network: th.nn.Module, *configs: Any) -> Path:
    """A folder as training leaves it."""
    flags = defaults(*cli.COMMANDS[command].sections)
    for config in configs:
        flags |= {name: value for name, value in asdict(config).items() if name in flags}
    checkpoints.save(str(folder / "ema_0.5_000100.pt"), network.state_dict())
    write_json(str(folder / "config.json"), {"command": command, "version": "0", "flags": flags})
    table = {"classes": NAMES, "class_from": "filename", "counts": [1, 1, 1]}
    write_json(str(folder / "classes.json"), table)
    return folder


class Runs:
    """Folders as training leaves them, and their networks, by the name of each config."""

    def __init__(self, root: Path, **configs: Any) -> None:
        self.root, self.process = root, build_diffusion(PROCESS)
        for name, config in configs.items():
            network = scrambled(build_network(config, True))
            write_run(root / name, TRAINED_BY[type(config)], network, config, PROCESS)
            setattr(self, name, network)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def __getitem__(self, name: str) -> str:
        return str(self.root / name)


def saved_by(main: Main, folder: Path, *argv: str) -> dict[str, np.ndarray]:
    """What a command leaves as its npz."""
    main([*argv, "--log_dir", str(folder)])
    (path,) = folder.glob("samples_*.npz")
    with np.load(path) as saved:
        return dict(saved)


def by_hand(
    process: Any,
    network: Any,
    labels: list[int] | None,
    count: int,
    *,
    shape: tuple[int, ...] = (3, 8, 8),
    **options: Any,
) -> np.ndarray:
    """Samples of the first batch, of `count` images, straight from the loop."""
    generators = [image_generator(0, index) for index in range(count)]
    kwargs = {**options.pop("more", {}), **({} if labels is None else {"y": th.tensor(labels)})}
    sampler = options.pop("sampler", make_sampler("ddpm"))
    loop = {"model_kwargs": kwargs, "generator": generators, "device": "cpu", **options}
    return to_uint8(process.sample_loop(sampler, network, (count, *shape), **loop))
