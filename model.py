"""
Every part of a multimodal transformer, each built from the ones before it:

    1. tokenizers      CharTokenizer, BPETokenizer
    2. attention       Linear, scaled_dot_product_attention, KVCache, MultiHeadAttention; masks;
                       RotaryEmbedding
    3. layers          LayerNorm, RMSNorm, Dropout, FeedForward, LearnedPositionalEncoding
    4. blocks          EncoderBlock, DecoderBlock
    5. stacks          TransformerEncoder, TransformerDecoder; init_weights
    6. vision          PatchEmbedding, AttentionPooling, ViT
    7. language        GPT
    8. multimodal      connectors, MLLM, CLIP
    9. options         beam search, mixture of experts, YaRN, several images, tiles, and the
                       encoder-decoder of 2017

Shapes: (B, T, C) = batch, time, channels; (B, N, C) for image tokens; (B, n_head, T, head_dim)
inside attention. Masks are boolean, True = may attend, and broadcast to (B, n_head, Tq, Tk). A row
that may attend nowhere gives zeros.
"""

import contextlib
import heapq
import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

IGNORE_INDEX = -1  # a target that does not count in the loss
# the placeholder of an image among token ids; no vocabulary has it, so no GPT can write it
IMAGE_ID = -200


# 1. tokenizers ------------------------------------------------------------------------------------


class CharTokenizer:
    """One id per character. The vocabulary is the sorted set of characters of a text."""

    def __init__(self, text):
        self.chars = "".join(sorted(set(text)))
        self.ids = {c: i for i, c in enumerate(self.chars)}
        self.vocab_size = len(self.chars)

    def encode(self, text):
        """Return the list of ids of a str. Fails on a character outside the vocabulary."""
        for c in text:
            assert c in self.ids, f"the character {c!r} is not in the vocabulary of this model"
        return [self.ids[c] for c in text]

    def decode(self, ids):
        return "".join(self.chars[i] for i in ids)

    def state(self):
        return {"kind": "char", "chars": self.chars}

    @classmethod
    def from_state(cls, state):
        return cls(state["chars"])


class BPETokenizer:
    """Byte-pair encoding of UTF-8 bytes (Sennrich et al. 2016; on bytes as in GPT-2, Radford et al.
    2019).

    Ids 0 to 2 are pad, bos and eos, which encode() never returns and decode() omits, so no text can
    imitate them. Then follow the 256 bytes, so no text is unknown, and one id per merge in the
    order in which the merges were learnt.
    """

    pad_id, bos_id, eos_id = range(3)
    byte_ids = range(3, 3 + 256)  # the id of each byte
    first_merge = 3 + 256
    # text is split into words (with the space before them), punctuation and white space; merges
    # stay inside a piece
    pieces = re.compile(r"'(?:s|t|re|ve|m|ll|d)\b| ?\w+| ?[^\w\s]+|\s+(?!\S)|\s+")

    def __init__(self, merges):
        """merges: list of (left id, right id), in the order in which they were learnt."""
        self.merges = [tuple(pair) for pair in merges]
        self.pair_ids = {pair: self.first_merge + i for i, pair in enumerate(self.merges)}
        self.bytes = [b""] * self.first_merge  # of each id
        for b, i in enumerate(self.byte_ids):
            self.bytes[i] = bytes([b])
        for left, right in self.merges:
            self.bytes.append(self.bytes[left] + self.bytes[right])
        self.vocab_size = len(self.bytes)
        self.cache = {}

    @classmethod
    def train(cls, texts, vocab_size):
        """Learn merges from an iterable of str until there are vocab_size ids, or no pair occurs
        twice."""
        piece_counts = Counter(piece for text in texts for piece in cls.pieces.findall(text))
        words = [(cls.ids_of_bytes(piece), n) for piece, n in piece_counts.items()]
        counts = Counter()  # how often each pair occurs
        where = defaultdict(set)  # the indices of the words in which it occurs
        changed = set()  # pairs whose count has changed

        def count_pairs(w, sign):
            ids, n = words[w]
            for pair in zip(ids, ids[1:]):
                counts[pair] += sign * n
                where[pair].add(w)
                changed.add(pair)

        for w in range(len(words)):
            count_pairs(w, +1)
        merges = []
        heap = []  # (-count, pair), the most frequent first
        while cls.first_merge + len(merges) < vocab_size:
            for pair in changed:
                heapq.heappush(heap, (-counts[pair], pair))
            changed.clear()
            while heap and heap[0][0] != -counts[heap[0][1]]:
                heapq.heappop(heap)  # outdated: the pair was pushed again when its count changed
            if not heap or heap[0][0] > -2:
                break
            _, pair = heapq.heappop(heap)
            for w in where.pop(pair):
                count_pairs(w, -1)
                ids, n = words[w]
                words[w] = cls.merge(ids, pair, cls.first_merge + len(merges)), n
                count_pairs(w, +1)
            merges.append(pair)
        return cls(merges)

    @classmethod
    def ids_of_bytes(cls, text):
        return [cls.byte_ids[b] for b in text.encode("utf-8", "surrogatepass")]

    @staticmethod
    def merge(ids, pair, new_id):
        """Return ids with every occurrence of pair replaced by new_id."""
        merged = []
        for i in ids:
            if merged and (merged[-1], i) == pair:
                merged[-1] = new_id
            else:
                merged.append(i)
        return merged

    def encode(self, text):
        """Return the list of ids of a str, none of them special."""
        ids = []
        for piece in self.pieces.findall(text):
            if piece not in self.cache:
                self.cache[piece] = self.encode_piece(piece)
            ids += self.cache[piece]
        return ids

    def encode_piece(self, piece):
        """Merge the pair that was learnt first, again and again."""
        ids = self.ids_of_bytes(piece)
        while len(ids) > 1:
            known = [pair for pair in zip(ids, ids[1:]) if pair in self.pair_ids]
            if not known:
                break
            pair = min(known, key=self.pair_ids.get)
            ids = self.merge(ids, pair, self.pair_ids[pair])
        return ids

    def decode(self, ids):
        """Return the str of ids, without special ids. Bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.bytes[i] for i in ids).decode("utf-8", "replace")

    def state(self):
        return {"kind": "byte_bpe", "merges": [list(pair) for pair in self.merges]}

    @classmethod
    def from_state(cls, state):
        return cls(state["merges"])


TOKENIZERS = {"char": CharTokenizer, "byte_bpe": BPETokenizer}


def tokenizer_from_state(state):
    """Return the tokenizer whose state() this is."""
    return TOKENIZERS[state["kind"]].from_state(state)


# 2. attention -------------------------------------------------------------------------------------


class Linear(nn.Linear):
    """nn.Linear that says how its weights start, see init_weights(): normal with standard deviation
    std, by default 1 / sqrt(channels in), which keeps the size of activations."""

    def __init__(self, n_in, n_out, bias=True, std=None):
        super().__init__(n_in, n_out, bias=bias)
        self.std = n_in**-0.5 if std is None else std


class OutputLayer(Linear):
    """The layer that scores classes or tokens. Its small weights make all of them about equally
    likely at first, as in GPT-2. AdamW trains it, not Muon."""

    def __init__(self, n_in, n_out, bias=True):
        super().__init__(n_in, n_out, bias=bias, std=0.02)


def padding_mask(ids, pad_id):
    """Return the (B, 1, 1, T) mask of (B, T) ids, True at the tokens that are not padding."""
    return (ids != pad_id)[:, None, None, :]


def causal_mask(Tq, Tk, device=None):
    """Return a (Tq, Tk) mask: each query sees the keys up to its own position. The last query is at
    the last key."""
    return torch.ones(Tq, Tk, dtype=torch.bool, device=device).tril(Tk - Tq)


def scaled_dot_product_attention(q, k, v, mask=None, dropout_p=0.0):
    """Return softmax(q k^T / sqrt(head_dim)) v, equation 1 of "Attention Is All You Need" (Vaswani
    et al. 2017).

    q: (..., Tq, head_dim); k and v: (..., Tk, head_dim); mask: boolean, broadcastable to (..., Tq,
    Tk). Returns the output (..., Tq, head_dim) and the weights (..., Tq, Tk) before dropout.
    """
    scores = (q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1)  # (..., Tq, Tk)
    if mask is not None:  # the lowest finite number: -inf would give NaN in a row that sees nothing
        bias = torch.zeros_like(mask, dtype=scores.dtype)
        scores = scores + bias.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    if mask is not None:
        weights = weights.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return F.dropout(weights, dropout_p, dropout_p > 0) @ v, weights


class KVCache:
    """The keys and values of an attention layer for all positions so far, in memory that is
    allocated once."""

    def __init__(self, max_len=0):
        self.max_len = max_len  # 0: as many as the first call brings, such as those of a memory
        self.length = 0
        self.kv = None  # (2, B, n_head, max_len, head_dim)

    def append(self, k, v):
        """Add the keys and values (B, n_head, T, head_dim) of T positions. Return those of all
        positions so far."""
        B, n_head, T, head_dim = k.shape
        if self.kv is None:
            self.kv = k.new_empty(2, B, n_head, self.max_len or T, head_dim)
        end = self.length + T
        self.kv[:, :, :, self.length : end] = torch.stack((k, v))
        self.length = end
        return self.kv[:, :, :, :end].unbind()

    def select(self, rows):
        """Keep these rows of the batch, (n,) indices, in which a row may occur several times."""
        self.kv = self.kv[:, rows]


def frequencies(n_channels):
    """Return (n_channels / 2,) geometrically spaced frequencies in radians per position."""
    return 10000.0 ** (-torch.arange(0, n_channels, 2).float() / n_channels)


class RotaryEmbedding(nn.Module):
    """Rotary positions (RoFormer, Su et al. 2021): each pair of channels is rotated by an angle
    proportional to the position, so that the product of a query and a key depends only on their
    distance. Channel i is paired with channel i + head_dim / 2."""

    def __init__(self, head_dim, max_len):
        super().__init__()
        assert head_dim % 2 == 0, f"rotary positions need an even head_dim, not {head_dim}"
        # (head_dim / 2,), radians
        self.set_tables(frequencies(head_dim), max_len)

    def set_tables(self, frequencies, max_len, scale=1.0):
        angles = torch.outer(torch.arange(max_len).float(), frequencies)
        # (max_len, head_dim)
        self.register_buffer("cos", scale * angles.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", scale * angles.sin().repeat(1, 2), persistent=False)

    def forward(self, x, positions):
        """Rotate x (B, n_head, T, head_dim) by the angles of positions (T,), or (B, T)."""
        # (1, T, head_dim), or (B, 1, T, head_dim)
        cos = self.cos[positions].unsqueeze(-3).to(x.dtype)
        sin = self.sin[positions].unsqueeze(-3).to(x.dtype)
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin


class MultiHeadAttention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2): self-, cross- and cached attention
    in one class.

    With keep_weights = True the weights (B, n_head, Tq, Tk) of the last call are kept in
    attn_weights.
    """

    def __init__(self, n_embd, n_head, bias=True, rotary=None, proj_std=0.0):
        """rotary: a RotaryEmbedding for self-attention. proj_std: initial weights of the projection
        back into the residual stream; with 0, a block adds nothing at first (Goyal et al. 2017,
        Bachlechner et al. 2020)."""
        super().__init__()
        assert n_embd % n_head == 0, f"n_embd={n_embd} is not a multiple of n_head={n_head}"
        self.n_head = n_head
        self.rotary = rotary
        # queries, keys and values in one matrix product
        self.qkv = Linear(n_embd, 3 * n_embd, bias=bias)
        self.proj = Linear(n_embd, n_embd, bias=bias, std=proj_std)
        self.keep_weights = False
        self.attn_weights = None

    def forward(self, x, memory=None, mask=None, causal=False, cache=None, positions=None):
        """Attend from x (B, Tq, C) to itself or to memory (B, Tk, C). Returns (B, Tq, C).

        Project, rotate queries and keys if there is a rotary embedding, append keys and values to
        the cache if there is one, attend in each head, join the heads, and project.

        mask: boolean, True = may attend. causal: queries see keys up to their own position. cache:
        a KVCache; in self-attention x continues what it holds, in cross-attention it keeps the keys
        and values of the memory. positions: (Tq,) or (B, Tq) rotary positions; by default those
        that follow the cache.
        """
        Tq = x.size(1)
        start = 0 if cache is None else cache.length
        q, k, v = self.project(x, memory, start)  # (B, n_head, T, head_dim)
        if self.rotary is not None:
            if positions is None:
                positions = torch.arange(start, start + Tq, device=x.device)
            q = self.rotary(q, positions)
            k = self.rotary(k, positions)
        if cache is not None:
            k, v = cache.append(k, v)
        out = self.attend(q, k, v, mask, causal)
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, n_head, Tq, head_dim) -> (B, Tq, C)

    def project(self, x, memory, start):
        """Return queries of x, and keys and values of x, or of the memory from position start on:
        those before it are in the cache."""
        if memory is None:
            q, k, v = self.qkv(x).chunk(3, -1)
        else:
            C = x.size(-1)
            q_weight, kv_weight = self.qkv.weight.split((C, 2 * C))
            q_bias, kv_bias = (
                (None, None) if self.qkv.bias is None else self.qkv.bias.split((C, 2 * C))
            )
            q = F.linear(x, q_weight, q_bias)
            k, v = F.linear(memory[:, start:], kv_weight, kv_bias).chunk(2, -1)
        return self.split_heads(q), self.split_heads(k), self.split_heads(v)

    def split_heads(self, x):
        """(B, T, C) -> (B, n_head, T, head_dim): each head has head_dim neighbouring channels."""
        return x.unflatten(2, (self.n_head, -1)).transpose(1, 2)

    def attend(self, q, k, v, mask, causal):
        """Run the attention function above, or torch's kernel where that is faster: except for
        bfloat16 on a CPU."""
        Tq, Tk = q.size(2), k.size(2)
        slow_kernel = q.dtype == torch.bfloat16 and q.device.type == "cpu"
        fused = not self.keep_weights and not slow_kernel
        if fused and causal and mask is None and Tq == Tk:  # the kernel knows this mask
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if causal and Tq > 1:
            allowed = causal_mask(Tq, Tk, q.device)
            mask = allowed if mask is None else mask & allowed
        if fused:
            out = F.scaled_dot_product_attention(q, k, v, mask)
            if mask is not None:  # kernels differ in what they return for a row that sees nothing
                out = out.masked_fill(~mask.any(-1, keepdim=True), 0.0)
            return out
        out, weights = scaled_dot_product_attention(q, k, v, mask)
        self.attn_weights = weights.detach() if self.keep_weights else None
        return out


# 3. layers ----------------------------------------------------------------------------------------


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) over the channels, then a gain and a shift (Ba et al.
    2016). Computed by torch's kernel: written out like RMSNorm below, the training step of a small
    ViT takes a fifth longer on a CPU."""

    def __init__(self, n_embd, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd))
        self.eps = eps

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """x / root mean square over the channels, then a gain; the mean is kept (Zhang and Sennrich
    2019)."""

    def __init__(self, n_embd, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.eps = eps

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


NORMS = {"layer": LayerNorm, "rms": RMSNorm}


def make_norm(norm, n_embd):
    assert norm in NORMS, f"norm={norm}: {' or '.join(NORMS)}"
    return NORMS[norm](n_embd)


@contextlib.contextmanager
def evaluating(model):
    """Put the model into evaluation mode, without dropout, inside a with block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class Dropout(nn.Module):
    """Zero a share p of x in training and scale the rest by 1 / (1 - p) (Srivastava et al. 2014).

    p is rounded to 256ths: one random byte decides on each element, and eight bytes are drawn at
    once, since drawing the numbers of F.dropout is slow on CPUs.
    """

    def __init__(self, p):
        super().__init__()
        self.p = round(256 * p) / 256

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        n_words = math.ceil(x.numel() / 8)
        words = torch.empty(n_words, dtype=torch.long, device=x.device).random_(-(2**63), None)
        is_kept = words.view(torch.uint8)[: x.numel()].view(x.shape) >= int(256 * self.p)
        return x * is_kept.to(x.dtype).div_(1 - self.p)


def swiglu(x):
    """(..., 2 n) -> (..., n): half of the channels, gated by the SiLU of the other half (Shazeer
    2020)."""
    gate, x = x.chunk(2, -1)
    return F.silu(gate) * x


ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "swiglu": swiglu}


class FeedForward(nn.Module):
    """(B, T, C) -> (B, T, C): two linear layers with an activation between them, applied to each
    position alone."""

    def __init__(self, n_embd, activation="gelu", dropout=0.0, bias=True):
        super().__init__()
        assert activation in ACTIVATIONS, f"activation={activation}: {', '.join(ACTIVATIONS)}"
        self.activation = ACTIVATIONS[activation]
        n_hidden = n_up = 4 * n_embd
        # two thirds of the width keep the number of weights; 8 suits the hardware
        if activation == "swiglu":
            n_hidden = round(n_hidden * 2 / 3 / 8) * 8
            n_up = 2 * n_hidden
        self.up = Linear(n_embd, n_up, bias=bias)
        self.proj = Linear(n_hidden, n_embd, bias=bias, std=0.0)
        self.drop = Dropout(dropout)

    def forward(self, x):
        return self.drop(self.proj(self.activation(self.up(x))))


class LearnedPositionalEncoding(nn.Module):
    """Add one learnt vector per position."""

    def __init__(self, n_embd, max_len):
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(max_len, n_embd))

    def forward(self, x, positions=slice(None)):
        """x: (B, T, C) at positions (T,) or (B, T), by default at all of them."""
        return x + self.positions[positions]


# 4. blocks ----------------------------------------------------------------------------------------
# Pre-norm: the residual stream itself is never normalised (Xiong et al. 2020). Dropout acts on what
# each sub-layer adds to the stream (Vaswani et al. 2017, section 5.4), not on the attention
# weights: on a CPU, drawing random numbers for those takes longer than the attention itself.


class EncoderBlock(nn.Module):
    """(B, T, C) -> (B, T, C): x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(
        self,
        n_embd,
        n_head,
        activation="gelu",
        norm="layer",
        dropout=0.0,
        bias=True,
        rotary=None,
    ):
        super().__init__()
        self.norm1 = make_norm(norm, n_embd)
        self.attn = MultiHeadAttention(n_embd, n_head, bias=bias, rotary=rotary)
        self.norm2 = make_norm(norm, n_embd)
        self.ff = FeedForward(n_embd, activation=activation, dropout=dropout, bias=bias)
        self.drop = Dropout(dropout)

    def forward(self, x, mask=None):
        x = x + self.drop(self.attn(self.norm1(x), mask=mask))
        return x + self.ff(self.norm2(x))


class DecoderBlock(EncoderBlock):
    """An encoder block with causal self-attention, followed by cross-attention to a memory if
    cross=True.

    gated: the output of the cross-attention is multiplied by the tanh of a learnt number that
    starts at 0, so the model does at first what it did without a memory (Flamingo, Alayrac et al.
    2022).
    """

    def __init__(self, n_embd, n_head, norm="layer", bias=True, cross=False, gated=False, **block):
        super().__init__(n_embd, n_head, norm=norm, bias=bias, **block)
        self.cross_attn = self.cross_gate = None
        if cross:
            self.cross_norm = make_norm(norm, n_embd)
            # Behind a gate of zero, a projection of zeros would get no gradient, nor would the
            # gate. A bias would change text without an image.
            self.cross_attn = MultiHeadAttention(
                n_embd, n_head, bias=bias and not gated, proj_std=n_embd**-0.5 if gated else 0.0
            )
            self.cross_gate = nn.Parameter(torch.zeros(1)) if gated else None

    def forward(
        self, x, memory=None, mask=None, memory_mask=None, caches=(None, None), positions=None
    ):
        """x: (B, T, C); memory: (B, Tm, C), or None to skip cross-attention; caches: of self- and
        cross-attention.

        x may have K times as many rows as the memory: then K rows in turn share a row of it.
        """
        self_cache, cross_cache = caches
        x = x + self.drop(
            self.attn(self.norm1(x), mask=mask, causal=True, cache=self_cache, positions=positions)
        )
        if self.cross_attn is not None and memory is not None:
            queries = self.cross_norm(x).view(len(memory), -1, x.size(2))  # (B, K * T, C)
            attended = self.cross_attn(queries, memory, memory_mask, cache=cross_cache).view_as(x)
            if self.cross_gate is not None:
                attended = self.cross_gate.tanh() * attended
            x = x + self.drop(attended)
        return x + self.ff(self.norm2(x))


# 5. stacks ----------------------------------------------------------------------------------------


def init_weights(model):
    """Set the initial weights of all layers of a model.

    Linear layers: normal with the standard deviation that the layer names, see Linear. Embeddings:
    0.02, as in GPT-2. Convolutions: He et al. 2015. Biases: 0.
    """
    for module in model.modules():
        if isinstance(module, Linear):
            nn.init.normal_(module.weight, std=module.std)
        elif isinstance(module, (nn.Embedding, LearnedPositionalEncoding)):
            nn.init.normal_(next(module.parameters()), std=0.02)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, (Linear, nn.Conv2d)) and module.bias is not None:
            nn.init.zeros_(module.bias)


class TransformerEncoder(nn.Module):
    """n_layer encoder blocks and a last norm: (B, T, C) -> (B, T, C). block: further arguments of
    EncoderBlock."""

    def __init__(self, n_layer, n_embd, n_head, **block):
        super().__init__()
        self.blocks = nn.ModuleList(EncoderBlock(n_embd, n_head, **block) for _ in range(n_layer))
        self.norm = LayerNorm(n_embd)

    def forward(self, x, mask=None):
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


class TransformerDecoder(nn.Module):
    """n_layer decoder blocks and a last norm. The blocks cross_layers, counted from 0, have
    cross-attention.

    block: further arguments of DecoderBlock.
    """

    def __init__(self, n_layer, n_embd, n_head, norm="layer", cross_layers=(), **block):
        super().__init__()
        assert set(cross_layers) <= set(range(n_layer)), (
            f"cross_layers={cross_layers}: there are the blocks 0 to {n_layer - 1}"
        )
        self.blocks = nn.ModuleList()
        for i in range(n_layer):
            cross = i in cross_layers
            self.blocks.append(DecoderBlock(n_embd, n_head, norm=norm, cross=cross, **block))
        self.norm = make_norm(norm, n_embd)

    def new_caches(self, max_len):
        """Return empty caches for forward(): of self- and of cross-attention, for each block."""
        return [(KVCache(max_len), KVCache()) for _ in self.blocks]

    def forward(self, x, memory=None, mask=None, memory_mask=None, caches=None, positions=None):
        """(B, T, C) -> (B, T, C). mask: in addition to the causal one, such as padding_mask(ids,
        pad_id)."""
        caches = caches or [(None, None)] * len(self.blocks)
        for block, block_caches in zip(self.blocks, caches):
            x = block(x, memory, mask, memory_mask, block_caches, positions)
        return self.norm(x)


# 6. vision ----------------------------------------------------------------------------------------


@dataclass
class ViTConfig:
    image_size: int = 64
    patch_size: int = 8
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 192
    n_classes: int = 10  # 0: no output layer
    dropout: float = 0.0
    activation: str = "gelu"
    stem: str = "residual"  # or "patch" or "instance", see PatchEmbedding
    label_smoothing: float = 0.0
    pixel_mean: tuple = (120.0, 117.0, 107.0)  # of values 0 to 255, red, green, blue
    pixel_std: tuple = (63.0, 62.0, 65.0)
    patch_dropout: float = 0.0  # share of the patches that are left out in training
    # options, see section 9
    kind: str = "vit"  # or another one of VITS
    max_tiles: int = 1
    across_layer: int = 0
    keep: tuple = ()


class ResidualConv(nn.Module):
    """(B, n, H, W) -> the same plus two 3x3 convolutions of it (ResNet, He et al. 2016), each
    normalised over groups of channels. With one group they add nothing at first."""

    def __init__(self, n, groups):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(n, n, 3, padding=1, bias=False),
            nn.GroupNorm(groups, n),
            nn.ReLU(),
            nn.Conv2d(n, n, 3, padding=1, bias=False),
            nn.GroupNorm(groups, n),
        )
        if groups == 1:
            nn.init.zeros_(self.layers[-1].weight)

    def forward(self, x):
        return x + self.layers(x)


class PatchEmbedding(nn.Module):
    """(B, 3, H, W) -> (B, N, C) with N = H / patch_size * W / patch_size, row by row.

    stem="patch": one linear map per patch (ViT, Dosovitskiy et al. 2020). stem="residual":
    convolutions halve the image and double the channels until a patch is one place (Xiao et al.
    2021), each but the first followed by a ResidualConv. Neighbouring pixels belong together, and
    with little data it pays to build that in. stem="instance": the sum of both, where every channel
    of an image is normalised alone (Ulyanov et al. 2016). That removes what all places of an image
    have in common, such as the colour of the paper, and makes shapes stand out; the linear map
    knows the colours.
    """

    def __init__(self, patch_size, n_embd, stem):
        super().__init__()
        self.patch_size = patch_size
        assert stem in ("patch", "residual", "instance"), f"stem={stem}: patch, residual, instance"
        self.linear = self.stem = None
        if stem != "residual":
            self.linear = nn.Conv2d(3, n_embd, patch_size, stride=patch_size)
        if stem == "patch":
            return
        n_halvings = patch_size.bit_length() - 1
        assert 2 <= patch_size == 2**n_halvings <= n_embd, (
            f"stem={stem}: patch_size={patch_size} is not 2, 4, 8, ... up to n_embd={n_embd}"
        )
        layers = []
        n_in = 3
        for i in reversed(range(n_halvings)):
            n_out = n_embd // 2**i  # such as 32, 64, 128
            groups = n_out if self.linear else 1
            layers += [
                nn.Conv2d(n_in, n_out, 3, stride=2, padding=1),
                nn.GroupNorm(groups, n_out),
                nn.ReLU(),
            ]
            if n_in > 3:
                layers.append(ResidualConv(n_out, groups))
            n_in = n_out
        self.stem = nn.Sequential(*layers, nn.Conv2d(n_embd, n_embd, 1))

    def forward(self, images):
        H, p = images.size(-1), self.patch_size
        assert H % p == 0, f"{H}x{H} pixels do not divide into patches of {p}x{p}"
        if not self.linear:  # on CPUs it is faster so, but norms of many groups 20 times as slow
            images = images.contiguous(memory_format=torch.channels_last)
        x = sum(part(images) for part in (self.linear, self.stem) if part)
        return x.flatten(2).transpose(1, 2)  # (B, C, H / p, W / p) -> (B, N, C)


class AttentionPooling(nn.Module):
    """(B, N, C) -> (B, C): each head averages its C / n_head channels over the tokens, weighted by
    the softmax of a learnt score (SeqPool of Compact Transformers, Hassani et al. 2021, with
    several heads)."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.score = Linear(n_embd, n_head, bias=False)  # the softmax would ignore a bias

    def forward(self, x):
        weights = self.score(x).softmax(dim=1)  # (B, N, n_head)
        heads = x.unflatten(2, (weights.size(2), -1))  # (B, N, n_head, C / n_head)
        # (B, n_head, C / n_head) -> (B, C)
        return (weights[..., None] * heads).sum(dim=1).flatten(1)


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2020). Class logits come from attention pooling of the
    patches.

    Images are pixels 0 to 255, uint8 or float, (B, 3, H, H), normalised here. Sizes other than
    config.image_size work: the positions are interpolated.
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.n_features = c.n_embd  # channels of features()
        self.register_buffer("pixel_mean", torch.tensor(c.pixel_mean).view(1, 3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(c.pixel_std).view(1, 3, 1, 1))
        self.grid = c.image_size // c.patch_size
        self.patches = PatchEmbedding(c.patch_size, c.n_embd, c.stem)
        self.position = LearnedPositionalEncoding(c.n_embd, self.grid**2)
        self.drop = Dropout(c.dropout)
        self.encoder = TransformerEncoder(
            c.n_layer, c.n_embd, c.n_head, dropout=c.dropout, activation=c.activation
        )
        self.pool = AttentionPooling(c.n_embd, c.n_head)
        self.head = OutputLayer(c.n_embd, c.n_classes) if c.n_classes else nn.Identity()
        init_weights(self)

    def embed_patches(self, images):
        """Return (B, N, C) patch embeddings with positions of (B, 3, H, W) pixels."""
        x = self.patches((images.float() - self.pixel_mean) / self.pixel_std)
        side = images.size(-1) // self.config.patch_size
        if side == self.grid:
            return self.position(x)
        table = self.position.positions.T.unflatten(1, (self.grid, -1))  # (C, grid, grid)
        table = F.interpolate(table[None], (side, side), mode="bicubic", antialias=True)
        return x + table.flatten(2).transpose(1, 2)  # (1, C, side, side) -> (1, N, C)

    def features(self, images):
        """Return (B, N, C) features of (B, 3, H, W) pixels: one vector per patch, row by row.

        In training with patch_dropout, those of a random part of the patches: faster, and harder to
        memorise (FLIP, Li et al. 2023).
        """
        x = self.embed_patches(images)
        if self.training and self.config.patch_dropout:
            B, N, C = x.shape
            n_kept = N - int(self.config.patch_dropout * N)
            # (B, n_kept, 1)
            kept = torch.rand(B, N, device=x.device).argsort(dim=1)[:, :n_kept, None]
            x = x.gather(1, kept.expand(-1, -1, C))
        return self.encoder(self.drop(x))

    def pooled(self, images):
        """Return (B, C), one vector per image."""
        return self.pool(self.features(images))

    def forward(self, images, labels=None):
        """(B, 3, H, W) pixels, labels -> (B, n_classes) logits, loss (None without labels).

        labels: (B,) classes, -1 = ignored.
        """
        logits = self.head(self.pooled(images))
        if labels is None:
            return logits, None
        smoothing = self.config.label_smoothing if self.training else 0.0
        loss = F.cross_entropy(
            logits.float(), labels, ignore_index=IGNORE_INDEX, label_smoothing=smoothing
        )
        return logits, loss


# 7. language --------------------------------------------------------------------------------------


@dataclass
class GPTConfig:
    vocab_size: int = 4096
    block_size: int = 128  # the longest sequence, image tokens included
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0
    activation: str = "gelu"
    norm: str = "rms"
    positions: str = "rotary"  # or "learned", as GPT-2 has
    bias: bool = False
    cross_layers: tuple = ()  # blocks that attend to a memory, such as image tokens
    gated: bool = True  # through gates that start at 0, which leave a trained GPT as it was
    # options, see section 9
    n_experts: int = 0  # above 0: MixtureOfExperts
    experts_per_token: int = 2


def sample_next(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Return (B,) ids drawn from (B, vocab_size) logits. temperature 0: the likeliest. top_k,
    top_p: see keep_likely().
    """
    if not temperature:
        return logits.argmax(-1)
    logits = keep_likely(logits.float() / temperature, top_k, top_p)
    # needs one random number per row, torch.multinomial one per id
    cumulative = logits.softmax(-1).cumsum(-1)
    random = torch.rand(len(logits), 1, device=logits.device, generator=generator)
    drawn = random * (1 - 1e-6) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, drawn, right=True).squeeze(1)  # the first that is greater


class GPT(nn.Module):
    """A decoder-only language model (Radford et al. 2018, 2019). The output layer shares its
    weights with the embedding."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embedding = nn.Embedding(c.vocab_size, c.n_embd)
        self.position = rotary = None
        if c.positions == "learned":
            self.position = LearnedPositionalEncoding(c.n_embd, c.block_size)
        else:
            rotary = RotaryEmbedding(c.n_embd // c.n_head, c.block_size)
        self.drop = Dropout(c.dropout)
        self.decoder = TransformerDecoder(
            c.n_layer,
            c.n_embd,
            c.n_head,
            c.norm,
            c.cross_layers,
            gated=c.gated,
            activation=c.activation,
            dropout=c.dropout,
            bias=c.bias,
            rotary=rotary,
        )
        if c.n_experts:
            use_experts(self)
        self.head = OutputLayer(c.n_embd, c.vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        init_weights(self)

    def hidden(self, x, caches=None, memory=None, memory_mask=None, mask=None, positions=None):
        """(B, T, C) embeddings -> (B, T, C), ready for self.head.

        caches: from decoder.new_caches(). memory: (B, Tm, C) for blocks with cross-attention, where
        memory_mask (B, 1, T, Tm) allows it; it may have fewer rows, see DecoderBlock. mask: (B, 1,
        T, T), in addition to the causal one, and positions: (B, T), for several texts in one row,
        see MLLM.
        """
        if positions is None:
            start = caches[0][0].length if caches else 0
            end = start + x.size(1)
            assert end <= self.config.block_size, (
                f"{end} positions do not fit block_size={self.config.block_size}"
            )
            positions = torch.arange(start, end, device=x.device)
        if self.position is not None:
            x = self.position(x, positions)
        return self.decoder(self.drop(x), memory, mask, memory_mask, caches, positions)

    def next_logits(self, x, caches, memory, memory_mask):
        """Return the logits (B, vocab_size) of the token after embeddings x (B, T, C); see
        hidden()."""
        return self.head(self.hidden(x, caches, memory, memory_mask)[:, -1])

    def target_logits(self, x, targets):
        """Return the logits only where there is a target: (n, vocab_size) of (B, T, C) from
        hidden(), and their n indices in targets.flatten(), (B, T)."""
        where = (targets.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
        # CPUs prepare a matrix product anew for every new size
        padded = F.pad(where, (0, -len(where) % 256))
        return self.head(x.flatten(0, 1)[padded])[: len(where)].float(), where

    def forward(self, ids, targets=None):
        """(B, T) ids, (B, T) targets (-1 = ignored) -> (B, T, vocab_size) logits, loss (None
        without targets)."""
        logits = self.head(self.hidden(self.embedding(ids)))
        if targets is None:
            return logits, None
        loss = F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX
        )
        return logits, loss + balance_loss(self)

    def read_prompt(self, x, copies, memory=None, memory_mask=None):
        """Read the embeddings (B, T, C) of each prompt once, for several continuations of it.

        memory, memory_mask: see hidden(). Returns the logits of the next token (B * copies,
        vocab_size), caches with as many rows, and the mask of the memory for new tokens, which see
        what the last token of the prompt sees.
        """
        caches = self.decoder.new_caches(self.config.block_size)
        logits = self.next_logits(x, caches, memory, memory_mask)
        rows = torch.arange(len(x), device=x.device).repeat_interleave(copies)
        for self_cache, _ in caches:  # the copies share the memory
            self_cache.select(rows)
        last_mask = None if memory_mask is None else memory_mask[:, :, -1:]
        return logits[rows], caches, last_mask

    @torch.no_grad()
    def stream(self, ids, max_new_tokens, eos_id=-1, num_samples=1, embedded=None, **sampling):
        """Yield the next ids (B * num_samples,), one position at a time: num_samples continuations
        of each prompt ids (B, T). Rows are filled with eos_id after their end (-1: none ends); it
        stops when all have ended.

        embedded: the prompts' embeddings, memory and its mask, as of MLLM.embed(). sampling:
        further arguments of sample_next(). When the cache is full, the newer half of block_size is
        read again into an empty one, which bounds the cost of a token; the model forgets what came
        before.
        """
        block_size = self.config.block_size
        columns = list(ids.repeat_interleave(num_samples, dim=0).unbind(dim=1))
        ended = torch.zeros(len(columns[0]), dtype=torch.bool, device=ids.device)
        x, memory, memory_mask = embedded or (self.embedding(ids[:, -block_size:]), None, None)
        with evaluating(self):
            logits, caches, memory_mask = self.read_prompt(x, num_samples, memory, memory_mask)
            for i in range(max_new_tokens):
                token = sample_next(logits, **sampling).masked_fill(ended, eos_id)
                ended |= token == eos_id
                yield token
                if ended.all() or i == max_new_tokens - 1:
                    return
                columns.append(token)
                new = columns[-1:]
                if caches[0][0].length == block_size:
                    new = columns[-max(1, block_size // 2) :]
                    for self_cache, _ in caches:
                        self_cache.length = 0
                x = self.embedding(torch.stack(new, dim=1))
                logits = self.next_logits(x, caches, memory, memory_mask)

    def generate(self, ids, max_new_tokens, **options):
        """(B, T) ids -> (B, T + n) ids, n <= max_new_tokens: the prompt and its continuation.
        options: see stream(), such as temperature=0.0 (greedy), top_k, eos_id, generator."""
        tokens = self.stream(ids, max_new_tokens, **options)
        return torch.cat((ids, *(token[:, None] for token in tokens)), dim=1)


# 8. multimodal ------------------------------------------------------------------------------------


class LinearConnector(nn.Module):
    """Vision to language channels by one matrix (LLaVA, Liu et al. 2023): (B, N, n_vision) -> (B,
    N, n_language)."""

    needs_grid = False  # whether it takes all patches of an image, in order

    def __init__(self, n_vision, n_language, bias=False):
        super().__init__()
        self.up = Linear(n_vision, n_language, bias=bias)

    @staticmethod
    def n_tokens(side):
        """Return how many image tokens side x side patches become."""
        return side * side

    def forward(self, x):
        return self.up(x)


class MLPConnector(LinearConnector):
    """The same by two layers (LLaVA-1.5, Liu et al. 2024)."""

    def __init__(self, n_vision, n_language):
        super().__init__(n_vision, n_language, bias=True)
        self.down = Linear(n_language, n_language)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


CONNECTORS = {"linear": LinearConnector, "mlp": MLPConnector}  # further ones: see section 9


@dataclass
class MLLMConfig:
    vit: ViTConfig = field(default_factory=ViTConfig)
    # with cross_layers image tokens are attended, not inserted
    gpt: GPTConfig = field(default_factory=GPTConfig)
    connector: str = "mlp"  # or another one of CONNECTORS
    max_images: int = 1  # that are adjacent in a prompt; above 1 see ImageComparison
    bos_id: int = BPETokenizer.bos_id
    eos_id: int = BPETokenizer.eos_id

    @classmethod
    def from_dict(cls, d):
        """Return the config of dataclasses.asdict(config)."""
        return cls(**(d | {"vit": ViTConfig(**d["vit"]), "gpt": GPTConfig(**d["gpt"])}))

    def n_placeholders(self, image_size):
        """Return how many ids represent an image: one per image token, or a single marker with
        cross-attention."""
        assert self.connector in CONNECTORS, f"connector={self.connector}: {', '.join(CONNECTORS)}"
        side = image_size // self.vit.patch_size
        return 1 if self.gpt.cross_layers else CONNECTORS[self.connector].n_tokens(side)


class MLLM(nn.Module):
    """ViT -> connector -> GPT.

    Token ids (B, T) hold placeholders, IMAGE_ID, where images belong; the images of all rows are
    given in that order. A row may have any number of images; without any, the model is the GPT
    alone. Two fusions:
    - prefix: each placeholder is replaced by one image token, which the GPT reads like a word
      (LLaVA, Liu et al. 2023).
    - cross (config.gpt.cross_layers): one placeholder, a marker, represents a whole image. The
      image tokens are a memory for the GPT's cross-attention (Flamingo, Alayrac et al. 2022).

    images: (M, 3, H, W) pixels, or their (M, N, C) image tokens from encode(), to reuse these.

    Several samples about the same images may share a row, after the images: segments (B, T) is 0
    for the images, 1 for the first sample, 2 for the second, ..., -1 for padding. A sample sees the
    images and itself.
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        assert (
            not c.vit.patch_dropout or c.gpt.cross_layers and not CONNECTORS[c.connector].needs_grid
        ), "patch_dropout needs fusion=cross and a connector that does not need all patches"
        self.vit = VITS[c.vit.kind](c.vit)
        # features of patches are needed here, not classes
        self.vit.pool = self.vit.head = nn.Identity()
        self.connector = CONNECTORS[c.connector](self.vit.n_features, c.gpt.n_embd)
        self.compare = ImageComparison(c.max_images, c.gpt.n_embd) if c.max_images > 1 else None
        self.marker = nn.Embedding(1, c.gpt.n_embd) if c.gpt.cross_layers else None
        init_weights(self)
        self.gpt = GPT(c.gpt)

    def encode(self, images):
        """Return (M, N, C) image tokens of (M, 3, H, W) pixels; C are the channels of the GPT."""
        return self.connect(self.vit.features(images))

    def connect(self, features):
        """Return (M, N, C) image tokens of the features of the ViT."""
        return self.connector(features)

    def tokens_of(self, images):
        return images if torch.is_tensor(images) and images.dim() == 3 else self.encode(images)

    def embed(self, tokens, ids):
        """Return the embeddings (B, T, C) of ids (B, T) and image tokens (M, N, C); and the memory
        and its mask for GPT.hidden(), which are None without cross-attention."""
        is_image = ids == IMAGE_ID  # (B, T)
        n_expected = len(tokens) * (1 if self.marker is not None else tokens.size(1))
        n_placeholders = is_image.sum()
        assert n_placeholders == n_expected, (
            f"{n_placeholders} placeholders; the images need {n_expected}"
        )
        x = self.gpt.embedding(ids.masked_fill(is_image, 0))  # (B, T, C)
        if len(tokens) == 0:
            return x, None, None
        if self.compare is not None:
            tokens = self.compare(tokens, is_image)
        if self.marker is None:
            return self.embed_prefix(x, tokens, is_image), None, None
        return self.embed_cross(x, tokens, is_image)

    def embed_prefix(self, x, tokens, is_image):
        """Put image tokens in the places of their placeholders.

        For example, with two images of two tokens, a1 a2 and b1 b2:

            ids      IMG IMG the dog IMG IMG a   cat
            becomes  a1  a2  the dog b1  b2  a   cat
        """
        return x.masked_scatter(is_image[:, :, None], tokens.to(x.dtype))

    def embed_cross(self, x, tokens, is_image):
        """Put the marker in the places of the placeholders, and all image tokens of a row into its
        memory. Return x (B, T, C), the memory (B, K * N, C) with K images in the row that has the
        most, and its mask (B, 1, T, K * N), None if all may be seen.

        Rows with fewer images are padded with zeros, which are not seen. Each token attends to the
        most recent group of adjacent images. For example, with images a, b and c:

            ids      IMG IMG the dog IMG a   cat .
            sees     a   ab  ab  ab  c   c   c   c
            first    0   0   0   0   2   2   2   2     the first image of the most recent group
            n_so_far 1   2   2   2   3   3   3   3     images up to here
        """
        B = len(x)
        M, N, C = tokens.shape
        x = torch.where(is_image[:, :, None], self.marker.weight, x)
        n_so_far, first = group_images(is_image)  # (B, T)
        K = int(n_so_far[:, -1].max())  # images in the row with the most
        row, _ = is_image.nonzero(as_tuple=True)  # (M,), of each image
        memory = tokens.new_zeros(B, K, N, C)
        memory[row, n_so_far[is_image] - 1] = tokens
        image = torch.arange(K, device=tokens.device)
        mask = (first[:, :, None] <= image) & (image < n_so_far[:, :, None])  # (B, T, K)
        mask = None if mask.all() else mask.repeat_interleave(N, dim=2)[:, None]  # (B, 1, T, K * N)
        return x, memory.flatten(1, 2), mask

    def forward(self, images, ids, targets=None, label_smoothing=0.0, segments=None):
        """(B, T) ids -> (B, T, vocab_size) logits, None.

        With targets (B, T), -1 = ignored: None, loss, which includes balance_loss(). The output
        layer then runs only where there is a target. segments (B, T): separate_samples() makes a
        mask and positions of them; None: each row is one sample.
        """
        x, memory, memory_mask = self.embed(self.tokens_of(images), ids)
        mask = positions = None
        if segments is not None:
            mask, positions = separate_samples(segments)
        x = self.gpt.hidden(x, None, memory, memory_mask, mask, positions)
        if targets is None:
            return self.gpt.head(x), None
        logits, where = self.gpt.target_logits(x, targets)
        loss = F.cross_entropy(logits, targets.flatten()[where], label_smoothing=label_smoothing)
        return None, loss + balance_loss(self)

    def log_probs(self, images, prompts, answers, mask=None, temperature=1.0):
        """Return the (B * K, T) log-probabilities of the tokens of answers (B * K, T), K in turn to
        each of the prompts (B, Tp), given what stands before them; 0 where mask (B * K, T) is
        False. Probabilities are the softmax of logits / temperature. The images of each prompt are
        given once."""
        x, memory, memory_mask = self.embed(self.tokens_of(images), prompts)
        K = len(answers) // len(prompts)
        written = self.gpt.embedding(answers[:, :-1])
        x = torch.cat((x.repeat_interleave(K, dim=0), written), dim=1)  # (B * K, Tp + T - 1, C)
        if memory_mask is not None:  # answers see what the last token of the prompt sees
            seen = memory_mask[:, :, -1:].expand(-1, -1, written.size(1), -1)
            memory_mask = torch.cat((memory_mask, seen), dim=2).repeat(1, 1, K, 1)
        x = self.gpt.hidden(x, None, memory, memory_mask)[:, prompts.size(1) - 1 :]  # (B * K, T, C)
        targets = answers if mask is None else answers.masked_fill(~mask, IGNORE_INDEX)
        logits, where = self.gpt.target_logits(x, targets)
        # (n,)
        log_p = -F.cross_entropy(logits / temperature, targets.flatten()[where], reduction="none")
        return log_p.new_zeros(targets.numel()).index_copy(0, where, log_p).view_as(targets)

    @torch.no_grad()
    def generate(
        self,
        images,
        ids,
        max_new_tokens,
        temperature=0.0,
        beams=1,
        length_penalty=1.0,
        num_captions=1,
        **sampling,
    ):
        """Return what the model writes after the prompts ids (B, T): (B * num_captions, n) new ids,
        prompt by prompt, each row filled with eos after its end.

        Greedy, unless temperature > 0 (samples; sampling: see sample_next()) or beams > 1 (the best
        num_captions texts, see beam_search()).
        """
        c = self.config
        with evaluating(self):
            tokens = self.tokens_of(images)
            room = c.gpt.block_size - ids.size(1) + 1  # the last new token is not read
            assert room > 0, f"{ids.size(1)} tokens of prompt exceed {c.gpt.block_size} of context"
            n = min(max_new_tokens, room)
            embedded = self.embed(tokens, ids)
            if beams > 1 and not temperature:
                texts, _ = beam_search(self.gpt, embedded, n, beams, c.eos_id, length_penalty)
                return texts[:, :num_captions].flatten(0, 1)
            new = self.gpt.stream(
                ids, n, c.eos_id, num_captions, embedded, temperature=temperature, **sampling
            )
            return torch.stack(list(new), dim=1)


def group_images(is_image):
    """Return for each position of (B, T) placeholders how many there are up to here, this one
    included, and the number of the first one of the most recent group of adjacent placeholders,
    counted from 0 in the row (0 before any); both (B, T). See MLLM.embed_cross() for an example."""
    n_so_far = is_image.cumsum(dim=1)
    begins_group = is_image & ~F.pad(is_image, (1, -1))
    first = torch.where(begins_group, n_so_far - 1, 0).cummax(dim=1).values
    return n_so_far, first


def separate_samples(segments):
    """Return the mask (B, 1, T, T) and the positions (B, T) with which the samples of a row do not
    notice each other.

    The positions of each sample continue those of the images. For example, with two images of one
    token:

        segments   0 0 1 1 1 2 2 -1
        positions  0 1 2 3 4 2 3  0
    """
    same = segments[:, :, None] == segments[:, None, :]  # (B, T, T)
    is_shared = segments == 0
    mask = (same | is_shared[:, None, :])[:, None]
    # (B, T), earlier tokens of the same sample, or of the images
    n_before = same.tril(-1).sum(dim=2)
    n_shared = is_shared.sum(dim=1, keepdim=True)  # (B, 1)
    positions = (n_before + n_shared * (segments > 0)) * (segments >= 0)
    return mask, positions


@dataclass
class CLIPConfig:
    vit: ViTConfig = field(default_factory=lambda: ViTConfig(n_classes=0))
    vocab_size: int = 4096
    max_tokens: int = 32  # the longest text, with bos and eos
    n_layer: int = 2  # of the text encoder
    n_head: int = 4
    n_embd: int = 128
    n_shared: int = 128  # dimensions of the space that images and texts share
    dropout: float = 0.0
    pad_id: int = BPETokenizer.pad_id

    @classmethod
    def from_dict(cls, d):
        """Return the config of dataclasses.asdict(config)."""
        return cls(**(d | {"vit": ViTConfig(**d["vit"])}))


class CLIP(nn.Module):
    """A ViT and a text encoder that map a photo and its caption to nearby vectors of one space
    (Radford et al. 2021).

    Unlike the paper's, the text encoder reads in both directions, and a text's vector is the mean
    of its tokens. words_head predicts from a photo alone the words of its captions (Joulin et al.
    2016), which say more about a photo than one caption that has to be picked out.
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.vit = ViT(c.vit)
        self.embedding = nn.Embedding(c.vocab_size, c.n_embd)
        self.position = LearnedPositionalEncoding(c.n_embd, c.max_tokens)
        self.drop = Dropout(c.dropout)
        self.encoder = TransformerEncoder(c.n_layer, c.n_embd, c.n_head, dropout=c.dropout)
        self.text_head = OutputLayer(c.n_embd, c.n_shared, bias=False)
        self.image_head = OutputLayer(c.vit.n_embd, c.n_shared)
        self.words_head = OutputLayer(c.vit.n_embd, c.vocab_size)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # of 1 / temperature
        init_weights(self)

    def embed_pooled(self, pooled):
        """(B, C) from vit.pooled(images) -> (B, n_shared) unit vectors"""
        return F.normalize(self.image_head(pooled).float(), dim=-1)

    def embed_images(self, images):
        """(B, 3, H, W) pixels -> (B, n_shared) unit vectors"""
        return self.embed_pooled(self.vit.pooled(images))

    def embed_texts(self, ids):
        """(B, max_tokens) ids, padded with pad_id -> (B, n_shared) unit vectors"""
        mask = padding_mask(ids, self.config.pad_id)  # (B, 1, 1, T)
        x = self.encoder(self.drop(self.position(self.embedding(ids))), mask)
        is_token = mask[:, 0].transpose(1, 2)  # (B, T, 1)
        mean = (x * is_token).sum(dim=1) / is_token.sum(dim=1)
        return F.normalize(self.text_head(mean).float(), dim=-1)

    def logits(self, images, texts):
        """(n, d) and (m, d) unit vectors -> (n, m): their cosines over the temperature, which is at
        least 0.01"""
        return self.log_scale.exp().clamp(max=100.0) * images @ texts.T

    def loss(self, images, texts):
        """Return the contrastive loss of (B, d) unit vectors of photos and their texts: the mean of
        the cross-entropies of finding each photo's text among all texts and each text's photo among
        all photos."""
        logits = self.logits(images, texts)  # (B, B)
        pairs = torch.arange(len(images), device=images.device)
        return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2


# 9. options (skip on a first reading) -------------------------------------------------------------


def keep_likely(logits, top_k, top_p):
    """Set all but the likeliest of (B, vocab_size) logits to -inf.

    top_k: keep the k likeliest tokens; 0: all. top_p: keep the fewest tokens that together have
    this probability (nucleus sampling, Holtzman et al. 2020); 1: all.
    """
    if top_k:
        kth_best = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth_best, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        outside = probs.cumsum(-1) - probs >= top_p  # likelier tokens have that probability already
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -math.inf)
    return logits


@torch.no_grad()
def beam_search(gpt, embedded, max_new_tokens, beams, eos_id, length_penalty=1.0):
    """Return the best continuations of prompts that a beam search finds: (B, beams, n) ids, n <=
    max_new_tokens, best first and filled with eos_id after their end; and their (B, beams) scores.
    There are fewer than beams if there are fewer texts.

    The score is log p / length ** length_penalty, the end counted in the length (0: log p itself,
    which prefers short texts). At each position the best continuations are kept, ended ones among
    them, as many as there are beams. The search stops when all that are kept have ended. embedded:
    the prompts' embeddings (B, T, C), memory and its mask, as of MLLM.embed().
    """
    x, memory, memory_mask = embedded
    B = len(x)
    device = x.device
    first_row = torch.arange(B, device=device)[:, None] * beams  # (B, 1), of each prompt's beams
    total = torch.full((B, beams), -math.inf, device=device)  # log p; at first there is one beam
    total[:, 0] = 0.0
    length = torch.zeros(B, beams, dtype=torch.long, device=device)
    ended = torch.zeros(B, beams, dtype=torch.bool, device=device)
    tokens = torch.empty(B, beams, 0, dtype=torch.long, device=device)
    with evaluating(gpt):
        logits, caches, memory_mask = gpt.read_prompt(x, beams, memory, memory_mask)
        while True:
            log_p = logits.float().log_softmax(-1).view(B, beams, -1)
            log_p[ended] = -math.inf
            log_p[:, :, eos_id][ended] = 0.0  # ended texts stay as they are
            candidates = total[:, :, None] + log_p  # (B, beams, vocab_size)
            new_length = length + ~ended
            candidate_scores = candidates / (new_length[:, :, None] ** length_penalty)
            scores, best = candidate_scores.flatten(1).topk(beams)  # (B, beams)
            beam = best // log_p.size(2)
            token = best % log_p.size(2)
            total = candidates.flatten(1).gather(1, best)
            length = new_length.gather(1, beam)
            ended = ended.gather(1, beam) | (token == eos_id)
            kept = tokens.gather(1, beam[:, :, None].expand_as(tokens))
            tokens = torch.cat((kept, token[:, :, None]), dim=2)
            if tokens.size(2) >= max_new_tokens or ended.all():
                is_text = scores[0].isfinite()
                return tokens[:, is_text], scores[:, is_text]
            for self_cache, _ in caches:  # all beams of a prompt share the memory
                self_cache.select((first_row + beam).flatten())
            x = gpt.embedding(token.view(-1, 1))  # (B * beams, 1, C)
            logits = gpt.next_logits(x, caches, memory, memory_mask)


class MixtureOfExperts(nn.Module):
    """(B, T, C) -> (B, T, C): feed-forward layers, the experts, of which each token passes through
    the k that a router prefers (Shazeer et al. 2017). Their outputs are weighted by the router's
    probabilities, which are normalised for k > 1; for k = 1 the router would then get no gradient.

    In training, balance is the load-balancing loss of the Switch Transformer (Fedus et al. 2022,
    equation 4) for the last forward pass: 1 if the tokens are spread evenly.
    """

    def __init__(self, n_embd, n_experts, k, **feed_forward):
        super().__init__()
        assert 1 <= k <= n_experts, (
            f"experts_per_token={k} is not between 1 and n_experts={n_experts}"
        )
        self.k = k
        self.router = Linear(n_embd, n_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(n_embd, **feed_forward) for _ in range(n_experts))

    def forward(self, x):
        tokens = x.flatten(0, 1)  # (B * T, C)
        n_experts = len(self.experts)
        p = self.router(tokens).float().softmax(-1)  # (B * T, n_experts)
        weights, chosen = p.topk(self.k, dim=-1)  # (B * T, k)
        if self.k > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            # tokens that chose it, and as which of their k
            rows, rank = (chosen == i).nonzero(as_tuple=True)
            weighted = weights[rows, rank, None] * expert(tokens[rows])
            out = out.index_add(0, rows, weighted.to(out.dtype))
        self.balance = 0.0
        if self.training:
            # share of the choices that fell on each expert
            load = chosen.flatten().bincount(minlength=n_experts) / chosen.numel()
            self.balance = n_experts * (load * p.mean(dim=0)).sum()
        return out.view_as(x)


def use_experts(gpt):
    """Replace the feed-forward layers of a GPT by mixtures of experts."""
    c = gpt.config
    for block in gpt.decoder.blocks:
        block.ff = MixtureOfExperts(
            c.n_embd,
            c.n_experts,
            c.experts_per_token,
            activation=c.activation,
            dropout=c.dropout,
            bias=c.bias,
        )


def balance_loss(model, weight=0.01):
    """Return the load-balancing loss of the last forward pass, its mean over all mixtures of
    experts. It is 0 in evaluation, and without experts."""
    losses = [module.balance for module in model.modules() if isinstance(module, MixtureOfExperts)]
    return weight * sum(losses) / max(1, len(losses))


def extend_context(gpt, block_size, factor, alpha=0.5, beta=2.0):
    """Let a trained GPT with rotary positions read block_size tokens at once, without further
    training (YaRN, Peng et al. 2023).

    factor: the new context over that of the training; 1 leaves the frequencies as they are. A pair
    of channels that turned beta times or more in the context of the training keeps its frequency;
    one that turned alpha times or less is divided by the factor, so that it meets no new angle; a
    ramp in between. The paper has alpha = 1 and beta = 32 for Llama, and says that they depend on
    the model; with contexts of hundreds, 0.5 and 2 are better. Queries and keys are scaled by 0.1
    ln(factor) + 1: a sharper softmax over more keys.
    """
    c = gpt.config
    assert c.positions == "rotary", "a GPT with learned positions cannot read a longer context"
    head_dim = c.n_embd // c.n_head
    turns = c.block_size * frequencies(head_dim) / (2 * math.pi)
    kept = ((turns - alpha) / (beta - alpha)).clamp(0, 1)
    stretched = frequencies(head_dim) * (kept + (1 - kept) / factor)
    rotary = RotaryEmbedding(head_dim, block_size)
    rotary.set_tables(stretched, block_size, scale=0.1 * math.log(factor) + 1)
    for block in gpt.decoder.blocks:
        block.attn.rotary = rotary
    c.block_size = block_size


class PixelShuffleConnector(nn.Module):
    """2x2 neighbouring patches become one token with four times the channels, then two layers
    (InternVL 1.5, Chen et al. 2024): a quarter of the image tokens."""

    needs_grid = True

    def __init__(self, n_vision, n_language):
        super().__init__()
        self.mlp = MLPConnector(4 * n_vision, n_language)

    @staticmethod
    def n_tokens(side):
        return (side // 2) ** 2

    def forward(self, x):
        """(B, N, n_vision), a square grid with an even side -> (B, N / 4, n_language)"""
        B, N, C = x.shape
        half = math.isqrt(N) // 2
        assert 4 * half**2 == N, f"pixel_shuffle folds a square grid of even side, not {N} patches"
        x = x.view(B, half, 2, half, 2, C).transpose(2, 3)  # (B, half, half, 2, 2, C)
        return self.mlp(x.reshape(B, half * half, 4 * C))


class CAbstractor(nn.Module):
    """Convolutions, average pooling to a grid of 0.4 times the side, such as 3x3 of 8x8 patches,
    convolutions again (Honeybee, Cha et al. 2024): a sixth of the image tokens."""

    needs_grid = True

    def __init__(self, n_vision, n_language):
        super().__init__()
        self.before = ResidualConv(n_vision, 1)
        self.up = nn.Conv2d(n_vision, n_language, 1)
        self.after = ResidualConv(n_language, 1)
        self.norm = LayerNorm(n_language)
        self.down = Linear(n_language, n_language)

    @staticmethod
    def n_tokens(side):
        return round(0.4 * side) ** 2

    def forward(self, x):
        """(B, N, n_vision), a square grid -> (B, n_tokens, n_language)"""
        side = math.isqrt(x.size(1))
        x = x.transpose(1, 2).unflatten(2, (side, side))  # (B, n_vision, side, side)
        x = F.gelu(self.up(self.before(x)))
        x = F.adaptive_avg_pool2d(x, round(0.4 * side))
        x = self.after(x).flatten(2).transpose(1, 2)  # (B, n_tokens, n_language)
        return self.down(self.norm(x))


class Resampler(LinearConnector):
    """16 learnt queries attend to the patches, however many there are; each becomes an image token
    (Flamingo, Alayrac et al. 2022; Qwen-VL, Bai et al. 2023)."""

    has_places = False  # an image token stands for no part of the image

    def __init__(self, n_vision, n_language):
        super().__init__(n_vision, n_language)
        self.queries = LearnedPositionalEncoding(n_language, 16)
        self.norm = LayerNorm(n_language)
        self.attn = MultiHeadAttention(n_language, 4, proj_std=n_language**-0.5)

    @staticmethod
    def n_tokens(side):
        return 16

    def forward(self, x):
        queries = self.norm(self.queries.positions).expand(len(x), -1, -1)  # (B, 16, n_language)
        return self.attn(queries, self.up(x))


CONNECTORS |= {
    "pixel_shuffle": PixelShuffleConnector,
    "abstractor": CAbstractor,
    "resampler": Resampler,
}


class ImageComparison(nn.Module):
    """Tell each of several adjacent images its place, and at each of its tokens what differs from
    the image before it (as between the frames of a video, Wang et al. 2021): comparing images is
    hard to learn otherwise."""

    def __init__(self, max_images, n_embd):
        super().__init__()
        self.order = nn.Embedding(max_images, n_embd)
        self.change = Linear(n_embd, n_embd, bias=False)

    def forward(self, tokens, is_image):
        """(M, N, C) image tokens, (B, T) placeholders -> (M, N, C)"""
        n = is_image.sum() // len(tokens)  # placeholders per image
        n_so_far, first = group_images(is_image)
        place = (n_so_far - 1 - first)[is_image][::n] // n  # (M,)
        is_later = (place > 0)[:, None, None]
        change = (tokens - tokens.roll(1, dims=0)) * is_later
        return tokens + self.order(place)[:, None] + self.change(change)


def make_mllm(config):
    """Return the MLLM, or the option of it, that an MLLMConfig describes."""
    return TiledMLLM(config) if config.vit.kind == "tiles" else MLLM(config)


# (rows, columns) of tiles
LAYOUTS = [
    (rows, columns) for rows in range(1, 5) for columns in range(1, 5) if rows * columns <= 4
]


class TileEmbedding(nn.Module):
    """Add to the N patches of each tile, (M, T, N, C), a learnt vector for its place in the layout
    of its image, times the tanh of a learnt number that starts at 0 (Llama 3.2 Vision, Meta 2024).
    layouts: (M,)"""

    def __init__(self, n_embd):
        super().__init__()
        self.vectors = nn.Embedding(len(LAYOUTS), 4 * n_embd)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x, layouts):
        M, T, N, C = x.shape
        vectors = self.vectors(layouts).view(M, 4, 1, C)[:, :T]
        return x + self.gate.tanh() * vectors


class GatedEncoderBlock(EncoderBlock):
    """An encoder block whose two parts are multiplied by the tanh of learnt numbers that start at
    0, so it changes nothing at first (Llama 3.2 Vision)."""

    def __init__(self, n_embd, n_head, **block):
        super().__init__(n_embd, n_head, **block)
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ff_gate = nn.Parameter(torch.zeros(1))
        # behind a gate of zero, weights of zero would get no gradient
        self.attn.proj.std = self.ff.proj.std = n_embd**-0.5

    def forward(self, x, mask=None):
        x = x + self.attn_gate.tanh() * self.drop(self.attn(self.norm1(x), mask=mask))
        return x + self.ff_gate.tanh() * self.ff(self.norm2(x))


class TiledViT(ViT):
    """A ViT for images on up to max_tiles tiles (Llama 3.2 Vision): its blocks see each tile by
    itself, then across_layer further, gated blocks see all tiles of an image. The outputs of the
    blocks named in keep are features too."""

    def __init__(self, config):
        super().__init__(config)
        self.n_features = config.n_embd * (1 + len(config.keep))
        self.tiles_before = TileEmbedding(config.n_embd)
        self.tiles_after = TileEmbedding(config.n_embd)
        self.across = nn.ModuleList(
            GatedEncoderBlock(config.n_embd, config.n_head, dropout=config.dropout)
            for _ in range(config.across_layer)
        )
        init_weights(self)

    def features(self, images):
        """Return (M, T * N, n_features), zeros in the tiles that a layout lacks, of
        config.tools.data.TiledImages: pixels (M, T, 3, H, W) and layouts (M,)."""
        M, T = images.pixels.shape[:2]
        x = self.embed_patches(images.pixels.flatten(0, 1))  # (M * T, N, C)
        x = x.unflatten(0, (M, T))
        x = self.tiles_before(x, images.layouts).flatten(0, 1)
        x = self.drop(x)
        kept = []
        for i, block in enumerate(self.encoder.blocks):
            x = block(x)
            if i in self.config.keep:
                kept.append(x.unflatten(0, (M, T)).flatten(1, 2))  # (M, T * N, C)
        x = self.encoder.norm(x).unflatten(0, (M, T))
        N = x.size(2)
        x = self.tiles_after(x, images.layouts).flatten(1, 2)
        n_tiles = torch.tensor(LAYOUTS, device=x.device).prod(dim=1)[images.layouts]  # (M,)
        exists = torch.arange(T * N, device=x.device) < N * n_tiles[:, None]  # (M, T * N)
        for block in self.across:
            x = block(x, exists[:, None, None])
        return torch.cat((x, *kept), dim=-1) * exists[:, :, None]


VITS = {"vit": ViT, "tiles": TiledViT}  # by ViTConfig.kind; pretrained.py adds CLIP's


class TiledMLLM(MLLM):
    """An MLLM with cross-attention for TiledImages. The tokens of missing tiles are zeros, and are
    not attended."""

    def connect(self, features):
        """Return (M, T * N, C) image tokens of (M, T * N, n_features) features."""
        # (M * T, N, n_features)
        tiles = features.unflatten(1, (self.config.vit.max_tiles, -1)).flatten(0, 1)
        exists = tiles.any(dim=2).any(dim=1)[:, None, None]
        tokens = self.connector(tiles) * exists
        return tokens.unflatten(0, (-1, self.config.vit.max_tiles)).flatten(1, 2)

    def embed_cross(self, x, tokens, is_image):
        x, memory, mask = super().embed_cross(x, tokens, is_image)
        exists = memory.any(dim=-1)[:, None, None]
        exists = exists.expand(-1, -1, x.size(1), -1)  # (B, 1, T, Tm)
        if mask is not None:
            exists = exists & mask
        return x, memory, exists


class SinusoidalPositionalEncoding(nn.Module):
    """Add sines and cosines of geometrically spaced frequencies (Vaswani et al. 2017, section
    3.5): channels 0 and 1 are the sine and the cosine of the first one, and so on."""

    def forward(self, x):
        """x: (B, T, C) at positions 0, 1, 2, ..."""
        B, T, C = x.shape
        angles = torch.outer(torch.arange(T).float(), frequencies(C))  # (T, C / 2)
        table = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)  # (T, C)
        return x + table.to(x)


class Transformer(nn.Module):
    """The encoder-decoder of Vaswani et al. 2017, with pre-norm. Source, target and output share
    one embedding (section 3.4)."""

    def __init__(
        self,
        vocab_size,
        n_layer=6,
        n_embd=512,
        n_head=8,
        pad_id=0,
        dropout=0.1,
    ):
        super().__init__()
        self.pad_id = pad_id
        self.embedding = nn.Embedding(vocab_size, n_embd)
        self.position = SinusoidalPositionalEncoding()
        self.drop = Dropout(dropout)
        block = {"activation": "relu", "dropout": dropout}
        self.encoder = TransformerEncoder(n_layer, n_embd, n_head, **block)
        self.decoder = TransformerDecoder(
            n_layer, n_embd, n_head, cross_layers=range(n_layer), **block
        )
        init_weights(self)
        # embed() multiplies by sqrt(n_embd)
        nn.init.normal_(self.embedding.weight, std=n_embd**-0.5)

    def embed(self, ids):
        x = self.embedding(ids)
        return self.drop(self.position(x * math.sqrt(x.size(-1))))

    def forward(self, source, target):
        """(B, Ts), (B, Tt) ids -> (B, Tt, vocab_size): at each position the logits of the next
        target token."""
        source_mask = padding_mask(source, self.pad_id)
        target_mask = padding_mask(target, self.pad_id)
        memory = self.encoder(self.embed(source), source_mask)
        x = self.decoder(self.embed(target), memory, target_mask, source_mask)
        return F.linear(x, self.embedding.weight)
