"""Autoencoders: losses against closed forms, a loop that resumes to the bit, trained ones of ours and of others."""

import csv
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch as th
from few import few
from PIL import Image
from runs import write_run
from safetensors.torch import save_file

from guided_diffusion import logger
from guided_diffusion.commands import autoencoder_train
from guided_diffusion.commands.autoencoder_loop import AutoencoderLoop
from guided_diffusion.config import AutoencoderConfig, AutoencoderTrainConfig, ClassifierConfig
from guided_diffusion.image_datasets import load_data
from guided_diffusion.networks.autoencoder import AutoencoderKL, PatchDiscriminator, straight_through
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.script_util import build_autoencoder, build_classifier
from guided_diffusion.training import checkpoints
from guided_diffusion.training.autoencoder import (
    AutoencoderLoss,
    DeadCodes,
    adaptive_weight,
    codebook_loss,
    hinge_loss,
)
from guided_diffusion.training.first_stage import load_autoencoder
from guided_diffusion.training.similarity import psnr, ssim

SCRIPT = Path(__file__).parents[2] / "scripts" / "autoencoder_train.py"
TINY = {"image_size": 16, "ch_mult": "1,1", "z_channels": 3, "embed_dim": 3}
DISC = {"disc_weight": 0.5, "disc_start": 1, "disc_channels": 8, "disc_layers": 1}


def tiny(**options):
    th.manual_seed(5)
    return build_autoencoder(AutoencoderConfig(**TINY, **options))


@pytest.fixture
def pictures(tmp_path):
    """Eight smooth pictures of 16 pixels."""
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    for index in range(8):
        corners = Image.fromarray(rng.integers(0, 256, (3, 3, 3), np.uint8))
        corners.resize((16, 16), Image.Resampling.BILINEAR).save(folder / f"{index}.png")
    return str(folder)


def stream(pictures, batch_size=4):
    return load_data(data_dir=pictures, batch_size=batch_size, image_size=16, log=lambda line: None)


def make(folder, data, network, *, losses=None, **options):
    """A loop that logs in `folder`."""
    logger.configure(dir=str(folder), format_strs=["csv", "log"])
    th.manual_seed(6)
    usual = {
        "batch_size": 4,
        "microbatch": -1,
        "lr": 1e-3,
        "ema_rate": "0.5",
        "log_interval": 1,
        "save_interval": 1000,
        "resume_checkpoint": "",
        "max_steps": 3,
    }
    return AutoencoderLoop(model=network, data=data, losses=AutoencoderTrainConfig(**losses or {}), **usual | options)


def rows(folder):
    with open(Path(folder) / "progress.csv") as file:
        return list(csv.DictReader(file))


def test_codes_and_latents_draw_each_other_by_their_gradients():
    th.manual_seed(0)
    latents, codes = (th.randn(2, 3, 4, 4, dtype=th.float64, requires_grad=True) for _ in range(2))
    codebook_loss(latents, codes, 0.25).sum().backward()
    each = 2 * (latents - codes).detach() / latents[0].numel()
    th.testing.assert_close(codes.grad, -each)
    th.testing.assert_close(latents.grad, 0.25 * each)


def test_gradients_pass_straight_through_the_codebook():
    th.manual_seed(0)
    latents, codes, slope = (th.randn(2, 3, 4, 4, requires_grad=True) for _ in range(3))
    replaced = straight_through(latents, codes)
    th.testing.assert_close(replaced, codes)
    (replaced * slope.detach()).sum().backward()
    assert th.equal(latents.grad, slope)
    assert codes.grad is None


def test_the_adaptive_weight_is_the_ratio_of_gradient_norms():
    layer = th.tensor([1.0, 2.0], requires_grad=True)
    reconstruction, adversarial = (layer * th.tensor([3.0, 4.0])).sum(), (layer * th.tensor([0.0, 2.0])).sum()
    assert float(adaptive_weight(reconstruction, adversarial, layer)) == pytest.approx(5 / (2 + 1e-4))
    assert float(adaptive_weight(reconstruction, 0 * adversarial, layer)) == 1e4


def test_the_hinge_loss_stops_at_the_margins():
    real, fake = th.tensor([[2.0, 0.0]]), th.tensor([[-3.0, 1.0]])
    assert hinge_loss(real, fake).tolist() == [0.5 * (0.5 + 1.0)]


def test_scores_of_patches_do_not_depend_on_the_batch():
    network, images = PatchDiscriminator(3, 8, 2).double(), th.randn(3, 3, 32, 32, dtype=th.float64)
    scores = network(images)
    assert scores.shape == (3, 1, 6, 6)  # 8 after the halvings; a window of 4 with padding 1 takes 1 away, twice
    th.testing.assert_close(network(images[1:2]), scores[1:2])


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_every_parameter_gets_a_gradient(kind):
    network, images = tiny(kind=kind, n_embed=8), th.rand(2, 3, 16, 16) * 2 - 1
    loss = AutoencoderLoss(AutoencoderTrainConfig())
    made = loss.reconstruct(network, images, th.randn(2, 3, 8, 8))
    loss.terms(images, made)["loss"].mean().backward()
    assert [name for name, param in network.named_parameters() if param.grad is None or not param.grad.any()] == []


def test_dead_codes_become_latents_by_key():
    latents, codes = th.arange(12.0).view(1, 2, 2, 3), th.nn.Parameter(th.full((5, 2), -1.0))
    opt = th.optim.AdamW([codes])
    codes.grad = th.ones_like(codes)
    opt.step()
    results = []
    for _ in range(2):
        codes.data.fill_(-1.0)
        dead = DeadCodes(5, 2, seed=3, device=th.device("cpu"))
        for updates, ids in [(1, [0, 1]), (2, [1, 3])]:
            dead.see(latents, th.tensor(ids))
            count = dead.reseed(codes, opt, updates)
            assert count == (0 if updates == 1 else 2)
        results.append(codes.detach().clone())
    assert th.equal(*results)
    assert th.equal(results[0][[0, 1, 3]], th.full((3, 2), -1.0))
    vectors = latents[0].flatten(1).T.tolist()
    assert all(row in vectors for row in results[0][[2, 4]].tolist())
    assert not opt.state[codes]["exp_avg"][[2, 4]].any()
    assert opt.state[codes]["exp_avg"][[0, 1, 3]].all()


def reference_ssim(x, y):
    """Window by window, for one channel of numbers in [0, 255]."""
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for i, j in itertools.product(range(x.shape[0] - 10), range(x.shape[1] - 10)):
        a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
        ma, mb = (weights * a).sum(), (weights * b).sum()
        va, vb = (weights * (a - ma) ** 2).sum(), (weights * (b - mb) ** 2).sum()
        cov = (weights * (a - ma) * (b - mb)).sum()
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return np.mean(values)


def test_psnr_and_ssim_are_those_of_the_papers():
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 255, (2, 3, 14, 17))
    y = np.clip(x + rng.normal(0, 20, x.shape), 0, 255)
    a, b = (th.from_numpy(each / 127.5) for each in (x, y))
    expected = [np.mean([reference_ssim(x[n, c], y[n, c]) for c in range(3)]) for n in range(2)]
    th.testing.assert_close(ssim(a - 1, b - 1), th.tensor(expected).float(), atol=1e-6, rtol=0)
    mse = ((x - y) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(psnr(a - 1, b - 1), 20 * np.log10(255) - 10 * np.log10(mse), rtol=1e-5)
    assert ssim(a - 1, a - 1).tolist() == [1.0, 1.0]


@pytest.mark.slow
def test_a_tiny_autoencoder_overfits_four_images(tmp_path, pictures):
    images = next(stream(pictures))[0]
    data, seen = itertools.repeat((images, {})), itertools.repeat((images, {}))
    options = {"lr": 4e-3, "max_steps": 70, "ema_rate": "", "log_interval": 70, "val_data": seen, "val_batches": 1}
    make(tmp_path, data, tiny(), val_interval=70, **options).run_loop()
    last = rows(tmp_path)[-1]
    assert float(last["val_psnr"]) > 20
    assert float(last["val_ssim"]) > 0.7
    assert "val_psnr_q0" not in last
    with Image.open(tmp_path / "reconstructions" / "000070.png") as grid:
        assert grid.height > 2 * 16


@pytest.mark.parametrize("kind", few(["kl", "vq"], ["vq"]))
def test_a_resumed_run_is_the_unbroken_one(tmp_path, pictures, kind):
    options = {"kind": kind, "n_embed": 8}
    losses = {**DISC, "reseed_interval": 3}
    make(tmp_path / "whole", stream(pictures), tiny(**options), losses=losses, max_steps=4).run_loop()
    make(tmp_path / "part", stream(pictures), tiny(**options), losses=losses, max_steps=2).run_loop()
    start = {"resume_checkpoint": str(tmp_path / "part"), "max_steps": 4}
    make(tmp_path / "rest", stream(pictures), tiny(**options), losses=losses, **start).run_loop()
    for name in ("model000004.pt", "ema_0.5_000004.pt", "opt000004.pt", "state000004.pt"):
        one, other = (checkpoints.load(str(tmp_path / folder / name)) for folder in ("whole", "rest"))
        one.pop("rng", None), other.pop("rng", None)
        th.testing.assert_close(one, other, atol=0, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    extra = checkpoints.load(str(tmp_path / "whole" / "state000004.pt"))["extra"]
    assert set(extra) == {"scale", "discriminator", *(["codes"] if kind == "vq" else [])}
    assert extra["discriminator"]["opt"]["state"][0]["step"] == 3
    assert float(rows(tmp_path / "whole")[-1]["d_weight"]) > 0


def test_the_discriminator_learns_and_microbatches_add_up(tmp_path, pictures):
    """Without the adaptive weight's dependence on the microbatch, its gradients are those of the whole batch."""
    states = []
    for size in (4, 2):
        loop = make(tmp_path / str(size), stream(pictures), tiny(), losses={**DISC, "disc_start": 0}, max_steps=1)
        loop.microbatch = size
        before = [param.clone() for param in loop.adversary.network.parameters()]
        batch, cond = next(stream(pictures))
        loop.forward_backward(batch, cond)
        states.append([param.grad.clone() for param in loop.adversary.network.parameters()])
        assert all(grad.abs().max() > 0 for grad in states[-1][:-1])
        loop.adversary.step(1e-3)
        after = list(loop.adversary.network.parameters())
        # within the margins the scores' constant cancels out
        assert all(not th.equal(one, other) for one, other in zip(before[:-1], after[:-1], strict=True))
    th.testing.assert_close(*states, atol=1e-6, rtol=1e-4)


WORDS = "--image_size 16 --ch_mult 1,1 --z_channels 3 --embed_dim 3 --ema_rate 0.5 --device cpu --num_workers 0"
WORDS += " --max_steps 3 --disc_weight 0.5 --disc_start 1 --disc_channels 8 --disc_layers 1 --lr 1e-3"


@pytest.mark.slow
def test_two_ranks_train_what_one_does(tmp_path, pictures, ranks):
    words = [*WORDS.split(), "--data_dir", pictures, "--val_data_dir", pictures, "--val_interval", "3"]
    autoencoder_train.main([*words, "--batch_size", "4", "--log_dir", str(tmp_path / "one")])
    done = ranks.run([SCRIPT, *words, "--batch_size", "2", "--log_dir", tmp_path / "two"])
    assert done.returncode == 0, done.stderr
    images = next(stream(pictures, 8))[0]
    networks = [load_autoencoder(str(tmp_path / folder / "model000003.pt"))[0] for folder in ("one", "two")]
    one, two = (network.decode(network.encode(images).mean) for network in networks)
    th.testing.assert_close(one, two, atol=5e-3, rtol=0)  # Adam moves biases in front of a norm by rounding alone
    one, two = (float(rows(tmp_path / folder)[-1]["val_psnr"]) for folder in ("one", "two"))
    assert one == pytest.approx(two, abs=0.02)
    network, factor = load_autoencoder(str(tmp_path / "two"))
    assert network.factor == 2
    assert not any(param.requires_grad for param in network.parameters())
    latents = network.encode(images)
    expected = (latents.mean.var(correction=0) + latents.std.square().mean()).rsqrt()
    assert factor == pytest.approx(float(expected), rel=0.3)  # of the batch before, half of these images


@pytest.mark.parametrize(
    ("options", "prefix", "beside", "factor"),
    [
        ({"ch_mult": "1,1,2,2", "embed_dim": 4, "z_channels": 4}, "first_stage_model.", {}, 0.18215),
        ({"ch_mult": "1,1,2,2", "embed_dim": 4, "z_channels": 4}, "", {}, 1.0),
        ({"kind": "vq", "n_embed": 7}, "first_stage_model.", {}, 1.0),
        ({"attn_resolutions": "8"}, "first_stage_model.", {"scale_factor": th.tensor(0.5)}, 0.5),
    ],
    ids=["Stable Diffusion", "alone", "VQ", "a factor of its own"],
)
@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_files_of_latent_diffusion_are_opened(tmp_path, options, prefix, beside, factor, ending):
    th.manual_seed(0)
    network = build_autoencoder(AutoencoderConfig(**{**TINY, **options})).eval()
    state = {f"{prefix}{name}": value.clone() for name, value in network.state_dict().items()}
    state |= {f"{prefix}loss.logvar": th.zeros(()), **beside}
    path = str(tmp_path / f"foreign.{ending}")
    save_file(state, path) if ending == "safetensors" else th.save({"state_dict": state, "epoch": 3}, path)
    opened, read = load_autoencoder(path)
    assert read == pytest.approx(factor)
    assert type(opened) is type(network)
    images = th.rand(1, 3, 16, 16)
    latents = [each.encode(images) for each in (network, opened)]
    latents = [each.mean if isinstance(network, AutoencoderKL) else each for each in latents]
    assert th.equal(*latents)
    assert th.equal(network.decode(latents[0]), opened.decode(latents[0]))


def test_a_file_without_an_autoencoder_is_refused(tmp_path):
    path = str(tmp_path / "other.pt")
    th.save({"weight": th.zeros(1)}, path)
    with pytest.raises(UserError, match="holds no autoencoder"):
        load_autoencoder(path)


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        ({"ch": 33}, "must be a positive multiple of 32 .* got 33; .* norm_groups 1"),
        ({"ch": 24}, "must be a positive multiple of 32 .* got 24; .* norm_groups 8"),
        ({"ch_mult": "1,2.5"}, "ch_mult '1,2.5' must be whole numbers"),
        ({"ch_mult": "1,0.5"}, "ch_mult '1,0.5' must be whole numbers"),
    ],
)
def test_widths_that_cannot_be_are_refused(options, answer):
    with pytest.raises(UserError, match=answer):
        build_autoencoder(AutoencoderConfig(**options))
    assert build_autoencoder(AutoencoderConfig(ch=24, norm_groups=8)).encoder.norm_out.num_groups == 8


def test_precision_is_of_the_computation_alone():
    network, images = tiny(), th.rand(1, 3, 16, 16)
    exact = network.decode(network.encode(images).mean)
    network.convert_to("bf16")
    rounded = network.decode(network.encode(images).mean)
    assert rounded.dtype == th.float32
    assert {param.dtype for param in network.parameters()} == {th.float32}
    assert 0 < float((exact - rounded).abs().max().detach()) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16", "feature_weight": 0.5, "val_distance": True, "kind": "vq", "n_embed": 16},
        {"precision": "fp16", **DISC, "disc_start": 0, "feature_weight": 0.5},
    ],
    ids=["bf16", "fp16"],
)
def test_a_command_with_features_in_16_bits(options, pictures, tmp_path):
    """Of a classifier, whose features are compared in training, and whose distance is measured in validation."""
    config = ClassifierConfig(
        image_size=16,
        classifier_width=64,
        classifier_depth=1,
        classifier_attention_resolutions="8",
        num_classes=2,
    )
    write_run(tmp_path / "judge", "classifier_train", build_classifier(config), config)
    flags = {**TINY, "data_dir": pictures, "val_data_dir": pictures, "val_interval": 1, "num_workers": 0}
    flags |= {"batch_size": 4, "max_steps": 2, "log_interval": 1, "ema_rate": 0.5, "log_dir": tmp_path / "run"}
    flags["features"] = f"classifier:{tmp_path / 'judge'}"
    autoencoder_train.main([f"--{name}={value}" for name, value in {**flags, **options}.items()])
    last = rows(tmp_path / "run")[-1]
    assert float(last["feature"]) > 0
    assert float(last["val_feature"]) > 0
    assert ("val_fd" in last) == bool(options.get("val_distance"))
    weights = checkpoints.load(str(tmp_path / "run" / "model000002.pt"))
    assert {value.dtype for value in weights.values()} == {th.float32}
    assert all(value.isfinite().all() for value in weights.values())
