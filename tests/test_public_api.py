"""Signatures of the originals: ours start with theirs, and what is new can only be given by keyword."""

from __future__ import annotations

import enum
import importlib
import inspect
import json
from pathlib import Path

import pytest

SIGNATURES = json.loads((Path(__file__).parent / "golden" / "signatures.json").read_text())
ORIGINALS = [(fork, module) for fork, modules in SIGNATURES.items() for module in modules]
STARS = json.loads((Path(__file__).parent / "golden" / "star_names.json").read_text())
IMPORTED = {  # by the originals' modules, and so part of their star imports
    "dist_util": "io os socket bf th dist GPUS_PER_NODE SETUP_RETRY_COUNT",
    "fp16_util": "np th nn logger INITIAL_LOG_LOSS_SCALE",
    "gaussian_diffusion": "enum math np th mean_flat normal_kl discretized_gaussian_log_likelihood",
    "image_datasets": "math random Image bf np DataLoader Dataset",
    "logger": "os sys time tempfile defaultdict contextmanager DEBUG INFO WARN ERROR DISABLED",
    "losses": "np th",
    "nn": "math th nn",
    "resample": "ABC abstractmethod np th dist",
    "respace": "np th GaussianDiffusion",
    "script_util": "argparse inspect gd NUM_CLASSES EncoderUNetModel SuperResModel UNetModel SpacedDiffusion",
    "train_util": "copy functools os bf th dist DDP AdamW dist_util logger MixedPrecisionTrainer "
    "INITIAL_LOG_LOSS_SCALE update_ema LossAwareSampler UniformSampler",
    "unet": "abstractmethod math np th nn F",
}
HIDDEN = {
    "gaussian_diffusion": ["_extract_into_tensor"],
    "image_datasets": ["_list_image_files_recursively"],
    "script_util": ["NUM_CLASSES"],
}


def ours(module):
    return importlib.import_module(f"guided_diffusion.{module}")


def default_of(value):
    return None if value is inspect.Parameter.empty else str(value) if not isinstance(value, str) else repr(value)


def differences(where, function, wanted):
    """What an original's caller would trip over."""
    have = list(inspect.signature(function).parameters.values())
    variadic = any(p.kind is p.VAR_POSITIONAL for p in have)
    problems = []
    by_name = {p.name: p for p in have}
    for position, (name, kind, default) in enumerate(wanted):
        if kind in ("VAR_KEYWORD", "VAR_POSITIONAL"):
            continue
        mine = by_name.get(name)
        if mine is None:
            problems.append(f"{where}: no parameter {name}")
        elif (
            kind == "POSITIONAL_OR_KEYWORD" and not variadic and (have[position].name != name or mine.kind.name != kind)
        ):
            problems.append(f"{where}: {name} is not at position {position}")
        elif default is not None and default_of(mine.default) != default and not same(mine.default, default):
            problems.append(f"{where}: {name} has default {default_of(mine.default)}, wanted {default}")
    if any(kind == "VAR_POSITIONAL" for _, kind, _ in wanted):
        return problems
    known = {name for name, _, _ in wanted}
    new = [p for p in have if p.name not in known and p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    return problems + [f"{where}: {p.name} is new and required" for p in new]


def same(value, text):
    """0 and 0.0, for example."""
    try:
        return value == json.loads(text)
    except (ValueError, TypeError):
        return False


def problems_of(module, name, wanted):
    thing = getattr(ours(module), name, None)
    if thing is None:
        return [f"{module}.{name} is missing"]
    if isinstance(wanted, list):
        return differences(f"{module}.{name}", thing, wanted)
    if "enum" in wanted:
        assert issubclass(thing, enum.Enum)
        ours_first = list(thing.__members__)[: len(wanted["enum"])]
        return [] if ours_first == wanted["enum"] else [f"{module}.{name} has other members"]
    problems = []
    for method, parameters in wanted.get("methods", {}).items():
        if not hasattr(thing, method):
            problems.append(f"{module}.{name}.{method} is missing")
        else:
            problems += differences(f"{module}.{name}.{method}", getattr(thing, method), parameters)
    return problems


@pytest.mark.parametrize(("fork", "module"), ORIGINALS)
def test_signatures_start_with_the_originals(fork, module):
    problems = []
    for name, wanted in SIGNATURES[fork][module].items():
        problems += problems_of(module, name, wanted)
    if fork == "upstream":
        problems = [p for p in problems if "use_neighborhood_attention is new" not in p]
    assert problems == []


@pytest.mark.parametrize("module", sorted(IMPORTED))
def test_star_imports_give_every_name_that_those_of_the_originals_give(module):
    names = {}
    exec(f"from guided_diffusion.{module} import *", names)
    wanted = {*STARS.get(module, ()), *IMPORTED[module].split(), *SIGNATURES["upstream"].get(module, ())}
    assert set(STARS) <= set(IMPORTED)
    assert wanted - set(names) == set()


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in HIDDEN.items() for name in names])
def test_names_that_repositories_import_though_they_are_not_public(module, name):
    assert hasattr(ours(module), name)


@pytest.mark.parametrize(
    "name", ["_predict_xstart_from_eps", "_predict_eps_from_xstart", "_predict_xstart_from_xprev", "_scale_timesteps"]
)
def test_methods_that_repositories_call_though_they_are_not_public(name):
    assert callable(getattr(ours("gaussian_diffusion").GaussianDiffusion, name))


def test_versions_agree():
    package = importlib.import_module("guided_diffusion")
    assert package.__version__.count(".") == 2
