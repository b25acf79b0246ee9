"""Text encoders that are trained along: the transformer of latent-diffusion's text-to-image models.

Parameters have the names and the order of CompVis/latent-diffusion's, so that its checkpoints load.

Shapes: N batch, L tokens of a text, V tokens of the vocabulary, D channels of a token, [N, L, D] context.
"""

from __future__ import annotations

import torch as th
import torch.nn.functional as F
from torch import nn

HEADS, HEAD_CHANNELS = 8, 64


class SelfAttention(nn.Module):
    """Attention of tokens to each other, [N, L, D] -> [N, L, D]; HEADS heads of HEAD_CHANNELS channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        inner = HEADS * HEAD_CHANNELS
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.to_out = nn.Linear(inner, dim)

    def forward(self, x: th.Tensor, mask: th.Tensor | None = None) -> th.Tensor:
        """Attend.

        :param mask: bool [N, L], False for tokens that are attended to by none.
        """
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v))
        attended = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None])
        out: th.Tensor = self.to_out(attended.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """Two layers with a GELU in between, applied to each token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU()), nn.Dropout(0.0), nn.Linear(4 * dim, dim)
        )

    def forward(self, x: th.Tensor) -> th.Tensor:
        out: th.Tensor = self.net(x)
        return out


class Positions(nn.Module):
    """A learned vector for each place of a token."""

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(length, dim)

    def forward(self, count: int) -> th.Tensor:
        """[count, D] of the first places."""
        return self.emb.weight[:count]


class Layers(nn.Module):
    """Layers of attention and feed-forward networks in turn, normalised before each (pre-norm)."""

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        kinds = (SelfAttention, FeedForward) * depth
        self.layers = nn.ModuleList(nn.ModuleList([nn.LayerNorm(dim), kind(dim)]) for kind in kinds)

    def forward(self, x: th.Tensor, mask: th.Tensor | None = None) -> th.Tensor:
        for pair in self.layers:
            norm, layer = pair.children()
            x = x + (layer(norm(x), mask) if isinstance(layer, SelfAttention) else layer(norm(x)))
        return x


class TextTransformer(nn.Module):
    """A bidirectional transformer over the tokens of texts."""

    def __init__(self, dim: int, depth: int, vocab_size: int, max_seq_len: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.max_seq_len = max_seq_len
        self.token_emb, self.pos_emb = nn.Embedding(vocab_size, dim), Positions(max_seq_len, dim)
        self.emb_dropout = nn.Dropout(dropout)
        self.attn_layers, self.norm = Layers(dim, depth), nn.LayerNorm(dim)
        self.to_logits = nn.Linear(dim, vocab_size)  # is in the checkpoints

    def forward(
        self, tokens: th.Tensor, mask: th.Tensor | None = None, *, return_embeddings: bool = False
    ) -> th.Tensor:
        """Logits [N, L, V] of tokens [N, L] int64, or with `return_embeddings` their vectors [N, L, D]."""
        if tokens.shape[1] > self.max_seq_len:
            raise ValueError(
                f"texts have {tokens.shape[1]} tokens, the text encoder takes {self.max_seq_len}: cut them"
            )
        x = self.emb_dropout(self.token_emb(tokens) + self.pos_emb(tokens.shape[1]))
        out: th.Tensor = self.norm(self.attn_layers(x, mask))
        return out if return_embeddings else self.to_logits(out)


class BERTEmbedder(nn.Module):
    """Tokens [N, L] int64 as context [N, L, n_embed].

    :param use_tokenizer: False: texts become tokens outside of it.
    """

    def __init__(
        self,
        n_embed: int,
        n_layer: int,
        vocab_size: int = 30522,
        max_seq_len: int = 77,
        device: str | th.device | None = None,
        use_tokenizer: bool = False,
        embedding_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if use_tokenizer:
            raise ValueError(
                "use_tokenizer must be False: give tokens, of the tokenizer that the network was trained with"
            )
        self.max_seq_len = max_seq_len
        self.transformer = TextTransformer(n_embed, n_layer, vocab_size, max_seq_len, embedding_dropout)
        self.to(device)

    def forward(self, text: th.Tensor) -> th.Tensor:
        out: th.Tensor = self.transformer(text, return_embeddings=True)
        return out

    encode = forward
