"""Files of latent-diffusion, Stable Diffusion 1 and GLIDE, of the published keys and tiny widths."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch as th
from few import few
from text_encoders import CORPUS, save_encoder

from guided_diffusion import load
from guided_diffusion.commands.pipeline import Samples
from guided_diffusion.config import DiffusionConfig, UNetConfig
from guided_diffusion.networks import glide
from guided_diffusion.networks.attention import CrossAttention
from guided_diffusion.networks.autoencoder import AutoencoderKL, VQModel
from guided_diffusion.networks.blocks import AttentionBlock
from guided_diffusion.networks.context import FolderEncoder
from guided_diffusion.networks.text import BERTEmbedder
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.options import defaults
from guided_diffusion.runtime.pictures import to_uint8
from guided_diffusion.runtime.seeds import image_generator
from guided_diffusion.sampling.guidance import classifier_free
from guided_diffusion.sampling.schedules import get_named_beta_schedule
from guided_diffusion.script_util import build_diffusion, build_unet
from guided_diffusion.training.checkpoints import open_checkpoint
from guided_diffusion.training.first_stage import load_autoencoder
from guided_diffusion.training.published import AVERAGE, CLIP, CONDITION, FIRST_STAGE, UNET, read_published
from guided_diffusion.unet import UNetModel

MANIFESTS = json.loads((Path(__file__).parents[1] / "golden" / "text_latent.json").read_text())
TINY = {"image_size": 8, "num_res_blocks": 1, "attention_resolutions": [1, 2], "channel_mult": [1, 2]}
ATTENDING = {"use_spatial_transformer": True, "transformer_depth": 1}
AUTOENCODER = {"ch": 32, "num_res_blocks": 1, "attn_resolutions": [], "resolution": 32, "in_channels": 3, "out_ch": 3}
VQ = {**AUTOENCODER, "ch_mult": [1, 1, 1], "z_channels": 3, "double_z": False}
KL = {**AUTOENCODER, "ch_mult": [1, 1, 1, 1], "z_channels": 4, "double_z": True}
LINEAR = "scaled_linear:0.0015,0.0195"


class ModelCheckpoint:
    """Stands for an object of the program that wrote a file."""


def filled(network, seed=0):
    """A network of random weights, none of them zero, in evaluation mode."""
    draws = th.Generator().manual_seed(seed)
    with th.no_grad():
        for value in network.parameters():
            value.copy_(0.1 * th.randn(value.shape, generator=draws))
    return network.eval()


def behind(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def unet(channels, model_channels=64, **options):
    return filled(
        UNetModel(in_channels=channels, out_channels=channels, model_channels=model_channels, **TINY, **options)
    )


def average_of(network):
    """The moving average of a U-Net, under the names that latent-diffusion gives it."""
    state = filled(network, seed=1).state_dict()
    return {AVERAGE + f"diffusion_model.{name}".replace(".", ""): value for name, value in state.items()}


def text_encoder_of(bert):
    return behind(f"{CONDITION}transformer.", bert.transformer.state_dict())


def bert_tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({word for text in CORPUS for word in text.split()})]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return tokenizer


def stable_diffusion(averaged=False):
    """(file, U-Net) of Stable Diffusion 1."""
    network = unet(4, num_heads=8, context_dim=8, **ATTENDING)
    state = {**behind(UNET, network.state_dict()), **behind(FIRST_STAGE, filled(AutoencoderKL(KL, 4)).state_dict())}
    state = {name: value.clone() for name, value in state.items()}
    state |= {f"{CLIP}embeddings.position_ids": th.arange(77)[None], "betas": th.tensor(schedule("scaled_linear"))}
    return (state | average_of(network) if averaged else state), network


def codebook_autoencoder():
    network = filled(VQModel(VQ, 512, 3))
    network.quantize.embedding.weight.data *= 20  # codes in all the places where latents are
    return network.state_dict()


def class_conditional():
    """That of a class-conditional model with a codebook: one head, and a last row for no class."""
    network = unet(3, num_heads=1, context_dim=8, num_classes=1000, null_class=True, class_context=True, **ATTENDING)
    state = network.state_dict()
    labels = state.pop("context_encoder.embedding.weight")
    state = {**behind(UNET, state), f"{CONDITION}embedding.weight": labels, "betas": th.tensor(schedule(LINEAR))}
    return state | behind(FIRST_STAGE, codebook_autoencoder()), network


def unconditional():
    network = unet(3, num_head_channels=32)
    state = {**behind(UNET, network.state_dict()), "betas": th.tensor(schedule(LINEAR))}
    return state | behind(FIRST_STAGE, codebook_autoencoder()), network


def schedule(name):
    return get_named_beta_schedule(name, 1000).astype(np.float32)


def saved(path, state):
    """The path of a file as latent-diffusion writes it."""
    th.save({"epoch": 3, "state_dict": state, "callbacks": {"best": ModelCheckpoint()}}, path)
    return str(path)


def rebuilt(path):
    """(network of a file, its flags)."""
    checkpoint = open_checkpoint(path)
    config = UNetConfig(**{name: checkpoint.flags[name] for name in defaults(UNetConfig) if name in checkpoint.flags})
    network = build_unet(config, checkpoint.flags["learn_sigma"])
    network.load_state_dict(checkpoint.fitting(network, checkpoint.flags))
    return network.eval(), checkpoint.flags


@pytest.mark.parametrize("kind", few([stable_diffusion, class_conditional, unconditional], [stable_diffusion]))
def test_a_file_is_the_network_that_it_was_made_of(kind, tmp_path):
    state, original = kind()
    network, flags = rebuilt(saved(tmp_path / "model.ckpt", state))
    x, t = th.randn(2, original.in_channels, 8, 8), th.tensor([3.0, 777.0])
    words = {"y": th.tensor([0, 1000])} if original.num_classes else {}
    words |= {"context": th.randn(2, 5, 8)} if kind is stable_diffusion else {}
    with th.no_grad():
        assert th.equal(network(x, t, **words), original(x, t, **words))
    process = build_diffusion(DiffusionConfig(**{n: flags[n] for n in defaults(DiffusionConfig) if n in flags}))
    assert np.allclose(process.betas, state["betas"].double(), rtol=1e-6)
    assert (flags["autoencoder_path"], flags["image_channels"]) == (str(tmp_path / "model.ckpt"), 3)
    assert flags["latent_factor"] == load_autoencoder(str(tmp_path / "model.ckpt"))[0].factor
    if kind is class_conditional:
        assert (flags["num_classes"], flags["null_class"], network.null_label) == (1000, True, 1000)


def test_the_moving_average_is_taken_and_what_is_no_tensor_is_told(tmp_path, capsys):
    state, original = stable_diffusion(averaged=True)  # which leaves the averages in the network
    network, _ = rebuilt(saved(tmp_path / "sd.ckpt", state))
    assert all(th.equal(value, original.state_dict()[name]) for name, value in network.state_dict().items())
    assert not th.equal(state[f"{UNET}out.2.weight"], network.out[2].weight)
    told = capsys.readouterr().out
    assert "sd.ckpt the weights at model_ema are taken: Stable Diffusion 1" in told
    assert "what is no tensor is left out (epoch, callbacks)" in told


@pytest.mark.slow
def test_a_safetensors_of_16_bits_opens_alike(tmp_path):
    state, original = stable_diffusion()
    halves = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    safetensors.torch.save_file(halves, tmp_path / "sd.safetensors")
    network, flags = rebuilt(str(tmp_path / "sd.safetensors"))
    assert flags["noise_schedule"] == "scaled_linear"
    assert all(
        th.equal(value, original.state_dict()[name].half().float()) for name, value in network.state_dict().items()
    )


def sampled(path, **options):
    return load(path, **options.pop("of", {})).sample(steps=2, sampler="ddim", seed=1, **options).images


def test_stable_diffusion_samples_for_prompts_and_decodes(tmp_path):
    path = saved(tmp_path / "sd.ckpt", stable_diffusion()[0])
    with pytest.raises(UserError, match="vectors of 8 numbers, and their encoder is not known: give its folder"):
        load(path, image_size=64)
    of = {"image_size": 64, "text_encoder": save_encoder("clip", tmp_path / "clip"), "max_tokens": 16}
    images = [sampled(path, of=of, prompt=text, cfg_scale=3) for text in ("a red cat", "two red dogs")]
    assert images[0].shape == (1, 64, 64, 3)
    assert (images[0] != images[1]).any()


@pytest.mark.slow
def test_class_conditional_models_sample_with_guidance(tmp_path):
    path = saved(tmp_path / "cin.ckpt", class_conditional()[0])
    images = [sampled(path, of={"image_size": 32}, classes=[label], cfg_scale=20) for label in (1, 2)]
    assert images[0].shape == (1, 32, 32, 3)
    assert (images[0] != images[1]).any()


def test_a_model_that_has_a_name_knows_the_names_of_imagenet(tmp_path):
    path = saved(tmp_path / "small.ckpt", class_conditional()[0])
    model = load(path, preset="ldm-imagenet256", image_size=32, device="cpu")
    assert model.sample(classes=["golden retriever"], cfg_scale=3, steps=2, sampler="ddim").labels.tolist() == [207]


@pytest.mark.slow
def test_a_text_transformer_in_the_file_needs_its_tokenizer_alone(tmp_path):
    bert, tokenizer = (
        filled(BERTEmbedder(64, 2, vocab_size=bert_tokenizer().get_vocab_size(), max_seq_len=9)),
        bert_tokenizer(),
    )
    network = unet(4, num_heads=8, context_dim=64, **ATTENDING)
    state = {**behind(UNET, network.state_dict()), **text_encoder_of(bert)}
    path = saved(tmp_path / "text2img.ckpt", state | behind(FIRST_STAGE, filled(AutoencoderKL(KL, 4)).state_dict()))
    with pytest.raises(UserError, match=r"tokenizer.json is missing.*bert-base-uncased"):
        load(path, image_size=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model = load(path, image_size=64)
    context = model.network.context_encoder.conditioning(["a red cat"])
    ids = [2, *tokenizer.encode("a red cat").ids, 3]
    with th.no_grad():
        expected = bert(th.tensor([[*ids, *[0] * (9 - len(ids))]]))
    assert context["context_mask"].all(), "the padding counts, as in training"
    assert th.allclose(context["context"], expected, atol=1e-6)
    assert model.sample(prompt="a red cat", steps=2, sampler="ddim").images.shape == (1, 64, 64, 3)


def test_padding_counts_as_text_where_it_did_in_training(tmp_path):
    folder = save_encoder("clip text", tmp_path / "clip")
    with th.no_grad():
        context, mask = FolderEncoder(folder, 16, padding=True).encode(["a red cat", ""])
        network = FolderEncoder(folder, 16).network
        names = FolderEncoder(folder, 16).tokenizer(["a red cat", ""], padding="max_length", max_length=16)
        expected = network(th.tensor(names.input_ids)).last_hidden_state
    assert mask.all()
    assert th.allclose(context, expected, atol=1e-6)


def heads_of(network):
    """(channels of q, heads) of each attention."""
    layers = [layer for layer in network.modules() if isinstance(layer, CrossAttention | AttentionBlock)]
    return [
        (layer.to_q.out_features, layer.heads)
        if isinstance(layer, CrossAttention)
        else (layer.channels, layer.num_heads)
        for layer in layers
    ]


def meta(shapes):
    return {name: th.zeros(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize("name", few(MANIFESTS["latent_unets"], ["txt2img-1p4B", "cin256-v2", "inpainting-vq4"]))
def test_the_published_networks_tell_their_flags(name):
    entry = MANIFESTS["latent_unets"][name]
    arguments: dict[str, Any] = entry["kwargs"]
    bert = meta(MANIFESTS["text_transformers"]["txt2img-1p4B"]["shapes"])
    condition = {
        "txt2img-1p4B": behind("transformer.", bert),
        "stable-diffusion-v1": meta({"transformer.text_model.final_layer_norm.weight": [768]}),
        "cin256": meta({"embedding.weight": [1000, 512]}),
        "cin256-v2": meta({"embedding.weight": [1001, 512]}),
    }.get(name, {})
    content = {"state_dict": {**behind(UNET, meta(entry["shapes"])), **behind(CONDITION, condition)}}
    published = read_published(content, "model.ckpt")
    config = UNetConfig(**{n: value for n, value in published.flags.items() if n in defaults(UNetConfig)})
    with th.device("meta"):
        ours, theirs = build_unet(config, False), UNetModel(**arguments)
    assert heads_of(ours) == heads_of(theirs)
    assert published.flags["image_size"] == (512 if name == "stable-diffusion-v1" else 256)
    assert published.flags["image_size"] // config.latent_factor * (1 + (config.image_size == 512)) in (
        [64, 128] if config.image_size == 512 else [arguments["image_size"]]
    )
    shapes = {n: list(v.shape) for n, v in ours.state_dict().items() if not n.startswith("context_encoder.")}
    assert shapes == entry["shapes"]
    wanted = {"null_class": name == "cin256-v2", "context_dim": arguments.get("context_dim", 0)}
    assert {n: getattr(config, n) for n in wanted} == wanted
    if name == "txt2img-1p4B":
        assert (config.text_encoder, config.text_depth, config.max_tokens) == ("scratch", 32, 77)


KINDS = {
    "base": glide.Text2ImUNet,
    "upsample": glide.SuperResText2ImUNet,
    "base-inpaint": glide.InpaintText2ImUNet,
    "upsample-inpaint": glide.SuperResInpaintText2ImUnet,
}


@pytest.mark.parametrize("name", few(KINDS, ["base", "upsample-inpaint"]))
def test_the_networks_of_glide_tell_their_arguments(name):
    entry = MANIFESTS["glide"][name]
    network = glide.read_glide(meta(entry["shapes"]))
    assert type(network) is KINDS[name]
    assert {n: list(v.shape) for n, v in network.state_dict().items()} == entry["shapes"]
    with th.device("meta"):
        original = KINDS[name](**entry["kwargs"])
    assert heads_of(network) == heads_of(original)
    assert [block.attn.heads for block in network.transformer.resblocks] == [8] * 16
    assert (network.use_scale_shift_norm, network.resblock_updown) == (True, True)


def glide_file(path, kind):
    """(path, network) of a file of GLIDE."""
    sizes = {"text_ctx": 6, "xf_width": 64, "xf_layers": 2, "xf_heads": 1, "xf_final_ln": True, "xf_padding": True}
    options = {**TINY, "use_scale_shift_norm": True, "resblock_updown": True, "num_head_channels": 64}
    del options["image_size"]
    network = filled(kind(**sizes, n_vocab=20, in_channels=3, out_channels=6, model_channels=64, **options))
    th.save(network.state_dict(), path)
    return str(path), network


@pytest.mark.parametrize("name", few(KINDS, ["base", "upsample-inpaint"]))
def test_glide_samples_for_tokens(name, tmp_path):
    path, original = glide_file(tmp_path / "glide.pt", KINDS[name])
    bert_tokenizer().save(str(tmp_path / "tokenizer.json"))
    sizes = {"large_size": 8, "small_size": 4} if "upsample" in name else {"image_size": 8}
    model = load(path, timestep_respacing="2", device="cpu", **sizes)
    network, process = model.network, model.diffusion
    tokens, mask = network.padded([[5, 7], [1] * 9])
    assert tokens.tolist() == [[5, 7, 19, 19, 19, 19], [1] * 6]
    assert mask.sum(1).tolist() == [2, 6]
    empty = dict(zip(("tokens", "mask"), network.padded([[], []]), strict=True))
    words = {"tokens": tokens, "mask": mask}
    words |= {"low_res": th.rand(2, 3, 4, 4)} if "upsample" in name else {}
    words |= {"inpaint_image": th.rand(2, 3, 8, 8), "inpaint_mask": th.ones(2, 1, 8, 8)} if "inpaint" in name else {}
    x, t = th.randn(2, 3, 8, 8), th.tensor([3.0, 777.0])
    with th.no_grad():
        assert th.equal(network(x, t, **words), original(x, t, **words))
    images = process.p_sample_loop(network, (2, 3, 8, 8), noise=x, model_kwargs=words)
    assert images.isfinite().all()
    betas = get_named_beta_schedule("linear" if "upsample" in name else "cosine", 1000)
    assert np.allclose(process.original_alphas_cumprod, np.cumprod(1 - betas))
    th.manual_seed(0)
    guided = process.p_sample_loop(classifier_free(network, 3.0, null=empty), x.shape, noise=x, model_kwargs=words)
    th.manual_seed(0)
    assert not th.equal(guided, process.p_sample_loop(network, x.shape, noise=x, model_kwargs=words))


@pytest.mark.slow
def test_load_takes_prompts_for_glide_and_its_upsampler(tmp_path):
    tokenizer = bert_tokenizer()  # of less than 20 tokens
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    path, network = glide_file(tmp_path / "base.pt", glide.Text2ImUNet)
    glide_file(tmp_path / "upsample.pt", glide.SuperResText2ImUNet)
    model = load(path, image_size=8, device="cpu")
    options = {"seed": 3, "timestep_respacing": "2", "sampler": "ddim", "batch_size": 2}
    made = model.sample(prompt="A Red cat", cfg_scale=3, num_samples=2, **options)
    assert made.prompts == ["A Red cat"]
    words, empty = (
        dict(zip(("tokens", "mask"), network.padded([ids]), strict=True))
        for ids in (tokenizer.encode("a red cat").ids, [])
    )
    process = load(path, image_size=8, timestep_respacing="2", device="cpu").diffusion
    generators = [image_generator(3, index) for index in range(2)]
    guided = classifier_free(network, 3.0, null=empty)
    both = {name: value.expand(2, -1) for name, value in words.items()}
    looped = process.ddim_sample_loop(guided, (2, 3, 8, 8), model_kwargs=both, generator=generators)
    assert np.array_equal(made.images, to_uint8(looped))
    assert model._upsamplers == [str(tmp_path / "upsample.pt")]
    upsampler = load(tmp_path / "upsample.pt", large_size=8, small_size=4, device="cpu")
    small = Samples(made.images[:, ::2, ::2], prompts=made.prompts)
    large = upsampler.upsample(small, steps=2)
    assert large.images.shape == (2, 8, 8, 3)
    assert np.array_equal(large.images, upsampler.upsample(small.images, prompt="a red cat", steps=2).images)
    assert not np.array_equal(large.images, upsampler.upsample(small.images, prompt="a dog", steps=2).images)
    with pytest.raises(UserError, match="was trained with captions: give --prompt"):
        model.sample(steps=2)
    with pytest.raises(UserError, match="--classes has no effect without --class_cond"):
        model.sample(prompt="a", classes=[1], steps=2)


def test_the_page_about_latents_paints_with_glide(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "latent.md").read_text(encoding="utf-8")
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "padded" in code]
    names: dict[str, Any] = {}
    exec(code.replace('"100"', '"2"'), names)
    path, _ = glide_file(tmp_path / "glide.pt", glide.InpaintText2ImUNet)
    bert_tokenizer().save(str(tmp_path / "tokenizer.json"))
    image, keep = th.rand(1, 3, 8, 8), th.ones(1, 1, 8, 8)
    assert names["paint"](path, [5, 7], image, keep).isfinite().all()


def without(state, word):
    return {name: value for name, value in state.items() if word not in name}


def test_what_cannot_be_used_is_told_in_a_sentence(tmp_path):
    state, _ = unconditional()
    odd = {**state, "betas": th.linspace(1e-4, 2e-2, 1000)}
    wider = {**state, f"{UNET}input_blocks.0.0.weight": th.zeros(64, 7, 3, 3)}
    path, _ = glide_file(tmp_path / "glide.pt", glide.Text2ImUNet)
    cases = [
        (without(state, "out.2."), "holds no whole U-Net of latent-diffusion"),
        (odd, "the betas of the file are of no schedule that is known"),
        (wider, "sees images beside its latents, as for inpainting"),
        (without(state, FIRST_STAGE), "no autoencoder is named: give --autoencoder_path"),
    ]
    for number, (content, told) in enumerate(cases):
        with pytest.raises(UserError, match=told):
            load(saved(tmp_path / f"{number}.ckpt", content))
    with pytest.raises(UserError, match=r"tokenizer.json is missing.*from one of gpt2"):
        load(path)
    th.save(without(th.load(path), "token_embedding.weight") | {"token_embedding.weight": th.zeros(3)}, path)
    with pytest.raises(UserError, match="holds no whole network of GLIDE"):
        load(path)
