"""Text in the commands: encoders of captions in training, prompts in sampling, and guidance by CLIP.

Shapes: N images, L tokens, D the width of the context, E embedding size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th

from .. import dist_util, logger
from ..config import CaptionConfig, ContextConfig
from ..data.captions import Captioning
from ..networks.context import ContextEncoder, ScratchEncoder, build_context_encoder, clip_embedding
from ..nn import traits_of
from ..runtime.errors import UserError, quoted, reason, refuse
from ..runtime.files import lines_of, writing
from ..sampling.guidance import clip_guidance, combine
from ..training import checkpoints
from .flags import Flags
from .sections import ClipConfig, FreeGuidanceConfig, PromptConfig

if TYPE_CHECKING:
    from ..image_datasets import ImageStream
    from ..runtime.jobs import Conditioning
    from ..sampling.prediction import CondFn
    from .common import Plan, Restored

KEPT = 4096  # prompts whose context is kept


def captioning_of(flags: Flags) -> dict[str, Any]:
    """The keyword of `load_data` for the captions of the data; {} for a network without text."""
    if flags.values.get("context") != "text":
        return {}
    config = flags.part(CaptionConfig)
    return {"captioning": Captioning(config.caption_column, config.skip_uncaptioned, config.caption_dropout)}


def encoder_of_training(
    flags: Flags, stream: ImageStream, validation: ImageStream | None
) -> tuple[Flags, ContextEncoder | None]:
    """The encoder of the captions, set in the streams, and the flags with what its network needs; writes its tokenizer.

    A run that goes on, or starts from another one, has the tokenizer of that one.
    """
    if stream.captions is None:
        return flags, None
    config, path = flags.part(ContextConfig), flags.values["resume_checkpoint"] or flags.values["init_from"]
    source = path if path and checkpoints.config_beside(path).get("context") == "text" else ""
    tokenizer = checkpoints.tokenizer_beside(source) if source and config.text_encoder == "scratch" else ""
    encoder = build_context_encoder(
        config, captions=stream.captions.all_texts(), tokenizer=tokenizer, device=dist_util.dev(), log=logger.warn
    )
    assert encoder is not None
    settings = encoder.settings()
    if isinstance(encoder, ScratchEncoder) and dist_util.rank() == 0:
        with writing(os.path.join(logger.get_dir(), checkpoints.TOKENIZER)) as file:
            file.write(encoder.tokenizer_json().encode())
    for part in filter(None, (stream, validation)):
        if part.captions is not None:
            part.captions.keywords = encoder.keywords
    place = checkpoints.from_folder(settings["text_encoder"], logger.get_dir())
    of_folder = {} if config.text_encoder in ("scratch", "minilm") else {"text_encoder": place}
    known = {"context_dim": settings["context_dim"], "text_fingerprint": settings["fingerprint"], **of_folder}
    return flags.with_values(**known), encoder


def first_captions(stream: ImageStream, indices: Sequence[int]) -> dict[str, th.Tensor]:
    """The keywords of the network for the first caption of each of these images; {} for a stream without captions."""
    captions = stream.captions
    if captions is None or captions.keywords is None:
        return {}
    paths = stream.dataset.local_images
    return dict(captions.keywords([captions.texts[paths[index]][0] for index in indices]))


def prompts_of(flags: Flags) -> list[str]:
    """The texts of --prompt or --prompts, [] where none are given."""
    config = flags.part(PromptConfig)
    if not config.prompts:
        return [" ".join(config.prompt.split())] if config.prompt else []
    return lines_of(config.prompts, f"--prompts {config.prompts}", "prompt")


def check_prompts(flags: Flags, *, prompted: bool = False) -> bool:
    """Whether images are made for prompts; refused where a network of text has none.

    :param prompted: the images that are enlarged have prompts of their own.
    """
    texts, path = bool(prompts_of(flags)) or prompted, flags.values["model_path"]
    lacking = flags.values["context"] == "text" and not texts
    refuse((lacking, f"{path} was trained with captions: give --prompt or --prompts"))
    return texts


def extend(plan: Plan, model: Restored, prompts: Sequence[str] = ()) -> None:
    """Make samples for prompts, which the images take in turn.

    :param prompts: those that the images to enlarge were made for, which count where no flag gives others.
    """
    texts = prompts_of(model.flags) or list(prompts)
    check_prompts(model.flags, prompted=bool(texts))
    if texts:
        plan.job["prompts"] = texts = _one_turn(texts)
    if model.encoder is not None:
        plan.job["conditioning"] = _with_texts(plan.job.get("conditioning"), _encode(model), texts)


def _one_turn(texts: Sequence[str]) -> list[str]:
    """The least list that gives these texts when it is taken in turn."""
    array = np.asarray(texts)
    counts = (n for n in range(1, len(texts)) if texts[n] == texts[0] and (array[n:] == array[:-n]).all())
    return list(texts[: next(counts, len(texts))])


def _encode(model: Restored) -> Callable[[Sequence[str]], dict[str, th.Tensor]]:
    """texts -> keywords of the network; a weaker network beside it encodes the tokens itself."""
    encoder = model.encoder
    assert encoder is not None
    weaker = model.flags.part(FreeGuidanceConfig).autoguide_path
    return encoder.keywords if weaker else encoder.conditioning


def _with_texts(
    before: Conditioning | None, encode: Callable[[Sequence[str]], dict[str, th.Tensor]], texts: Sequence[str]
) -> Conditioning:
    """The conditioning of a job with the keywords of its prompts, each of which is encoded alone."""

    @lru_cache(KEPT)
    def encoded(text: str) -> dict[str, th.Tensor]:
        return encode([text])

    def conditioning(rows: Sequence[int]) -> dict[str, th.Tensor]:
        parts = [encoded(texts[row % len(texts)]) for row in rows]
        keywords = {name: th.cat([part[name] for part in parts]) for name in parts[0]}
        return {**(before(rows) if before else {}), **keywords}

    return conditioning


def null_keywords(model: Restored) -> dict[str, th.Tensor]:
    """What classifier-free guidance leads away from: the context of --negative_prompt or of the empty text.

    {} for networks without text, and for those that were never shown empty texts.
    """
    negative = model.flags.values.get("negative_prompt", "")
    if model.encoder is None or not (negative or model.flags.values["null_text"]):
        return {}
    return _encode(model)([negative])


def refuse_unguidable(model: Restored, scale: float, null: Mapping[str, th.Tensor]) -> None:
    """Refuse classifier-free guidance of a network that knows no "nothing"."""
    traits, values = traits_of(model.network), model.flags.values
    if traits.null_label is not None or traits.null_cond or traits.null_vector or null:
        return
    text = values["context"] == "text"
    labelled = values["class_cond"] or values["vector_dim"]
    dropout = "--class_dropout" if labelled else "--caption_dropout" if text else "--cond_dropout"
    remedy = "give --negative_prompt" if text else "guide with a classifier"
    raise UserError(
        f"--cfg_scale {scale} needs a network that knows {'the empty caption' if text else repr('no class')}, and "
        f"{model.path} was trained without {dropout}: train with {dropout} 0.1, or {remedy}"
    )


def with_clip(plan: Plan, model: Restored, guide: CondFn | None) -> CondFn | None:
    """The guidance of a classifier, if any, and that of --clip_path."""
    config, channels = model.flags.part(ClipConfig), model.flags.values["image_channels"]
    if not (config.clip_path and config.clip_scale):
        return guide
    texts = [config.clip_prompt] if config.clip_prompt else prompts_of(model.flags)
    refuse(
        (len(texts) != 1, "--clip_path guides all images to one text: give --clip_prompt"),
        (channels not in (1, 3), f"--clip_path sees images of 1 or 3 channels, and these have {channels}"),
    )
    encoder, target = _clip(config.clip_path, texts[0])
    mode = "noisy" if config.clip_on == "x_t" else "denoised"
    plan.request |= {
        "clip": encoder.identity,
        "clip_scale": config.clip_scale,
        "clip_prompt": texts[0],
        "clip_on": config.clip_on,
    }
    stage = model.first_stage

    def embed(x: th.Tensor) -> th.Tensor:
        embedding: th.Tensor = encoder.differentiable(x if stage is None else stage.decode(x))
        return embedding

    clip = clip_guidance(embed, target, mode=mode, scale=config.clip_scale)
    return combine(guide, clip) if guide else clip


def _clip(folder: str, text: str) -> tuple[Any, th.Tensor]:
    """The network of images of a CLIP, and its embedding [E] of a text."""
    from ..evaluation.features import make_extractor

    try:
        encoder = make_extractor(f"clip:{folder}", device=dist_util.dev())
        return encoder, clip_embedding(folder, text).to(dist_util.dev())
    except Exception as error:  # the library does not say what it raises
        fault = reason(error).partition("cannot be used: ")[2] or reason(error)
        raise UserError(f"--clip_path {quoted(folder)} cannot be used: {fault}") from error
