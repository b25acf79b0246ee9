"""The house: what may import what, and how large things may be, read off the syntax trees."""

from __future__ import annotations

import ast
import graphlib
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "guided_diffusion"
# a module imports from its own line and from those above it
LINES = """runtime
config
logger dist_util
nn losses
networks
unet
sampling
diffusion
gaussian_diffusion respace resample
data
image_datasets
script_util
sample_util
fp16_util
training
train_util
evaluation
commands""".splitlines()
LINE = {name: number for number, line in enumerate(LINES) for name in line.split()}
TREES = {path.relative_to(ROOT).with_suffix("").parts: ast.parse(path.read_text()) for path in ROOT.rglob("*.py")}
MODULES = sorted(name for name in TREES if name[-1] not in ("__init__", "__main__"))
COMMANDS = [name for name in MODULES if name[0] == "commands" and "entry" in ast.unparse(TREES[name])]
NEVER_LOG = ("runtime", "config", "nn", "losses", "networks", "unet", "sampling", "diffusion", "gaussian_diffusion")
WITHOUT_TORCH = ("errors", "files", "options", "launchers", "log_writers", "atomic", "remote")  # of runtime


def imports(tree, name, *, nested=True):
    """(module that is imported or is imported from, name taken from it); those for type checkers are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from ((tuple(alias.name.split(".")), "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ("guided_diffusion", *name)[: len(name) + 1 - node.level] if node.level else ()
            yield from (((*base, *filter(None, (node.module or "").split("."))), alias.name) for alias in node.names)
        elif nested or isinstance(node, ast.If | ast.Try):
            yield from imports(node, name, nested=nested)


def ours(name, *, nested=True):
    """(module of the package, name taken from it) of what a module imports."""
    for (package, *module), taken in imports(TREES[name], name, nested=nested):
        inner = (*module, taken)
        if package == "guided_diffusion":
            yield (inner, "") if inner in TREES or (*inner, "__init__") in TREES else (tuple(module), taken)


def test_modules_import_from_their_line_and_those_above():
    pairs = [(name, module) for name in MODULES for module, _ in ours(name) if module]
    assert [(name, module) for name, module in pairs if LINE[module[0]] > LINE[name[0]] or module == name] == []


def test_rooms_import_each_other_in_no_circle_and_by_few_arrows():
    below = {name[0]: set() for name in MODULES}
    for name in MODULES:
        below[name[0]] |= {module[0] for module, _ in ours(name) if module} - {name[0]}
    graphlib.TopologicalSorter(below).prepare()  # raises where there is one
    assert sum(map(len, below.values())) <= 90


def test_a_chain_of_imports_is_at_most_ten_modules_long():
    below = {name: {module for module, _ in ours(name) if module in TREES} for name in MODULES}
    longest = {}
    for name in graphlib.TopologicalSorter(below).static_order():
        longest[name] = 1 + max((longest[module] for module in below.get(name, ())), default=0)
    assert {name: length for name, length in longest.items() if length > 10} == {}


def test_there_are_fourteen_modules_and_eight_rooms():
    assert {name[0] for name in MODULES} == set(LINE)
    assert len(LINE) == 22
    rooms = {name[0] for name in MODULES if len(name) > 1}
    assert len(rooms) == 8
    for room in rooms:
        assert ast.get_docstring(TREES[room, "__init__"]), room
        assert sum(name[0] == room for name in MODULES) > 1, room


def test_no_private_name_crosses_a_border():
    taken = [(name, word) for name in MODULES for _, word in ours(name)]
    assert [(name, word) for name, word in taken if word.startswith("_") and not word.startswith("__")] == []
    assert [name for name in MODULES if any(part.startswith("_") for part in name)] == []


def test_the_package_may_have_another_name():
    """Research code keeps a copy of it in a folder of its own: no module names the package that it is in."""
    named = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] == "guided_diffusion")
        or (
            isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "guided_diffusion" for alias in node.names)
        )
    }
    assert named == set()


def test_metrics_are_a_lone_file_of_numpy():
    standard = sys.stdlib_module_names | {"numpy"}
    name = ("evaluation", "metrics")
    assert {module[0] for module, _ in imports(TREES[name], name)} <= standard


def uses_torch(name):
    return any(module[0] == "torch" for module, _ in imports(TREES[name], name, nested=False))


def test_the_training_imports_few_modules():
    found, waiting = set(), [("train_util",)]
    while waiting:
        name = waiting.pop()
        found |= {name[:length] for length in range(len(name) + 1)}  # with its packages
        waiting += [module for module, _ in ours(name, nested=False) if module in TREES and module not in found]
    assert len(found) <= 40


@pytest.mark.parametrize("name", [("config",), *(("runtime", module) for module in WITHOUT_TORCH)], ids=".".join)
def test_what_help_needs_does_not_import_torch(name):
    assert not uses_torch(name)
    assert {module for module, _ in ours(name, nested=False)} <= {("config",), *(("runtime", m) for m in WITHOUT_TORCH)}


@pytest.mark.parametrize("name", COMMANDS, ids=".".join)
def test_commands_parse_before_they_import_torch(name):
    allowed = {
        ("config",),
        ("runtime", "errors"),
        ("runtime", "options"),
        ("runtime", "launchers"),
        ("commands", "flags"),
        ("commands", "sections"),
        ("commands", "tool_sections"),
    }
    allowed |= {("commands", "entry"), ("commands", "stages")}
    assert {module for module, _ in ours(name, nested=False) if module} <= allowed
    assert not uses_torch(name)


def test_the_lower_lines_never_log():
    lower = [name for name in MODULES if name[0] in NEVER_LOG]
    assert [name for name in lower if ("logger",) in {module for module, _ in ours(name)}] == []


def functions():
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield f"{'.'.join(name)}.{node.name}", node


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
    sizes = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in ROOT.rglob("*.py")}
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
