"""Networks of latent-diffusion and GLIDE: keys of published configurations, and recorded outputs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch as th

from guided_diffusion.networks import glide
from guided_diffusion.networks.autoencoder import AutoencoderKL, VQModelInterface
from guided_diffusion.networks.memory import recompute_at
from guided_diffusion.networks.text import BERTEmbedder, TextTransformer
from guided_diffusion.unet import UNetModel

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
from conformance import fill_weights, rng_for, tensor_for  # noqa: E402

MANIFESTS = json.loads((GOLDEN / "text_latent.json").read_text())
SMALL = MANIFESTS["small"]
NUMBERS = np.load(GOLDEN / "text_latent.npz")
GLIDE = {
    "base": glide.Text2ImUNet,
    "upsample": glide.SuperResText2ImUNet,
    "base-inpaint": glide.InpaintText2ImUNet,
    "upsample-inpaint": glide.SuperResInpaintText2ImUnet,
}


def autoencoder(kind, embed_dim, ddconfig, n_embed=None):
    if kind.lower() == "kl":
        return AutoencoderKL(ddconfig=ddconfig, embed_dim=embed_dim)
    return VQModelInterface(ddconfig=ddconfig, n_embed=n_embed, embed_dim=embed_dim)


def published(group, entry, name):
    if group == "latent_unets":
        return UNetModel(**entry["kwargs"])
    if group == "autoencoders":
        return autoencoder(entry["kind"], entry["embed_dim"], entry["ddconfig"], entry["n_embed"])
    if group == "text_transformers":
        return BERTEmbedder(entry["n_embed"], entry["n_layer"]).transformer
    return GLIDE[name](**entry["kwargs"])


@pytest.mark.parametrize(
    ("group", "name"),
    [(group, name) for group, entries in MANIFESTS.items() if group != "small" for name in entries],
)
def test_published_configurations_have_their_keys_in_order(group, name):
    entry = MANIFESTS[group][name]
    with th.device("meta"):
        state = published(group, entry, name).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == entry["shapes"]
    assert list(state) == list(entry["shapes"])
    if "parameters" in entry:
        assert sum(value.numel() for value in state.values()) == entry["parameters"]


def ready(network, name):
    """A network with weights made from their names."""
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == SMALL[name]["shapes"]
    fill_weights(network)
    return network.eval().requires_grad_(False)


def same(value, name):
    recorded = NUMBERS[name]
    assert value.shape == recorded.shape
    assert np.abs(value.numpy() - recorded).max() <= 1e-4 * np.abs(recorded).max()


@pytest.mark.parametrize("name", [name for name in SMALL if name.startswith("unet/")])
def test_latent_unets_compute_what_was_recorded(name):
    kwargs = SMALL[name]["kwargs"]
    network = ready(UNetModel(**kwargs), name)
    more = {}
    if "context_dim" in kwargs:
        more["context"] = tensor_for(f"{name}/context", (2, 7, kwargs["context_dim"]))
    if "num_classes" in kwargs:
        more["y"] = th.tensor([0, 4])
    x = tensor_for(f"{name}/x", (2, kwargs["in_channels"], kwargs["image_size"], kwargs["image_size"]))
    same(network(x, th.tensor([3.0, 777.0]), **more), name)


@pytest.mark.parametrize("name", ["kl", "kl-deep"])
def test_kl_autoencoders_compute_what_was_recorded(name):
    embed_dim, ddconfig = SMALL[f"ae/{name}"]["arguments"]
    network = ready(AutoencoderKL(ddconfig=ddconfig, embed_dim=embed_dim), f"ae/{name}")
    moments = network.encode(tensor_for(f"{name}/x", (2, 3, *[ddconfig["resolution"]] * 2), 0.5)).parameters
    same(moments, f"ae/{name}/moments")
    same(network.decode(moments.chunk(2, dim=1)[0]), f"ae/{name}/decoded")


def test_a_vq_autoencoder_computes_what_was_recorded():
    embed_dim, n_embed, ddconfig = SMALL["ae/vq"]["arguments"]
    network = ready(VQModelInterface(ddconfig=ddconfig, n_embed=n_embed, embed_dim=embed_dim), "ae/vq")
    z = network.encode(tensor_for("vq/x", (2, 3, *[ddconfig["resolution"]] * 2), 0.5))
    same(z, "ae/vq/z")
    assert (network.quantize.ids(z).numpy() == NUMBERS["ae/vq/ids"]).all()
    same(network.decode(z), "ae/vq/decoded")


def tokens_for(name, shape, vocab):
    return th.from_numpy(rng_for(name).integers(0, vocab, shape))


def test_the_text_transformer_computes_what_was_recorded():
    entry = SMALL["text/xt"]
    arguments = entry["dim"], entry["depth"], entry["vocab"], entry["max_seq_len"]
    network = ready(TextTransformer(*arguments), "text/xt")
    tokens = tokens_for("xt/tokens", (2, entry["max_seq_len"]), entry["vocab"])
    same(network(tokens, return_embeddings=True), "text/xt")


@pytest.mark.parametrize("name", GLIDE)
def test_glide_computes_what_was_recorded(name):
    kwargs = SMALL[f"glide/{name}"]["kwargs"]
    network = ready(GLIDE[name](**kwargs), f"glide/{name}")
    prefix, length = f"glide/{name}", kwargs["text_ctx"]
    tokens, mask = tokens_for(f"{prefix}/tokens", (2, length), kwargs["n_vocab"]), th.ones(2, length, dtype=th.bool)
    mask[0, 4:] = False
    more = {"tokens": tokens, "mask": mask}
    if "upsample" in name:
        more["low_res"] = tensor_for(f"{prefix}/low_res", (2, 3, 8, 8), 0.5)
    if "inpaint" in name:
        more["inpaint_image"] = tensor_for(f"{prefix}/inpaint_image", (2, 3, 16, 16), 0.5)
        more["inpaint_mask"] = (tensor_for(f"{prefix}/inpaint_mask", (2, 1, 16, 16)) > 0).float()
    same(network(tensor_for(f"{prefix}/x", (2, 3, 16, 16)), th.tensor([10.0, 500.0]), **more), prefix)
    same(network.text(tokens, mask)[1].transpose(1, 2), f"{prefix}/text")


def small(name):
    """A network with recorded weights, and inputs of its own."""
    kwargs = SMALL[name]["kwargs"]
    if name.startswith("glide/"):
        network = ready(GLIDE[name.removeprefix("glide/")](**kwargs), name)
        more = {"tokens": tokens_for("t", (2, kwargs["text_ctx"]), kwargs["n_vocab"]), "mask": th.ones(2, 10) > 0}
    else:
        network = ready(UNetModel(**kwargs), name)
        more = {"context": tensor_for("c", (2, 7, kwargs["context_dim"])), "context_mask": th.ones(2, 7) > 0}
    return network, tensor_for("x", (2, kwargs["in_channels"], 16, 16)), th.tensor([3.0, 777.0]), more


BOTH = pytest.mark.parametrize("name", ["unet/context", "glide/base"])


@BOTH
def test_sixteen_bits_and_autocast_stay_close(name):
    network, x, t, more = small(name)
    exact = network(x, t, **more)
    with th.autocast("cpu", th.bfloat16):
        automatic = network(x, t, **more)
    network.convert_to("bf16")
    low = network(x, t, **more)
    assert low.dtype == exact.dtype
    for value in (automatic, low):
        assert (value - exact).abs().max() < 0.1 * exact.abs().max()
    network.convert_to("fp32")
    assert {param.dtype for param in network.parameters()} == {th.float32}


@BOTH
def test_recomputing_changes_nothing(name):
    network, x, t, more = small(name)
    network.requires_grad_(True)
    grads = []
    for resolutions in ("", f"{network.image_size},{network.image_size // 2}"):
        recompute_at(network, resolutions)
        network.zero_grad()
        network(x, t, **more).square().sum().backward()
        grads.append([param.grad.clone() for param in network.parameters() if param.grad is not None])
    assert len(grads[0]) > 50
    assert all(th.equal(*pair) for pair in zip(*grads, strict=True))


SLOW = [pytest.param(name, "aot_eager", marks=pytest.mark.slow) for name in ("unet/context", "glide/base")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), [("unet/context", "eager"), *SLOW])
def test_a_network_is_one_graph(name, backend):
    network, x, t, more = small(name)
    compiled = th.compile(network, backend=backend, fullgraph=True)
    assert th.allclose(compiled(x, t, **more), network(x, t, **more), atol=1e-5)


@BOTH
def test_gradients_reach_images_and_context(name):
    network, x, t, more = small(name)
    x.requires_grad_(True)
    inputs = [x] + [value.requires_grad_(True) for key, value in more.items() if key == "context"]
    for grad in th.autograd.grad(network(x, t, **more).sum(), inputs):
        assert th.isfinite(grad).all()
        assert grad.abs().max() > 0


def test_what_a_mask_leaves_out_is_attended_to_by_none():
    network, x, t, more = small("unet/context")
    more["context_mask"][:, 4:] = False
    out = network(x, t, **more)
    more["context"][:, 4:] += 5
    assert th.equal(network(x, t, **more), out)
    cut = {"context": more["context"][:, :4], "context_mask": None}
    assert th.allclose(network(x, t, **cut), out, atol=1e-5)


def test_a_context_that_does_not_fit_is_refused():
    network, x, t, _ = small("unet/context")
    with pytest.raises(ValueError, match=r"attends to a context: give a context \[N, L, 24\]"):
        network(x, t)
    with pytest.raises(ValueError, match=r"context must be \[N, L, 24\] for this network, got \[2, 7, 20\]"):
        network(x, t, context=th.zeros(2, 7, 20))
    with pytest.raises(ValueError, match="context is of 3 images where there are 2: give one for each"):
        network(x, t, context=th.zeros(3, 7, 24))
    with pytest.raises(ValueError, match=r"context_mask must be \[2, 7\], as the context, got \[2, 6\]"):
        network(x, t, context=th.zeros(2, 7, 24), context_mask=th.ones(2, 6, dtype=th.bool))
    with pytest.raises(ValueError, match="context_dim needs use_spatial_transformer"):
        UNetModel(16, 3, 32, 3, 1, (1,), context_dim=8)
    plain = UNetModel(16, 3, 32, 3, 1, (), channel_mult=(1,))
    with pytest.raises(ValueError, match="attends to no context: leave context out"):
        plain(th.zeros(1, 3, 16, 16), th.zeros(1), context=th.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="multiple of 4 on each side"):
        autoencoder("kl", *SMALL["ae/kl"]["arguments"]).encode(th.zeros(1, 3, 30, 32))
