"""The flags of training that starts from a trained network. As in config.py, a field is a flag, without torch."""

from __future__ import annotations

from dataclasses import dataclass

from .config import flag, nearest, path_flag

MISMATCHES = ("error", "reinit", "inflate")
LORA_KINDS = ("attention", "convolutions")


def parse_kinds(text: str) -> str:
    """The same text, if it names layers that can carry adapters.

    :raises ValueError: naming the word that is none.
    """
    for word in text.split(","):
        if word not in LORA_KINDS:
            allowed = ",".join(LORA_KINDS)
            raise ValueError(
                f"{word!r} in {text!r} carries no adapters: name some of {allowed}{nearest(word, LORA_KINDS)}"
            )
    return text


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Starting from a trained network."""

    init_from: str = path_flag(
        "a checkpoint, or the folder of a run (its newest EMA), whose weights a new run starts from; '' for none"
    )
    init_mismatch: str = flag(
        "error",
        "parameters that do not fit it: error; reinit, they start anew; inflate, they grow so that the network still "
        "computes what it did, and classes are found by name",
        choices=MISMATCHES,
    )
    freeze: str = flag("", "parameters that are not trained: patterns such as input_blocks.*,time_embed.*; '' for none")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (LoRA) in place of training the weights."""

    lora_rank: int = flag(0, "rank of the adapters; 0: none, all weights are trained", at_least=0, at_most=2**16)
    lora_alpha: float = flag(0.0, "the adapters' output is scaled by this over the rank; 0: not scaled", at_least=0)
    lora_on: str = flag(
        "attention,convolutions",
        "what has adapters: attention (its projections), convolutions (of the residual blocks)",
        convert=parse_kinds,
    )
    lora_train: str = flag("", "parameters that are trained beside the adapters: patterns such as label_emb.*")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """An adapter (LoRA) over the network of --model_path."""

    lora_path: str = path_flag("its file loraNNNNNN.pt, or the folder of the run that trained it; '' for none")
    lora_scale: float = flag(1.0, "how much of it: 0 none, 1 as it was trained")
