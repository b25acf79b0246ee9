"""The flag to write in place of an unknown word: what other programs call it, else the nearest."""

from __future__ import annotations

from collections.abc import Sequence

from ..runtime.errors import nearest

# flags -> what other programs call them; of several flags it is the first one that the command has
SYNONYMS = {
    "lr": "learning_rate learning-rate",
    "steps max_steps": "steps num_steps",
    "max_steps": "epochs max_iters train_steps",
    "steps": "num_inference_steps ddim_steps sampling_steps n_steps nfe",
    "log_dir": "output output_dir out out_dir outdir logdir save_dir",
    "data_dir": "data dataset data_path train_dir images",
    "model_path": "model checkpoint ckpt weights",
    "resume_checkpoint": "resume resume_from",
    "image_size": "resolution size img_size",
    "classifier_scale cfg_scale": "guidance_scale scale",
    "cfg_scale": "cfg cond_scale unconditional_guidance_scale",
    "cfg_rescale": "guidance_rescale rescale",
    "sampler": "scheduler solver method",
    "init_image": "init_img init source input_image img2img",
    "mask": "mask_image mask_path inpaint",
    "strength": "denoising_strength noise_strength sdedit",
    "churn": "s_churn S_churn",
    "resample_jump": "jump jump_length",
    "classes": "label labels class",
    "prompt": "text caption",
    "prompts": "prompt_file prompts_file from_file",
    "use_fp16": "fp16 half",
    "precision classifier_precision": "dtype amp mixed_precision",
    "microbatch": "gradient_accumulation grad_accum gradient_accumulation_steps accumulate_grad_batches",
    "use_checkpoint checkpoint_resolutions": "gradient_checkpointing grad_checkpoint activation_checkpointing",
    "compile": "torch_compile compile_model",
    "device": "gpu cuda",
}


def flag_instead(word: str, known: Sequence[str], otherwise: str = "; --help lists the flags") -> str:
    """The flag to write instead of an unknown one."""
    bare = word.split("=")[0].lstrip("-")
    flags = next((flags.split() for flags, words in SYNONYMS.items() if bare in words.split()), [])
    synonyms = [f"; did you mean --{name}?" for name in flags if name in known]
    near = nearest(f"--{bare}", [f"--{name}" for name in known])
    return synonyms[0] if synonyms else near or otherwise
