"""Networks as others hand them over: archives of TorchScript and of torch.export, which hold code beside weights.

Trust: such a file is a program, and whoever runs it lets it compute what it likes with the images. What it could do
beyond computing is refused before torch sees it. Of both kinds only a copy of the members that were looked at is given
to torch, so that a zip with two directories shows nothing else to it.

- TorchScript: pickles in it are read by torch's own reader in C++, which calls no Python. Refused are operators that
  touch files (``torch.save``, ``torch.from_file``), and those of other libraries.
- torch.export: reading one unpickles, and evaluates expressions of sizes as Python. Refused are pickles of more than
  tensors, compiled code, targets that are no operators of torch, and expressions that are no arithmetic of sizes.

A program can still take any time and memory. Give it limits of the system where it comes from strangers.
"""

from __future__ import annotations

import io
import json
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import torch as th

from guided_diffusion import untrusted

_TOUCHES_FILES = re.compile(r"\btorch\.(save|load|from_file)\b")
_FOREIGN_OPERATOR = re.compile(r"\bops\.(?!prim\b)(\w+)|\btorch\.(classes|ops)\b")

_ARITHMETIC = re.compile(r"[\w\s+\-*/%(),.<>=!&|~']{0,100000}")
_WORD = re.compile(
    r"[a-z]{1,3}\d+|\d+(\.\d+)?|Symbol|Integer|Float|Rational|positive|nonnegative|negative|integer|real|True|False"
    r"|Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv|CeilDiv|CleanDiv|ModularIndexing|IntTrueDiv|Where"
    r"|Eq|Ne|Lt|Le|Gt|Ge|Equality|Unequality|StrictLessThan|LessThan|StrictGreaterThan|GreaterThan|And|Or|Not|oo|int_oo"
)
_TARGET = re.compile(
    r"torch\.ops\.(aten|prims)\.(?!from_file\b|save\b)\w+\.\w+|torch\.ops\.higher_order\.wrap_with_set_grad_enabled"
    r"|torch\.sym_(max|min|int|float|not|ite)"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_|getitem)"
)
_MEMBER = re.compile(
    r"archive_(format|version)|byteorder|\.data/.*|models/model\.json|extra/.*|data/sample_inputs/model\.pt"
    r"|data/weights/(model_weights_config\.json|weight_\d+)|data/constants/(model_constants_config\.json|tensor_\d+)"
)
_CONTAINERS = (None, "builtins.tuple", "builtins.list", "builtins.dict")


def load_torchscript(path: str, device: th.device) -> Any:
    """The module of a TorchScript archive, in evaluation mode.

    :raises OSError, ValueError: if there is none, it cannot be read, or does more than compute.
    """
    members = _members(path, "TorchScript archive")
    for name, content in members.items():
        if name.endswith(".py"):
            text = content.decode(errors="replace")
            found = _TOUCHES_FILES.search(text) or _FOREIGN_OPERATOR.search(text)
            if found:
                raise _refusal(path, "TorchScript archive", f"its code has {untrusted.quoted(found[0])}, which may do")
    module = _loaded(path, "TorchScript archive", lambda: th.jit.load(_archive(members), map_location=device))
    return module.eval()


def load_exported(path: str, device: th.device) -> Any:
    """The module of an exported program (.pt2), as it was when it was exported.

    :raises OSError, ValueError: if there is none, it cannot be read, or does more than compute.
    """
    kind = "exported program of torch 2.9 or newer"
    members = _members(path, kind)
    odd = [name for name in members if not _MEMBER.fullmatch(name.partition("/")[2])]
    if odd:
        raise _refusal(path, kind, f"it has the member {untrusted.quoted(odd[0])}, where graph and tensors belong")
    for name, content in members.items():
        members[name] = _checked(path, kind, name, content)
    return _loaded(path, kind, lambda: _module(members, device))


def _module(members: dict[str, bytes], device: th.device) -> Any:
    from torch.export.passes import move_to_device_pass

    program = th.export.load(_archive(members))
    return move_to_device_pass(program, device).module(check_guards=False)  # guards would be compiled as Python


# ---- archives


def _members(path: str, kind: str) -> dict[str, bytes]:
    """Everything in an archive, by name."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{untrusted.quoted(path)} does not exist: give the file of a network there")
    try:
        with untrusted.open_archive(path) as archive:
            claimed = sum(member.file_size for member in archive.infolist())
            if claimed > os.path.getsize(path) + untrusted.LARGE_MEMBER:  # torch packs code, never weights
                raise ValueError(f"its members unpack to {claimed} bytes")
            names = archive.namelist()
            if len(set(names)) < len(names):
                raise ValueError("it has two members of one name")
            return {name: untrusted.read_member(archive, name) for name in names}
    except ValueError as error:
        raise _refusal(path, kind, str(error)) from error


def _archive(members: dict[str, bytes]) -> io.BytesIO:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    file.seek(0)
    return file


def _loaded(path: str, kind: str, load: Callable[[], Any]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that TorchScript is not developed further
            return load()
    except (MemoryError, th.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # torch says with all kinds of them that a file is not what it should be
        raise _refusal(path, kind, untrusted.reason(error)) from error


def _refusal(path: str, kind: str, reason: str) -> ValueError:
    return ValueError(f"{path} is no {kind} that may be run ({reason}): save it again, or give another --features")


# ---- what an exported program says


def _checked(path: str, kind: str, name: str, content: bytes) -> bytes:
    """A member, if it holds what may be loaded; the graph without what is only for tracing errors."""
    try:
        if name.endswith(".pt"):
            _check_pickle(content)
        if not name.endswith(".json"):
            return content
        value = untrusted.parse_json(content)
        for key, part in _walk(value):
            _check_entry(key, part)
        return json.dumps(value).encode()
    except ValueError as error:
        raise _refusal(path, kind, f"{name.partition('/')[2]}: {error}") from error


def _check_pickle(content: bytes) -> None:
    try:
        th.load(io.BytesIO(content), weights_only=True)
    except Exception as error:  # an unpickler raises whatever the bytes lead it to
        raise ValueError("it pickles more than tensors and plain values") from error


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Every entry of every object in a JSON value; what is only for tracing errors is emptied on the way."""
    if isinstance(value, dict):
        for key in ("metadata", "guards_code"):
            if key in value:
                value[key] = type(value[key])() if isinstance(value[key], dict | list) else value[key]
        for key, part in value.items():
            yield key, part
            yield from _walk(part)
    elif isinstance(value, list):
        for part in value:
            yield from _walk(part)


def _check_entry(key: str, value: Any) -> None:
    if key == "target" and isinstance(value, str) and not _TARGET.fullmatch(value):
        raise ValueError(f"the target {untrusted.quoted(value)} is none of the operators that compute")
    if key == "expr_str" and not _is_arithmetic(value):
        raise ValueError(f"the size {untrusted.quoted(str(value))} is no arithmetic")
    if key == "use_pickle" and value is not False:
        raise ValueError("a tensor of another library's type")
    if key in ("in_spec", "out_spec") and not _is_plain(value):
        raise ValueError("inputs or outputs in other containers than tuples, lists and dicts")


def _is_arithmetic(text: Any) -> bool:
    """Whether an expression is made of sizes, numbers and the functions of sizes alone."""
    if not isinstance(text, str) or not _ARITHMETIC.fullmatch(text):
        return False
    return all(_WORD.fullmatch(word) for word in re.findall(r"[\w.]+", text))


def _is_plain(spec: Any) -> bool:
    """Whether the description of nested containers names those of Python alone."""
    if not isinstance(spec, str) or not spec:
        return not spec
    parts = untrusted.parse_json(spec.encode())
    return all(key != "type" or part in _CONTAINERS for key, part in _walk(parts))
