"""Folders of tiny text encoders and CLIPs of random weights, as transformers writes them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import torch as th

CORPUS = ["a red cat", "a blue dog", "two red dogs", "rain and snow", ""]
SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_tokenizer(folder: Any, start: str, end: str) -> int:
    """A tokenizer of words that transformers reads; returns the number of its tokens."""
    import tokenizers
    import transformers

    words = sorted({word for text in CORPUS for word in text.split()})
    names = ["[PAD]", "[UNK]", start, end, *words]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({n: i for i, n in enumerate(names)}, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, 2), (end, 3)]
    )
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", bos_token=start, eos_token=end
    )
    wrapped.save_pretrained(folder)
    return len(names)


def networks(kind: str, count: int) -> Any:
    """A network of a kind, for so many tokens."""
    import transformers

    if kind == "bert":
        config = transformers.BertConfig(vocab_size=count, max_position_embeddings=16, **SIZES)
        return transformers.BertModel(config)
    if kind == "t5":
        config = transformers.T5Config(vocab_size=count, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
        return transformers.T5EncoderModel(config)
    text = dict(SIZES, vocab_size=count, max_position_embeddings=16, bos_token_id=2, eos_token_id=3, pad_token_id=0)
    if kind == "clip text":
        return transformers.CLIPTextModel(transformers.CLIPTextConfig(**text))
    vision = dict(SIZES, image_size=8, patch_size=4)
    options = {"text_config": text, "vision_config": vision, "projection_dim": 6}
    return transformers.CLIPModel(transformers.CLIPConfig(**options))


def save_encoder(kind: str, folder: Path) -> str:
    """The folder of a network and its tokenizer."""
    th.manual_seed(0)
    count = save_tokenizer(folder, "[CLS]", "[SEP]")
    networks(kind, count).eval().save_pretrained(folder)
    return str(folder)


def save_clip(folder: Path) -> str:
    """The folder of a CLIP with both parts and their preparations."""
    import transformers

    save_encoder("clip", folder)
    size = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    transformers.CLIPImageProcessor(**size).save_pretrained(folder)
    return str(folder)
