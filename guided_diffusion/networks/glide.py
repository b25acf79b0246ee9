"""The text-conditional networks of GLIDE (Nichol et al. 2021), by the names of openai/glide-text2im.

Shapes: N batch, L tokens of a text (`text_ctx`), V tokens of the vocabulary, D channels of the text transformer
(`xf_width`), [N, C, H, W] images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch as th
import torch.nn.functional as F
from torch import nn

from ..runtime.errors import UserError
from .architecture import GLIDE, architecture
from .attention import LayerNorm32
from .backbone import UNetModel
from .context import ContextEncoder, read_tokenizer


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_qkv, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: th.Tensor) -> th.Tensor:
        q, k, v = self.c_qkv(x).unflatten(-1, (self.heads, -1)).transpose(1, 2).chunk(3, dim=-1)
        out: th.Tensor = self.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class _FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: th.Tensor) -> th.Tensor:
        out: th.Tensor = self.c_proj(F.gelu(self.c_fc(x)))
        return out


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn, self.ln_1 = _Attention(width, heads), LayerNorm32(width)
        self.mlp, self.ln_2 = _FeedForward(width), LayerNorm32(width)

    def forward(self, x: th.Tensor) -> th.Tensor:
        x = x + self.attn(self.ln_1(x))
        out: th.Tensor = x + self.mlp(self.ln_2(x))
        return out


class _Transformer(nn.Module):
    """Residual blocks of attention and feed-forward layers over [N, L, D]."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))

    def forward(self, x: th.Tensor) -> th.Tensor:
        for block in self.resblocks:
            x = block(x)
        return x


class Text2ImUNet(UNetModel):
    """A U-Net that attends to a text, whose last token also joins the embedding of the timestep.

    :param text_ctx: L.
    :param xf_width: D; 0 for a network without text.
    :param xf_final_ln: normalise the output of the transformer.
    :param xf_padding: learned vectors take the place of tokens that the mask leaves out.
    :param n_vocab: V, of which the last token ends a text.
    """

    enlarges = False  # whether it sees small images

    def __init__(
        self,
        text_ctx: int,
        xf_width: int,
        xf_layers: int,
        xf_heads: int,
        xf_final_ln: bool,
        *args: Any,
        xf_padding: bool = False,
        n_vocab: int = 50257,
        **kwargs: Any,
    ) -> None:
        self.text_ctx, self.xf_width, self.xf_padding = text_ctx, xf_width, xf_padding
        self._text = xf_layers, xf_heads, xf_final_ln, n_vocab
        kwargs.setdefault("image_size", 64)
        super().__init__(*args, encoder_channels=xf_width or None, **kwargs)

    def _build(self) -> None:
        super()._build()
        if not self.xf_width:
            return
        layers, heads, final_ln, n_vocab = self._text
        self.transformer = _Transformer(self.xf_width, layers, heads)
        self.final_ln = LayerNorm32(self.xf_width) if final_ln else None
        self.token_embedding = nn.Embedding(n_vocab, self.xf_width)
        self.positional_embedding = nn.Parameter(th.empty(self.text_ctx, self.xf_width).normal_(std=0.01))
        self.transformer_proj = nn.Linear(self.xf_width, 4 * self.model_channels)
        if self.xf_padding:
            self.padding_embedding = nn.Parameter(th.empty(self.text_ctx, self.xf_width).normal_(std=0.01))

    def text(self, tokens: th.Tensor, mask: th.Tensor | None = None) -> tuple[th.Tensor, th.Tensor]:
        """What the network takes of texts: a vector [N, 4 * model_channels] for the embedding, and context [N, L, D].

        :param tokens: [N, L] int64.
        :param mask: bool [N, L], False where a text has ended.
        """
        if tokens.shape[1] != self.text_ctx:
            raise UserError(f"tokens must be [N, {self.text_ctx}], got {list(tokens.shape)}: pad or cut the texts")
        vectors = self.token_embedding(tokens.long()) + self.positional_embedding
        if self.xf_padding:
            if mask is None:
                raise UserError(
                    "mask is missing: the network has vectors of its own for tokens after the end of a text"
                )
            vectors = th.where(mask[..., None], vectors, self.padding_embedding)
        out = self.transformer(vectors)
        out = out if self.final_ln is None else self.final_ln(out)
        return self.transformer_proj(out[:, -1]), out

    def padded(self, texts: Sequence[Sequence[int]]) -> tuple[th.Tensor, th.Tensor]:
        """The tokens [N, L] of texts, cut or filled up, and their mask, on the CPU; [] is the empty text."""
        tokens = th.full((len(texts), self.text_ctx), self._text[-1] - 1)
        mask = th.zeros(tokens.shape, dtype=th.bool)
        for number, text in enumerate(texts):
            kept = th.tensor([*text[: self.text_ctx]], dtype=th.long)
            tokens[number, : len(kept)], mask[number, : len(kept)] = kept, True
        return tokens, mask

    def forward(  # type: ignore[override]
        self, x: th.Tensor, timesteps: th.Tensor, tokens: th.Tensor | None = None, mask: th.Tensor | None = None
    ) -> th.Tensor:
        """Predict from noisy images and the tokens of their texts."""
        emb = self._embed(x[:, : self.in_channels], timesteps, None)
        if not self.xf_width:
            return self._predict(x, emb)
        if tokens is None:
            raise UserError(f"tokens are missing: give the tokens of the texts, [N, {self.text_ctx}]")
        vector, context = self.text(tokens, mask)
        return self._predict(x, emb + vector.to(emb), context, None)


class _WithImages(Text2ImUNet):
    """A network that sees further images and masks, joined to x along the channels: so many of each, x among them."""

    images, masks = 1, 0

    def __init__(self, *args: Any, in_channels: int = 3, **kwargs: Any) -> None:
        super().__init__(*args, in_channels=in_channels * self.images + self.masks, **kwargs)


def _enlarged(low_res: th.Tensor, x: th.Tensor) -> th.Tensor:
    return F.interpolate(low_res, x.shape[2:], mode="bilinear", align_corners=False)


def _known(x: th.Tensor, image: th.Tensor | None, mask: th.Tensor | None) -> th.Tensor:
    """[N, C + 1, H, W]: what is kept of an image, and the mask that says so (1 keeps); zeros where none is given."""
    if image is None or mask is None:
        return x.new_zeros(len(x), x.shape[1] + 1, *x.shape[2:])
    return th.cat([image * mask, mask], dim=1)


class SuperResText2ImUNet(_WithImages):
    """The upsampler: it also sees small images [N, C, h, w]."""

    images, enlarges = 2, True

    def forward(  # type: ignore[override]
        self, x: th.Tensor, timesteps: th.Tensor, low_res: th.Tensor, **kwargs: Any
    ) -> th.Tensor:
        """Predict from noisy images, their small versions, and texts."""
        return super().forward(th.cat([x, _enlarged(low_res, x)], dim=1), timesteps, **kwargs)


class InpaintText2ImUNet(_WithImages):
    """The network that paints: it also sees what is kept of an image, and the mask."""

    images, masks = 2, 1

    def forward(  # type: ignore[override]
        self,
        x: th.Tensor,
        timesteps: th.Tensor,
        inpaint_image: th.Tensor | None = None,
        inpaint_mask: th.Tensor | None = None,
        **kwargs: Any,
    ) -> th.Tensor:
        """Predict from noisy images, images [N, C, H, W] that a mask [N, 1, H, W] of ones keeps, and texts."""
        return super().forward(th.cat([x, _known(x, inpaint_image, inpaint_mask)], dim=1), timesteps, **kwargs)


class SuperResInpaintText2ImUnet(_WithImages):
    """The upsampler that paints: it sees small images, what is kept of the large ones, and the mask."""

    images, masks, enlarges = 3, 1, True

    def forward(  # type: ignore[override]
        self,
        x: th.Tensor,
        timesteps: th.Tensor,
        inpaint_image: th.Tensor | None = None,
        inpaint_mask: th.Tensor | None = None,
        low_res: th.Tensor | None = None,
        **kwargs: Any,
    ) -> th.Tensor:
        """Predict from noisy images, kept parts of images, small versions, and texts."""
        if low_res is None:
            raise UserError("low_res is missing: give the small images, [N, C, h, w]")
        parts = [x, _known(x, inpaint_image, inpaint_mask), _enlarged(low_res, x)]
        return super().forward(th.cat(parts, dim=1), timesteps, **kwargs)


class GlideEncoder(ContextEncoder):
    """Texts as the tokens that a network of GLIDE takes: GPT-2's byte-pair encoding of them in lower case.

    :param tokenizer: the JSON of GPT-2's tokenizer.
    """

    def __init__(self, network: Text2ImUNet, tokenizer: str, log: Callable[[str], object]) -> None:
        super().__init__(network.xf_width, network.text_ctx, log)
        self.network, self.tokenizer = network, read_tokenizer(tokenizer)

    def encode(self, texts: Sequence[str]) -> tuple[th.Tensor, th.Tensor]:
        tokens, mask = (value.to(self.network.token_embedding.weight.device) for value in self.keywords(texts).values())
        return self.network.text(tokens, mask)[1], mask

    def keywords(self, texts: Sequence[str]) -> dict[str, th.Tensor]:
        ids = [self.tokenizer.encode(text.lower()).ids for text in texts]
        for text, each in zip(texts, ids, strict=True):
            if len(each) > self.max_tokens:
                self._tell_cut(text, len(each), self.tokenizer.decode(each[: self.max_tokens]))
        if (largest := max(map(max, filter(None, ids)), default=0)) >= self.network.token_embedding.num_embeddings:
            raise UserError(f"the tokenizer.json has a token {largest}, and the network none: take that of gpt2")
        return dict(zip(("tokens", "mask"), self.network.padded(ids), strict=True))

    def conditioning(self, texts: Sequence[str]) -> dict[str, th.Tensor]:
        return self.keywords(texts)

    def settings(self) -> dict[str, Any]:
        return {"text_encoder": GLIDE, "context_dim": self.context_dim, "max_tokens": self.max_tokens}


HEAD = 64  # channels of a head, in all published networks
LARGE = 2**10  # any size in pixels, of which attention_resolutions are parts


def read_glide(state: Mapping[str, th.Tensor]) -> Text2ImUNet:
    """An untrained network, on the meta device, of the architecture that weights show.

    :raises KeyError: naming a weight that is missing.
    """
    trunk, seen = architecture(state, LARGE), state["input_blocks.0.0.weight"].shape[1]
    channels = state["out.2.weight"].shape[0] // 2
    kinds = (Text2ImUNet, SuperResText2ImUNet, InpaintText2ImUNet, SuperResInpaintText2ImUnet)
    inputs = (channels, 2 * channels, 2 * channels + 1, 3 * channels + 1)
    if seen not in inputs or "channel_mult" not in trunk:
        raise ValueError(f"a U-Net of {seen} channels in and {2 * channels} out")
    layers = {name.split(".")[2] for name in state if name.startswith("transformer.resblocks.")}
    vocabulary, width = state["token_embedding.weight"].shape
    with th.device("meta"):
        return kinds[inputs.index(seen)](
            text_ctx=len(state["positional_embedding"]),
            xf_width=width,
            xf_layers=len(layers),
            xf_heads=width // HEAD,
            xf_final_ln="final_ln.weight" in state,
            xf_padding="padding_embedding" in state,
            n_vocab=vocabulary,
            in_channels=channels,
            model_channels=trunk["num_channels"],
            out_channels=2 * channels,
            num_res_blocks=trunk["num_res_blocks"],
            attention_resolutions=[LARGE // int(part) for part in trunk["attention_resolutions"].split(",") if part],
            channel_mult=[float(mult) for mult in trunk["channel_mult"].split(",")],
            num_head_channels=HEAD,
            use_scale_shift_norm=trunk["use_scale_shift_norm"],
            resblock_updown=trunk.get("resblock_updown", False),
        )
