"""Flags: what the originals' scripts take, what a wrong word is answered, and which value wins."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest

import guided_diffusion.commands
from conversion.command import DATASETS
from guided_diffusion.commands import cascade_sample, flags as cli, help_page
from guided_diffusion.commands.sections import ClipConfig, LatentConfig, PromptConfig
from guided_diffusion.config import (
    CaptionConfig,
    ClassifierConfig,
    ContextConfig,
    DiffusionConfig,
    NetworkConfig,
    UNetConfig,
    resolve_precision,
)
from guided_diffusion.runtime.errors import WHY, UserError, as_user_error, nearest
from guided_diffusion.runtime.options import check_keywords, defaults, parse_size, size_flag

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "flags.json").read_text())
COMMANDS = sorted(cli.COMMANDS)

# Flags beyond the originals', with the values that do what the originals did: an empty text or False turns a thing off,
# and many have no effect without another flag. As to the rest: the originals drew a seed from the system, took a GPU
# where there is one, labels from file names, and ended with Pillow's own error at a bad image.
VALUES_BEYOND = [
    (
        "",
        "checkpoint_resolutions log_dir device val_data_dir plugin eval_reference label_column data_range "
        "inception_weights precision classifier_precision loss_weight classifier_channel_mult sampler classes "
        "autoguide_path guidance_interval init_image mask interpolate init_classes init_from freeze lora_train "
        "lora_path cond_type cond_dir val_cond_dir cond_images classifier_path ema_rate "
        "channel_mult autoencoder_path autoencoder_id preset shard data_weights balance vector vectors vector_columns "
        "ema_profiles class_sampling",
    ),
    (
        False,
        "compile fsdp dry_run fast_decode cache_images random_crop use_neighborhood_attention predict_v "
        "zero_terminal_snr null_class save_images spread save_terms mask_invert invert null_cond skip_unpaired "
        "ema_warmup randomize_class use_new_attention_order cache_latents copy_autoencoder",
    ),
    (
        0,
        "seed warmup_steps keep_last keep_every max_steps sample_interval eval_interval steps order save_intermediate "
        "lora_rank cond_channels latent_channels start_index decode_tile vector_dim ema_start",
    ),
    (0.0, "grad_clip cond_aug cond_aug_level class_dropout dynamic_threshold cfg_rescale lora_alpha cond_dropout"),
    (0.0, "scale_factor tile_overlap"),
    (16.0, "shard_cache_gb"),
    ("all", "shuffle"),
    ("gathered", "checkpoint_format"),
    ("crop", "fit"),
    (1.0, "cfg_scale autoguide_scale lora_scale classifier_scale"),
    (10.0, "dist_timeout"),
    ("auto", "class_from clip_guided"),
    (2, "dims"),
    (-1, "num_workers"),
    ("error", "on_bad_image init_mismatch"),
    (True, "random_flip async_save"),
    (50, "max_bad_steps"),
    (1000, "val_interval eval_samples num_classes"),
    ("fid", "eval_metrics"),
    ("dpm++2m", "eval_sampler"),
    (20, "eval_steps"),
    ("inception", "features"),
    (64, "eval_batch_size"),
    ("fp32", "eval_precision"),
    (3, "image_channels"),
    (5.0, "min_snr_gamma"),
    (32, "norm_groups"),
    (-1.0, "eta churn strength"),
    ("vlb", "likelihood"),
    ("uniform", "dequantize"),
    (1, "probes resample latent_factor"),
    ("rademacher", "probe_noise"),
    ("rk45", "flow_solver"),
    (0.0001, "flow_tolerance"),
    (10, "resample_jump"),
    ("attention,convolutions", "lora_on"),
    (0.001, "fp16_scale_growth"),
]
BEYOND = {name: value for value, names in VALUES_BEYOND for name in names.split()} | defaults(ClassifierConfig)
BEYOND |= defaults(ContextConfig, CaptionConfig, PromptConfig, ClipConfig)
# classifier_train cropped at random; image_train has kept averages all along
DIFFERENT = {("classifier_train", "random_crop"): True}


@pytest.mark.parametrize("command", sorted(GOLDEN))
def test_every_flag_of_the_originals_with_its_default_and_type(command):
    ours = defaults(*cli.COMMANDS[command].sections)
    theirs = {name: default for name, (default, _) in GOLDEN[command].items()}
    assert {name: ours.get(name, "absent") for name in theirs} == theirs
    assert {name: type(ours[name]) for name in theirs} == {name: type(value) for name, value in theirs.items()}


@pytest.mark.parametrize("command", sorted(GOLDEN))
def test_every_other_flag_reproduces_them_by_default(command):
    ours = defaults(*cli.COMMANDS[command].sections)
    more = {name: value for name, value in ours.items() if name not in GOLDEN[command]}
    assert more == {name: DIFFERENT.get((command, name), BEYOND.get(name, "unknown flag")) for name in more}


MODEL = "--image_size 64 --num_channels 192 --num_res_blocks 3 --learn_sigma True --class_cond True"
README = [
    (
        "image_train",
        f"--data_dir images {MODEL} --diffusion_steps 4000 --noise_schedule cosine --lr 1e-4 --batch_size 128",
    ),
    (
        "classifier_sample",
        "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --dropout 0.1 --image_size 64 "
        "--learn_sigma True --noise_schedule cosine --num_channels 192 --num_head_channels 64 --num_res_blocks 3 "
        "--resblock_updown True --use_new_attention_order True --use_fp16 True --use_scale_shift_norm True "
        "--classifier_scale 1.0 --classifier_path 64x64_classifier.pt --classifier_depth 4 "
        "--model_path 64x64_diffusion.pt --batch_size 4 --num_samples 100 --timestep_respacing 250",
    ),
    (
        "classifier_sample",
        "--attention_resolutions 32,16,8 --class_cond False --diffusion_steps 1000 --image_size 256 --learn_sigma True "
        "--noise_schedule linear --num_channels 256 --num_head_channels 64 --num_res_blocks 2 --resblock_updown True "
        "--use_fp16 True --use_scale_shift_norm True --classifier_scale 10.0 --classifier_path 256x256_classifier.pt "
        "--model_path 256x256_diffusion_uncond.pt --batch_size 4 --timestep_respacing ddim25 --use_ddim True",
    ),
    (
        "super_res_sample",
        "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --large_size 256 --small_size 64 "
        "--learn_sigma True --noise_schedule linear --num_channels 192 --num_heads 4 --num_res_blocks 2 "
        "--resblock_updown True --use_fp16 True --use_scale_shift_norm True --model_path 64_256_upsampler.pt "
        "--base_samples 64_samples.npz --batch_size 4 --num_samples 100 --timestep_respacing 250",
    ),
    (
        "classifier_train",
        "--iterations 300000 --anneal_lr True --batch_size 256 --lr 3e-4 --save_interval 10000 --weight_decay 0.05 "
        "--image_size 128 --classifier_attention_resolutions 32,16,8 --classifier_depth 2 --classifier_width 128 "
        "--classifier_pool attention --classifier_resblock_updown True --classifier_use_scale_shift_norm True",
    ),
]


@pytest.mark.parametrize(("command", "line"), README)
def test_published_command_lines_parse_unchanged(command, line):
    given = cli.parse(command, shlex.split(line)).given
    words = shlex.split(line)
    assert set(given) == {word[2:] for word in words[::2]}
    for flag, word in zip(words[::2], words[1::2], strict=True):
        assert str(given[flag[2:]]) in (
            word,
            str(float(word)) if word[0].isdigit() and "," not in word and word[-1].isdigit() else word,
        )


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("--num_chanels 3", "unknown flag --num_chanels; did you mean --num_channels?"),
        ("--zzz 3", "unknown flag --zzz; --help lists the flags"),
        ("stray", "unexpected word stray: flags are written --NAME VALUE; --help lists them"),
        ("--guidance_scale=3", "unknown flag --guidance_scale=3; did you mean --cfg_scale?"),
        ("--ckpt x", "unknown flag --ckpt; did you mean --model_path?"),
        ("--dims 5", "argument --dims: '5' is none of 1, 2, 3"),
        ("--cfg 3", "unknown flag --cfg; did you mean --cfg_scale?"),
        ("--num_inference_steps 3", "unknown flag --num_inference_steps; did you mean --steps?"),
        ("--init_img a.png", "unknown flag --init_img; did you mean --init_image?"),
        ("--steps -3", "argument --steps: -3 is below the least value, 1"),
        ("--eta -0.5", "argument --eta: -0.5 is below the least value, 0"),
        ("--churn -2", "argument --churn: -2 is below the least value, 0"),
        ("--order -1", "argument --order: -1 is below the least value, 1"),
        ("--strength -0.5", "argument --strength: -0.5 is below the least value, 1e-06"),
        ("--cfg_scale nan", "argument --cfg_scale: nan is not a finite number"),
        ("--autoguide_scale inf", "argument --autoguide_scale: inf is not a finite number"),
        ("--dynamic_threshold nan", "argument --dynamic_threshold: nan is not a finite number"),
        ("--image_size 64x", "image size '64x' is not a size: write 64, or HEIGHTxWIDTH such as 64x128"),
        ("--image_size 0", "image size '0' is not a size"),
        ("--batch_size 0", "argument --batch_size: 0 is below the least value, 1"),
        ("--batch_size two", "argument --batch_size: 'two' is not of type int"),
        ("--eta nan", "argument --eta: nan is not a finite number"),
        ("--eta inf", "argument --eta: inf is not a finite number"),
        ("--use_ddim maybe", "boolean value expected: 'maybe' is neither True nor False"),
        ("--num_samples", "argument --num_samples: expected one argument"),
    ],
)
def test_a_wrong_flag_is_answered_by_a_sentence(line, answer, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse("image_sample", line.split())
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert answer in printed
    assert len(printed.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("command", "word", "meant"),
    [
        ("image_train", "--epochs", "max_steps"),
        ("classifier_train", "--epochs", "max_steps"),
        ("image_train", "--steps", "max_steps"),
        ("image_sample", "--num_steps", "steps"),
        ("image_train", "--num_steps", "max_steps"),
        ("image_sample", "--guidance_scale", "cfg_scale"),
        ("super_res_sample", "--guidance_scale", "classifier_scale"),
        ("classifier_sample", "--guidance_scale", "classifier_scale"),
        ("image_sample", "--scheduler", "sampler"),
    ],
)
def test_hints_are_of_the_command_and_know_aliases(command, word, meant, capsys):
    with pytest.raises(SystemExit):
        cli.parse(command, [word, "3"])
    assert f"did you mean --{meant}?" in capsys.readouterr().err


def test_every_hint_names_a_flag():
    known = {word for command in cli.COMMANDS.values() for word in command.words()}
    assert set(" ".join(cli.SYNONYMS).split()) <= known


def test_the_names_of_the_samplers_are_read_off_their_table():
    from guided_diffusion.sampling.samplers import SAMPLERS

    assert cli.sampler_names() == list(SAMPLERS)
    help_text = " ".join(cli.parser("image_sample").format_help().split())
    assert f"one of {', '.join(SAMPLERS)}; ''" in help_text


@pytest.mark.parametrize("variable", ["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"])
def test_one_rank_answers_for_all(variable, capsys, monkeypatch):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(SystemExit):
        cli.parse("image_sample", ["--zzz"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("word", ["--use_ddim", "--use_ddim True", "--use_ddim=yes", "--use_ddim 1"])
def test_booleans_take_a_word_or_stand_alone(word):
    assert cli.parse("image_sample", word.split()).given == {"use_ddim": True}


EVERY = {**cli.COMMANDS, **DATASETS, **cli.OTHERS}
# where nothing else can mean what the default does: these never stand above what a checkpoint says
NOT_GIVEN = {
    *(("steps", 0), ("order", 0), ("eta", -1.0), ("churn", -1.0), ("strength", -1.0)),
    *(("cond_channels", 0), ("image_size", ""), ("rows", 0), ("columns", 0), ("decode_tile", 0)),
    ("data_weights", ""),
    ("port", 0),
    ("num_heads_upsample", -1),
    ("num_workers", -1),
}


def spelled_out(command):
    """A command line of what a command always needs, and of every other flag with the default that --help shows."""
    flags = EVERY[command].flags()
    words = [spec.metadata["choices"][0] if spec.metadata["choices"] else name for name, spec in flags.items()]
    needed = [word for word, spec in zip(words, flags.values(), strict=True) if spec.metadata["positional"]]
    optional = {name: spec for name, spec in flags.items() if not spec.metadata["positional"]}
    return needed, [word for name, spec in optional.items() for word in (f"--{name}", str(spec.default))]


@pytest.mark.parametrize("command", EVERY)
def test_a_default_that_is_given_is_as_if_it_were_not(command):
    needed, defaults_of_all = spelled_out(command)
    bare, given = cli.parse(command, needed), cli.parse(command, needed + defaults_of_all)
    assert (given.values, given.changed) == (bare.values, bare.changed)
    absent = set(EVERY[command].flags()) - set(given.given)
    assert absent == {name for name in absent if (name, EVERY[command].flags()[name].default) in NOT_GIVEN}


@pytest.mark.parametrize("command", EVERY)
def test_no_rule_about_flags_without_effect_minds_a_default(command):
    given = cli.parse(command, [word for words in spelled_out(command) for word in words]).given
    for said in (given, *({name: value} for name, value in given.items())):
        cli.Flags(command, said).check()


def test_conditions_name_flags():
    conditions = {
        condition
        for command in cli.COMMANDS.values()
        for name, spec in command.flags().items()
        for text in (*command.needs(name), *spec.metadata["excludes"].split())
        for condition in re.split(r"[|&]", text)
    }
    known = {name for command in cli.COMMANDS.values() for name in command.flags()}
    assert len(conditions) > 20
    assert {re.split("!?=", condition)[0] for condition in conditions} <= known


@pytest.mark.parametrize(
    ("command", "line", "sentence"),
    [
        (
            "image_sample",
            "--mask m.png",
            "--mask has no effect without --init_image: leave it out or give --init_image",
        ),
        ("image_sample", "--strength 0.5", "--strength has no effect without --init_image: leave it out or"),
        ("image_sample", "--invert", "--invert has no effect without --init_image"),
        ("image_sample", "--init_image i --mask_invert", "--mask_invert has no effect without --mask"),
        ("image_sample", "--init_image i --resample 2", "--resample has no effect without --mask"),
        (
            "image_sample",
            "--init_image i --mask m --resample_jump 2",
            "--resample_jump has no effect without --resample other than 1: leave it out or give",
        ),
        ("image_sample", "--init_classes 1", "--init_classes has no effect without --invert or --interpolate: "),
        (
            "image_sample",
            "--init_image i --interpolate j --mask m",
            "--interpolate and --mask exclude each other: give",
        ),
        ("image_sample", "--init_image i --interpolate j --num_samples 1", "without --num_samples other than 1"),
        ("image_sample", "--steps 4 --timestep_respacing 4", "--steps and --timestep_respacing exclude each other: "),
        ("image_sample", "--sampler ddpm --use_ddim True", "--use_ddim and --sampler exclude each other: give one"),
        ("image_sample", "--sampler ddim --use_ddim True", ""),
        ("image_sample", "--cfg_rescale 0.5", "--cfg_rescale has no effect without --cfg_scale other than 1.0: leave"),
        ("image_sample", "--autoguide_scale 2", "--autoguide_scale has no effect without --autoguide_path"),
        (
            "image_sample",
            "--autoguide_path x",
            "--autoguide_path has no effect without --autoguide_scale other than 1.0",
        ),
        (
            "image_sample",
            "--guidance_interval 5,20",
            "has no effect without --cfg_scale other than 1.0 or --autoguide_path or --clip_path with --clip_scale",
        ),
        ("image_sample", "--lora_scale 2", "--lora_scale has no effect without --lora_path"),
        ("image_sample", "--randomize_class --classes 1", "--randomize_class and --classes exclude each other"),
        ("image_sample", "--cfg_scale 2", ""),  # the checkpoint says whether there are classes
        ("classifier_sample", "--classifier_path x --classifier_scale 0 --guidance_interval 10,30", "has no effect"),
        ("classifier_sample", "--classifier_path x --guidance_interval 10,30", ""),
        ("classifier_sample", "--classifier_path x --clip_guided True", "without --sampler or --use_ddim"),
        ("classifier_sample", "--classifier_path x --clip_guided True --sampler ddpm", "--sampler other than ddpm"),
        (
            "classifier_sample",
            "--classifier_path x --clip_guided True --use_ddim --clip_denoised False",
            "--clip_guided has no effect without --clip_denoised or --dynamic_threshold",
        ),
        ("super_res_sample", "--classifier_scale 2", "--classifier_scale has no effect without --classifier_path"),
        ("super_res_sample", "--image_size 8", "--image_size has no effect without --classifier_path"),
        ("super_res_sample", "--guidance_interval 5,20", "or --clip_path with --clip_scale: leave it out"),
        ("image_nll", "--probes 3", "--probes has no effect without --likelihood flow: leave it out or give"),
        ("image_nll", "--save_terms --likelihood flow", "--save_terms has no effect without --likelihood vlb"),
        ("image_nll", "--likelihood flow --flow_solver heun --flow_tolerance 1", "without --flow_solver rk45"),
        ("image_train", "--val_interval 3", "--val_interval has no effect without --val_data_dir"),
        ("image_train", "--ema_warmup --ema_rate=", "--ema_warmup has no effect without --ema_rate: leave it out"),
        ("image_train", "--class_dropout 0.1", "--class_dropout has no effect without --class_cond"),
        ("image_train", "--compile --fsdp", "--compile and --fsdp exclude each other: give one"),
        ("image_train", "--fsdp --microbatch auto", "--fsdp and --microbatch exclude each other: give one"),
        ("image_train", "--checkpoint_resolutions 8 --use_checkpoint", "exclude each other: give one"),
        ("image_train", "--lora_alpha 2", "--lora_alpha has no effect without --lora_rank"),
        ("image_train", "--lora_rank 3 --init_from x --freeze out.*", "--freeze and --lora_rank exclude each other"),
        ("image_train", "--lora_rank 2", "--lora_rank has no effect without --init_from"),
        ("image_train", "--init_mismatch reinit", "--init_mismatch has no effect without --init_from"),
        ("image_train", "--eval_samples 20", "--eval_samples has no effect without --eval_interval"),
        ("image_train", "--cond_dropout 0.1", "--cond_dropout has no effect without --cond_type"),
        ("image_train", "--caption_dropout 0.1", "--caption_dropout has no effect without --context text"),
        ("image_train", "--context text --text_encoder x --text_depth 2", "without --text_encoder scratch"),
        ("image_train", "--context text --use_neighborhood_attention", "exclude each other"),
        ("image_sample", "--prompt a --prompts b", "--prompt and --prompts exclude each other"),
        ("image_sample", "--prompt a --negative_prompt b", "no effect without --cfg_scale other than 1.0"),
        ("image_sample", "--clip_prompt a", "--clip_prompt has no effect without --clip_path"),
        ("image_train", "--resume_checkpoint auto --cond_dropout 0.1", ""),  # that of the run that goes on
        ("classifier_train", "--eval_interval 3", "--eval_interval has no effect without --val_data_dir"),
        ("classifier_train", "--fit pad", "--random_crop exclude each other: give --random_crop False beside it"),
        ("classifier_train", "--fit pad --random_crop True", "give --random_crop False beside it"),
        ("classifier_train", "--fit pad --random_crop False", ""),
        ("classifier_train", "--autoencoder_path x --cache_latents", "give --random_crop False beside it"),
        ("image_train", "--latent_factor 2", "--latent_factor has no effect without --autoencoder_path: leave it out"),
        ("image_train", "--latent_channels 4", "--latent_channels has no effect without --autoencoder_path"),
        ("image_train", "--decode_tile 8", "--decode_tile has no effect without --autoencoder_path"),
        ("image_train", "--num_heads_upsample 0", "--num_heads_upsample: 0 is below the least value, 1"),
        ("classifier_sample", "--classifier_path x --guidance_interval 5", "write LOW,HIGH, such as 100,800"),
        ("sweep", "--guidance_interval 5", "write LOW,HIGH, such as 100,800"),
        ("image_train", "--data_range 5", "write LOW,HIGH, such as 0,4095 or 0,1"),
        ("classifier_train", "--noised False --schedule_sampler loss-second-moment", "without --noised: leave it out"),
        (
            "sweep",
            "--guidance cfg --classifier_path x",
            "--classifier_path has no effect without --guidance classifier",
        ),
    ],
)
def test_flags_without_effect_or_contrary_are_answered_by_a_sentence(command, line, sentence, capsys):
    if not sentence:
        cli.parse(command, line.split())
        return
    with pytest.raises(SystemExit) as stop:
        cli.parse(command, line.split())
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


def test_what_the_checkpoint_says_is_known_when_it_is_read():
    flags = cli.parse("image_sample", ["--cfg_scale", "2", "--classes", "1"])
    with pytest.raises(
        ValueError,
        match="--cfg_scale has no effect without --class_cond or --vector_columns or --cond_type or --context text",
    ):
        flags.over({"class_cond": False, "cond_type": "", "context": "none"}, UNetConfig).check()
    flags.over({"class_cond": True, "cond_type": ""}, UNetConfig).check()
    flags = cli.parse("image_sample", ["--autoencoder_path", "x"]).over({"cond_type": "image"}, UNetConfig)
    with pytest.raises(ValueError, match="and the checkpoint has --cond_type: leave --autoencoder_path out"):
        flags.check()
    flags = cli.parse("image_sample", ["--decode_tile", "8"]).over({"autoencoder_path": ""}, LatentConfig)
    with pytest.raises(ValueError, match="without --autoencoder_path, and the checkpoint is without: leave it out"):
        flags.check()
    started = cli.Flags("image_train", {"init_from": "pixels", "cache_latents": True}, {"autoencoder_path": ""})
    with pytest.raises(ValueError, match="--cache_latents has no effect without --autoencoder_path"):
        started.check()
    resumed = cli.Flags("classifier_train", {"fit": "pad"}, {"random_crop": True})
    with pytest.raises(ValueError, match="exclude each other: give --random_crop False beside it"):
        resumed.check()


def test_iterations_and_max_steps_are_one_flag():
    for word in ("--iterations", "--max_steps"):
        assert cli.parse("classifier_train", [word, "7"]).given == {"iterations": 7}


def test_precedence_is_command_line_then_checkpoint_then_default():
    flags = cli.parse("image_sample", ["--num_channels", "32", "--seed", "5"])
    saved = {
        "num_channels": 64,
        "num_res_blocks": 3,
        "use_fp16": True,
        "seed": 9,
        "noise_schedule": "cosine",
        "lr": 1.0,
    }
    over = flags.over(saved, UNetConfig, DiffusionConfig)
    assert over.part(UNetConfig).num_channels == 32
    assert over.part(UNetConfig).num_res_blocks == 3
    assert over.part(UNetConfig).dropout == 0.0
    assert over.part(DiffusionConfig).noise_schedule == "cosine"
    assert over.part(UNetConfig).use_fp16 is False  # precision belongs to a run, not to a checkpoint
    assert over.values["seed"] == 5
    assert "lr" not in over.values
    assert flags.over(saved, ClassifierConfig).part(UNetConfig).num_res_blocks == 2


@pytest.mark.parametrize(("name", "value"), [("num_channels", "64"), ("class_cond", 1), ("channel_mult", None)])
def test_saved_flags_of_another_type_are_refused(name, value):
    with pytest.raises(ValueError, match=f"config.json says {name} .*, which cannot be used: it should be of type"):
        cli.parse("image_sample", []).over({name: value}, UNetConfig)


def test_saved_numbers_and_sizes_may_take_either_form():
    over = cli.parse("image_sample", []).over({"dropout": 0, "image_size": "32x64"}, UNetConfig)
    assert over.part(UNetConfig).image_size == "32x64"


def test_every_flag_has_a_help_text_and_a_plain_default():
    for command in cli.COMMANDS.values():
        for spec in command.flags().values():
            assert len(spec.metadata["help"]) > 8, spec.name
            assert json.loads(json.dumps(spec.default)) == spec.default


def shown_by(capsys, command, *words):
    with pytest.raises(SystemExit) as stop:
        cli.parse(command, words)
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_the_first_flags_and_names_all(command, capsys, monkeypatch):
    """Below an example that parses; --help all explains each, with its choices."""
    monkeypatch.setenv("COLUMNS", "90")
    page, everything = shown_by(capsys, command, "--help"), shown_by(capsys, command, "--help", "all")
    flags = cli.COMMANDS[command].flags()
    first, example = help_page.FIRST_STEPS[command]
    for text in (page, everything):
        assert all(
            (name.upper() if spec.metadata["positional"] else f"--{name}") in text.split()
            for name, spec in flags.items()
        )
        assert max(len(line) for line in text.splitlines() if line.startswith(" ")) <= 90
        line = text.replace("\\\n", "").split("for example:\n")[1].splitlines()[0]
        assert line.split() == ["python", f"scripts/{command}.py", *example.split()]
        assert text.startswith(f"usage: {command}.py")
    explained = re.findall(r"^  (--\w+|[A-Z_]+)[ \n]", page.split("help, and flags from files")[0], re.MULTILINE)
    names = [word.removeprefix("--").lower() for word in explained]
    assert names == first.split() or (not first and set(names) == set(flags))
    assert len(first.split()) in (0, 5)
    for name, spec in flags.items():
        about = everything.split(f"\n  {name.upper() if spec.metadata['positional'] else f'--{name} '}")[1].split(
            "\n  -"
        )[0]
        assert {choice for choice in spec.metadata["choices"] if choice} <= set(re.findall(r"[\w-]+", about)), name


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_of_each_help_parses(command):
    words = help_page.FIRST_STEPS[command][1].split()
    (cascade_sample.parse_stages if command == "cascade_sample" else partial(cli.parse, command))(words)


@pytest.mark.parametrize(
    ("command", "topic", "flags"),
    [
        ("image_sample", "inpainting", {"mask"}),
        ("image_sample", "img2img", {"init_image"}),
        ("image_sample", "SDEdit", {"strength"}),
        ("image_sample", "NFE", {"steps"}),
        ("classifier_sample", "guidance scale", {"classifier_scale", "cfg_scale"}),
        ("classifier_sample", "guidance_scale", {"classifier_scale", "cfg_scale"}),
        ("image_train", "gradient accumulation", {"microbatch"}),
        ("image_train", "gradient_accumulation_steps", {"microbatch"}),
        ("image_train", "activation checkpointing", {"use_checkpoint"}),
        ("image_train", "mixed precision", {"precision"}),
        ("image_train", "xyzzy", set()),
    ],
)
def test_help_finds_flags_by_the_words_of_the_field(command, topic, flags, capsys):
    page = shown_by(capsys, command, "--help", topic)
    assert set(re.findall(r"^  --(\w+)", page, re.MULTILINE)) == flags
    assert flags or page == f"no flag of {command}.py is about {topic}: --help all explains every flag\n"


def test_help_says_what_a_checkpoint_decides():
    text = " ".join(cli.parser("image_sample").format_help().split())
    for shown in (
        "pixels: 64, or HEIGHTxWIDTH (from the checkpoint, else 64)",
        "condition the network on class labels (from the checkpoint, else False)",
        "'' chooses by size (from the checkpoint, else '')",
        "images per pass of the network (default: 16)",
        "activation checkpointing: recompute them backwards, for memory (default: False)",
    ):
        assert shown in text
    assert "from the checkpoint" not in cli.parser("image_train").format_help()


@pytest.mark.parametrize("words", [["--version"], *([name, "--version"] for name in cli.COMMANDS)])
def test_version(words, capsys):
    with contextlib.suppress(SystemExit):
        guided_diffusion.commands.main(words)
    assert capsys.readouterr().out == f"guided-diffusion {guided_diffusion.__version__}\n"


PLUGIN = """
from dataclasses import dataclass
from guided_diffusion.sampling.samplers import SAMPLERS, make_sampler
from guided_diffusion.sampling.steps import Sampler

@dataclass(frozen=True)
class Mine(Sampler):
    def step(self, *args):
        return make_sampler("ddim").step(*args)

SAMPLERS["mine"] = Mine
"""


def test_a_plugin_adds_a_sampler_before_the_flags_are_checked(tmp_path, capsys, monkeypatch):
    from guided_diffusion.commands import common
    from guided_diffusion.sampling import samplers

    monkeypatch.setattr(samplers, "SAMPLERS", dict(samplers.SAMPLERS))
    (tmp_path / "mine.py").write_text(PLUGIN)
    (tmp_path / "other.py").write_text(PLUGIN.replace("mine", "other"))
    with pytest.raises(ValueError, match="sampler 'mine' is unknown"):
        common.sampler_of(cli.parse("image_sample", ["--sampler", "mine"]))
    files = ["--plugin", f"{tmp_path}/mine.py", "--plugin", f"{tmp_path}/other.py"]
    for words in (files, ["--plugin", f"{files[1]},{files[3]}"]):
        sampler = common.sampler_of(cli.parse("image_sample", [*words, "--sampler", "mine"]))
        assert type(sampler).__name__ == "Mine"
    assert cli.sampler_names()[-2:] == ["mine", "other"]
    with pytest.raises(SystemExit) as stop:
        cli.parse("image_sample", ["--plugin", str(tmp_path / "absent.py")])
    assert stop.value.code == 2
    assert "absent.py is no Python file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "expected"), [(64, (64, 64)), ("64", (64, 64)), ("32x48", (32, 48)), ((8, 16), (8, 16))]
)
def test_sizes(size, expected):
    assert parse_size(size) == expected
    assert size_flag(size) == (expected[0] if expected[0] == expected[1] else f"{expected[0]}x{expected[1]}")


@pytest.mark.parametrize("size", ["", "x", "1x2x3", "-4", 0, (4, 0), None, "a"])
def test_bad_sizes(size):
    with pytest.raises(ValueError, match="is not a size: write 64"):
        parse_size(size)


@pytest.mark.parametrize(
    ("precision", "use_fp16", "expected"),
    [("", False, "fp32"), ("", True, "fp16"), ("bf16", False, "bf16"), ("fp16", True, "fp16"), ("fp32", False, "fp32")],
)
def test_precision(precision, use_fp16, expected):
    assert resolve_precision(precision, use_fp16) == expected


def test_precision_contradictions():
    with pytest.raises(ValueError, match="precision bf16 contradicts use_fp16 True"):
        resolve_precision("bf16", True)
    with pytest.raises(ValueError, match="use one of fp32, fp16, bf16"):
        resolve_precision("half", False)


def test_a_foreign_error_becomes_one_printable_sentence_and_a_users_mistake_stays_whole():
    for error, why in ((ValueError("bad\nsecond line"), "bad"), (OSError(2, "No such file"), "No such file")):
        told = pytest.raises(UserError, match=rf"^x cannot be used \({why}\): write y$")
        with told as raised, as_user_error(f"x cannot be used ({WHY}): write y", ValueError, OSError):
            raise error
        assert raised.value.__cause__ is error
    with pytest.raises(UserError, match=r"^a{300}$"), as_user_error(WHY):
        raise UserError("a" * 300)
    with pytest.raises(KeyError), as_user_error(WHY, ValueError):
        raise KeyError("another kind")


def test_unknown_keywords_name_the_nearest():
    with pytest.raises(TypeError, match="create has no keyword 'num_chanels'; did you mean num_channels"):
        check_keywords(["num_chanels"], [spec.name for spec in fields(NetworkConfig)], "create")
    assert nearest("zzz", ["abc"]) == ""
