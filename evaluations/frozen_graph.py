"""Weights out of a frozen TensorFlow graph, without TensorFlow: the published evaluator's classify_image_graph_def.pb.

Such a file is one GraphDef of Google's protobuf; a message is a row of fields, each a number, a wire type and a value.
Only what leads to float32 constants is followed: GraphDef.node -> NodeDef.attr["value"] -> AttrValue.tensor. Nothing
is taken on trust: lengths are checked before they are used, and a tensor whose file gives one number for all of it is
a view of that number, so that no tensor takes more memory than its file has bytes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch as th

from evaluations.inception import BLOCKS, STEM, InceptionNetwork, Step, named_steps
from guided_diffusion import untrusted

MAX_FIELDS = 1_000_000  # of all messages that are read; a graph of the published size has some 20,000
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5  # wire types
NODE = 1  # in GraphDef
NAME, OPERATION, ATTRIBUTE = 1, 2, 5  # in NodeDef
KEY, VALUE = 1, 2  # in its map of attributes
TENSOR = 8  # in AttrValue
TYPE, SHAPE, CONTENT, FLOATS = 1, 2, 4, 5  # in TensorProto
DIMENSION, SIZE = 2, 1  # in TensorShapeProto, and in its Dim
FLOAT32 = 1  # of TensorFlow's types

Array = npt.NDArray[np.float32]


# ---- the wire format


class _Reader:
    """Fields of messages, of which the whole file has at most `MAX_FIELDS`."""

    def __init__(self) -> None:
        self.left = MAX_FIELDS

    def fields(self, message: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
        """Number, wire type and value of every field of a message: an int of a varint, else bytes."""
        place = 0
        while place < len(message):
            self.left -= 1
            if self.left < 0:
                raise ValueError(f"it has more than {MAX_FIELDS} fields")
            key, place = _varint(message, place)
            number, kind = key >> 3, key & 7
            value: int | memoryview
            if kind == VARINT:
                value, place = _varint(message, place)
            else:
                start, place = _extent(message, place, kind)
                value = message[start:place]
            if number == 0:
                raise ValueError("a field has the number 0")
            yield number, kind, value

    def parts(self, message: memoryview, number: int) -> Iterator[memoryview]:
        """Messages or strings that a message holds under one number."""
        for found, kind, value in self.fields(message):
            if found == number:
                yield _bytes(kind, value)


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """A number of 7 bits a byte, the lowest first, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(message):
            raise ValueError("it ends within a number")
        byte = message[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("a number has more than 10 bytes")


def _extent(message: memoryview, place: int, kind: int) -> tuple[int, int]:
    """Where the bytes of a field start and end."""
    if kind == LENGTH:
        length, place = _varint(message, place)
    elif kind in (FIXED32, FIXED64):
        length = 4 if kind == FIXED32 else 8
    else:
        raise ValueError(f"a field has the wire type {kind}")
    if length > len(message) - place:
        raise ValueError(f"a field of {length} bytes where {len(message) - place} are left")
    return place, place + length


def _bytes(kind: int, value: int | memoryview) -> memoryview:
    if kind != LENGTH or isinstance(value, int):
        raise ValueError("a number where a message belongs")
    return value


def _text(value: memoryview) -> str:
    if len(value) > untrusted.MAX_NAME:
        raise ValueError(f"a name of more than {untrusted.MAX_NAME} characters")
    try:
        return bytes(value).decode()
    except UnicodeDecodeError as error:
        raise ValueError("a name that is no text") from error


# ---- graphs


def read_frozen_graph(path: str) -> dict[str, Array]:
    """The float32 constants of a frozen graph by the names of their nodes; the arrays cannot be written to.

    :raises ValueError: if the file is no such graph, is damaged, or is larger than 2**29 bytes.
    """
    try:
        return _constants(memoryview(untrusted.read_file(path)))
    except ValueError as error:
        raise ValueError(
            f"{path} is no frozen TensorFlow graph ({error}): download classify_image_graph_def.pb again"
        ) from error


def _constants(graph: memoryview) -> dict[str, Array]:
    reader = _Reader()
    found: dict[str, Array] = {}
    for node in reader.parts(graph, NODE):
        name, tensor = _constant(reader, node)
        if tensor is None:
            continue
        if name in found:
            raise ValueError(f"two nodes have the name {untrusted.quoted(name)}")
        try:
            array = _array(reader, tensor)
        except ValueError as error:
            raise ValueError(f"in the node {untrusted.quoted(name)}, {error}") from error
        if array is not None:
            found[name] = array
    if not found:
        raise ValueError("it holds no float32 constants")
    return found


def _constant(reader: _Reader, node: memoryview) -> tuple[str, memoryview | None]:
    """Name of a node, and its tensor if it is a constant."""
    name, operation, tensor = "", "", None
    for number, kind, value in reader.fields(node):
        if number == NAME:
            name = _text(_bytes(kind, value))
        elif number == OPERATION:
            operation = _text(_bytes(kind, value))
        elif number == ATTRIBUTE:
            tensor = _tensor(reader, _bytes(kind, value)) or tensor
    return name, tensor if operation == "Const" else None


def _tensor(reader: _Reader, attribute: memoryview) -> memoryview | None:
    """The tensor of an entry of a node's attributes, if the entry is its value."""
    key, entry = "", None
    for number, kind, value in reader.fields(attribute):
        if number == KEY:
            key = _text(_bytes(kind, value))
        elif number == VALUE:
            entry = _bytes(kind, value)
    if key != "value" or entry is None:
        return None
    return next(reader.parts(entry, TENSOR), None)


def _array(reader: _Reader, tensor: memoryview) -> Array | None:
    """The numbers of a TensorProto; None if they are not float32."""
    type_number, shape, content = 0, tuple[int, ...](), memoryview(b"")
    floats: list[memoryview] = []
    for number, kind, value in reader.fields(tensor):
        if number == TYPE and isinstance(value, int):
            type_number = value
        elif number == SHAPE:
            shape = _shape(reader, _bytes(kind, value))
        elif number == CONTENT:
            content = _bytes(kind, value)
        elif number == FLOATS and not isinstance(value, int):
            floats.append(value)  # packed or one by one
    return _numbers(content or b"".join(floats), shape) if type_number == FLOAT32 else None


def _shape(reader: _Reader, message: memoryview) -> tuple[int, ...]:
    sides = []
    for dimension in reader.parts(message, DIMENSION):
        sizes = [value for number, _, value in reader.fields(dimension) if number == SIZE]
        sides.append(sizes[-1] if sizes else 0)
    shape = tuple(side for side in sides if isinstance(side, int))
    if len(shape) < len(sides) or math.prod(shape) > untrusted.MAX_BYTES or max(shape, default=0) > untrusted.MAX_BYTES:
        raise ValueError(f"the shape {untrusted.printable(str(sides))} is none")
    return shape


def _numbers(content: memoryview | bytes, shape: tuple[int, ...]) -> Array:
    """Numbers in a shape; one alone, or none for 0, stands for all."""
    if len(content) % 4:
        raise ValueError(f"{len(content)} bytes are no float32 numbers")
    numbers: Array = np.frombuffer(content, "<f4")
    wanted = math.prod(shape)
    if len(numbers) == wanted:
        return numbers.reshape(shape)
    if len(numbers) > 1:
        raise ValueError(f"{len(numbers)} numbers for a tensor of {wanted}")
    return np.broadcast_to(numbers if len(numbers) else np.float32(0), shape)


# ---- Inception


def inception_state_dict(tensors: Mapping[str, Array]) -> dict[str, th.Tensor]:
    """The state dict of `InceptionNetwork` from the constants of the published graph.

    :raises ValueError: if one of them is missing or has another shape.
    """
    state = InceptionNetwork().state_dict()
    names = tensor_names()
    missing = [name for name in names.values() if name not in tensors and not name.endswith("/gamma")]
    if missing:
        raise _not_inception(f"{len(missing)} of its {len(names)} tensors are missing, the first is {missing[0]}")
    for key, name in names.items():
        if name in tensors:
            _copy(name, tensors[name], state[key].numpy())
        else:
            state[key].fill_(1)
    return dict(state)


def _copy(name: str, source: Array, target: Array) -> None:
    """Fill a tensor of torch's; TensorFlow has the channels of the input, then of the output, as the last axes."""
    order = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[target.ndim]
    target = target.transpose(order)
    if source.shape != target.shape:
        raise _not_inception(f"{name} has shape {source.shape}, not {target.shape}")
    np.copyto(target, source)


def _not_inception(reason: str) -> ValueError:
    return ValueError(
        f"the graph is not the published Inception, {reason}: "
        "download inception-2015-12-05, which has classify_image_graph_def.pb"
    )


BATCHNORM = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}


def tensor_names() -> dict[str, str]:
    """What the graph calls each tensor of the state dict."""
    names = {}
    for layer, scope in _layers():
        names[f"{layer}.conv.weight"] = f"{scope}/conv2d_params"
        for ours, theirs in BATCHNORM.items():
            names[f"{layer}.bn.{ours}"] = f"{scope}/batchnorm/{theirs}"
    return names | {"fc.weight": "softmax/weights", "fc.bias": "softmax/biases"}


def _layers() -> Iterator[tuple[str, str]]:
    """Each layer and its scope in the graph.

    A block's branches are tower, tower_1, ..., but for a single convolution, which lies in the block itself.
    """
    for number, name in enumerate(STEM):
        yield name, _numbered("conv", number)
    for number, (block, branches) in enumerate(BLOCKS.items()):
        scope = _numbered("mixed", number)
        towers = (f"{scope}/{_numbered('tower', tower)}" for tower in itertools.count())
        for branch, steps in branches.items():
            for layer, place in _branch_layers(branch, steps, next(towers) if len(steps) > 1 else scope):
                yield f"{block}.{layer}", place


def _branch_layers(branch: str, steps: Sequence[Step], scope: str) -> Iterator[tuple[str, str]]:
    """Each layer of a branch and its scope: conv, conv_1, ..., where a fork counts anew in a scope of its own."""
    layers = [names for _, names in named_steps(branch, steps) if names]
    for number, names in enumerate(layers):
        if len(names) == 1:
            yield names[0], f"{scope}/{_numbered('conv', number)}"
        else:
            yield from ((name, f"{scope}/mixed/{_numbered('conv', side)}") for side, name in enumerate(names))


def _numbered(name: str, number: int) -> str:
    return f"{name}_{number}" if number else name
