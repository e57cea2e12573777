"""
Every part of a multimodal transformer, each built from the ones before it:

    1. tokenizers      CharTokenizer, BPETokenizer
    2. attention       scaled_dot_product_attention, KVCache, RotaryEmbedding, MultiHeadAttention; masks
    3. layers          LayerNorm, RMSNorm, Dropout, FeedForward, positional encodings; evaluating
    4. blocks          EncoderBlock, DecoderBlock
    5. stacks          TransformerEncoder, TransformerDecoder, Transformer (the encoder-decoder of 2017)
    6. vision          PatchEmbedding, AttentionPooling, ViT
    7. language        GPT
    8. multimodal      connectors, MLLM, CLIP

Shapes: (B, T, C) = batch, time, channels; (B, N, C) for image tokens; (B, n_head, T, head_dim) inside attention.
Masks are boolean, True = may attend, and broadcast to (B, n_head, Tq, Tk). A row that may attend nowhere gives zeros.
"""

import contextlib
import heapq
import math
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

IGNORE_INDEX = -1  # a target that no loss counts
IMAGE_ID = -200  # the placeholder of an image in the ids: no token of any vocabulary, so that no GPT can write it


class SettingError(ValueError):
    """A setting, a text or a file that cannot be used. The stages print its message alone, without a traceback."""


def choose(table, **choice):
    """choose({"a": A, "b": B}, kind="a") -> A; SettingError names the kinds that there are."""
    (kind, name), = choice.items()
    if name not in table:
        raise SettingError(f"{kind} {name!r}: {', '.join(table)}")
    return table[name]


# 1. tokenizers -------------------------------------------------------------------------------------------------------

class CharTokenizer:
    """One id per character. The vocabulary is the set of characters of the text that it is made from, sorted."""

    def __init__(self, text):
        self.chars = "".join(sorted(set(text)))
        self.ids = {c: i for i, c in enumerate(self.chars)}
        self.vocab_size = len(self.chars)

    def encode(self, text):
        """str -> list of ids; SettingError names a character that the vocabulary lacks."""
        unknown = next((c for c in text if c not in self.ids), None)
        if unknown is not None:
            raise SettingError(f"the character {unknown!r} is not in the vocabulary of this model")
        return [self.ids[c] for c in text]

    def decode(self, ids):
        return "".join(self.chars[i] for i in ids)

    def state(self):
        return {"kind": "char", "chars": self.chars}

    @classmethod
    def from_state(cls, state):
        return cls(state["chars"])


class BPETokenizer:
    """Byte-pair encoding on UTF-8 bytes (Sennrich et al. 2016; byte-level as in GPT-2, Radford et al. 2019). Ids 0-2
    are pad, bos and eos, which encode() never returns and decode() leaves out, so that no typed text can be taken for
    them; then come the 256 bytes, so that no text is unknown; then one id per merge, in the order learnt."""

    pad_id, bos_id, eos_id = range(3)
    byte_ids = range(3, 3 + 256)  # the id of each byte
    first_merge = 3 + 256
    # text is cut into words (with the space before them), punctuation and white space; merges stay inside a piece
    pieces = re.compile(r"'(?:s|t|re|ve|m|ll|d)\b| ?\w+| ?[^\w\s]+|\s+(?!\S)|\s+")

    def __init__(self, merges):
        """merges: [(left id, right id)], in the order in which they were learnt."""
        self.merges = [tuple(pair) for pair in merges]
        self.ranks = {pair: self.first_merge + i for i, pair in enumerate(self.merges)}  # pair -> id of the pair
        self.bytes = [b""] * self.first_merge
        for b, i in enumerate(self.byte_ids):
            self.bytes[i] = bytes([b])
        for left, right in self.merges:
            self.bytes.append(self.bytes[left] + self.bytes[right])
        self.vocab_size = len(self.bytes)
        self.cache = {}

    @classmethod
    def train(cls, texts, vocab_size):
        """Learn merges from an iterable of str until vocab_size ids exist, or no pair occurs twice."""
        if vocab_size < cls.first_merge:
            raise SettingError(f"vocab_size must be at least {cls.first_merge}: the special ids and every byte")
        count = Counter(piece for text in texts for piece in cls.pieces.findall(text))
        words = [(cls.ids_of_bytes(piece), n) for piece, n in count.items()]
        pairs, where = Counter(), defaultdict(set)  # how often a pair occurs, and in which words
        for w, (ids, n) in enumerate(words):
            for pair in zip(ids, ids[1:]):
                pairs[pair] += n
                where[pair].add(w)
        heap = [(-n, pair) for pair, n in pairs.items()]
        heapq.heapify(heap)
        merges = []
        while heap and cls.first_merge + len(merges) < vocab_size:
            n, pair = heapq.heappop(heap)
            if pairs[pair] != -n:  # an outdated entry: the pair's count has changed since, and was pushed again
                continue
            if -n < 2:
                break
            change = defaultdict(int)  # of the pairs' counts by this merge
            for w in where.pop(pair):
                ids, n = words[w]
                merged = cls._merge(ids, pair, cls.first_merge + len(merges))
                for old in zip(ids, ids[1:]):
                    change[old] -= n
                for fresh in zip(merged, merged[1:]):
                    change[fresh] += n
                    where[fresh].add(w)
                words[w] = (merged, n)
            for each, n in change.items():
                pairs[each] += n
                if pairs[each] > 0:
                    heapq.heappush(heap, (-pairs[each], each))
            merges.append(pair)
        return cls(merges)

    @classmethod
    def ids_of_bytes(cls, text):
        return [cls.byte_ids[b] for b in text.encode("utf-8", "surrogatepass")]

    @staticmethod
    def _merge(ids, pair, new):
        """ids with every occurrence of pair replaced by the id new."""
        out = []
        for i in ids:
            if out and (out[-1], i) == pair:
                out[-1] = new
            else:
                out.append(i)
        return out

    def encode(self, text):
        """str -> list of ids, none of them special."""
        out, rank = [], lambda pair: self.ranks.get(pair, math.inf)  # the pair learnt first is merged first
        for piece in self.pieces.findall(text):
            if piece not in self.cache:
                ids = self.ids_of_bytes(piece)
                while (best := min(zip(ids, ids[1:]), key=rank, default=None)) in self.ranks:
                    ids = self._merge(ids, best, self.ranks[best])
                self.cache[piece] = ids
            out += self.cache[piece]
        return out

    def decode(self, ids):
        """ids -> str; special ids are left out, bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.bytes[i] for i in ids).decode("utf-8", "replace")

    def state(self):
        return {"kind": "byte_bpe", "merges": [list(pair) for pair in self.merges]}

    @classmethod
    def from_state(cls, state):
        return cls(state["merges"])


class GPT2Tokenizer(BPETokenizer):
    """The tokenizer of GPT-2 with its ids: the 256 bytes, printable ones first; the merges that OpenAI learnt;
    <|endoftext|>; after these our pad, bos and eos."""

    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    byte_ids = [i for _, i in sorted((b, i) for i, b in enumerate([*printable, *sorted({*range(256)} - {*printable})]))]
    first_merge = 256

    def __init__(self, merges):
        super().__init__(merges)
        self.pad_id, self.bos_id, self.eos_id = range(len(self.bytes) + 1, len(self.bytes) + 4)
        self.bytes += [b""] * 4
        self.vocab_size = len(self.bytes)
        # GPT-2 cuts by the Unicode categories L and N. To re, \w is L, N and _; \d is Nd; the rest of N is Nl and No
        n = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) in ("Nl", "No"))
        s = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # white space; re's \s is more
        self.pieces = re.compile(rf"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_{n}]+| ?[\d{n}]+| ?(?:[^\w{s}]|_)+"
                                 rf"|[{s}]+(?![^{s}])|[{s}]+")

    def state(self):
        return super().state() | {"kind": "gpt2"}


def tokenizer_from_state(state):
    """The tokenizer whose state() this is. SettingError for a kind that this version does not know."""
    kinds = {"char": CharTokenizer, "byte_bpe": BPETokenizer, "gpt2": GPT2Tokenizer}
    return choose(kinds, tokenizer=state["kind"]).from_state(state)


# 2. attention --------------------------------------------------------------------------------------------------------

def padding_mask(ids, pad_id):
    """(B, T) ids -> (B, 1, 1, T) mask, True at the tokens that are not padding."""
    return (ids != pad_id)[:, None, None, :]


def causal_mask(Tq, Tk, device=None):
    """(Tq, Tk) mask in which a query sees the keys up to its own position; the last query sees the last key."""
    return torch.ones(Tq, Tk, dtype=torch.bool, device=device).tril(Tk - Tq)


def scaled_dot_product_attention(q, k, v, mask=None, dropout_p=0.0):
    """softmax(q k^T / sqrt(head_dim)) v, equation 1 of "Attention Is All You Need" (Vaswani et al. 2017).

    q: (..., Tq, head_dim), k and v: (..., Tk, head_dim), mask: boolean, broadcastable to (..., Tq, Tk).
    Returns the output (..., Tq, head_dim) and the weights (..., Tq, Tk) before dropout.
    """
    scores = (q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1)  # (..., Tq, Tk); to divide q is less work
    if mask is not None:  # to add is faster than to fill; a finite number gives no NaN where a row sees nothing
        scores = scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1)
    if mask is not None and not (seen := mask.any(dim=-1, keepdim=True)).all():
        weights = weights.masked_fill(~seen, 0.0)
    return F.dropout(weights, dropout_p, dropout_p > 0) @ v, weights


class KVCache:
    """The keys and values of one attention layer for the positions seen so far, in memory allocated once."""

    def __init__(self, max_len):
        self.max_len, self.length, self.k, self.v = max_len, 0, None, None

    def append(self, k, v):
        """k, v: (B, n_head, T, head_dim) of the next T positions. Returns those of all positions so far."""
        B, n_head, T, head_dim = k.shape
        if self.k is None:
            self.k, self.v = (t.new_empty(B, n_head, self.max_len, head_dim) for t in (k, v))
        self.k[:, :, self.length:self.length + T] = k
        self.v[:, :, self.length:self.length + T] = v
        self.length += T
        return self.k[:, :, :self.length], self.v[:, :, :self.length]

    def select(self, rows):
        """Keep these rows of the batch, (n,) indices; a row may be kept several times, for several continuations."""
        if self.k is not None:
            self.k, self.v = self.k[rows], self.v[rows]


def rows_at(table, start, T):
    """(max_len, C) -> (T, C), the rows from start on; or, where start is a (B, T) tensor, (B, T, C), those rows."""
    return table[start] if torch.is_tensor(start) else table[start:start + T]


class RotaryEmbedding(nn.Module):
    """Rotary positions (RoFormer, Su et al. 2021): each pair of channels is rotated by an angle proportional to the
    position, so that a query and a key see only their distance. Channel i pairs with i + head_dim / 2."""

    def __init__(self, head_dim, max_len, base=10000.0, yarn=1.0, trained_len=0):
        """yarn: factor by which the context of a model that was trained with trained_len positions (0: max_len) is
        stretched without further training (YaRN, Peng et al. 2023). A pair of channels that turned beta times or more
        in trained_len keeps its frequency; one that turned alpha times or less is divided by the factor, so that it
        meets no new angle; a ramp in between. The paper has alpha = 1 and beta = 32 for Llama, and says that they
        depend on the model; with contexts of hundreds, 0.5 and 2 are better. Queries and keys are scaled by 0.1
        ln(yarn) + 1: a sharper softmax over more keys."""
        super().__init__()
        if head_dim % 2:
            raise SettingError(f"rotary positions need an even head_dim, not {head_dim}")
        frequencies = base ** (-torch.arange(0, head_dim, 2).float() / head_dim)  # (head_dim / 2,), radians a position
        if yarn != 1.0:
            turns = (trained_len or max_len) * frequencies / (2 * math.pi)
            alpha, beta = 0.5, 2.0
            kept = ((turns - alpha) / (beta - alpha)).clamp(0, 1)
            frequencies = frequencies * (kept + (1 - kept) / yarn)
        angles, size = torch.outer(torch.arange(max_len).float(), frequencies), 0.1 * math.log(yarn) + 1
        self.register_buffer("cos", size * angles.cos().repeat(1, 2), persistent=False)  # (max_len, head_dim)
        self.register_buffer("sin", size * angles.sin().repeat(1, 2), persistent=False)

    def forward(self, x, start=0):
        """x: (B, n_head, T, head_dim) at the positions start, start + 1, ...; or start: (B, T), the positions."""
        cos, sin = (rows_at(table, start, x.size(-2)).to(x.dtype) for table in (self.cos, self.sin))  # (T, head_dim)
        if cos.dim() == 3:
            cos, sin = cos[:, None], sin[:, None]  # (B, 1, T, head_dim)
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin


class MultiHeadAttention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2): self-, cross- and cached attention in one class.
    n_embd: channels in and out; rotary: a RotaryEmbedding for self-attention, or None; fused: run torch's kernel, which
    never holds the (Tq, Tk) weights in memory, instead of scaled_dot_product_attention above. The latter runs all the
    same for bfloat16 on a CPU, where it is faster, and where the attribute keep_weights is True; the attention weights
    (B, n_head, Tq, Tk) are then kept as the attribute attn_weights."""

    def __init__(self, n_embd, n_head, bias=True, rotary=None, fused=True):
        super().__init__()
        if n_embd % n_head:
            raise SettingError(f"n_embd={n_embd} is not a multiple of n_head={n_head}")
        self.n_head, self.rotary, self.fused = n_head, rotary, fused
        self.keep_weights, self.attn_weights = False, None
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=bias)  # the three projections in one matrix product
        self.proj = nn.Linear(n_embd, n_embd, bias=bias)

    def _heads(self, x):
        B, T, C = x.shape
        return x.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, T, C) -> (B, n_head, T, head_dim)

    def forward(self, x, memory=None, mask=None, causal=False, cache=None, positions=None):
        """x: (B, Tq, C); memory: (B, Tk, C) to attend to instead of x; mask: boolean, True = may attend; causal: a
        query sees the keys up to its own place. cache: a KVCache; for self-attention x continues what it holds, for
        cross-attention it keeps the memory's keys and values after the first call. positions: (B, Tq), of the rotary
        embedding, where they are not 0, 1, 2, ..."""
        B, Tq, C = x.shape
        start = 0 if cache is None else cache.length
        if memory is None:
            q, k, v = (self._heads(t) for t in self.qkv(x).chunk(3, dim=-1))
            if self.rotary is not None:
                where = start if positions is None else positions
                q, k = self.rotary(q, where), self.rotary(k, where)
        else:
            q_weight, kv_weight = self.qkv.weight.split((C, 2 * C))
            q_bias, kv_bias = (None, None) if self.qkv.bias is None else self.qkv.bias.split((C, 2 * C))
            q = self._heads(F.linear(x, q_weight, q_bias))
            new = memory[:, start:]  # nothing, once the cache holds the memory
            k, v = (self._heads(t) for t in F.linear(new, kv_weight, kv_bias).chunk(2, dim=-1))
        if cache is not None:
            k, v = cache.append(k, v)
        Tk = k.size(2)
        fused = self.fused and not self.keep_weights and not (q.dtype == torch.bfloat16 and q.device.type == "cpu")
        is_causal = causal and mask is None and Tq == Tk and fused  # the kernel has this one mask built in
        if causal and not is_causal and Tq > 1:
            allowed = causal_mask(Tq, Tk, x.device)
            mask = allowed if mask is None else mask & allowed
        if fused:
            out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal)
            if mask is not None:  # kernels differ in what they make of a row that sees nothing
                out = out.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)
        else:
            out, attn_weights = scaled_dot_product_attention(q, k, v, mask)
            self.attn_weights = attn_weights.detach() if self.keep_weights else None
        return self.proj(out.transpose(1, 2).reshape(B, Tq, C))  # (B, n_head, Tq, head_dim) -> (B, Tq, C)


# 3. layers -----------------------------------------------------------------------------------------------------------

class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) over the channels, then a gain and a shift (Ba et al. 2016). Run by torch's
    kernel: written out, as RMSNorm below, a small ViT's training step is a fifth longer on a CPU."""

    def __init__(self, n_embd, eps=1e-5):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(n_embd)), nn.Parameter(torch.zeros(n_embd)), eps

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """Root mean square 1 over the channels, then a gain; the mean stays (Zhang and Sennrich 2019)."""

    def __init__(self, n_embd, eps=1e-5):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n_embd)), eps

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps) * self.weight


def make_norm(norm, n_embd):
    """norm: "layer" or "rms"."""
    return choose({"layer": LayerNorm, "rms": RMSNorm}, norm=norm)(n_embd)


@contextlib.contextmanager
def evaluating(model):
    """Inside the block the model is in evaluation mode, without dropout; then it returns to its mode before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class Dropout(nn.Module):
    """Zeroes a share p of x in training and scales the rest by 1 / (1 - p) (Srivastava et al. 2014). p is rounded to
    256ths: one random byte decides on an element, eight are drawn at once; F.dropout's numbers are slow on CPUs."""

    def __init__(self, p):
        super().__init__()
        self.p = round(256 * p) / 256

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        random = torch.empty(-(-x.numel() // 8), dtype=torch.long, device=x.device).random_(-2 ** 63, None)
        keep = random.view(torch.uint8)[:x.numel()].view(x.shape) >= 256 * self.p
        return x * (keep / (1 - self.p)).to(x.dtype)


def swiglu(x):
    """(..., 2 n) -> (..., n): half of the channels, gated by the SiLU of the other half (Shazeer 2020)."""
    gate, x = x.chunk(2, dim=-1)
    return F.silu(gate) * x


def gelu_tanh(x):
    """The approximation of GELU that GPT-2 was trained with (Hendrycks and Gimpel 2016, section 2)."""
    return F.gelu(x, approximate="tanh")


def quick_gelu(x):
    """The coarser approximation of GELU that CLIP was trained with (the same section)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": gelu_tanh, "quick_gelu": quick_gelu, "swiglu": swiglu}


class FeedForward(nn.Module):
    """(B, T, C) -> (B, T, C): two linear layers with an activation between them, applied to each position alone."""

    def __init__(self, n_embd, n_hidden=None, activation="gelu", dropout=0.0, bias=True):
        super().__init__()
        self.activation, n_hidden = choose(ACTIVATIONS, activation=activation), n_hidden or 4 * n_embd
        if activation == "swiglu":
            n_hidden = round(n_hidden * 2 / 3 / 8) * 8  # keeps the number of weights; 8 suits the hardware
        self.up = nn.Linear(n_embd, 2 * n_hidden if activation == "swiglu" else n_hidden, bias=bias)
        self.proj = nn.Linear(n_hidden, n_embd, bias=bias)
        self.drop = Dropout(dropout)

    def forward(self, x):
        return self.drop(self.proj(self.activation(self.up(x))))


class MixtureOfExperts(nn.Module):
    """(B, T, C) -> (B, T, C): feed-forward layers, the experts, of which each token passes through the k that a router
    prefers (Shazeer et al. 2017). Their outputs are weighted by the router's probabilities, of sum 1; with k = 1 by the
    probability itself, or the router would get no gradient from the loss.

    In training, load (n_experts,) is the share of the choices that fell on each expert, and balance the load-balancing
    loss of the Switch Transformer (Fedus et al. 2022, equation 4): n_experts times the sum of load times mean
    probability, 1 where the tokens are spread evenly. Both are of one forward pass, padding included: with accumulation
    or several processes, each part is balanced by itself."""

    def __init__(self, n_embd, n_experts, k, **feed_forward):
        super().__init__()
        if not 1 <= k <= n_experts:
            raise SettingError(f"experts_per_token={k} is not between 1 and n_experts={n_experts}")
        self.k, self.load, self.balance = k, None, None
        self.router = nn.Linear(n_embd, n_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(n_embd, **feed_forward) for _ in range(n_experts))

    def forward(self, x):
        tokens, n_experts = x.flatten(0, 1), len(self.experts)  # (B * T, C)
        p = self.router(tokens).float().softmax(dim=-1)  # (B * T, n_experts)
        weights, chosen = p.topk(self.k, dim=-1)  # (B * T, k)
        weights = weights / weights.sum(dim=-1, keepdim=True) if self.k > 1 else weights
        out = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            rows, rank = (chosen == i).nonzero(as_tuple=True)  # the tokens that chose it, and as which of their k
            padded = F.pad(rows, (0, -len(rows) % 64))  # CPUs prepare a product anew for each new size
            new = weights[rows, rank, None] * expert(tokens[padded])[:len(rows)]
            out = out.index_add(0, rows, new.to(out.dtype))
        if self.training:
            self.load = chosen.flatten().bincount(minlength=n_experts) / chosen.numel()
            self.balance = n_experts * (self.load * p.mean(dim=0)).sum()
        return out.view_as(x)


class SinusoidalPositionalEncoding(nn.Module):
    """Adds sines and cosines of geometrically spaced wavelengths (Vaswani et al. 2017, section 3.5)."""

    def __init__(self, n_embd, max_len):
        super().__init__()
        angles = torch.outer(torch.arange(max_len).float(), 10000.0 ** (-torch.arange(0, n_embd, 2).float() / n_embd))
        table = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :n_embd]  # (max_len, n_embd)
        self.register_buffer("table", table, persistent=False)

    def forward(self, x, start=0):
        """x: (B, T, C) at the positions start, start + 1, ..."""
        return x + rows_at(self.table, start, x.size(1))


class LearnedPositionalEncoding(nn.Module):
    """Adds one learnt vector per position; used as the encoding above."""

    def __init__(self, n_embd, max_len):
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(max_len, n_embd))

    def forward(self, x, start=0):
        return x + rows_at(self.positions, start, x.size(1))


# 4. blocks -----------------------------------------------------------------------------------------------------------
# Pre-norm: the residual stream itself is never normalised (Xiong et al. 2020). Dropout acts on what each sub-layer
# adds to the stream, as in Vaswani et al. 2017, section 5.4, and not on the attention weights: on a CPU, drawing random
# numbers for those takes longer than the attention itself.

class EncoderBlock(nn.Module):
    """(B, T, C) -> (B, T, C): x + attention(norm(x)), then x + feed_forward(norm(x)), with n_experts a mixture."""

    def __init__(self, n_embd, n_head, activation="gelu", norm="layer", dropout=0.0, bias=True, rotary=None,
                 n_experts=0, experts_per_token=1):
        super().__init__()
        self.norm1, self.norm2 = make_norm(norm, n_embd), make_norm(norm, n_embd)
        self.attn = MultiHeadAttention(n_embd, n_head, bias=bias, rotary=rotary)
        feed_forward = {"activation": activation, "dropout": dropout, "bias": bias}
        self.ff = MixtureOfExperts(n_embd, n_experts, experts_per_token, **feed_forward) if n_experts else \
            FeedForward(n_embd, **feed_forward)
        self.drop = Dropout(dropout)

    def forward(self, x, mask=None):
        x = x + self.drop(self.attn(self.norm1(x), mask=mask))
        return x + self.ff(self.norm2(x))


class DecoderBlock(EncoderBlock):
    """An encoder block whose self-attention is causal; with cross=True, cross-attention to a memory follows it.

    gated: what the cross-attention adds is multiplied by the tanh of a learnt number that starts at 0, so that at first
    the model does what it did without a memory (Flamingo, Alayrac et al. 2022).
    """

    def __init__(self, n_embd, n_head, norm="layer", bias=True, cross=False, gated=False, **block):
        super().__init__(n_embd, n_head, norm=norm, bias=bias, **block)
        self.cross_norm = make_norm(norm, n_embd) if cross else None
        self.cross_attn = MultiHeadAttention(n_embd, n_head, bias=bias) if cross else None
        self.cross_gate = nn.Parameter(torch.zeros(1)) if cross and gated else None

    def forward(self, x, memory=None, mask=None, memory_mask=None, cache=None, positions=None):
        """x: (B, T, C); memory: (B, Tm, C) or None: no cross-attention; cache: KVCache of self- and of cross-attn. Or x
        has K times as many rows, and K in turn share a memory, whose keys and values are then computed once."""
        self_cache, cross_cache = cache or (None, None)
        x = x + self.drop(self.attn(self.norm1(x), mask=mask, causal=True, cache=self_cache, positions=positions))
        if self.cross_attn is not None and memory is not None:
            asking = self.cross_norm(x).view(len(memory), -1, x.size(2))  # (B, K * T, C)
            attended = self.cross_attn(asking, memory, memory_mask, cache=cross_cache).view_as(x)
            x = x + self.drop(attended if self.cross_gate is None else self.cross_gate.tanh() * attended)
        return x + self.ff(self.norm2(x))


# 5. stacks -----------------------------------------------------------------------------------------------------------

def init_weights(model):
    """The one place where weights get their first values. Matrices: normal with deviation 1 / sqrt(channels in), which
    keeps the size of activations; projections back into the residual stream 0, so that a block does nothing at first
    (Goyal et al. 2017, Bachlechner et al. 2020), unless behind a gate that starts at 0: where both factors are 0,
    neither has a gradient. Output layers and embeddings: 0.02 (GPT-2), so that all tokens are about equally likely.
    Convolutions as in He et al. 2015; biases 0; gains 1, and 0 where a residual branch of convolutions ends."""
    gated = [block.cross_attn.proj for block in model.modules() if getattr(block, "cross_gate", None) is not None]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            zero = name.endswith("proj") and not any(module is proj for proj in gated)
            std = 0.0 if zero else 0.02 if name.endswith("head") else module.in_features ** -0.5
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, (nn.Embedding, LearnedPositionalEncoding)):
            nn.init.normal_(next(module.parameters()), std=0.02)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, ResidualConv):
            nn.init.zeros_(module.norm2.weight)
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
            nn.init.zeros_(module.bias)


class TransformerEncoder(nn.Module):
    """n_layer encoder blocks and a last norm: (B, T, C) -> (B, T, C). block: what else EncoderBlock takes."""

    def __init__(self, n_layer, n_embd, n_head, norm="layer", **block):
        super().__init__()
        self.blocks = nn.ModuleList(EncoderBlock(n_embd, n_head, norm=norm, **block) for _ in range(n_layer))
        self.norm = make_norm(norm, n_embd)

    def forward(self, x, mask=None, keep=()):
        """keep: indices of blocks whose outputs are wanted too, beside the last: (B, T, C * (1 + len(keep)))."""
        kept = []
        for i, block in enumerate(self.blocks):
            x = block(x, mask)
            kept += [x] if i in keep else []
        return torch.cat((self.norm(x), *kept), dim=-1) if keep else self.norm(x)


class TransformerDecoder(nn.Module):
    """n_layer decoder blocks, a last norm. cross_every: each so many-th has cross-attention. block: as DecoderBlock."""

    def __init__(self, n_layer, n_embd, n_head, norm="layer", cross_every=0, **block):
        super().__init__()
        if cross_every > n_layer:
            raise SettingError(f"cross_every={cross_every}: no block of n_layer={n_layer} would have cross-attention")
        has_cross = [cross_every > 0 and (i + 1) % cross_every == 0 for i in range(n_layer)]
        self.blocks = nn.ModuleList(DecoderBlock(n_embd, n_head, norm=norm, cross=has, **block) for has in has_cross)
        self.norm = make_norm(norm, n_embd)

    def new_caches(self, max_len, memory_len=0):
        return [(KVCache(max_len), KVCache(memory_len)) for _ in self.blocks]  # empty, for forward(caches=...)

    def forward(self, x, memory=None, mask=None, memory_mask=None, caches=None, positions=None):
        """(B, T, C) -> (B, T, C); mask: in addition to the causal one, such as padding_mask(ids, pad_id)."""
        for i, block in enumerate(self.blocks):
            x = block(x, memory, mask, memory_mask, caches[i] if caches else None, positions)
        return self.norm(x)


class Transformer(nn.Module):
    """The encoder-decoder of Vaswani et al. 2017, pre-norm. One embedding for source, target, output (section 3.4)."""

    def __init__(self, vocab_size, n_layer=6, n_embd=512, n_head=8, max_len=512, pad_id=0, dropout=0.1):
        super().__init__()
        self.pad_id, self.n_embd = pad_id, n_embd
        self.embedding = nn.Embedding(vocab_size, n_embd)
        self.position = SinusoidalPositionalEncoding(n_embd, max_len)
        self.drop = Dropout(dropout)
        self.encoder = TransformerEncoder(n_layer, n_embd, n_head, activation="relu", dropout=dropout)
        self.decoder = TransformerDecoder(n_layer, n_embd, n_head, activation="relu", dropout=dropout, cross_every=1)
        init_weights(self)
        nn.init.normal_(self.embedding.weight, std=n_embd ** -0.5)  # embed() multiplies by sqrt(n_embd)

    def embed(self, ids):
        return self.drop(self.position(self.embedding(ids) * math.sqrt(self.n_embd)))

    def encode(self, source):
        """(B, Ts) ids -> (B, Ts, C) memory"""
        return self.encoder(self.embed(source), padding_mask(source, self.pad_id))

    def forward(self, source, target):
        """(B, Ts), (B, Tt) ids -> (B, Tt, vocab_size): at each position the logits of the token after it."""
        masks = padding_mask(target, self.pad_id), padding_mask(source, self.pad_id)
        return F.linear(self.decoder(self.embed(target), self.encode(source), *masks), self.embedding.weight)


# 6. vision -----------------------------------------------------------------------------------------------------------

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
    norm: str = "layer"
    stem: str = "conv"  # "patch": one linear layer a patch
    label_smoothing: float = 0.0
    pixel_mean: tuple = (120.0, 117.0, 107.0)  # of values 0 to 255, red, green, blue
    pixel_std: tuple = (63.0, 62.0, 65.0)
    class_token: bool = False  # a learnt token before the patches, as CLIP has; features() leaves it out
    pre_norm: bool = False  # a norm before the first block, as CLIP has
    last_norm: bool = True  # a norm after the last block
    max_tiles: int = 1  # above 1, an image is up to so many tiles of image_size; see TileEmbedding
    across_layer: int = 0  # further blocks, in which the patches of all tiles of an image attend to each other
    keep: tuple = ()  # indices of blocks whose outputs stand beside the last in features()
    patch_dropout: float = 0.0  # share of the patches that are left out in training

    def __post_init__(self):
        if self.patch_dropout and (self.class_token or self.max_tiles > 1):
            raise SettingError("patch_dropout is for images without class token and tiles")
        if list(self.keep) != [i for i in range(self.n_layer) if i in self.keep]:
            raise SettingError(f"keep={self.keep} are not some of the blocks 0 to {self.n_layer - 1}, in order")

    @property
    def n_features(self):
        """Channels of ViT.features()."""
        return self.n_embd * (1 + len(self.keep))


class ResidualConv(nn.Module):
    """(B, n, H, W) -> the same plus what two 3x3 convolutions make of it (ResNet, He et al. 2016), 0 at first."""

    def __init__(self, n):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(n, n, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.GroupNorm(1, n), nn.GroupNorm(1, n)

    def forward(self, x):
        return x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))


class PatchEmbedding(nn.Module):
    """(B, 3, H, W) -> (B, N, C), N = H / patch_size * W / patch_size, row by row. stem="patch": one linear map of each
    patch (ViT, Dosovitskiy et al. 2020). stem="conv": 3x3 convolutions, most of stride 2, down to one place per patch
    (Xiao et al. 2021): neighbouring pixels belong together, and with little data it pays to build that in.
    stem="residual": each halving doubles the channels, and a ResidualConv follows all but the first."""

    def __init__(self, patch_size, n_embd, stem="patch"):
        super().__init__()
        self.patch_size = patch_size
        if stem != "patch" and n_embd < patch_size:
            raise SettingError(f"stem={stem} and patches of {patch_size} pixels take a width of {patch_size} or more")
        linear_stem = lambda patch_size, n_embd: nn.Conv2d(3, n_embd, patch_size, stride=patch_size)
        self.stem = choose({"patch": linear_stem, "conv": self.conv_stem, "residual": self.residual_stem},
                           stem=stem)(patch_size, n_embd)

    @staticmethod
    def unit(n_in, n_out, stride):
        """The layers of a convolution with its norm and ReLU."""
        return [nn.Conv2d(n_in, n_out, 3, stride, padding=1), nn.GroupNorm(1, n_out), nn.ReLU()]

    @staticmethod
    def halvings(patch_size):
        """How often an image is halved until a patch is one place."""
        if patch_size < 2 or patch_size & (patch_size - 1):
            raise SettingError(f"the convolutional stem halves the image: patch_size={patch_size} is not 2, 4, 8, ...")
        return patch_size.bit_length() - 1

    def residual_stem(self, patch_size, n_embd):
        widths = [3, *(n_embd >> i for i in reversed(range(self.halvings(patch_size))))]  # such as 3, 32, 64, 128
        layers = []
        for a, b in zip(widths, widths[1:]):
            layers += self.unit(a, b, 2) + [ResidualConv(b)] * bool(layers)
        return nn.Sequential(*layers, nn.Conv2d(n_embd, n_embd, 1))

    def conv_stem(self, patch_size, n_embd):
        unit, halvings = self.unit, self.halvings(patch_size)
        widths = [3, n_embd // 4, *[3 * n_embd // 8] * (halvings - 2)] if halvings > 1 else [3]  # such as 3, 32, 48
        layers = [layer for a, b in zip(widths, widths[1:]) for layer in unit(a, b, 2)]
        if halvings > 1:  # before the last halving, a convolution that keeps the size
            layers += unit(widths[-1], widths[-1], 1)
        return nn.Sequential(*layers, *unit(widths[-1], n_embd, 2), nn.Conv2d(n_embd, n_embd, 1))

    def forward(self, images):
        H, W = images.shape[-2:]
        if H % self.patch_size or W % self.patch_size:
            raise ValueError(f"{H}x{W} pixels do not divide into patches of {self.patch_size}x{self.patch_size}")
        return self.stem(images).flatten(2).transpose(1, 2)  # (B, C, H', W') -> (B, N, C)


LAYOUTS = [(rows, columns) for rows in range(1, 5) for columns in range(1, 5) if rows * columns <= 4]  # of tiles


def best_layout(width, height, max_tiles):
    """The index in LAYOUTS of the grid of square tiles on which an image is laid: of those with max_tiles at most the
    one on which it is reduced least; of several of these the one that is padded least, and then the smallest. The side
    of a tile is 1, and width and height are in tiles."""
    def cost(layout):
        rows, columns = LAYOUTS[layout]
        scale = min(columns / width, rows / height)  # the image then fits
        padding = rows * columns - scale ** 2 * width * height
        return max(0.0, 1 - scale), round(padding, 6), rows * columns
    return min((i for i, (rows, columns) in enumerate(LAYOUTS) if rows * columns <= max_tiles), key=cost)


class TileEmbedding(nn.Module):
    """(M, T, N, C), the N patches of T tiles of an image -> the same with a learnt vector added for each place in each
    layout, times the tanh of a learnt number that starts at 0 (Llama 3.2 Vision, Meta 2024). layouts: (M,)"""

    def __init__(self, n_embd):
        super().__init__()
        self.vectors = nn.Embedding(len(LAYOUTS), 4 * n_embd)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x, layouts):
        M, T, N, C = x.shape
        return x + self.gate.tanh() * self.vectors(layouts).view(M, 4, 1, C)[:, :T]


class AttentionPooling(nn.Module):
    """(B, N, C) -> (B, C): each head takes the mean of its C / n_head channels over the tokens, weighted by the softmax
    of a learnt score (as SeqPool in Compact Transformers, Hassani et al. 2021, with several heads)."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.score = nn.Linear(n_embd, n_head, bias=False)  # the softmax would not see a bias

    def attn_weights(self, x):
        """(B, N, C) -> (B, N, n_head): how much each token counts; sums to 1 over the tokens."""
        return self.score(x).softmax(dim=1)

    def forward(self, x):
        B, N, C = x.shape
        weights = self.attn_weights(x)[..., None]  # (B, N, n_head, 1)
        return (weights * x.view(B, N, weights.size(2), -1)).sum(dim=1).view(B, C)  # (B, N, n_head, C/n_head) -> (B, C)


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2020). Its class logits come from attention pooling of the patch tokens,
    not from a class token. Images are pixel values 0 to 255, uint8 or float, (B, 3, H, W), normalised here by buffers
    that travel with the weights. Another size than config.image_size works: the positions are interpolated."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.register_buffer("pixel_mean", torch.tensor(c.pixel_mean).view(1, 3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(c.pixel_std).view(1, 3, 1, 1))
        if c.image_size % c.patch_size:
            raise SettingError(f"image_size={c.image_size} is not a multiple of patch_size={c.patch_size}")
        self.grid = c.image_size // c.patch_size
        self.patches = PatchEmbedding(c.patch_size, c.n_embd, c.stem)
        self.position = LearnedPositionalEncoding(c.n_embd, self.grid ** 2)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, c.n_embd)) if c.class_token else None
        self.pre_norm = make_norm(c.norm, c.n_embd) if c.pre_norm else nn.Identity()
        self.drop = Dropout(c.dropout)
        self.encoder = TransformerEncoder(c.n_layer, c.n_embd, c.n_head, c.norm, dropout=c.dropout,
                                          activation=c.activation)
        if not c.last_norm:
            self.encoder.norm = nn.Identity()
        if c.max_tiles > 1:
            self.tiles_before, self.tiles_after = TileEmbedding(c.n_embd), TileEmbedding(c.n_embd)
            self.across = nn.ModuleList(EncoderBlock(c.n_embd, c.n_head, c.activation, c.norm, c.dropout)
                                        for _ in range(c.across_layer))
        self.pool = AttentionPooling(c.n_embd, c.n_head)
        self.head = nn.Linear(c.n_embd, c.n_classes) if c.n_classes else nn.Identity()
        init_weights(self)

    def _add_positions(self, x, H, W):
        """x: (B, H * W, C), a grid of H x W patches."""
        if H == W == self.grid:
            return self.position(x)
        table = self.position.positions.view(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)  # (1, C, grid, grid)
        if x.device.type == "mps":  # which lacks the backward pass of this interpolation
            table = table.cpu()
        table = F.interpolate(table, (H, W), mode="bicubic", antialias=True).to(x.device)
        return x + table.flatten(2).transpose(1, 2)  # (1, C, H, W) -> (1, N, C)

    def features(self, images, layouts=None):
        """(B, 3, H, W) pixels -> (B, N, C): one vector per patch, row by row, of n_features channels; in training with
        patch_dropout those of some patches, in any order. Of tiles, (M, T,
        3, H, W) with their layouts (M,), numbers in LAYOUTS: (M, T * N, C), zeros in the tiles that a layout lacks."""
        c, tiled = self.config, images.dim() == 5
        H, W = (pixels // c.patch_size for pixels in images.shape[-2:])
        pixels = images.flatten(0, -4)  # (M * T, 3, H, W)
        x = self._add_positions(self.patches((pixels.float() - self.pixel_mean) / self.pixel_std), H, W)
        if self.class_token is not None:  # it has its position in it
            x = torch.cat((self.class_token.expand(len(x), 1, -1), x), dim=1)
        if tiled:
            x = self.tiles_before(x.unflatten(0, images.shape[:2]), layouts).flatten(0, 1)
        if self.training and c.patch_dropout:  # faster, and harder to memorise (FLIP, Li et al. 2023)
            n = x.size(1) - int(c.patch_dropout * x.size(1))
            kept = torch.rand(x.shape[:2], device=x.device).argsort(dim=1)[:, :n, None]  # (B, n, 1)
            x = x.gather(1, kept.expand(-1, -1, x.size(2)))
        x = self.encoder(self.drop(self.pre_norm(x)), keep=c.keep)[:, c.class_token:]  # each tile by itself
        if not tiled:
            return x
        (M, T), N = images.shape[:2], x.size(1)
        x, kept = x.view(M, T * N, c.n_features).split((c.n_embd, c.n_features - c.n_embd), dim=-1)
        x = self.tiles_after(x.view(M, T, N, c.n_embd), layouts).flatten(1, 2)  # (M, T * N, C)
        n_tiles = torch.tensor([rows * columns for rows, columns in LAYOUTS], device=x.device)[layouts]  # (M,)
        seen = torch.arange(T * N, device=x.device) < N * n_tiles[:, None]  # (M, T * N)
        for block in self.across:
            x = block(x, seen[:, None, None])
        return torch.cat((x, kept), dim=-1) * seen[:, :, None]

    def forward(self, images, labels=None):
        """(B, 3, H, W) pixels, labels -> (B, n_classes) logits, loss (None without labels). labels: (B,) classes, -1 =
        ignored, or (B, n_classes) probabilities."""
        logits = self.head(self.pool(self.features(images)))
        if labels is None:
            return logits, None
        return logits, F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX,
                                       label_smoothing=self.config.label_smoothing if self.training else 0.0)


# 7. language ---------------------------------------------------------------------------------------------------------

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
    positions: str = "rotary"  # "learned", "sinusoidal"
    yarn: float = 1.0  # factor by which a context of trained_len is stretched; see RotaryEmbedding
    trained_len: int = 0  # 0: block_size
    n_experts: int = 0  # feed-forward layers in each block; see MixtureOfExperts
    experts_per_token: int = 2  # how many of them a token passes through
    balance_weight: float = 0.01  # of their load-balancing loss, in training
    bias: bool = False
    tie_weights: bool = True  # the output layer is the token embedding, transposed
    cross_every: int = 0  # every so many-th block attends to a memory, such as image tokens; 0: none
    gated: bool = True  # through gates that start at 0: a trained GPT stays what it was, and a new one learns slower


def sample_next(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """(B, vocab_size) logits -> (B,) ids. temperature 0: the likeliest token. top_k: only the k likeliest tokens.
    top_p: only the fewest tokens that together have that probability (nucleus sampling, Holtzman et al. 2020)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k and top_k > 0:
        kth = logits.topk(min(top_k, logits.size(-1)), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p and top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)  # of the likelier tokens together
        logits = logits.masked_fill((before >= top_p).scatter(-1, order, before >= top_p), -math.inf)
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)  # one random number a row; torch.multinomial draws one a token
    drawn = torch.rand(len(logits), 1, device=logits.device, generator=generator) * (1 - 1e-6) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, drawn, right=True).squeeze(1)  # the first that is greater


class GPT(nn.Module):
    """A decoder-only language model (Radford et al. 2018, 2019)."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embedding = nn.Embedding(c.vocab_size, c.n_embd)
        if c.n_embd % c.n_head:
            raise SettingError(f"n_embd={c.n_embd} is not a multiple of n_head={c.n_head}")
        added = choose({"rotary": None, "learned": LearnedPositionalEncoding,
                        "sinusoidal": SinusoidalPositionalEncoding}, positions=c.positions)
        self.position = added(c.n_embd, c.block_size) if added else None
        if added and c.yarn != 1.0:
            raise SettingError(f"yarn={c.yarn} stretches rotary positions, and these are {c.positions}")
        rotary = None if added else RotaryEmbedding(c.n_embd // c.n_head, c.block_size, 10000.0, c.yarn, c.trained_len)
        self.drop = Dropout(c.dropout)
        self.decoder = TransformerDecoder(c.n_layer, c.n_embd, c.n_head, c.norm, c.cross_every, activation=c.activation,
                                          dropout=c.dropout, bias=c.bias, rotary=rotary, gated=c.gated,
                                          n_experts=c.n_experts, experts_per_token=c.experts_per_token)
        self.head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        if c.tie_weights:
            self.head.weight = self.embedding.weight
        init_weights(self)

    def hidden(self, x, caches=None, memory=None, memory_mask=None, mask=None, positions=None):
        """(B, T, C) embeddings -> (B, T, C), ready for self.head. caches: of self.decoder.new_caches(); memory: (B, Tm,
        C), or fewer rows, see DecoderBlock: what the blocks with cross-attention attend to, where memory_mask (B, 1, T,
        Tm) allows it. mask (B, 1, T,
        T), in addition to the causal one, and positions (B, T) serve several texts in one row; see MLLM."""
        start = caches[0][0].length if caches else 0
        last = start + x.size(1) if positions is None else int(positions.max()) + 1
        if last > self.config.block_size:
            raise ValueError(f"{last} positions do not fit block_size={self.config.block_size}")
        if self.position is not None:
            x = self.position(x, start if positions is None else positions)
        return self.decoder(self.drop(x), memory, mask, memory_mask, caches, positions)

    def balance_loss(self):
        """What the experts of the last pass add to the loss in training: the mean over blocks; 0 without experts."""
        experts = [block.ff for block in self.decoder.blocks] if self.config.n_experts and self.training else []
        return self.config.balance_weight * sum(each.balance for each in experts) / max(1, len(experts))

    def expert_loads(self):
        """The load of expert j of block i in the last forward pass of training: {"load_i_j": share}, for a log."""
        blocks = self.decoder.blocks if self.config.n_experts else []
        return {f"load_{i}_{j}": share for i, block in enumerate(blocks) if block.ff.load is not None
                for j, share in enumerate(block.ff.load.tolist())}

    def logits_where(self, x, targets):
        """(B, T, C) of hidden(), (B, T) targets -> (n, vocab_size) logits where there is a target, and these n places
        in targets.flatten()."""
        where = (targets.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
        padded = F.pad(where, (0, -len(where) % 256))  # CPUs prepare a product anew for each new size
        return self.head(x.flatten(0, 1)[padded])[:len(where)].float(), where

    def forward(self, ids, targets=None):
        """(B, T) ids, (B, T) targets (-1 = ignored) -> (B, T, vocab_size) logits, loss (None without targets)"""
        logits = self.head(self.hidden(self.embedding(ids)))
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX)
        return logits, loss + self.balance_loss()

    def _read_prompt(self, ids, copies, embeddings, memory, memory_mask):
        """Reads each prompt once, for a number of copies of it to continue. Returns the logits (B * copies,
        vocab_size), caches of so many rows, and the memory's mask of the last position, which holds for what follows.
        """
        caches = self.decoder.new_caches(self.config.block_size, 0 if memory is None else memory.size(1))
        x = self.embedding(ids) if embeddings is None else embeddings
        logits = self.head(self.hidden(x, caches, memory, memory_mask)[:, -1])
        rows = torch.arange(ids.size(0), device=ids.device).repeat_interleave(copies)
        for cache, _ in caches:  # the copies share the memory
            cache.select(rows)
        return logits[rows], caches, None if memory_mask is None else memory_mask[:, :, -1:]

    @torch.no_grad()
    def stream(self, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None, eos_id=None, generator=None,
               num_samples=1, embeddings=None, memory=None, memory_mask=None):
        """Yields the next ids, (B * num_samples,), one position at a time; takes what generate() takes.
        num_samples: continuations of each prompt, which is read once for all of them. embeddings: (B, T, C), to read
        instead of those of ids. memory, memory_mask: see hidden(); new tokens see what the last of the prompt sees.
        The cache serves as long as the text fits block_size. Then the newer half of it is read again from an empty
        cache, so that the cost of a token stays bounded; the model forgets what came before that half."""
        block_size = self.config.block_size
        columns = list(ids.repeat_interleave(num_samples, dim=0).unbind(dim=1))
        ended = torch.zeros(len(ids) * num_samples, dtype=torch.bool, device=ids.device)
        with evaluating(self):
            for i in range(max_new_tokens):
                if i == 0:
                    logits, caches, memory_mask = self._read_prompt(ids[:, -block_size:], num_samples, embeddings,
                                                                    memory, memory_mask)
                else:
                    x = columns[-1][:, None]  # (B, 1)
                    if caches[0][0].length == block_size:
                        x = torch.stack(columns[-max(1, block_size // 2):], dim=1)  # (B, T / 2)
                        for cache, _ in caches:  # that of the memory stays
                            cache.length = 0
                    logits = self.head(self.hidden(self.embedding(x), caches, memory, memory_mask)[:, -1])
                token = sample_next(logits, temperature, top_k, top_p, generator)
                if eos_id is not None:
                    token = token.masked_fill(ended, eos_id)
                    ended |= token == eos_id
                yield token
                if eos_id is not None and ended.all():
                    return
                columns.append(token)

    def generate(self, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None, eos_id=None, generator=None):
        """(B, T) ids -> (B, T + n) ids, n <= max_new_tokens: prompt and continuation. temperature 0 is greedy. With
        eos_id a row ends at its first eos_id and is filled with it; generation stops when every row has ended."""
        tokens = list(self.stream(ids, max_new_tokens, temperature, top_k, top_p, eos_id, generator))
        return torch.cat((ids, torch.stack(tokens, dim=1)), dim=1) if tokens else ids

    @torch.no_grad()
    def beam_search(self, ids, max_new_tokens, beams, eos_id, length_penalty=1.0, embeddings=None, memory=None,
                    memory_mask=None):
        """The best continuations of ids (B, T) that a beam search finds: (B, beams, n) ids, n <= max_new_tokens, best
        first and filled with eos_id after their end, and their (B, beams) scores.

        The score is log p / length ** length_penalty, the end counted in the length (0: log p itself, which prefers
        short texts). At each position the best continuations are kept, ended ones among them, as many as there are
        beams. The search stops when all that are kept have ended. embeddings, memory, memory_mask: as in stream()."""
        B, device = ids.size(0), ids.device
        first = torch.arange(B, device=device)[:, None] * beams  # (B, 1), the row of each prompt's first beam
        total = torch.full((B, beams), -math.inf, device=device)  # log p; at first there is one beam, the others wait
        total[:, 0] = 0.0
        length, ended = torch.zeros_like(total, dtype=torch.long), torch.zeros_like(total, dtype=torch.bool)
        tokens, scores = ids.new_empty(B, beams, 0), total
        with evaluating(self):
            while tokens.size(2) < max_new_tokens and not ended.all():
                if tokens.size(2) == 0:
                    logits, caches, memory_mask = self._read_prompt(ids, beams, embeddings, memory, memory_mask)
                else:
                    x = self.embedding(token.view(-1, 1))  # (B * beams, 1, C)
                    logits = self.head(self.hidden(x, caches, memory, memory_mask)[:, -1])
                log_p = logits.float().log_softmax(dim=-1).view(B, beams, -1).masked_fill(ended[:, :, None], -math.inf)
                log_p[:, :, eos_id] = log_p[:, :, eos_id].masked_fill(ended, 0.0)  # what has ended stays as it is
                candidates = total[:, :, None] + log_p  # (B, beams, vocab_size)
                lengths = length + ~ended
                scores, best = (candidates / (lengths[:, :, None] ** length_penalty)).flatten(1).topk(beams)
                beam, token = best // log_p.size(2), best % log_p.size(2)  # (B, beams)
                total, length = candidates.flatten(1).gather(1, best), lengths.gather(1, beam)
                ended = ended.gather(1, beam) | (token == eos_id)
                tokens = torch.cat((tokens.gather(1, beam[:, :, None].expand_as(tokens)), token[:, :, None]), dim=2)
                for cache, _ in caches:  # all beams of a prompt share the memory
                    cache.select((first + beam).flatten())
        return tokens, scores


# 8. multimodal -------------------------------------------------------------------------------------------------------

class LinearConnector(nn.Module):
    """Vision to language channels by one matrix (LLaVA, Liu et al. 2023): (B, N, n_vision) -> (B, N, n_language)."""

    def __init__(self, n_vision, n_language):
        super().__init__()
        self.up = nn.Linear(n_vision, n_language)

    @staticmethod
    def n_tokens(side):
        """How many image tokens side x side patches become."""
        return side * side

    def forward(self, x):
        return self.up(x)


class MLPConnector(LinearConnector):
    """The same by two layers (LLaVA-1.5, Liu et al. 2024): (B, N, n_vision) -> (B, N, n_language)."""

    def __init__(self, n_vision, n_language):
        super().__init__(n_vision, n_language)
        self.down = nn.Linear(n_language, n_language)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class PixelShuffleConnector(nn.Module):
    """2x2 neighbouring patches become one token of four times the channels, then two layers (InternVL 1.5, Chen et al.
    2024): a quarter of the image tokens, which are most of what the GPT reads for a short caption."""

    def __init__(self, n_vision, n_language):
        super().__init__()
        self.mlp = MLPConnector(4 * n_vision, n_language)

    @staticmethod
    def n_tokens(side):
        if side % 2:
            raise SettingError(f"{side * side} patches are no square grid of even side, to be folded 2x2")
        return (side // 2) ** 2

    def forward(self, x):
        """(B, N, n_vision), a square grid of even side -> (B, N / 4, n_language)"""
        B, N, C = x.shape
        half = math.isqrt(self.n_tokens(math.isqrt(N)))
        if (2 * half) ** 2 != N:
            raise SettingError(f"{N} patches are no square grid")
        x = x.view(B, half, 2, half, 2, C).transpose(2, 3)  # (B, half, half, 2, 2, C)
        return self.mlp(x.reshape(B, half * half, 4 * C))


CONNECTORS = {"linear": LinearConnector, "mlp": MLPConnector, "pixel_shuffle": PixelShuffleConnector}


@dataclass
class MLLMConfig:
    vit: ViTConfig = field(default_factory=ViTConfig)
    gpt: GPTConfig = field(default_factory=GPTConfig)  # cross_every > 0: image tokens are attended, not inserted
    connector: str = "mlp"  # or linear, pixel_shuffle
    max_images: int = 1  # that may stand side by side; above 1 each is told its place, and what differs from the last
    bos_id: int = BPETokenizer.bos_id
    eos_id: int = BPETokenizer.eos_id

    def __post_init__(self):
        choose(CONNECTORS, connector=self.connector)
        if self.vit.max_tiles > 1 and not self.gpt.cross_every:
            raise SettingError("tiles are attended: max_tiles above 1 takes cross-attention, fusion=cross")
        if self.vit.patch_dropout and (self.connector == "pixel_shuffle" or not self.gpt.cross_every):
            raise SettingError("patch_dropout takes fusion=cross and a connector that takes each patch by itself")

    @classmethod
    def from_dict(cls, d):
        return cls(**{**d, "vit": ViTConfig(**d["vit"]), "gpt": GPTConfig(**d["gpt"])})  # d: dataclasses.asdict(config)

    def n_image_tokens(self, image_size):
        """How many tokens an image of image_size x image_size pixels becomes; SettingError if patches do not fit it."""
        if image_size % self.vit.patch_size:
            raise SettingError(f"image_size={image_size} is not a multiple of patch_size={self.vit.patch_size}")
        return self.vit.max_tiles * CONNECTORS[self.connector].n_tokens(image_size // self.vit.patch_size)

    def n_placeholders(self, image_size):
        """How many ids stand for an image: one per image token, or a single marker with cross-attention."""
        n_image_tokens = self.n_image_tokens(image_size)  # with cross-attention too, for its error
        return 1 if self.gpt.cross_every else n_image_tokens


class MLLM(nn.Module):
    """ViT -> connector -> GPT.

    The ids (B, T) hold placeholders, IMAGE_ID, where images stand; all images of all rows are given in that order. A
    row may have any number of images; without any, the model is the GPT alone. Two fusions:
    - prefix: each placeholder is replaced by one image token, which the GPT reads like a word (LLaVA, Liu et al. 2023).
    - cross (config.gpt.cross_every > 0): one placeholder, a marker, stands for a whole image. Its embedding is the same
      for all images; the image tokens are a memory for the GPT's cross-attention (Flamingo, Alayrac et al. 2022). A
      word attends to the images that stand last before it; images that stand side by side count together.
    Of images that stand side by side each is told its place, and at each of its tokens what differs from the image
    before it (as between the frames of a video, Wang et al. 2021): to compare images is hard to learn otherwise.
    images: (M, 3, H, W) pixels; or (M, N, n_embd) image tokens from encode(), as tiles always are.
    Several texts about the same images may stand in one row, after the images, which are read once: segments (B, T) is
    0 for the images, 1 for the first text, 2 for the second, ..., -1 for padding; a text sees the images and itself."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vit, self.gpt = ViT(config.vit), GPT(config.gpt)
        self.connector = CONNECTORS[config.connector](config.vit.n_features, config.gpt.n_embd)
        cross, n_embd = config.gpt.cross_every > 0, config.gpt.n_embd
        self.marker = nn.Embedding(1, n_embd) if cross else None
        self.order = nn.Embedding(config.max_images, n_embd) if config.max_images > 1 else None
        self.change = nn.Linear(n_embd, n_embd, bias=False) if config.max_images > 1 else None
        init_weights(nn.ModuleList([self.connector, self.marker, self.order, self.change]))
        self.vit.pool, self.vit.head = nn.Identity(), nn.Identity()  # patch features are needed here, not classes

    def encode(self, images, layouts=None):
        """(M, 3, H, W) pixels, or (M, T, 3, H, W) tiles with their layouts, or (M, N, n_features) features of the ViT
        -> (M, N, n_embd of the GPT) image tokens; zeros where a layout has no tile."""
        T = self.config.vit.max_tiles
        if images.dim() != (5 if T > 1 else 4) and images.dim() != 3:
            raise ValueError(f"images of shape {tuple(images.shape)} for a model of max_tiles={T}")
        features = images if images.dim() == 3 else self.vit.features(images, layouts)
        if T == 1:
            return self.connector(features)
        tiles = features.unflatten(1, (T, -1))  # (M, T, N, n_features)
        tokens = self.connector(tiles.flatten(0, 1)).unflatten(0, tiles.shape[:2])  # (M, T, N, C)
        return (tokens * tiles.any(dim=(2, 3))[:, :, None, None]).flatten(1, 2)

    def embed(self, images, ids, copies=1):
        """ids (B, T) -> x (B, T, C), the embeddings of words and images; and the memory of GPT.hidden() and its mask.
        Without cross-attention both are None. With it the memory is (B, Tm, C), Tm the image tokens of the row with the
        most images; the mask (B, 1, T, Tm) is None where every position may attend to everything. copies: so many rows
        in turn have the same placeholders, their images are given once, and memory and mask have B / copies rows."""
        is_image = ids == IMAGE_ID  # (B, T)
        if copies > 1:
            first, memory, memory_mask = self.embed(images, ids[::copies])
            words = self.gpt.embedding(ids.masked_fill(is_image, 0))  # (B, T, C)
            first = first.repeat_interleave(copies, dim=0)
            return torch.where(is_image[:, :, None], first, words), memory, memory_mask
        tokens = images if images.dim() == 3 else self.encode(images)  # (M, N, C)
        M, N, C = tokens.shape
        if is_image.sum() != (M if self.config.gpt.cross_every else M * N):
            raise ValueError(f"{is_image.sum()} placeholders for {M} images of {N} tokens each")
        x = self.gpt.embedding(ids.masked_fill(is_image, 0))  # (B, T, C)
        if M == 0:
            return x, None, None
        n = is_image.sum() // M  # placeholders of an image
        there = tokens.any(dim=-1) | (self.config.vit.max_tiles == 1)  # (M, N), False where a layout lacks a tile
        so_far = is_image.cumsum(dim=1)  # (B, T), how many placeholders stand up to here
        starts = is_image & ~F.pad(is_image, (1, -1))  # a placeholder without one right before it: the first of a group
        first = torch.where(starts, so_far - 1, 0).cummax(dim=1).values  # (B, T), the first one of the last group
        if self.order is not None:  # without it, attended images that stand side by side are a set
            places = (so_far - 1 - first)[is_image][::n] // n  # (M,)
            if places.max() >= self.config.max_images:
                raise SettingError(f"{places.max() + 1} images side by side, and max_images={self.config.max_images}")
            change = (tokens - tokens.roll(1, dims=0)) * (places > 0)[:, None, None]  # since the image before it
            tokens = tokens + self.order(places)[:, None] + self.change(change)  # (M, N, C)
        if self.marker is None:
            return x.masked_scatter(is_image[:, :, None], tokens.to(x.dtype)), None, None
        x = torch.where(is_image[:, :, None], self.marker.weight, x)
        K = int(so_far[:, -1].max())  # the most images of a row
        memory, seen = tokens.new_zeros(len(ids), K, N, C), is_image.new_zeros(len(ids), K, N)
        where = is_image.nonzero()[:, 0], so_far[is_image] - 1  # row by row, in order
        memory[where], seen[where] = tokens, there
        image = torch.arange(K, device=tokens.device)
        mask = (first[:, :, None] <= image) & (image < so_far[:, :, None])  # (B, T, K)
        mask = (mask[:, :, :, None] & seen[:, None]).flatten(2)  # (B, T, K * N)
        return x, memory.flatten(1, 2), None if mask.all() else mask[:, None]

    def hidden(self, images, ids, segments=None):
        """What the GPT's head takes, (B, T, C). Texts that share images in a row do not see each other, and the
        positions of each begin right after the images."""
        x, memory, memory_mask = self.embed(images, ids)
        mask = positions = None
        if segments is not None:
            same = segments[:, :, None] == segments[:, None, :]  # (B, T, T)
            mask = (same | (segments == 0)[:, None, :])[:, None]
            before = same.tril(-1).sum(dim=2)  # (B, T), tokens of the same text, or of the images, that stand before
            images_end = (segments == 0).sum(dim=1, keepdim=True)  # (B, 1)
            positions = before * (segments >= 0) + images_end * (segments > 0)  # (B, T), 0 for padding
        return self.gpt.hidden(x, None, memory, memory_mask, mask, positions)

    def caption_prompt(self, tokens):
        """(B, N, C) image tokens -> (B, T) ids that ask for a caption of each image: its placeholders, then bos."""
        B, N, _ = tokens.shape
        ids = torch.full((B, (1 if self.config.gpt.cross_every else N) + 1), IMAGE_ID, device=tokens.device)
        ids[:, -1] = self.config.bos_id
        return ids

    def forward(self, images, ids, targets=None, label_smoothing=0.0, segments=None):
        """(B, T) ids -> (B, T, vocab_size) logits and None. With targets (B, T), -1 = ignored: None and the loss, since
        the output layer then runs only where there is a target."""
        x = self.hidden(images, ids, segments)
        if targets is None:
            return self.gpt.head(x), None
        logits, where = self.gpt.logits_where(x, targets)
        loss = F.cross_entropy(logits, targets.flatten()[where], label_smoothing=label_smoothing)
        return None, loss + self.gpt.balance_loss()

    def log_probs(self, images, ids, mask=None, copies=1, temperature=1.0):
        """(B, T) ids -> (B, T): log p(ids[:, t] | images, ids[:, :t]); 0 at t = 0, placeholders and where not mask.
        copies: how many rows in turn are about the same images, which are given once. p is the softmax of
        logits / temperature."""
        wanted = ids != IMAGE_ID if mask is None else mask & (ids != IMAGE_ID)
        targets = ids.masked_fill(~wanted, IGNORE_INDEX)[:, 1:]  # (B, T - 1)
        x, memory, memory_mask = self.embed(images, ids, copies)
        memory_mask = None if memory_mask is None else memory_mask[:, :, :-1].repeat(1, 1, copies, 1)
        logits, where = self.gpt.logits_where(self.gpt.hidden(x[:, :-1], None, memory, memory_mask), targets)
        log_p = -F.cross_entropy(logits / temperature, targets.flatten()[where], reduction="none")  # (n,)
        return F.pad(log_p.new_zeros(targets.numel()).index_copy(0, where, log_p).view_as(targets), (1, 0))

    @torch.no_grad()
    def generate(self, images, ids=None, max_new_tokens=32, temperature=0.0, top_k=None, top_p=None, generator=None,
                 beams=1, length_penalty=1.0, num_captions=1):
        """What the model writes after ids: (B * num_captions, T) new ids, prompt by prompt, each row filled with eos_id
        after its end. ids: (B, T) prompts with placeholders; None asks for a caption of each image. Greedy unless
        temperature > 0 (samples) or beams > 1 (the best num_captions of them, best first; see GPT.beam_search())."""
        if num_captions > 1 and not temperature and beams < num_captions:
            raise ValueError(f"num_captions={num_captions} needs as many beams, or samples (temperature above 0)")
        c = self.config
        with evaluating(self):
            tokens = images if images.dim() == 3 else self.encode(images)
            ids = self.caption_prompt(tokens) if ids is None else ids
            room = c.gpt.block_size - ids.size(1) + 1  # the last token is not read again
            if room < 1:
                raise SettingError(f"{ids.size(1)} positions leave no room in block_size={c.gpt.block_size}")
            n = min(max_new_tokens, room)
            read = dict(zip(("embeddings", "memory", "memory_mask"), self.embed(tokens, ids)))
            if beams > 1 and not temperature:
                written, _ = self.gpt.beam_search(ids, n, beams, c.eos_id, length_penalty, **read)
                return written[:, :num_captions].flatten(0, 1)
            new = list(self.gpt.stream(ids, n, temperature, top_k, top_p, c.eos_id, generator, num_captions, **read))
        return torch.stack(new, dim=1) if new else ids[:, :0]

    @torch.no_grad()
    def attention_to_images(self, images, ids):
        """How much the model attends to each part of the images when it writes the token after each of ids (B, T).
        images: (B * k, 3, H, W), k per row. Returns (B, T, k * N), the mean over layers and heads, of sum 1."""
        blocks = self.gpt.decoder.blocks
        layers = [b.cross_attn for b in blocks if b.cross_attn is not None] or [b.attn for b in blocks]
        try:
            for attn in layers:
                attn.keep_weights = True
            with evaluating(self):
                self.hidden(images, ids)
            seen = torch.stack([attn.attn_weights.float().mean(dim=1) for attn in layers]).mean(dim=0)  # (B, T, Tk)
            if not self.config.gpt.cross_every:
                B, T, is_image = *ids.shape, ids == IMAGE_ID
                seen = seen.transpose(1, 2)[is_image].view(B, is_image[0].sum(), T).transpose(1, 2)  # placeholders
        finally:
            for attn in layers:
                attn.keep_weights, attn.attn_weights = False, None
        return seen / seen.sum(dim=-1, keepdim=True).clamp_min(1e-9)


class Conversation:
    """A conversation with an MLLM that goes on turn by turn. What was read is kept in the caches and not read again."""

    def __init__(self, model, images):
        """images: (M, 3, H, W), or (M, N, C) from encode(), all that the conversation is about, in the order of their
        placeholders."""
        with torch.no_grad(), evaluating(model):
            self.model, self.tokens = model, images if images.dim() == 3 else model.encode(images)  # (M, N, C)
        self.ids = torch.empty(1, 0, dtype=torch.long, device=self.tokens.device)
        self.caches = model.gpt.decoder.new_caches(model.config.gpt.block_size, self.tokens.shape[:2].numel())

    @torch.no_grad()
    def read(self, ids):
        """(1, T) ids that come next -> (1, T, vocab_size) logits; ValueError where block_size ends."""
        self.ids, start = torch.cat((self.ids, ids), dim=1), self.ids.size(1)
        each = 1 if self.model.gpt.config.cross_every else self.tokens.size(1)  # placeholders of an image
        with evaluating(self.model):
            x, memory, mask = self.model.embed(self.tokens[:(self.ids == IMAGE_ID).sum() // each], self.ids)  # a lookup
            mask = None if mask is None else mask[:, :, start:]
            return self.model.gpt.head(self.model.gpt.hidden(x[:, start:], self.caches, memory, mask))

    def answer(self, ids, temperature=0.0, generator=None):
        """Reads (1, T) ids of what the user says, then bos, and yields the ids of the answer as they are written, eos
        not among them. The answer ends where block_size ends."""
        c = self.model.config
        logits = self.read(F.pad(ids, (0, 1), value=c.bos_id))
        while self.ids.size(1) < c.gpt.block_size:
            token = sample_next(logits[:, -1], temperature, generator=generator)
            logits = self.read(token[:, None])
            if token == c.eos_id:
                return
            yield token.item()


@dataclass
class CLIPConfig:
    vit: ViTConfig = field(default_factory=lambda: ViTConfig(n_classes=0))
    vocab_size: int = 4096
    max_tokens: int = 32  # the longest text, bos and eos included
    n_layer: int = 2  # of the text encoder
    n_head: int = 4
    n_embd: int = 128
    n_shared: int = 128  # dimensions of the space that images and texts share
    dropout: float = 0.0
    pad_id: int = BPETokenizer.pad_id
    words: bool = False  # whether it also learns to predict, from a photo alone, the words of its captions

    @classmethod
    def from_dict(cls, d):
        return cls(**{**d, "vit": ViTConfig(**d["vit"])})  # d: dataclasses.asdict(config)


class CLIP(nn.Module):
    """A ViT and a text encoder that map a photo and its caption to nearby vectors of one space (Radford et al. 2021).
    Unlike the paper's, the text encoder reads both ways, and a text's vector is the mean of its tokens. With words, the
    words of all of a photo's captions are a label as well (Joulin et al. 2016): it tells more of a photo than one
    caption that is to be picked out."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.vit = ViT(c.vit)
        self.embedding = nn.Embedding(c.vocab_size, c.n_embd)
        self.position = LearnedPositionalEncoding(c.n_embd, c.max_tokens)
        self.drop = Dropout(c.dropout)
        self.encoder = TransformerEncoder(c.n_layer, c.n_embd, c.n_head, dropout=c.dropout)
        self.text_head = nn.Linear(c.n_embd, c.n_shared, bias=False)
        self.image_head = nn.Linear(c.vit.n_embd, c.n_shared)
        self.words_head = nn.Linear(c.vit.n_embd, c.vocab_size) if c.words else None
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # of one over the temperature
        init_weights(self)

    def embed_images(self, images, words=False):
        """(B, 3, H, W) pixels -> (B, n_shared) unit vectors; with words, and (B, vocab_size) logits"""
        pooled = self.vit.pool(self.vit.features(images))  # (B, C)
        vectors = F.normalize(self.image_head(pooled).float(), dim=-1)
        return (vectors, self.words_head(pooled)) if words else vectors

    def embed_texts(self, ids):
        """(B, T) ids, padded with pad_id -> (B, n_shared) unit vectors"""
        mask = padding_mask(ids, self.config.pad_id)  # (B, 1, 1, T)
        x = self.encoder(self.drop(self.position(self.embedding(ids))), mask)
        counts = mask[:, 0].transpose(1, 2)  # (B, T, 1)
        return F.normalize(self.text_head((x * counts).sum(dim=1) / counts.sum(dim=1)).float(), dim=-1)

    def logits(self, images, texts):
        """(n, d) and (m, d) unit vectors -> (n, m): their cosines over the temperature, which is at least 0.01"""
        return self.log_scale.exp().clamp(max=100.0) * images @ texts.T

    def loss(self, images, texts):
        """(B, d) unit vectors of photos and of their texts -> the mean of two cross-entropies: of finding each photo's
        text among all texts, and each text's photo among all photos."""
        logits, pairs = self.logits(images, texts), torch.arange(len(images), device=images.device)  # (B, B), (B,)
        return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2

    def forward(self, images, ids):
        """(B, 3, H, W) pixels, and (B, T) ids of their texts -> what loss() takes; and the logits of embed_images(), or
        None without words"""
        if self.words_head is None:
            return self.embed_images(images), self.embed_texts(ids), None
        vectors, words = self.embed_images(images, words=True)
        return vectors, self.embed_texts(ids), words
