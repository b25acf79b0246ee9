"""The Inception network against torch-fidelity's and TensorFlow's, and its resize against TensorFlow 1's.

golden/inception.json: keys and shapes of the state dict of torch-fidelity 0.4.0's FeatureExtractorInceptionV3, in
order. golden/inception.npz: its outputs for `pictures()` with the weights of `filled()`, of which every `STRIDES`-th
number is kept ("spatial": what its Mixed_6d.branch1x1 returns, cut and flattened as the published evaluator does);
and resize/HxW: every 13th pixel of what TensorFlow 1 makes of random images of that size.

golden/inception_tensorflow.npz: outputs for `pictures()`, as many of them, of the published evaluator's network written
in the operations of TensorFlow 2.21, with the weights of `tensorflow_weight()` under the names of its graph.
golden/inception_tensorflow.json: each layer of the state dict and its scope in that graph.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch as th

from guided_diffusion.evaluation.inception import InceptionNetwork, resize_tf1

GOLDEN = Path(__file__).parents[1] / "golden"
SHAPES = json.loads((GOLDEN / "inception.json").read_text())
STRIDES = {"pool": 7, "spatial": 7, "logits_unbiased": 5, "logits": 5}


def rng(name):
    return np.random.default_rng(zlib.crc32(name.encode()))


def filled(shapes):
    """A state dict whose numbers follow from names and shapes, and keep what flows through the network in range."""
    return {name: th.from_numpy(values(name, tuple(shape))) for name, shape in shapes.items()}


def values(name, shape):
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    noise = rng(name).standard_normal(shape, dtype=np.float32)
    if len(shape) > 1:
        return noise * np.float32((2 / np.prod(shape[1:])) ** 0.5)
    if name.endswith("running_var"):
        return np.exp(noise / 5)
    return noise / 10 + np.float32(name.endswith("weight"))


def pictures(height=64, width=48):
    """Noise, and a smooth slope that wraps around: uint8 [2, 3, height, width]."""
    noise = rng("pictures").integers(0, 256, (height, width, 3), dtype=np.uint8)
    slope = np.add.outer(np.arange(height) * 3, np.arange(width) * 2)[..., None] * np.array([1, 2, 3]) // 4 % 256
    return th.from_numpy(np.stack([noise, slope.astype(np.uint8)])).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def weights():
    return filled(SHAPES)


@pytest.fixture(scope="module")
def network(weights):
    network = InceptionNetwork()
    network.load_state_dict(weights)
    return network


@pytest.fixture(scope="module")
def seen(network):
    """What the network sees in the pictures."""
    return network(pictures())


def close(got, wanted, tolerance):
    assert got.shape == wanted.shape
    assert np.abs(np.asarray(got) - wanted).max() <= tolerance * np.abs(wanted).max()


def test_the_state_dict_is_torch_fidelitys():
    ours = [(name, list(value.shape)) for name, value in InceptionNetwork().state_dict().items()]
    assert ours == list(SHAPES.items())


@pytest.mark.parametrize("output", STRIDES)
def test_the_outputs_are_torch_fidelitys(seen, output):
    with np.load(GOLDEN / "inception.npz") as golden:
        wanted = golden[output]
    assert len(wanted) == 2
    assert np.abs(wanted[0] - wanted[1]).mean() > 0.05 * np.abs(wanted).mean()  # the pictures make a difference
    close(getattr(seen, output)[:, :: STRIDES[output]], wanted, 1e-4)


def tensorflow_weight(name, shape):
    """Numbers that follow from a name and a shape of the graph."""
    noise = rng(name).standard_normal(shape, dtype=np.float32)
    if len(shape) > 1:
        return noise * np.float32((2 / np.prod(shape[:-1])) ** 0.5)
    if name.endswith("variance"):
        return np.exp(noise / 5)
    return noise / 10 + np.float32(name.endswith("gamma"))


def tensorflow_state():
    """The weights of the graph as a state dict; there, the channels of input and output are the last axes."""
    batchnorm = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    names = {"fc.weight": "softmax/weights", "fc.bias": "softmax/biases"}
    for layer, scope in json.loads((GOLDEN / "inception_tensorflow.json").read_text()).items():
        names[f"{layer}.conv.weight"] = f"{scope}/conv2d_params"
        names |= {f"{layer}.bn.{ours}": f"{scope}/batchnorm/{theirs}" for ours, theirs in batchnorm.items()}
    state = {}
    for key, name in names.items():
        shape = SHAPES[key]
        order, back = {4: ((2, 3, 1, 0), (3, 2, 0, 1)), 2: ((1, 0), (1, 0)), 1: ((0,), (0,))}[len(shape)]
        state[key] = th.from_numpy(tensorflow_weight(name, tuple(shape[axis] for axis in order)).transpose(back))
    return state


def test_the_outputs_are_tensorflows():
    network = InceptionNetwork()
    network.load_state_dict(tensorflow_state(), strict=True)
    seen = network(pictures())
    with np.load(GOLDEN / "inception_tensorflow.npz") as golden:
        for output, stride in STRIDES.items():
            close(getattr(seen, output)[:, ::stride], golden[output], 1e-4)


def test_the_outputs_have_their_shapes_and_the_logits_differ_by_the_biases(seen, weights):
    assert [tuple(output.shape) for output in seen] == [(2, 2048), (2, 2023), (2, 1008), (2, 1008)]
    assert all(output.dtype == th.float32 and output.is_contiguous() for output in seen)
    assert th.equal(seen.logits, seen.logits_unbiased + weights["fc.bias"])
    close(seen.logits_unbiased, (seen.pool.double() @ weights["fc.weight"].double().T).numpy(), 1e-5)


def test_spatial_features_are_the_start_of_the_1x1_branch_place_by_place(network, seen):
    branch = []
    handle = network.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, output: branch.append(output))
    network(pictures())
    handle.remove()
    assert branch[0].shape == (2, 192, 17, 17)
    assert float(branch[0].min()) == 0  # after the ReLU
    assert th.equal(seen.spatial.view(2, 17, 17, 7)[1, 3, 5], branch[0][1, :7, 3, 5])
    assert th.equal(seen.spatial.view(2, 17, 17, 7), branch[0].movedim(1, 3)[..., :7])


def test_the_same_images_give_the_same_bits_in_any_mode_and_type(network, seen):
    network.train()
    again = network(pictures().float())
    network.eval()
    assert all(th.equal(*pair) for pair in zip(seen, again, strict=True))


def test_images_do_not_see_each_other(network, seen):
    alone = network(pictures()[1:])
    for output, wanted in zip(alone, seen, strict=True):
        close(output, wanted[1:].numpy(), 1e-5)


@pytest.mark.slow
def test_bfloat16_is_of_the_convolutions_alone(weights, seen):
    network = InceptionNetwork(dtype=th.bfloat16)
    network.load_state_dict(weights)
    assert {value.dtype for value in network.parameters()} == {th.float32}
    kinds = set()
    network.Mixed_7c.register_forward_hook(lambda module, given, output: kinds.add(output.dtype))
    got = network(pictures()[:1])
    assert kinds == {th.bfloat16}
    assert got.pool.dtype == got.spatial.dtype == got.logits.dtype == th.float32
    assert 1e-4 < float((got.pool - seen.pool[:1]).norm() / seen.pool[:1].norm()) < 2e-2


def test_tf32_is_off_while_it_looks_and_then_as_it_was(network):
    cudnn, used = th.backends.cudnn, []
    handle = network.Mixed_5b.register_forward_hook(lambda *_: used.append((cudnn.allow_tf32, cudnn.deterministic)))
    before = cudnn.allow_tf32, cudnn.deterministic, cudnn.enabled
    network(pictures(8, 8)[:1])
    handle.remove()
    assert used == [(False, True)]
    assert before == (True, False, True)
    assert (cudnn.allow_tf32, cudnn.deterministic, cudnn.enabled) == before


def test_to_make_one_draws_no_random_numbers_and_its_weights_are_zero():
    before = th.get_rng_state()
    network = InceptionNetwork()
    assert th.equal(th.get_rng_state(), before)
    assert not any(value.any() for value in network.state_dict().values())
    assert not any(value.requires_grad for value in network.parameters())


def test_gradients_reach_the_images(network):
    images = pictures(8, 8)[:1].float().requires_grad_()
    network(images).pool.sum().backward()
    assert images.grad.abs().min() > 0


@pytest.mark.parametrize("size", ["32x32", "64x48", "256x256", "300x310"])
def test_resizing_is_tensorflow_1s(size):
    height, width = map(int, size.split("x"))
    image = rng(f"img{size}").integers(0, 256, (1, height, width, 3)).astype(np.float32)
    got = resize_tf1(th.from_numpy(image).permute(0, 3, 1, 2))
    assert got.shape == (1, 3, 299, 299)
    with np.load(GOLDEN / "inception.npz") as golden:
        assert np.abs(got[0].permute(1, 2, 0)[::13, ::13].numpy() - golden[f"resize/{size}"]).max() < 1e-3


def test_an_image_of_the_right_size_stays_as_it_is():
    image = th.rand(1, 3, 299, 299) * 255
    given = image.clone()
    assert th.equal(resize_tf1(image), image)
    InceptionNetwork()(image)
    assert th.equal(image, given)  # and is not written to


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 5), (598, 40), (299, 301)])
def test_a_slope_is_a_slope_until_the_last_pixel(height, width):
    """Pixel i of the output lies at i * H / 299, and there is nothing beyond the last pixel."""
    down, across = th.meshgrid(th.arange(height), th.arange(width), indexing="ij")
    got = resize_tf1((2 * down + 3 * across).expand(2, 3, height, width))
    assert got.dtype == th.float32
    place = th.arange(299, dtype=th.float64)
    wanted_down = (place * height / 299).clamp(max=height - 1)
    wanted_across = (place * width / 299).clamp(max=width - 1)
    wanted = 2 * wanted_down[:, None] + 3 * wanted_across
    assert (got - wanted).abs().max() < 1e-3
