"""The house: what may import what, and how large things may be, read off the syntax trees."""

from __future__ import annotations

import ast
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "guided_diffusion"
EVALUATIONS = ROOT.parent / "evaluations"

# a module imports only from modules before it
ORDER = [
    *[
        "paths",
        "config",
        "data_config",
        "evaluation_config",
        "dataset_config",
        "likelihood_config",
        "upsampling_config",
        "finetuning_config",
        "conditioning_config",
        "npz_tool_config",
        "performance_config",
        "launchers",
        "cli",
        "nn",
        "ops",
        "losses",
        "log_writers",
        "logger",
        "dist_util",
        "seeds",
    ],
    *[
        "untrusted",
        "request",
        "npz",
        "pictures",
        "gallery",
        "film",
        "schedules",
        "steps",
        "solvers",
        "samplers",
        "loop",
    ],
    *[
        "prediction",
        "guidance",
        "editing",
        "surfaces",
        "forward_process",
        "gaussian_diffusion",
        "flow_likelihood",
        "respace",
    ],
    *[
        "resample",
        "blocks",
        "unet",
        "recomputing",
        "gradients",
        "adamw",
        "fp16_util",
        "sharding",
        "interruption",
        "archives",
        "crops",
    ],
    *["decoding", "masks"],
    *["image_files", "upsampling", "label_tables", "image_labels", "conditioning", "image_order", "image_cache"],
    *["image_items"],
    *["image_datasets", "init_images", "architecture", "manifest", "downloads", "hardware", "compiling"],
    *["checkpoint", "weight_files", "lora", "finetuning", "draws"],
    *["meter", "batches", "microbatches", "bad_steps", "run_state", "saving", "jobs", "sample_util", "likelihood"],
    *["train_util", "script_util"],
    *["dataset_images", "dataset_folder", "dataset_planes", "dataset_tar", "dataset_pickle", "dataset_lmdb"],
    *["dataset_output", "dataset_writer", "commands"],
]
# the same for the package evaluations, which stands above all of guided_diffusion but its commands
EVALUATION_ORDER = [
    *["metrics", "scores", "plots", "images", "inception", "weights", "features", "feature_sets", "references"],
    *["evaluator", "training", "sweep"],
]
NEVER_LOG = ORDER[: ORDER.index("fp16_util")]
WITHOUT_TORCH = [
    "__init__",
    "paths",
    "config",
    "data_config",
    "evaluation_config",
    "dataset_config",
    "likelihood_config",
    "upsampling_config",
    "finetuning_config",
    "conditioning_config",
    "npz_tool_config",
    "performance_config",
    "cli",
    "launchers",
    "log_writers",
]
MODULES = {
    path.relative_to(ROOT).with_suffix("").as_posix(): ast.parse(path.read_text()) for path in ROOT.rglob("*.py")
}
COMMANDS = [tree for name, tree in MODULES.items() if name.startswith("commands/")]
EVALUATION_MODULES = {path.stem: ast.parse(path.read_text()) for path in EVALUATIONS.glob("*.py")}


def imports(tree, *, nested):
    """Full names of what a module imports."""
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            inside = node.level == 2 or (node.level == 1 and tree not in COMMANDS)
            base = ["guided_diffusion"] if inside else ["guided_diffusion", "commands"] if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)


def ours(tree, *, nested=True, package="guided_diffusion", order=ORDER):
    """Modules of the package that a module imports."""
    for name in imports(tree, nested=nested):
        parts = name.split(".")
        if parts[0] == package and len(parts) > 1 and parts[1] in order:
            yield parts[1]


def test_every_module_has_its_place():
    top = {name.split("/")[0] for name in MODULES} - {"__init__", "__main__"}
    assert top == set(ORDER)
    assert set(EVALUATION_MODULES) - {"__init__"} == set(EVALUATION_ORDER)


@pytest.mark.parametrize("name", [name for name in sorted(MODULES) if not name.startswith("__")])
def test_modules_import_only_from_earlier_ones(name):
    here = ORDER.index(name.split("/")[0])
    later = [other for other in ours(MODULES[name]) if ORDER.index(other) > here or other == name]
    assert later == []


@pytest.mark.parametrize("name", EVALUATION_ORDER)
def test_modules_of_evaluations_import_only_from_earlier_ones(name):
    found = ours(EVALUATION_MODULES[name], package="evaluations", order=EVALUATION_ORDER)
    here = EVALUATION_ORDER.index(name)
    assert [other for other in found if EVALUATION_ORDER.index(other) >= here] == []


def test_the_package_may_have_another_name():
    """Research code keeps a copy of it in a folder of its own: no module names the package that it is in."""
    named = {name for name, tree in MODULES.items() for full in imports_as_written(tree) if full == "guided_diffusion"}
    assert named == set()


def imports_as_written(tree):
    """First words of absolute imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def test_only_functions_of_commands_import_evaluations():
    def uses(tree, *, nested):
        return any(full.split(".")[0] == "evaluations" for full in imports(tree, nested=nested))

    assert [name for name, tree in MODULES.items() if uses(tree, nested=False)] == []
    assert {name.split("/")[0] for name, tree in MODULES.items() if uses(tree, nested=True)} <= {"commands"}


def test_evaluations_stand_below_the_commands():
    """All but the file that is called as the original's script."""
    uses = {
        name
        for name, tree in EVALUATION_MODULES.items()
        if any(full.startswith("guided_diffusion.commands") for full in imports(tree, nested=True))
    }
    assert uses == {"evaluator"}
    assert not any(
        full.startswith("guided_diffusion.commands") for full in imports(EVALUATION_MODULES["evaluator"], nested=False)
    )


def test_metrics_are_a_lone_file_of_numpy():
    standard = sys.stdlib_module_names | {"numpy"}
    assert {full.split(".")[0] for full in imports(EVALUATION_MODULES["metrics"], nested=True)} <= standard


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_what_help_needs_does_not_import_torch(name):
    assert not any(full.split(".")[0] == "torch" for full in imports(MODULES[name], nested=False))


@pytest.mark.parametrize("name", sorted(name for name in MODULES if name.startswith("commands/") and "/_" not in name))
def test_commands_parse_before_they_import_torch(name):
    assert set(ours(MODULES[name], nested=False)) <= {
        "cli",
        "config",
        "data_config",
        "evaluation_config",
        "likelihood_config",
        "upsampling_config",
        "npz_tool_config",
        "performance_config",
        "commands",
    }
    assert not any(full.split(".")[0] == "torch" for full in imports(MODULES[name], nested=False))


@pytest.mark.parametrize("name", [name for name in NEVER_LOG if name not in ("logger", "dist_util")])
def test_the_lower_layers_never_log(name):
    assert "logger" not in ours(MODULES[name])


# ---- sizes


def functions():
    for name, tree in [*MODULES.items(), *((f"evaluations.{key}", tree) for key, tree in EVALUATION_MODULES.items())]:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield f"{name}.{node.name}", node


def body_lines(node):
    """Lines of a function without signature, decorators and docstring."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def depth(node):
    """How deep blocks are nested in each other."""
    blocks = (ast.For, ast.While, ast.If, ast.With, ast.Try)
    inner = [
        depth(child) for child in ast.iter_child_nodes(node) if not isinstance(child, ast.FunctionDef | ast.ClassDef)
    ]
    # `elif` is an `if` in the else of another one, and no deeper to the eye
    chained = isinstance(node, ast.If) and len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If)
    return max(inner, default=0) + (isinstance(node, blocks) and not chained)


def test_modules_are_short():
    paths = [*ROOT.rglob("*.py"), *EVALUATIONS.glob("*.py")]
    sizes = {str(path.relative_to(ROOT.parent)): len(path.read_text().splitlines()) for path in paths}
    assert {name: lines for name, lines in sizes.items() if lines > 450} == {}


def test_functions_are_short():
    lines = {name: body_lines(node) for name, node in functions()}
    assert statistics.median(lines.values()) < 8
    assert sum(count < 25 for count in lines.values()) / len(lines) >= 0.9
    assert {name: count for name, count in lines.items() if count > 60} == {}


def test_blocks_are_not_nested_deeply():
    assert {name: depth(node) for name, node in functions() if depth(node) > 3} == {}


# surfaces that the originals fix
THEIRS = {
    *["p_mean_variance", "p_sample", "p_sample_with_grad", "p_sample_loop", "p_sample_loop_progressive"],
    *[
        "ddim_sample",
        "ddim_sample_with_grad",
        "ddim_reverse_sample",
        "ddim_sample_loop",
        "ddim_sample_loop_progressive",
    ],
    *["plms_sample", "plms_sample_loop", "plms_sample_loop_progressive", "condition_mean", "condition_mean_with_grad"],
    *["condition_score", "condition_score_with_grad", "training_losses", "load_data", "load_superres_data"],
}


def test_functions_of_ours_take_few_positional_parameters():
    many = {}
    for name, node in functions():
        count = len([arg for arg in [*node.args.posonlyargs, *node.args.args] if arg.arg not in ("self", "cls")])
        if count > 6 and node.name not in THEIRS and node.name != "__init__":
            many[name] = count
    assert many == {}
