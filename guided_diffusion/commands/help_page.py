"""What ``--help`` begins with: the flags to start with and a line to try, of each command. A command without an entry
explains all its flags.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence

WIDTH = 100  # columns, at most

EMOJI = "--data_dir datasets/emoji64.zip"
MODEL = "--model_path models/emoji32"
GUIDED = f"{MODEL} --classifier_path models/emoji32/classifier"

# command -> (flags that are explained, '' for all; a line to try), of the bundled model where it takes one
FIRST_STEPS = {
    "image_train": (
        "data_dir log_dir image_size batch_size max_steps",
        f"{EMOJI} --log_dir runs/emoji --image_size 32 --batch_size 16 --max_steps 2000",
    ),
    "classifier_train": (
        "data_dir log_dir image_size num_classes iterations",
        f"{EMOJI} --log_dir runs/classifier --image_size 32 --num_classes 9 --batch_size 16 --iterations 1000",
    ),
    "super_res_train": (
        "data_dir log_dir large_size small_size max_steps",
        f"{EMOJI} --log_dir runs/upsampler --large_size 64 --small_size 16 --batch_size 8 --max_steps 2000",
    ),
    "autoencoder_train": (
        "data_dir log_dir image_size kind max_steps",
        f"{EMOJI} --log_dir runs/autoencoder --image_size 64 --max_steps 2000",
    ),
    "image_sample": (
        "model_path log_dir num_samples sampler steps",
        f"{MODEL} --log_dir runs/samples --num_samples 16 --sampler dpm++2m --steps 20",
    ),
    "classifier_sample": (
        "model_path classifier_path classifier_scale log_dir num_samples",
        f"{GUIDED} --classifier_scale 4 --classes smileys,flags --log_dir runs/guided --num_samples 16",
    ),
    "super_res_sample": (
        "model_path base_samples log_dir num_samples steps",
        "--model_path runs/upsampler --base_samples runs/small --log_dir runs/large --num_samples 16 --steps 20",
    ),
    "cascade_sample": (
        "",
        "--base.model_path runs/small --up1.model_path runs/upsampler --log_dir runs/cascade --num_samples 16",
    ),
    "image_nll": (
        "model_path data_dir log_dir num_samples likelihood",
        f"{MODEL} {EMOJI} --log_dir runs/nll --num_samples 40 --spread True --timestep_respacing 50",
    ),
    "evaluator": (
        "reference samples metrics features json",
        "reference.npz runs/samples --metrics fid,pr --json runs/scores.json",
    ),
    "make_reference": (
        "data_dir out image_size num_samples features",
        "datasets/emoji64.zip reference.npz --image_size 32",
    ),
    "sweep": (
        "model_path classifier_path reference scales samplers",
        f"{GUIDED} --reference reference.npz --scales 0,1,2,4 --samplers ddim,dpm++2m --log_dir runs/sweep",
    ),
    "download": ("", "inception"),
    "convert": ("", "runs/emoji emoji.safetensors --precision fp16"),
    "ema": ("", "runs/emoji --profile 0.07"),
    "npz_tool": ("", "to-png runs/samples runs/pngs"),
    "models": ("", "show imagenet256"),
    "demo": ("", "--log_dir demo-output"),
    "page": ("", "--port 7860"),
}


def width() -> int:
    """Columns of a help text."""
    return max(40, min(WIDTH, shutil.get_terminal_size().columns - 2))


def example_of(command: str) -> str:
    """A line to try, with its heading; '' where there is none."""
    example = FIRST_STEPS.get(command, ("", ""))[1]
    kept = re.sub(r"(--\S+) (?!-)", "\\1\xa0", example)  # a flag beside its value
    line = _folded(f"python scripts/{command}.py {kept}", end=" \\").replace("\xa0", " ")
    return f"\n\nfor example:\n{line}" if example else ""


def others(groups: Mapping[str, Sequence[str]]) -> str:
    """The names of flags below the title of their group."""
    parts = [f"  {title}\n{_folded('  '.join(names))}" for title, names in groups.items() if names]
    return "\n".join(["all others, which --help all explains, and --help WORD those about a word:", *parts])


def _folded(text: str, end: str = "") -> str:
    """A text in lines that are not too long.

    :param end: what all lines but the last end with.
    """
    return textwrap.indent(f"{end}\n".join(textwrap.wrap(text, width() - 8, break_on_hyphens=False)), "      ")
