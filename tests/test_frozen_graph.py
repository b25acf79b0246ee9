"""Reading the published evaluator's graph: the whole of it, every form of a tensor, and files that are something else.

golden/inception_graph.json: names and shapes of the weights in classify_image_graph_def.pb. golden/inception_graph.npz
was made with TensorFlow 2.21: the network written in its operations, with the weights of `weight()`, looked at
`pictures()` of test_inception.py, and every `STRIDES`-th number was kept ("spatial": of mixed_6/conv, as the published
evaluator has it); "graph" is a small GraphDef that its library wrote, and small/* what it reads there.
"""

from __future__ import annotations

import json
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch as th
from test_inception import STRIDES, close, pictures

from evaluations import frozen_graph
from evaluations.frozen_graph import inception_state_dict, read_frozen_graph, tensor_names
from evaluations.inception import InceptionNetwork
from guided_diffusion import untrusted

GOLDEN = Path(__file__).parent / "golden"
SHAPES = {name: tuple(shape) for name, shape in json.loads((GOLDEN / "inception_graph.json").read_text()).items()}


# ---- a writer of graphs


def varint(number):
    written = bytearray()
    while number > 127:
        written.append(number & 127 | 128)
        number >>= 7
    return bytes([*written, number])


def field(number, value):
    """An int as a varint, anything else as bytes with their length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def shape_of(*sides):
    return field(2, b"".join(field(2, field(1, side)) for side in sides))


def tensor_of(array, *, packed=False):
    return field(1, 1) + shape_of(*array.shape) + field(5 if packed else 4, array.astype("<f4").tobytes())


def attribute(key, value):
    return field(5, field(1, key) + field(2, value))


def node(name, tensor, operation="Const"):
    return field(1, field(1, name) + field(2, operation) + attribute("value", field(8, tensor)))


FLOAT = field(1, 1)


@pytest.fixture
def read(tmp_path):
    """Reads bytes as a graph."""

    def read(content):
        path = tmp_path / "graph.pb"
        path.write_bytes(content)
        return read_frozen_graph(str(path))

    return read


# ---- the published graph


def weight(name, shape):
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
    if len(shape) > 1:
        return noise * np.float32((2 / np.prod(shape[:-1])) ** 0.5)
    if name.endswith("variance"):
        return np.exp(noise / 5)
    return noise / 10 + np.float32(name.endswith("gamma"))


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    """The weights as they are read from a file of 96 MB, which has other nodes too."""
    path = tmp_path_factory.mktemp("published") / "classify_image_graph_def.pb"
    with path.open("wb") as file:
        file.write(field(1, field(1, "DecodeJpeg/contents") + field(2, "Placeholder")))
        for name, shape in SHAPES.items():
            file.write(node(name, tensor_of(weight(name, shape), packed=name.endswith("beta"))))
            file.write(field(1, field(1, f"{name}/read") + field(2, "Identity") + field(3, name)))
        file.write(node("mixed/join/concat_dim", field(1, 3) + field(2, b"") + field(7, 3)))
        file.write(field(4, field(1, 8)))
    tensors = read_frozen_graph(str(path))
    path.unlink()
    return tensors


@pytest.fixture(scope="module")
def state(tensors):
    return inception_state_dict(tensors)


def test_every_weight_of_the_graph_is_read(tensors):
    assert {name: array.shape for name, array in tensors.items()} == SHAPES
    for name in ("conv/conv2d_params", "mixed_10/tower_1/mixed/conv_1/batchnorm/beta", "softmax/biases"):
        assert np.array_equal(tensors[name], weight(name, SHAPES[name]))
        assert not tensors[name].flags.writeable


def test_every_weight_has_one_name_in_the_state_dict():
    names = tensor_names()
    assert sorted(names.values()) == sorted(SHAPES)
    wanted = [name for name in InceptionNetwork().state_dict() if not name.endswith("num_batches_tracked")]
    assert sorted(names) == sorted(wanted)


def test_the_network_computes_what_tensorflow_does(state):
    network = InceptionNetwork()
    network.load_state_dict(state, strict=True)
    seen = network(pictures())
    with np.load(GOLDEN / "inception_graph.npz") as golden:
        for name, stride in STRIDES.items():
            close(getattr(seen, name)[:, ::stride], golden[name], 1e-4)


def test_the_state_dict_is_whole_in_order_and_in_torchs_layout(tensors, state):
    assert list(state) == list(InceptionNetwork().state_dict())
    kernel = tensors["mixed_4/tower_1/conv_4/conv2d_params"]
    assert kernel.shape == (1, 7, 128, 192)
    got = state["Mixed_6b.branch7x7dbl_5.conv.weight"]
    assert got.shape == (192, 128, 1, 7)
    assert float(got[150, 20, 0, 4]) == float(kernel[0, 4, 20, 150])
    assert np.array_equal(state["fc.weight"].T, tensors["softmax/weights"])
    assert all(value.is_contiguous() for value in state.values())


def test_scales_that_are_not_there_are_one(tensors, state):
    without = {name: array for name, array in tensors.items() if not name.endswith("gamma")}
    got = inception_state_dict(without)
    assert th.equal(got["Mixed_7a.branch3x3_2.bn.weight"], th.ones(320))
    assert th.equal(got["Mixed_7a.branch3x3_2.bn.bias"], state["Mixed_7a.branch3x3_2.bn.bias"])


def test_a_missing_tensor_is_named(tensors):
    missing = {"mixed_7/tower/conv_1/conv2d_params", "softmax/biases"}
    rest = {name: array for name, array in tensors.items() if name not in missing}
    with pytest.raises(ValueError, match=r"not the published Inception, 2 of its 472 .*mixed_7/tower/conv_1/conv2d_pa"):
        inception_state_dict(rest)


def test_a_tensor_of_another_shape_is_named(tensors):
    other = tensors | {"softmax/weights": tensors["softmax/weights"].T}
    with pytest.raises(ValueError, match=r"softmax/weights has shape \(1008, 2048\), not \(2048, 1008\): download"):
        inception_state_dict(other)


# ---- forms of tensors


def test_what_tensorflow_wrote_is_read_as_tensorflow_reads_it(read):
    with np.load(GOLDEN / "inception_graph.npz") as golden:
        wanted = {name.removeprefix("small/"): golden[name] for name in golden if name.startswith("small/")}
        got = read(golden["graph"].tobytes())
    assert len(wanted) == 6
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        assert got[name].shape == array.shape
        assert np.array_equal(got[name], array)


ONE_BY_ONE = b"".join(varint(5 << 3 | 5) + np.float32(number).tobytes() for number in (1, 2, 3))
PACKED = field(5, np.array([1, 2], "<f4").tobytes())


@pytest.mark.parametrize(
    ("tensor", "wanted"),
    [
        (FLOAT + shape_of(3) + ONE_BY_ONE, [1, 2, 3]),
        (ONE_BY_ONE + shape_of(1, 3) + FLOAT, [[1, 2, 3]]),
        (FLOAT + shape_of(5) + PACKED + ONE_BY_ONE, [1, 2, 1, 2, 3]),
        (FLOAT + shape_of(2, 2) + ONE_BY_ONE[:5], [[1, 1], [1, 1]]),
        (FLOAT + ONE_BY_ONE[:5], 1),
        (FLOAT + shape_of(0, 7), np.zeros((0, 7))),
        (FLOAT + shape_of(2), [0, 0]),
        (FLOAT + field(3, 9) + varint(77 << 3 | 1) + bytes(8) + field(300, "what") + shape_of(2) + PACKED, [1, 2]),
    ],
    ids=["one by one", "any order", "mixed", "one for all", "scalar", "empty", "none for zero", "unknown fields"],
)
def test_forms_of_a_tensor(read, tensor, wanted):
    got = read(node("x", tensor))["x"]
    assert got.dtype == np.float32
    assert got.shape == np.shape(wanted)
    assert np.array_equal(got, wanted)


def test_only_float32_constants_are_taken(read):
    ints = node("ints", field(1, 3) + shape_of(2) + field(4, bytes(8)))
    other = node("other", tensor_of(np.ones(2)), operation="Variable")
    entry = field(5, field(2, field(8, tensor_of(np.ones(3)))) + field(1, "value"))  # the key after the value
    late = field(1, attribute("dtype", field(6, 1)) + entry + field(2, "Const") + field(1, "late"))
    assert list(read(ints + other + late + field(3, 21))) == ["late"]


# ---- files that are something else


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it holds no float32 constants"),
        (node("x", FLOAT + shape_of(2), "Variable"), "it holds no float32 constants"),
        (b"PK\x03\x04" + bytes(100), "a field has the wire type 3"),
        (b"\x00\x00", "a field has the number 0"),
        (node("x", tensor_of(np.ones(9)))[:-1], "a field of .* bytes where .* are left"),
        (b"\x0a\xff\xff\xff\xff\x0f", "a field of 4294967295 bytes where 0 are left"),
        (b"\x0a", "it ends within a number"),
        (b"\x08" + b"\xff" * 10, "a number has more than 10 bytes"),
        (field(1, 5), "a number where a message belongs"),
        (field(1, field(1, "x" * 2000)), "a name of more than 1000 characters"),
        (field(1, field(1, b"\xff\xfe")), "a name that is no text"),
        (node("x", tensor_of(np.ones(2))) * 2, "two nodes have the name 'x'"),
        (node("x", FLOAT + shape_of(2**40) + PACKED), r"in the node 'x', the shape \[1099511627776\] is none"),
        (node("x", FLOAT + shape_of(2**64 - 1)), r"the shape \[18446744073709551615\] is none"),
        (node("x", FLOAT + shape_of(*[2**20] * 3)), "the shape .* is none"),
        (node("x", FLOAT + shape_of(0, 2**63)), "the shape .* is none"),
        (node("x", FLOAT + shape_of(*[1] * 100) + ONE_BY_ONE[:5]), "dimension"),
        (node("x", FLOAT + field(2, field(2, field(1, "2"))) + PACKED), "the shape .* is none"),
        (node("x", FLOAT + shape_of(5) + PACKED), "2 numbers for a tensor of 5"),
        (node("x", FLOAT + shape_of(1) + PACKED), "2 numbers for a tensor of 1"),
        (node("x", FLOAT + shape_of(1) + field(4, b"abc")), "3 bytes are no float32 numbers"),
    ],
)
def test_other_files_are_refused_in_a_sentence(read, content, reason):
    with pytest.raises(ValueError, match=rf"graph.pb is no frozen TensorFlow graph \(.*{reason}.*\): download") as told:
        read(content)
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 600


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is no frozen TensorFlow graph \(it is a folder\)"):
        read_frozen_graph(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        read_frozen_graph(str(tmp_path / "nothing.pb"))


def test_files_without_end_are_refused(read, monkeypatch):
    content = node("x", tensor_of(np.ones(50)))
    assert list(read(content)) == ["x"]
    monkeypatch.setattr(frozen_graph, "MAX_FIELDS", 10)
    with pytest.raises(ValueError, match="more than 10 fields"):
        read(content)
    monkeypatch.setattr(untrusted, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="larger than 100 bytes"):
        read(content)


def test_a_small_file_takes_little_memory(read):
    content = b"".join(node(f"x{i}", FLOAT + shape_of(2**12, 2**12) + ONE_BY_ONE[:5]) for i in range(5))
    tracemalloc.start()
    try:
        got = read(content)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [array.shape for array in got.values()] == [(2**12, 2**12)] * 5
    assert peak < 2**20


def test_damage_anywhere_is_a_sentence_or_other_numbers(read):
    """Every prefix, and every byte changed in turn."""
    whole = node("conv", tensor_of(np.arange(4).reshape(2, 2))) + node("x", FLOAT + shape_of(3) + ONE_BY_ONE)
    damaged = [whole[:end] for end in range(len(whole))]
    damaged += [
        whole[:i] + bytes([whole[i] ^ flip]) + whole[i + 1 :] for i in range(len(whole)) for flip in (1, 8, 128)
    ]
    told = []
    for content in damaged:
        try:
            got = read(content)
        except ValueError as error:
            told.append(str(error))
        else:
            assert all(array.dtype == np.float32 for array in got.values())
    assert len(told) > len(whole)
    assert all("is no frozen TensorFlow graph" in message for message in told)
