"""
The tests: plain functions and bare asserts, in the order of model.py. Each fails if what its name says breaks.

    python test_model.py            # all of them; ends with `N passed, M failed`
    python test_model.py bpe        # those with "bpe" in their name
    python test_model.py --all      # the long ones too, of hard use: a quarter of an hour
    pytest test_model.py            # works as well, and is not needed
"""

import ast
import builtins
import contextlib
import copy
import csv
import hashlib
import http.server
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import types
import unicodedata
import warnings
import zipfile
import zlib
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import config
import gpt
import mllm
import model
import prepare_cifar
import prepare_flickr8k
import prepare_shakespeare
import scst
import vit
from config.tools import conversations, data, judges, metrics, pictures, pretrained, questions, shapes
from config.tools.data import to_pixels
from config.tools.metrics import bleu, cider, ends_badly, words_of
from model import (
    CLIP, CONNECTORS, GPT, IMAGE_ID, LAYOUTS, MLLM, AttentionPooling, BPETokenizer, CharTokenizer, CLIPConfig,
    Conversation, DecoderBlock, Dropout, EncoderBlock, FeedForward, GPT2Tokenizer, GPTConfig, KVCache, LayerNorm,
    LearnedPositionalEncoding, MixtureOfExperts, MLLMConfig, MultiHeadAttention, PatchEmbedding, PixelShuffleConnector,
    RMSNorm, RotaryEmbedding, SinusoidalPositionalEncoding, Transformer, TransformerDecoder, TransformerEncoder, ViT,
    ViTConfig, best_layout, causal_mask, padding_mask, sample_next, scaled_dot_product_attention, tokenizer_from_state,
)


def setup_function():
    """Before each test (pytest knows the name): the same random numbers; one thread, as the models are tiny."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


def close(a, b, atol=1e-5):
    """Assert that two tensors have the same shape and values; NaN equals nothing."""
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    assert torch.allclose(a, b, atol=atol, rtol=1e-4), f"they differ by up to {(a - b).abs().max():.2g}"


def raises(exception, text, f, *args):
    """Assert that f(*args) raises exception (SystemExit too), or one of several, with text in its message."""
    try:
        f(*args)
    except exception as e:
        assert text in str(e), f"{text!r} is not in {str(e)!r}"
    else:
        raise AssertionError(f"no error with {text!r}")


def shake(module, std=0.3):
    """module in eval mode, its weights far from where they start: they are so small there that much goes unnoticed."""
    for p in module.parameters():
        p.data += std * torch.randn_like(p)
    return module.eval()


def gradients(output, *tensors):
    """Of an uneven sum of output, so that no two of its numbers count alike."""
    return torch.autograd.grad((output * torch.linspace(-1, 2, output.numel()).view_as(output)).sum(), tensors)


def unreached(model, loss_of):
    """The parameters that loss_of() gives no gradient, or one that is not finite, once no weight is 0."""
    shake(model, 0.1)
    loss_of().backward()
    return [n for n, p in model.named_parameters() if p.grad is None or not (p.grad.any() and p.grad.isfinite().all())]


def fit(model, loss_of, steps, lr):
    """The loss after that many steps of Adam on loss_of()."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
    return loss.item()


@torch.no_grad()
def greedy(logits_of, ids, n):
    """ids (B, T) and n more, each the likeliest of a full pass without cache."""
    for _ in range(n):
        ids = torch.cat((ids, logits_of(ids)[:, -1:].argmax(dim=-1)), dim=1)
    return ids


def moved(a, b):
    """How far the logits or features (1, T, C) differ, by position."""
    return (a - b).abs().amax(dim=-1)[0]


# ---------------------------------------------------------------------------------------------------------------------
# 1. tokenizers

CORPUS = ["the cat sat on the mat, the cat's hat\n", "that's the hat   that the cat had", "naïve café — naïve café 🙂"]


def test_char_tokenizer_round_trip_and_unknown_character():
    tokenizer = CharTokenizer("hello\n")
    assert tokenizer.vocab_size == 5 and tokenizer.encode("\neh") == [0, 1, 2]
    assert tokenizer.decode(tokenizer.encode("hole\nhell")) == "hole\nhell"
    raises(ValueError, "'ß'", tokenizer.encode, "heßo")


def test_bpe_round_trip_loses_nothing_and_makes_no_special_id():
    tokenizer = BPETokenizer.train(CORPUS, 300)
    for text in ["", " ", "  two   spaces  ", "a\n\n\tb\r\n", "\x00\x01\x1c\x7f\u2028", "Ünïcödé e\u0301", "👩‍👩‍👧 🙂",
                 "日本語", "it's '' 'tis", "_a_1²", "<image>", "<pad><bos></s><|endoftext|>", *CORPUS]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text, repr(text)
        assert all(3 <= i < tokenizer.vocab_size for i in ids), repr(text)


def test_bpe_pieces_and_merges_worked_out_by_hand():
    pieces = ["that", "'s", "  ", " the", " hat", "!", "\n", "ok"]
    assert BPETokenizer.pieces.findall("".join(pieces)) == pieces
    # pieces: hug, _hug, _pug, _hugs. Pairs: ug 4, hu 3, _h 2, _p pu gs 1  ->  ug
    # then h+ug 3, _h 2, the rest 1  ->  hug; then _+hug 2, the rest 1  ->  _hug; then no pair occurs twice
    tokenizer = BPETokenizer.train(["hug hug pug hugs"], 400)
    assert tokenizer.bytes[259:] == [b"ug", b"hug", b" hug"] and tokenizer.vocab_size == 262
    assert tokenizer.encode("hugs") == [260, 3 + ord("s")]


def test_gpt2_tokenizer_cuts_and_numbers_as_gpt2_does():
    """The numbers are those of OpenAI's vocabulary: bytes that print come first."""
    tokenizer = GPT2Tokenizer([(71, 68), (75, 75), (256, 257), (258, 78), (220, 258)])  # he, ll, hell, hello, _hell
    assert [tokenizer.encode(c)[0] for c in "!aé \n"] == [0, 64, 127, 220, 198]
    assert tokenizer.encode("hello") == [259] and tokenizer.encode("a hell") == [64, 260]
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (262, 263, 264, 265)
    pieces = ["don", "'t", " DON", "'", "T", " ½²", "x", "_", "Ⅳ〇", "一", " \x1c", "ée", "\u0301", "  ", " 3", ".",
              "14", "\u3000\t\t"]
    assert tokenizer.pieces.findall("".join(pieces)) == pieces
    letter, number = (re.compile(tokenizer.pieces.pattern.split("|")[i][2:]) for i in (6 + 1, 6 + 2))
    for c in map(chr, range(sys.maxunicode + 1)):
        kind = unicodedata.category(c)[0]
        assert (bool(letter.fullmatch(c)), bool(number.fullmatch(c))) == (kind == "L", kind == "N"), repr(c)
    for text in CORPUS:
        assert tokenizer.decode([*tokenizer.encode(text), tokenizer.eos_id]) == text
    again = tokenizer_from_state(tokenizer.state())
    assert type(again) is GPT2Tokenizer and again.encode("hello") == [259]


def test_bpe_training_and_encoding_equal_a_naive_reference():
    def merge(ids, pair, new):
        i = next((i for i in range(len(ids) - 1) if tuple(ids[i:i + 2]) == pair), None)
        return ids if i is None else ids[:i] + [new] + merge(ids[i + 2:], pair, new)

    rng = np.random.default_rng(0)
    for letters in ("ab", "abc", "abcde"):  # few letters: many ties and many overlaps such as aaa
        words = ["".join(rng.choice(list(letters), rng.integers(1, 9))) for _ in range(60)]
        pieces, merges = [[3 + b for b in word.encode()] for word in words], []
        for new in range(259, 320):
            pairs = Counter(pair for piece in pieces for pair in zip(piece, piece[1:]))
            best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
            if best is None or pairs[best] < 2:
                break
            merges.append(best)
            pieces = [merge(piece, best, new) for piece in pieces]
        tokenizer = BPETokenizer.train(words, 320)
        assert tokenizer.merges == merges and [tokenizer.encode(word) for word in words] == pieces


def test_bpe_vocab_size_and_reserved_ids():
    tokenizer = BPETokenizer.train(CORPUS, 270)
    assert tokenizer.vocab_size == 270 and max(i for text in CORPUS for i in tokenizer.encode(text)) == 269
    assert BPETokenizer.train(CORPUS, 259).encode("é") == [3 + 0xC3, 3 + 0xA9]  # bytes alone
    assert [tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id] == [0, 1, 2]
    assert tokenizer.decode([1, *tokenizer.encode("the"), 1, *tokenizer.encode(" cat"), 2, 0]) == "the cat"
    raises(ValueError, "259", BPETokenizer.train, CORPUS, 258)


def test_tokenizers_come_back_from_their_state_through_json():
    for tokenizer in (CharTokenizer("".join(CORPUS)), BPETokenizer.train(CORPUS, 300)):
        back = tokenizer_from_state(json.loads(json.dumps(tokenizer.state())))
        assert type(back) is type(tokenizer) and back.vocab_size == tokenizer.vocab_size
        assert all(back.encode(text) == tokenizer.encode(text) for text in CORPUS)
    raises(ValueError, "tokenizer 'bpe': char, byte_bpe", tokenizer_from_state, {"kind": "bpe", "merges": []})


# ---------------------------------------------------------------------------------------------------------------------
# 2. attention


def test_masks_are_true_where_a_query_may_look():
    assert causal_mask(2, 4).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]  # the last query sees the last key
    mask = padding_mask(torch.tensor([[5, 6, 0], [7, 0, 0]]), 0)
    assert mask.dtype == causal_mask(2, 4).dtype == torch.bool
    assert mask.int().tolist() == [[[[1, 1, 0]]], [[[1, 0, 0]]]]  # (B, 1, 1, T)


def test_attention_function_equals_torch():
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 6, 8), torch.randn(2, 3, 6, 8)
    for mask in (None, causal_mask(4, 6), torch.tensor([1, 1, 0, 1, 0, 1]).bool().expand(2, 1, 1, 6)):
        out, weights = scaled_dot_product_attention(q, k, v, mask)
        close(out, F.scaled_dot_product_attention(q, k, v, mask))
        close(weights.sum(dim=-1), torch.ones(2, 3, 4))
        assert mask is None or not weights.masked_select(~mask).any()
        dropped, same = scaled_dot_product_attention(q, k, v, mask, dropout_p=0.5)
        close(same, weights)  # the weights are those before dropout
        assert not torch.allclose(dropped, out)


def test_attention_row_that_sees_nothing_gives_zeros_and_finite_gradients():
    mask = torch.ones(2, 1, 4, 4).bool()
    mask[1, :, 2] = False
    q = torch.randn(2, 3, 4, 8, requires_grad=True)
    out, weights = scaled_dot_product_attention(q, q.detach(), q.detach(), mask)
    assert not out[1, :, 2].any() and not weights[1, :, 2].any() and not gradients(out, q)[0][1, :, 2].any()
    for fused in (True, False):
        layer, x = shake(MultiHeadAttention(16, 2, fused=fused)), torch.randn(2, 4, 16, requires_grad=True)
        out = layer(x, mask=mask)
        close(out[1, 2], layer.proj.bias)
        assert all(g.isfinite().all() for g in gradients(out, x, *layer.parameters()))


def test_dropout_acts_in_training_alone():
    x = torch.randn(1, 6, 16)
    for layer in (FeedForward(16, dropout=0.5), shake(EncoderBlock(16, 2, dropout=0.5)).train()):
        assert not torch.allclose(layer(x), layer(x)) and layer.eval()(x).equal(layer(x))
    dropped = Dropout(0.25)(torch.ones(100, 100))
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(4 / 3).item()} and abs(dropped.mean() - 1) < 0.05


def test_rotary_keeps_norms_and_sees_distances_alone():
    rotary, q, k = RotaryEmbedding(8, 32), torch.randn(8), torch.randn(8)
    turned_q, turned_k = (rotary(x.expand(1, 1, 32, 8))[0, 0] for x in (q, k))  # the same vector at each position
    close(turned_q.norm(dim=-1), q.norm().expand(32))
    products = turned_q @ turned_k.T
    for distance in (-7, 0, 3):
        close(products.diagonal(distance), products.diagonal(distance)[:1].expand(32 - abs(distance)), 1e-4)
    assert (products[0, 1:] - products[0, 0]).abs().min() > 1e-3  # another distance, another product
    x = torch.randn(2, 3, 20, 8)
    close(rotary(x[:, :, 5:9], start=5), rotary(x)[:, :, 5:9])
    turned = RotaryEmbedding(4, 8)(torch.tensor([[1.0, 1, 0, 0]]), start=3)  # by 3 and 3 / 10000^(2/4)
    close(turned, torch.tensor([[math.cos(3), math.cos(0.03), math.sin(3), math.sin(0.03)]]))
    raises(ValueError, "even", RotaryEmbedding, 7, 32)


def test_yarn_stretches_slow_pairs_alone():
    """Peng et al. 2023, section 3.2, with alpha = 0.5 and beta = 2: of 32 channels, with L = 256 and base 10,000,
    pair i turns 40.7 / 10^(i / 4) times in L: more than twice keeps its frequency (up to pair 5), less than half is
    divided by the factor (from pair 8), the rest is in between."""
    plain, yarn = RotaryEmbedding(32, 1024), RotaryEmbedding(32, 1024, yarn=4.0, trained_len=256)
    close(RotaryEmbedding(32, 64, yarn=1.0, trained_len=16).cos, plain.cos[:64])
    size = 0.1 * math.log(4) + 1  # the square root of 1 / t, section 3.4
    close((yarn.cos ** 2 + yarn.sin ** 2).sqrt(), torch.tensor(size).expand(1024, 32))
    angle = lambda rotary, i: math.atan2(rotary.sin[1, i], rotary.cos[1, i])  # of pair i, at position 1
    for i in range(16):
        turns, theta = 256 / (2 * math.pi) / 10 ** (i / 4), 10 ** (-i / 4)
        ramp = min(max((turns - 0.5) / 1.5, 0), 1)
        close(torch.tensor(angle(plain, i)), torch.tensor(theta))
        close(torch.tensor(angle(yarn, i)), torch.tensor((1 - ramp) * theta / 4 + ramp * theta))
    assert all(abs(angle(yarn, i) / 10 ** (-i / 4) - 1) < 1e-3 for i in range(6))
    assert all(abs(angle(yarn, i) * 4 / 10 ** (-i / 4) - 1) < 1e-3 for i in range(8, 16))
    raises(ValueError, "yarn=2.0 stretches rotary", lambda: tiny_gpt(positions="learned", yarn=2.0))
    ids, gpt = torch.randint(20, (1, 16)), shake(tiny_gpt())
    stretched = tiny_gpt(block_size=64, yarn=4.0, trained_len=16)
    stretched.load_state_dict(gpt.state_dict())
    assert (gpt(ids)[0] - stretched(ids)[0]).abs().max() > 1e-4 and stretched(ids.repeat(1, 4))[0].isfinite().all()


def copy_attention(ours, theirs):
    """The weights of a torch.nn.MultiheadAttention."""
    ours.qkv.load_state_dict({"weight": theirs.in_proj_weight, "bias": theirs.in_proj_bias})
    ours.proj.load_state_dict(theirs.out_proj.state_dict())


def test_multi_head_attention_equals_torch_nn():
    theirs = shake(nn.MultiheadAttention(16, 4, batch_first=True))
    x, context, some = torch.randn(2, 5, 16), torch.randn(2, 7, 16), torch.tensor([1, 1, 0, 1, 1]).bool().expand(5, 5)
    for fused in (True, False):
        ours = MultiHeadAttention(16, 4, fused=fused)
        copy_attention(ours, theirs)
        close(ours(x), theirs(x, x, x)[0])
        close(ours(x, context), theirs(x, context, context)[0])
        close(ours(x, causal=True), theirs(x, x, x, attn_mask=~causal_mask(5, 5))[0])
        close(ours(x, mask=some, causal=True), theirs(x, x, x, attn_mask=~(some & causal_mask(5, 5)))[0])
    raises(ValueError, "n_embd=10 is not a multiple of n_head=4", MultiHeadAttention, 10, 4)


def test_hand_written_attention_equals_fused_in_outputs_and_gradients():
    layer, mask = shake(MultiHeadAttention(16, 2, rotary=RotaryEmbedding(8, 12))), torch.rand(2, 1, 6, 6) > 0.4
    past, x = torch.randn(2, 4, 16), torch.randn(2, 6, 16, requires_grad=True)
    for chosen, causal, cached in [(None, 0, 0), (mask, 0, 0), (None, 1, 0), (mask, 1, 0), (None, 1, 1)]:
        results = []
        for layer.fused in (True, False):
            cache = KVCache(10) if cached else None
            with torch.no_grad():
                layer(past, causal=True, cache=cache)  # with a cache, 6 queries see 4 + 6 keys
            out = layer(x, mask=chosen, causal=bool(causal), cache=cache)
            results.append((out, *gradients(out, x, *layer.parameters())))
        for a, b in zip(*results):
            close(a, b, 1e-4)


def test_attention_in_bfloat16_is_close_to_float32():
    layer, x = MultiHeadAttention(32, 4), torch.randn(2, 9, 32)
    expected = layer(x, causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        close(layer(x, causal=True).float(), expected, 0.02)
    close(layer.bfloat16()(x.bfloat16(), causal=True).float(), expected, 0.02)


def test_cached_attention_equals_one_full_pass():
    layer, x = shake(MultiHeadAttention(16, 2, rotary=RotaryEmbedding(8, 10))), torch.randn(2, 10, 16)
    for sizes in ([1] * 10, [4, 1, 3, 2]):
        cache = KVCache(10)
        parts = [layer(part, causal=True, cache=cache) for part in x.split(sizes, dim=1)]
        close(torch.cat(parts, dim=1), layer(x, causal=True))
    context, lost, mask = torch.randn(2, 7, 16), torch.full((2, 7, 16), math.nan), torch.arange(7)[None] < 5
    for room in (7, 9):  # in cross-attention the cache keeps the context, which is read once
        cache = KVCache(room)
        parts = layer(x[:, :1], context, mask, cache=cache), layer(x[:, 1:], lost, mask, cache=cache)
        close(torch.cat(parts, dim=1), layer(x, context, mask))


# ---------------------------------------------------------------------------------------------------------------------
# 3. layers


def test_norms_equal_torch_in_values_and_gradients():
    x = (3 * torch.randn(2, 5, 16) + 1).requires_grad_()
    layer, centred = shake(LayerNorm(16)), x - x.mean(dim=-1, keepdim=True)
    close(layer(x), centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias)
    for ours, theirs in ((layer, nn.LayerNorm(16)), (RMSNorm(16), nn.RMSNorm(16, eps=1e-5))):
        theirs.load_state_dict(shake(ours).state_dict())
        close(ours(x), theirs(x))
        for a, b in zip(gradients(ours(x), x, *ours.parameters()), gradients(theirs(x), x, *theirs.parameters())):
            close(a, b)


def test_feed_forward_equals_its_formula():
    x = torch.randn(2, 5, 96)
    for activation in ("relu", "gelu", "swiglu"):
        layer = shake(FeedForward(96, activation=activation), 0.1)
        h = x @ layer.up.weight.T + layer.up.bias
        if activation == "swiglu":
            gate, h = h.chunk(2, dim=-1)
            h = gate * gate.sigmoid() * h
        else:
            h = h.clamp(min=0) if activation == "relu" else h * (1 + torch.erf(h / math.sqrt(2))) / 2
        close(layer(x), h @ layer.proj.weight.T + layer.proj.bias, 1e-4)
        assert abs(sum(p.numel() for p in layer.parameters()) / (2 * 96 * 4 * 96) - 1) < 0.02  # swiglu's as well
    raises(ValueError, "'tanh'", FeedForward, 24, None, "tanh")


def test_experts_equal_a_slow_loop_and_share_the_work():
    x = torch.randn(2, 7, 12)
    for n, k in ((3, 1), (3, 2), (3, 3), (1, 1)):
        layer = shake(MixtureOfExperts(12, n, k), 0.5).train()
        slow = torch.zeros_like(x)
        for b, t in ((b, t) for b in range(2) for t in range(7)):
            p = (layer.router.weight @ x[b, t]).softmax(dim=0)
            best = sorted(range(n), key=lambda i: -p[i])[:k]
            for i in best:
                share = p[i] / sum(p[j] for j in best) if k > 1 else p[i]
                slow[b, t] += share * layer.experts[i](x[b, t])
        close(layer(x), slow, 1e-6)
        choices = [sorted(range(n), key=lambda i: -row[i])[:k] for row in layer.router(x).flatten(0, 1).tolist()]
        counts = Counter(i for best in choices for i in best)
        close(layer.load, torch.tensor([counts[i] / (14 * k) for i in range(n)]))
        mean_p = layer.router(x).softmax(dim=-1).mean(dim=(0, 1))
        close(layer.balance, n * (layer.load * mean_p).sum())
        layer(x).square().sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in layer.experts.parameters())
        assert n == 1 or layer.router.weight.grad.abs().sum() > 0  # from the loss itself, with k = 1 as well
    dense, mixture = shake(FeedForward(12), 0.5), MixtureOfExperts(12, 4, 4)
    for expert in mixture.experts:
        expert.load_state_dict(dense.state_dict())
    close(mixture(x), dense(x), 1e-6)
    raises(ValueError, "experts_per_token=3", MixtureOfExperts, 12, 2, 3)
    model, ids = shake(tiny_gpt(n_experts=4, experts_per_token=2)).train(), torch.randint(20, (8, 17))
    loss, plain = model(ids[:, :-1], ids[:, 1:])[1], model.eval()(ids[:, :-1], ids[:, 1:])[1]
    balance = sum(block.ff.balance for block in model.decoder.blocks) / 2
    close(loss, plain + 0.01 * balance)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    assert model.generate(ids[:1, :4], 5, temperature=0).equal(greedy(lambda ids: model(ids)[0], ids[:1, :4], 5))


def test_added_positions_by_hand_and_from_a_start():
    added = SinusoidalPositionalEncoding(4, 8)(torch.ones(1, 8, 4))[0] - 1
    close(added[0], torch.tensor([0.0, 1.0, 0.0, 1.0]))
    close(added[3], torch.tensor([math.sin(3), math.cos(3), math.sin(0.03), math.cos(0.03)]))  # 10000^(2/4) = 100
    learned, x = shake(LearnedPositionalEncoding(6, 12)), torch.randn(2, 10, 6)
    close(learned(x), x + learned.positions[:10])
    for positions in (SinusoidalPositionalEncoding(6, 12), learned):
        close(positions(x[:, 4:7], start=4), positions(x)[:, 4:7])


# ---------------------------------------------------------------------------------------------------------------------
# 4. blocks and 5. stacks


def copy_block(ours, theirs, *norms):
    """The weights of a torch.nn.TransformerEncoderLayer or -DecoderLayer; norms: ours, in their order."""
    copy_attention(ours.attn, theirs.self_attn)
    layers = [(ours.ff.up, theirs.linear1), (ours.ff.proj, theirs.linear2)]
    for mine, other in layers + [(norm, getattr(theirs, f"norm{i}")) for i, norm in enumerate(norms, 1)]:
        mine.load_state_dict(other.state_dict())


def test_transformer_encoder_equals_torch_nn():
    x, real = torch.randn(2, 6, 16), torch.arange(6) < torch.tensor([[6], [4]])
    for activation in ("relu", "gelu"):
        block = nn.TransformerEncoderLayer(16, 2, 64, 0.0, activation, batch_first=True, norm_first=True)
        theirs = shake(nn.TransformerEncoder(block, 2, nn.LayerNorm(16), enable_nested_tensor=False))
        theirs.train()  # in eval mode torch takes a fast path that zeroes padded positions
        ours = TransformerEncoder(2, 16, 2, activation=activation)
        for mine, other in zip(ours.blocks, theirs.layers):
            copy_block(mine, other, mine.norm1, mine.norm2)
        ours.norm.load_state_dict(theirs.norm.state_dict())
        close(ours.blocks[0](x), theirs.layers[0](x), 1e-4)
        close(ours(x), theirs(x), 1e-4)
        close(ours(x, real[:, None, None, :])[real], theirs(x, src_key_padding_mask=~real)[real], 1e-4)


def test_decoder_block_equals_torch_nn_and_has_cross_attention_only_if_asked():
    theirs = shake(nn.TransformerDecoderLayer(16, 2, 64, 0.0, "gelu", batch_first=True, norm_first=True))
    ours, x, memory = DecoderBlock(16, 2, cross=True), torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    copy_block(ours, theirs, ours.norm1, ours.cross_norm, ours.norm2)
    copy_attention(ours.cross_attn, theirs.multihead_attn)
    real = torch.arange(7) < torch.tensor([[7], [3]])
    expected = theirs(x, memory, tgt_mask=~causal_mask(5, 5), memory_key_padding_mask=~real)
    close(ours(x, memory, memory_mask=real[:, None, None, :]), expected, 1e-4)
    assert any("cross" in name for name in ours.state_dict())
    assert not any("cross" in name for name in DecoderBlock(16, 2).state_dict())


def test_decoder_output_does_not_depend_on_later_or_masked_positions():
    decoder, x = shake(TransformerDecoder(2, 16, 2)), torch.randn(1, 8, 16)
    changed = torch.cat((x[:, :3], torch.randn(1, 1, 16), x[:, 4:]), dim=1)
    by = moved(decoder(x), decoder(changed))
    assert by[:3].max() == 0 and by[3:].min() > 1e-4
    mask = torch.arange(8)[None] != 3
    assert moved(decoder(x, mask=mask), decoder(changed, mask=mask))[4:].max() == 0


def test_initial_weights_keep_the_size_of_what_they_are_given_and_add_nothing_to_the_residual_stream():
    model = tiny_gpt(vocab_size=500, n_embd=64, n_layer=8)
    for name, p in model.named_parameters():
        if name.endswith("proj.weight"):
            assert not p.any(), name
        elif p.ndim == 2:
            wanted = 0.02 if name == "embedding.weight" else 1 / 8
            assert abs(p.std().item() / wanted - 1) < 0.1, name
    x = torch.randn(2, 16, 64)
    close(model.decoder(x), model.decoder.norm(x))


def tiny_transformer(n_embd=32, dropout=0.0):
    return Transformer(vocab_size=11, n_layer=2, n_embd=n_embd, n_head=4, max_len=16, dropout=dropout)


def test_transformer_padding_does_not_leak():
    model, source, target = shake(tiny_transformer()), torch.randint(3, 11, (2, 5)), torch.randint(3, 11, (2, 4))
    close(model(F.pad(source, (0, 3)), F.pad(target, (0, 2)))[:, :4], model(source, target), 1e-4)
    padded = F.pad(source, (2, 3)), F.pad(target, (2, 1))  # the first two positions of the target see nothing at all
    before = model(*padded)
    model.embedding.weight.data[0] = torch.randn(32)  # other content where padding is, and another logit for padding
    close(model(*padded)[:, 2:6, 1:], before[:, 2:6, 1:])
    assert before.isfinite().all()


def test_transformer_learns_to_reverse_sequences():
    def batch(n, held_out=False):
        """source: 2 to 5 symbols, padded with 0; target: bos (1), the symbols in reverse order, eos (2), padded."""
        length, place = torch.randint(2, 6, (n, 1)), torch.arange(5)
        source = torch.randint(3, 11, (n, 5)) * (place < length)
        backward = source.gather(1, (length - 1 - place).clamp(min=0)) * (place < length)
        target = F.pad(F.pad(backward, (1, 0), value=1), (0, 1)).scatter(1, length + 1, 2)
        chosen = (source.sum(dim=1) % 5 == 0) == held_out  # a fifth of all sequences is never trained on
        return source[chosen], target[chosen]

    def loss_of():
        source, target = batch(128)
        return F.cross_entropy(model(source, target[:, :-1]).flatten(0, 1), target[:, 1:].flatten(), ignore_index=0)

    model = tiny_transformer(n_embd=64)
    fit(model, loss_of, 300, 2e-3)
    source, target = batch(1000, held_out=True)
    out = greedy(lambda ids: model.eval()(source, ids), torch.ones(len(source), 1, dtype=torch.long), 6)
    assert out.shape == target.shape
    assert ((out == target) | (target == 0)).all(dim=1).float().mean() >= 0.9  # what follows the end does not count


# ---------------------------------------------------------------------------------------------------------------------
# 6. vision


def tiny_vit(**changes):
    return ViT(ViTConfig(**dict(image_size=8, patch_size=4, n_layer=2, n_head=2, n_embd=16) | changes))


def photos(n, size=8):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)


def test_tiles_hold_the_image_and_nothing_else():
    pixels = np.random.default_rng(0).integers(0, 256, (30, 90, 3), dtype=np.uint8)
    (tiles,), (layout,) = data.to_images([Image.fromarray(pixels)], 30, 4)  # (4, 3, 30, 30)
    assert LAYOUTS[layout] == (1, 3) and not tiles[3].any()
    assert torch.equal(data.join_tiles(tiles, layout), torch.from_numpy(pixels).permute(2, 0, 1))
    (tiles,), (layout,) = data.to_images([Image.new("RGB", (50, 120), (9, 8, 7))], 40, 4)
    joined = data.join_tiles(tiles, layout)
    assert LAYOUTS[layout] == (3, 1) and joined.shape == (3, 120, 40)
    assert (joined[:, :96] == torch.tensor([9, 8, 7])[:, None, None]).all() and not joined[:, 96:].any()
    (plain,), (layout,) = data.to_images([Image.new("RGB", (50, 120))], 40)
    assert plain.shape == (3, 40, 40) and layout == 0 and data.join_tiles(plain, layout) is plain


def test_best_layout_is_the_one_that_reduces_least_and_pads_least():
    """By brute force, on whole pixels: tiles of 1,000 pixels, and images that are larger and smaller than these."""
    rng, seen = np.random.default_rng(0), Counter()
    for _ in range(200):
        width, height = (int(x) for x in np.exp(rng.uniform(math.log(100), math.log(9000), 2)))
        costs = []
        for i, (rows, columns) in enumerate(LAYOUTS):
            scale = min(1000 * columns / width, 1000 * rows / height)
            padding = 1e6 * rows * columns - (width * scale) * (height * scale)
            costs.append((max(0, 1 - scale), round(padding, 3), rows * columns, i))
        least = [c for c in costs if abs(c[0] - min(costs)[0]) < 1e-12]
        right = min(least, key=lambda c: c[1:])[3]
        assert best_layout(width / 1000, height / 1000, 4) == right, (width, height)
        seen[LAYOUTS[right]] += 1
    assert {best_layout(side / 48, side / 48, 4) for side in range(1, 49)} == {0}  # a small square stays on one tile
    assert len(seen) == 8 and set(LAYOUTS) == set(seen) and best_layout(9, 3, 1) == LAYOUTS.index((1, 1))
    assert [LAYOUTS[best_layout(w, h, 4)] for w, h in ((9, 3), (3, 9), (9, 9), (1, 1), (9, 1), (5, 3))] == [
        (1, 3), (3, 1), (2, 2), (1, 1), (1, 4), (2, 2)]


def test_tiles_are_plain_images_until_their_gates_open_and_empty_ones_change_nothing():
    sizes = dict(image_size=16, patch_size=8, n_layer=3, n_head=2, n_embd=16, n_classes=0, stem="patch")
    plain = shake(ViT(ViTConfig(**sizes)))
    tiled = ViT(ViTConfig(**sizes, max_tiles=4)).eval()
    tiled.load_state_dict(tiled.state_dict() | plain.state_dict())
    images, layouts = photos(20, size=16).view(5, 4, 3, 16, 16), torch.tensor([0, 3, 5, 1, 6])  # 1, 4, 4, 2 and 3 tiles
    n = [rows * columns for rows, columns in (LAYOUTS[i] for i in layouts)]
    features = tiled.features(images, layouts)  # (5, 4 * 4, 16)
    for i, tiles in enumerate(images):
        close(features[i, :4 * n[i]], plain.features(tiles[:n[i]]).flatten(0, 1))
        assert not features[i, 4 * n[i]:].any()
    other = images.clone()
    for i in range(5):
        other[i, n[i]:] = photos(4 - n[i], size=16)
    model = shake(MLLM(MLLMConfig(ViTConfig(**sizes, max_tiles=4, across_layer=1, keep=(0, 2)),
                                  tiny_gpt_config(cross_every=1), "mlp")))
    ids = torch.tensor([[IMAGE_ID, 1, 5, 6, 7]] * 5)
    assert model.vit.features(images, layouts).shape == (5, 16, 48) and model.config.n_image_tokens(16) == 16
    logits = [model(model.encode(some, layouts), ids)[0] for some in (images, other)]
    close(*logits)
    assert (model(model.encode(images, torch.full((5,), 3)), ids)[0] - logits[0]).abs().amax(dim=(1, 2))[0] > 1e-4
    for name in ("tiles_before", "tiles_after"):  # open gates tell places and layouts from each other
        tiles = images[:1, :1].expand(2, 4, 3, 16, 16)
        getattr(tiled, name).gate.data.fill_(1.0)
        seen = tiled.features(tiles, torch.tensor([3, 5])).view(2, 4, 4, 16)
        assert (seen[0, 0] - seen[0, 1]).abs().max() > 1e-4 and (seen[0, 0] - seen[1, 0]).abs().max() > 1e-4
        getattr(tiled, name).gate.data.fill_(0.0)
    model.train()
    model(model.encode(images, layouts), ids, ids.masked_fill(ids == IMAGE_ID, -1))[1].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    raises(ValueError, "max_tiles above 1", lambda: MLLMConfig(ViTConfig(max_tiles=4), tiny_gpt_config()))


def test_patch_embedding_equals_unfold_and_a_matrix():
    layer, images = shake(PatchEmbedding(4, 16)), torch.randn(2, 3, 8, 12)
    patches = F.unfold(images, 4, stride=4).transpose(1, 2)  # (B, N, 3 * 4 * 4), row by row
    close(layer(images), patches @ layer.stem.weight.flatten(1).T + layer.stem.bias, 1e-4)
    assert PatchEmbedding(8, 16, "conv")(torch.randn(2, 3, 16, 32)).shape == (2, 8, 16)
    for stem in ("patch", "conv", "residual"):
        raises(ValueError, "8x10", PatchEmbedding(4, 16, stem), torch.zeros(1, 3, 8, 10))
    raises(ValueError, "not 2, 4, 8", PatchEmbedding, 6, 16, "conv")
    raises(ValueError, "'dense'", PatchEmbedding, 8, 16, "dense")


def test_attention_pooling_is_a_weighted_mean_of_each_head():
    layer, x = shake(AttentionPooling(6, 2)), torch.randn(3, 5, 6)
    weights = (x @ layer.score.weight.T).softmax(dim=1)  # (3, 5, 2)
    by_hand = torch.cat([(weights[:, :, [h]] * x[:, :, 3 * h:3 * h + 3]).sum(dim=1) for h in (0, 1)], dim=1)
    close(layer(x), by_hand)
    close(layer.attn_weights(x).sum(dim=1), torch.ones(3, 2))


def test_vit_normalises_uint8_and_float_pixels_by_buffers_that_travel_with_the_weights():
    model, images, ones = shake(tiny_vit()), photos(2), torch.ones(1, 3, 1, 1)
    other = tiny_vit(pixel_mean=(1.0, 2.0, 3.0), pixel_std=(4.0, 5.0, 6.0)).eval()
    other.load_state_dict(model.state_dict())
    close(other(images.float())[0], model(images)[0])
    other.load_state_dict({**model.state_dict(), "pixel_mean": 0 * ones, "pixel_std": ones})
    close(other((images - model.pixel_mean) / model.pixel_std)[0], model(images)[0], 1e-4)


def test_vit_positions_are_plain_at_the_native_size_and_interpolated_at_others():
    model, images = shake(tiny_vit(image_size=16)), photos(2, 16)
    x = model.patches((images - model.pixel_mean) / model.pixel_std) + model.position.positions
    close(model.features(images), model.encoder(x))
    model.position.positions.data = torch.arange(4.0).repeat_interleave(4)[:, None].expand(16, 16)  # the row's number
    added = model._add_positions(torch.zeros(1, 21, 16), 7, 3)[0].view(7, 3, 16)
    close(added, added[:, :1, :1].expand(7, 3, 16))  # the same along a row
    assert (added[:, 0, 0].diff() > 0).all() and abs(added[3, 0, 0] - 1.5) < 1e-4
    assert model.features(torch.zeros(2, 3, 28, 12)).shape == (2, 21, 16)


def test_patches_are_left_out_in_training_alone():
    model, images = shake(tiny_vit(patch_dropout=0.5)), photos(2)
    whole, part = model.eval().features(images), model.train().features(images)
    assert whole.shape[1] == 4 and part.shape[1] == 2
    model.config = replace(model.config, patch_dropout=0.0)
    close(model.features(images), whole)  # there is no other dropout
    raises(ValueError, "class token", lambda: ViTConfig(patch_dropout=0.5, class_token=True))
    dropped = ViTConfig(image_size=8, patch_size=4, n_layer=1, n_head=2, n_embd=16, patch_dropout=0.5)
    raises(ValueError, "fusion=cross", MLLMConfig, dropped, tiny_gpt_config())
    model = shake(tiny_mllm(vit=dropped, gpt=tiny_gpt_config(cross_every=1))).train()
    assert torch.isfinite(model(images, torch.tensor([[IMAGE_ID, 1, 5]] * 2), torch.tensor([[-1, 5, 2]] * 2))[1])


def test_vit_initial_loss_ignored_labels_and_gradients():
    for stem in ("patch", "conv", "residual"):
        model, images, labels = tiny_vit(stem=stem), photos(64), torch.randint(0, 10, (64,))
        logits, loss = model(images, labels)
        assert abs(loss.item() - math.log(10)) < 0.1 and model(images)[1] is None
        some = labels.where(torch.arange(64) < 20, -1)
        close(model(images, some)[1], F.cross_entropy(logits[:20], labels[:20]))
        shares = F.one_hot(labels, 10).float()
        close(model(images, shares)[1], loss)
        assert not unreached(model, lambda: model(images, labels)[1])


def test_vit_overfits_eight_random_images():
    model, images, labels = tiny_vit(n_embd=32), photos(8), torch.arange(8)
    assert fit(model, lambda: model(images, labels)[1], 60, 3e-3) < 0.05


# ---------------------------------------------------------------------------------------------------------------------
# 7. language

POSITIONS = ("rotary", "learned", "sinusoidal")


def tiny_gpt(**changes):
    return GPT(GPTConfig(**dict(vocab_size=20, block_size=16, n_layer=2, n_head=2, n_embd=16) | changes))


def some_ids(*shape):
    return torch.randint(0, 20, shape)


def test_gpt_initial_loss_ignored_targets_and_gradients():
    for positions in POSITIONS:
        model, ids = tiny_gpt(vocab_size=256, positions=positions, bias=True), torch.randint(0, 256, (16, 17))
        logits, loss = model(ids[:, :-1], ids[:, 1:])
        assert abs(loss.item() - math.log(256)) < 0.1
        targets = ids[:, 1:].where(torch.arange(16) % 2 == 0, -1)
        close(model(ids[:, :-1], targets)[1], F.cross_entropy(logits[:, ::2].flatten(0, 1), ids[:, 1::2].flatten()))
        assert not unreached(model, lambda: model(ids[:, :-1], ids[:, 1:])[1])


def test_gpt_sees_the_order_of_earlier_tokens_and_no_later_ones():
    for positions in POSITIONS:
        model, ids = shake(tiny_gpt(n_layer=1, positions=positions, tie_weights=False)), torch.arange(12)[None]
        changed, swapped = ids + 5 * (ids == 7), torch.cat((ids[:, [1, 0]], ids[:, 2:]), dim=1)
        by = moved(model(ids)[0], model(changed)[0])
        assert by[:7].max() == 0 and by[7:].min() > 1e-4
        assert moved(model(ids)[0], model(swapped)[0])[-1] > 1e-4


def test_gpt_ties_the_output_layer_to_the_embedding_only_if_asked():
    tied, untied = tiny_gpt(), tiny_gpt(tie_weights=False)
    assert tied.head.weight is tied.embedding.weight
    assert untied.head.weight.data_ptr() != untied.embedding.weight.data_ptr()
    raises(ValueError, "block_size=16", tied, some_ids(1, 17))
    raises(ValueError, "'alibi'", GPT, GPTConfig(positions="alibi"))


def test_gpt_overfits_a_small_batch():
    model, ids = tiny_gpt(n_embd=32), some_ids(4, 17)
    assert fit(model, lambda: model(ids[:, :-1], ids[:, 1:])[1], 100, 5e-3) < 0.15


def test_gpt_greedy_generation_with_cache_equals_full_passes():
    for positions in POSITIONS:
        model, ids = shake(tiny_gpt(positions=positions, tie_weights=False)), some_ids(3, 16)
        x, caches = model.embedding(ids), model.decoder.new_caches(16)
        parts = [model.hidden(part, caches) for part in x.split([5] + [1] * 11, dim=1)]
        close(torch.cat(parts, dim=1), model.hidden(x), 1e-4)
        assert model.generate(ids[:, :4], 12, 0).equal(greedy(lambda ids: model(ids)[0], ids[:, :4], 12))


def test_gpt_beyond_its_block_goes_on_from_the_newer_half():
    model = shake(tiny_gpt(block_size=8, tie_weights=False))
    for ids in (some_ids(2, 5), some_ids(2, 11)):
        expected, start = ids, max(0, ids.size(1) - 8)
        for _ in range(20):
            start = expected.size(1) - 4 if expected.size(1) - start > 8 else start
            expected = torch.cat((expected, greedy(lambda ids: model(ids)[0], expected[:, start:], 1)[:, -1:]), dim=1)
        assert model.generate(ids, 20, temperature=0).equal(expected)


P = torch.tensor([0.5, 0.05, 0.3, 0.15])


def frequencies(**how):
    """How often sample_next draws each id, in 20000 draws from P."""
    return sample_next(P.log().expand(20000, 4), **how).bincount(minlength=4) / 20000


def test_sample_next_follows_temperature_and_top_k():
    close(frequencies(), P, 0.02)
    close(frequencies(temperature=0.5), P ** 2 / (P ** 2).sum(), 0.02)
    close(frequencies(top_k=2), torch.tensor([5 / 8, 0, 3 / 8, 0]), 0.02)
    close(frequencies(top_k=9), P, 0.02)
    logits = torch.randn(50, 20)
    assert sample_next(logits, top_k=1).equal(logits.argmax(dim=-1))
    assert sample_next(logits, temperature=0).equal(logits.argmax(dim=-1))


def test_sample_next_keeps_exactly_the_smallest_nucleus():
    for top_p, kept in [(0.49, [0]), (0.51, [0, 2]), (0.79, [0, 2]), (0.81, [0, 2, 3]), (0.96, [0, 1, 2, 3])]:
        assert frequencies(top_p=top_p).nonzero().flatten().tolist() == kept, top_p
    close(frequencies(top_p=0.7), torch.tensor([5 / 8, 0, 3 / 8, 0]), 0.02)
    rows = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log()  # each has a nucleus of its own
    assert sample_next(rows.repeat(100, 1), top_p=0.7).tolist() == [0, 1] * 100


def test_gpt_sampling_with_a_generator_is_reproducible_and_leaves_the_global_one_alone():
    model, ids, state = tiny_gpt(), some_ids(3, 4), torch.get_rng_state()
    first, other, again = (model.generate(ids, 12, generator=torch.Generator().manual_seed(i)) for i in (1, 2, 1))
    assert torch.get_rng_state().equal(state)
    assert first.equal(again) and not first.equal(other)


def test_gpt_fills_ended_rows_with_eos_and_stops_when_all_have_ended():
    model, ids = tiny_gpt(vocab_size=8, n_embd=8, tie_weights=False), torch.tensor([[2], [5]])
    for block in model.decoder.blocks:  # after id i comes i + 1: blocks that add nothing, unit vectors, a shifted head
        nn.init.zeros_(block.attn.proj.weight), nn.init.zeros_(block.ff.proj.weight)
    model.embedding.weight.data, model.head.weight.data = torch.eye(8), torch.eye(8).roll(1, dims=0)
    assert model.generate(ids, 7, 0).tolist() == [[2, 3, 4, 5, 6, 7, 0, 1], [5, 6, 7, 0, 1, 2, 3, 4]]
    assert model.generate(ids, 9, 0, eos_id=7).tolist() == [[2, 3, 4, 5, 6, 7], [5, 6, 7, 7, 7, 7]]
    assert model.generate(ids, 3, 0, eos_id=7).tolist() == [[2, 3, 4, 5], [5, 6, 7, 7]]
    assert model.generate(ids, 0).equal(ids)


def test_gpt_generates_without_dropout_and_restores_the_training_mode():
    model, ids = shake(tiny_gpt(dropout=0.5, tie_weights=False)), some_ids(3, 4)
    expected = model.generate(ids, 12, temperature=0)
    assert not model.training
    assert model.train().generate(ids, 12, temperature=0).equal(expected)
    raises(IndexError, "", model.generate, ids + 20, 3)  # after an error as well
    assert all(module.training for module in model.modules())


# ---------------------------------------------------------------------------------------------------------------------
# 8. multimodal

IMAGE = [IMAGE_ID] * 4  # the placeholders of one image of tiny_mllm()
EXAMPLE = torch.tensor([[1, 5, *IMAGE, 7, 8], [*IMAGE, 1, 9, 9, 6]])  # each row has its image in another place
TARGETS = torch.tensor([[5, -1, -1, -1, -1, 7, 8, 2], [-1, -1, -1, 1, 9, 9, 6, 2]])


def tiny_gpt_config(**changes):
    return GPTConfig(**dict(vocab_size=20, block_size=24, n_layer=2, n_head=2, n_embd=24) | changes)


def tiny_mllm(**changes):
    vit = ViTConfig(image_size=8, patch_size=4, n_layer=1, n_head=2, n_embd=16)
    return MLLM(MLLMConfig(**dict(vit=vit, gpt=tiny_gpt_config()) | changes))


def test_mllm_puts_image_tokens_where_the_placeholders_are():
    model, images = shake(tiny_mllm()), photos(2)
    (first, second), words = model.encode(images), model.gpt.embedding.weight
    expected = torch.stack([torch.cat((words[[1, 5]], first, words[[7, 8]])), torch.cat((second, words[[1, 9, 9, 6]]))])
    close(model.embed(images, EXAMPLE)[0], expected)
    close(model(images, EXAMPLE)[0], model.gpt.head(model.gpt.hidden(expected)))
    both = torch.cat((words[[5]], first, words[[6]], second, words[[7]]))[None]
    close(model.embed(images, torch.tensor([[5, *IMAGE, 6, *IMAGE, 7]]))[0], both)  # two images in one row
    text = torch.tensor([[1, 5, 9], [6, 7, 2]])  # without an image it is the language model
    close(model(images[:0], text)[0], model.gpt(text)[0])


def test_mllm_errors_for_wrong_counts_long_input_and_unknown_connectors():
    model, full = tiny_mllm(), torch.tensor([[*IMAGE, *[5] * 21]])
    raises(ValueError, "8 placeholders for 1 images of 4 tokens each", model, photos(1), EXAMPLE)
    raises(ValueError, "0 placeholders for 2 images", model, photos(2), torch.tensor([[1, 5]]))
    raises(ValueError, "block_size=24", model, photos(1), full)
    raises(ValueError, "block_size=24", model.generate, photos(1), full)  # no room to write in
    raises(ValueError, "'qformer'", MLLMConfig, ViTConfig(), GPTConfig(), "qformer")


def test_mllm_text_sees_the_image_before_it_and_nothing_sees_later_text():
    model, images, ids, later = shake(tiny_mllm()), photos(2), EXAMPLE[:1], EXAMPLE[:1].clone()
    features = model.hidden(images[:1], ids)
    by = moved(model.hidden(images[1:], ids), features)
    assert by[:2].max() == 0 and by[2:].min() > 1e-4
    later[:, 6] += 1
    by = moved(model.hidden(images[:1], later), features)
    assert by[:6].max() == 0 and by[6:].min() > 1e-4


def test_mllm_loss_and_log_probs_are_those_of_the_full_logits():
    model, images = shake(tiny_mllm()), photos(2)
    tokens = model.encode(images)
    close(tokens, model.connector(model.vit.features(images)))
    close(tokens, model.encode(mllm.frozen_features(model, images, torch.zeros(2).long())))
    logits, (none, loss) = model(images, EXAMPLE)[0], model(tokens, EXAMPLE, TARGETS)  # tokens stand in for pixels
    close(loss, F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten(), ignore_index=-1))
    spread = -logits[TARGETS >= 0].log_softmax(dim=-1).mean()
    close(model(tokens, EXAMPLE, TARGETS, label_smoothing=0.1)[1], 0.9 * loss + 0.1 * spread)
    expected = logits.log_softmax(dim=-1)[:, :-1].gather(2, EXAMPLE[:, 1:, None].clamp(min=0))[:, :, 0]
    for either in (images, tokens):
        close(model.log_probs(either, EXAMPLE), F.pad(expected, (1, 0)).masked_fill(EXAMPLE == IMAGE_ID, 0), 1e-4)
    close(model.log_probs(images[:1], torch.tensor([[1, 5, *IMAGE]]))[0, 1], expected[0, 0], 1e-4)  # ends with an image
    mask = torch.rand(EXAMPLE.shape) < 0.5
    close(model.log_probs(tokens, EXAMPLE, mask), model.log_probs(tokens, EXAMPLE) * mask, 1e-4)


def test_rows_about_the_same_images_give_the_log_probs_that_they_have_alone():
    for cross_every in (0, 1):
        model, images = shake(tiny_mllm(gpt=tiny_gpt_config(cross_every=cross_every)), 0.5), photos(3)
        one = [IMAGE_ID] * (1 if cross_every else 4)
        prompts = torch.tensor([[*one, *one, 1], [5, *one, *[6] * (len(one) - 1), 1]])  # two images, and one
        ids = torch.cat((prompts.repeat_interleave(3, dim=0), torch.randint(3, 20, (6, 5))), dim=1)
        alone = torch.cat([model.log_probs(images[some], row[None])
                           for some, row in zip([[0, 1]] * 3 + [[2]] * 3, ids)])
        close(model.log_probs(images, ids, copies=3), alone, 1e-4)
        assert moved(alone[:1], alone[1:2]).max() > 1e-3


def test_mllm_greedy_generation_equals_full_passes_in_a_batch_and_alone():
    model, images = shake(tiny_mllm(eos_id=-1)), photos(3)  # no id is -1: nothing ends
    prompt = torch.tensor([[*IMAGE, 1]] * 3)
    out = model.generate(model.encode(images), max_new_tokens=100)
    assert out.equal(greedy(lambda ids: model(images, ids)[0], prompt, 20)[:, 5:])  # 24 fill the block, one more unread
    assert out.equal(torch.cat([model.generate(image[None], max_new_tokens=100) for image in images]))
    assert not out[0].equal(out[1])  # each image has a caption of its own
    out = model.generate(images[:2], EXAMPLE, 10)
    assert out.equal(greedy(lambda ids: model(images[:2], ids)[0], EXAMPLE, 10)[:, 8:])


def test_mllm_sampling_is_reproducible_ends_rows_and_restores_the_training_mode():
    model, images = tiny_mllm().train(), photos(8)
    first, other, again = (model.generate(images, None, 19, 1.0, generator=torch.Generator().manual_seed(i))
                           for i in (1, 2, 1))
    assert first.equal(again) and not first.equal(other)
    ended = (first == 2).cumsum(dim=1) > 0
    assert ended.any() and (first[ended] == 2).all() and (first >= 0).all()
    raises(ValueError, "placeholders", model.generate, images, torch.tensor([[1, 5]]))
    assert all(module.training for module in model.modules())  # after an error as well


def test_mllm_config_comes_back_from_a_dict():
    model = tiny_mllm(connector="linear", eos_id=9)
    back = MLLMConfig.from_dict(asdict(model.config))
    assert back == model.config and isinstance(back.vit, ViTConfig) and isinstance(back.gpt, GPTConfig)
    MLLM(back).load_state_dict(model.state_dict())


def test_pixel_shuffle_folds_neighbouring_patches():
    layer, x = shake(PixelShuffleConnector(1, 8)), torch.arange(16.0).view(1, 16, 1)  # a grid of 4x4 patches
    squares = torch.tensor([[0.0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]])
    close(layer(x)[0], layer.mlp(squares))
    raises(ValueError, "9 patches are no square grid of even side", layer, torch.zeros(1, 9, 1))
    raises(ValueError, "8 patches are no square grid", layer, torch.zeros(1, 8, 1))


def test_mllm_initial_loss_and_gradients_through_each_connector_and_fusion():
    for connector, cross_every in itertools.product(CONNECTORS, (0, 2)):
        model = tiny_mllm(connector=connector, gpt=tiny_gpt_config(cross_every=cross_every))
        n, n_tokens = model.config.n_placeholders(8), model.config.n_image_tokens(8)
        assert n_tokens == model.encode(photos(1)).size(1) and n == (1 if cross_every else n_tokens)
        ids = torch.tensor([[IMAGE_ID] * n + [1, 5, 6]] * 2)
        loss_of = lambda: model(photos(2), ids, torch.tensor([[-1] * n + [5, 6, 2]] * 2))[1]
        assert abs(loss_of().item() - math.log(20)) < 0.3
        assert not unreached(model, loss_of), (connector, cross_every)


def shut(model):
    """The model with random weights in everything but its gates, which stay at 0."""
    gates = {name for name, _ in model.named_parameters() if name.endswith("cross_gate")}
    shake(model)
    for name, p in model.named_parameters():
        if name in gates:
            p.data.zero_()
    return model


def test_gated_cross_attention_is_the_text_model_at_zero_and_sees_every_image_otherwise():
    model, ids = shut(tiny_mllm(gpt=tiny_gpt_config(cross_every=2))), some_ids(3, 5)
    text, marked = GPT(tiny_gpt_config()), F.pad(ids, (2, 0), value=IMAGE_ID)  # two images before the words of each row
    text.load_state_dict({name: w for name, w in model.gpt.state_dict().items() if ".cross_" not in name})
    close(model(photos(3)[:0], ids)[0], text(ids)[0], 1e-6)  # without images it is the text model
    markers = model.marker.weight.expand(3, 2, -1)
    alone = text.head(text.hidden(torch.cat((markers, text.embedding(ids)), dim=1)))
    close(model(photos(6), marked)[0], alone, 1e-6)  # with them too, but for the markers, while the gates are shut
    for p in (p for name, p in model.named_parameters() if name.endswith("cross_gate")):
        p.data.normal_()
    images = photos(6)
    both = model(images, marked)[0]
    for i in range(6):
        other = images.clone()
        other[i] = 255 - other[i]
        by = (model(other, marked)[0] - both).abs().amax(dim=(1, 2))
        assert by[i // 2] > 1e-4 and all(by[row] == 0 for row in range(3) if row != i // 2)
    raises(ValueError, "6 placeholders for 4 images", model, photos(4), marked)


def visible(ids):
    """The rule in plain Python: for each position of a row the numbers of the images that it attends to."""
    seen, group, count = [], [], 0
    for t, i in enumerate(ids):
        if i == IMAGE_ID:
            group = group + [count] if t and ids[t - 1] == IMAGE_ID else [count]
            count += 1
        seen.append(group)
    return seen


def test_a_word_attends_to_the_images_that_stand_last_before_it():
    model, rng = shake(tiny_mllm(gpt=tiny_gpt_config(cross_every=1)), 0.3), np.random.default_rng(0)
    for _ in range(20):
        ids = torch.tensor(rng.choice([5, 6, 7, IMAGE_ID], (3, 9), p=[0.25, 0.25, 0.25, 0.25]))
        n = int((ids == IMAGE_ID).sum())
        tokens = torch.randn(n, 4, 24)
        if not n:
            continue
        _, memory, mask = model.embed(tokens, ids)
        K = memory.size(1) // 4
        mask = torch.ones(3, 1, 9, 4 * K, dtype=torch.bool) if mask is None else mask
        for row, start in zip(range(3), [0, *(ids == IMAGE_ID).sum(dim=1).cumsum(dim=0).tolist()]):
            for t, images in enumerate(visible(ids[row].tolist())):
                assert mask[row, 0, t].view(K, 4).all(dim=1).nonzero().flatten().tolist() == images
                assert mask[row, 0, t].sum() == 4 * len(images)
            own = tokens[start:start + int((ids[row] == IMAGE_ID).sum())]  # rows with more images do not matter
            close(memory[row, :own.size(0) * 4], own.flatten(0, 1))
            close(model(tokens, ids)[0][row], model(own, ids[row:row + 1])[0][0], 1e-4)


def test_an_image_changes_the_logits_of_the_words_that_may_see_it_and_of_no_others():
    rng = np.random.default_rng(1)
    for most in (1, 5):  # with more than one, images that stand side by side read those before them
        # one block: its self-attention comes before it sees images, so that no word hears of them from another
        model = shake(tiny_mllm(gpt=tiny_gpt_config(cross_every=1, n_layer=1), max_images=most), 0.3)
        for k in range(1, 6):
            ids = torch.from_numpy(rng.permutation([IMAGE_ID] * k + [5, 6, 7, 8]))[None]
            tokens = torch.randn(k, 4, 24)
            before = model(tokens, ids)[0][0]
            for image in range(k):
                changed = tokens.clone()
                changed[image] += 1
                moved = (model(changed, ids)[0][0] - before).abs().max(dim=1).values > 1e-6
                assert moved.tolist() == [image in seen for seen in visible(ids[0].tolist())]


def test_cross_attention_generates_with_a_cache_as_without():
    model, images = shake(tiny_mllm(eos_id=-1, gpt=tiny_gpt_config(cross_every=1)), 0.6), photos(3)
    out = model.generate(images, max_new_tokens=12)
    assert out.equal(greedy(lambda ids: model(images, ids)[0], torch.tensor([[IMAGE_ID, 1]] * 3), 12)[:, 2:])
    assert not out[0].equal(out[1])
    ids = torch.tensor([[IMAGE_ID, 5, IMAGE_ID, IMAGE_ID, 1], [5, IMAGE_ID, 6, 7, 1]])  # new words see the last images
    images = photos(4)
    out = model.generate(images, ids, 12)
    assert out.equal(greedy(lambda ids: model(images, ids)[0], ids, 12)[:, 5:])
    beams = model.generate(images, ids, 12, beams=2)
    alone = [model.generate(some, row[None], 12, beams=2) for some, row in zip((images[:3], images[3:]), ids)]
    assert beams.equal(torch.cat(alone))


def test_samples_share_the_reading_of_the_image():
    for cross_every in (0, 1):
        model, images = shake(tiny_mllm(gpt=tiny_gpt_config(cross_every=cross_every)), 0.1), photos(3)
        how = dict(max_new_tokens=9, temperature=1.0)
        shared = model.generate(images, num_captions=4, generator=torch.Generator().manual_seed(5), **how)
        apart = model.generate(images.repeat_interleave(4, dim=0), generator=torch.Generator().manual_seed(5), **how)
        assert shared.equal(apart) and len(shared.unique(dim=0)) > 3
    raises(ValueError, "as many beams", lambda: model.generate(images, num_captions=2))


def test_a_wide_beam_search_finds_the_best_of_all_texts():
    model, images = shake(tiny_mllm(gpt=tiny_gpt_config(vocab_size=6)), 0.5), photos(2)
    prompt = model.caption_prompt(model.encode(images))
    of_length = lambda n: list(map(list, itertools.product((0, 1, 3, 4, 5), repeat=n)))
    texts = [[*text, 2] for n in range(3) for text in of_length(n)] + of_length(3)  # ended, or cut off
    for penalty in (0.0, 1.0, 2.0):
        model.requires_grad_(False)
        scores = torch.tensor([[model.log_probs(images[i:i + 1], torch.cat((prompt[:1], torch.tensor([text])), dim=1))[
            0, prompt.size(1):].sum() / len(text) ** penalty for text in texts] for i in range(2)])
        best = scores.topk(3, dim=1)
        found = model.generate(images, max_new_tokens=3, beams=200, length_penalty=penalty, num_captions=3)
        wanted = [texts[j] + [2] * (3 - len(texts[j])) for row in best.indices.tolist() for j in row]
        assert found.tolist() == wanted
        x, *_ = model.embed(images, prompt)
        got = model.gpt.beam_search(prompt, 3, 200, 2, penalty, x)[1][:, :3]
        close(got, best.values, 1e-4)


def test_a_beam_of_one_is_greedy_and_more_are_at_least_as_likely():
    for cross_every in (0, 1):
        model, images = shake(tiny_mllm(gpt=tiny_gpt_config(cross_every=cross_every))).train(), photos(4)
        tokens = model.eval().encode(images)
        prompt = model.caption_prompt(tokens)
        read = model.embed(tokens, prompt)
        one, score = model.gpt.beam_search(prompt, 10, 1, 2, 0.0, *read)
        assert one[:, 0].equal(model.generate(images, max_new_tokens=10))
        wide = model.gpt.beam_search(prompt, 10, 8, 2, 0.0, *read)[1]
        assert (wide[:, 0] >= score[:, 0] - 1e-5).all() and (wide.diff(dim=1) <= 0).all()


def test_attention_to_images_is_that_of_the_words():
    for cross_every in (0, 2):
        model = shake(tiny_mllm(gpt=tiny_gpt_config(cross_every=cross_every)))
        images = photos(2)
        prompt = model.caption_prompt(model.encode(images))
        seen = model.attention_to_images(images, torch.cat((prompt, some_ids(2, 3)), dim=1))
        assert seen.shape == (2, prompt.size(1) + 3, 4) and (seen >= 0).all()
        close(seen[:, -3:].sum(dim=2), torch.ones(2, 3))
        assert not any(m.keep_weights for m in model.modules() if isinstance(m, MultiHeadAttention))
    model = shut(tiny_mllm())  # one block whose attention is known: words attend to the third image token alone
    for block in model.gpt.decoder.blocks:
        block.attn.forward = types.MethodType(third_alone, block.attn)
    images = photos(1)
    ids = torch.cat((model.caption_prompt(model.encode(images)), some_ids(1, 2)), dim=1)
    assert model.attention_to_images(images, ids)[0, -1].tolist() == [0, 0, 1, 0]


def third_alone(self, x, **_):
    B, T, _ = x.shape
    self.attn_weights = F.one_hot(torch.full((B, 1, T), 2), T).float()
    return torch.zeros_like(x)


def test_a_conversation_reads_each_token_once_and_answers_as_one_pass_does():
    for cross_every, most in ((0, 1), (1, 1), (1, 2)):
        gpt = tiny_gpt_config(cross_every=cross_every, block_size=200)
        model = shake(tiny_mllm(gpt=gpt, max_images=most), 0.3)
        images, n, hidden, read = photos(2), 1 if cross_every else 4, model.gpt.hidden, []
        model.gpt.hidden = lambda x, *rest: (read.append(x.size(1)), hidden(x, *rest))[1]
        chat, logits, per_turn = Conversation(model, images), [], []
        for turn in range(20):
            ids = torch.tensor([[IMAGE_ID] * 2 * n * (turn == 0) + [5, 6 + turn % 3]])
            before = sum(read)
            if turn < 2 or turn > 2:
                written = list(itertools.islice(chat.answer(ids, 1.0, torch.Generator().manual_seed(turn)), 4))
                assert 2 not in written
            else:
                start = chat.ids.size(1)
                logits = chat.read(F.pad(ids, (0, 1), value=1))
                close(logits, model(images, chat.ids)[0][:, start:], 1e-5)
            per_turn.append(sum(read) - before)
        model.gpt.hidden = hidden
        assert max(per_turn[3:]) <= 2 + 1 + 5  # the question, bos, the answer: not what was said before
    model = tiny_mllm()  # 24 positions
    chat = Conversation(model, photos(1))
    assert len(list(chat.answer(torch.tensor([[*IMAGE, 5]]), 1.0, torch.Generator().manual_seed(0)))) <= 18
    raises(ValueError, "block_size=24", chat.read, torch.full((1, 24), 5))


def test_images_that_stand_side_by_side_have_an_order():
    config = lambda n: tiny_mllm(gpt=tiny_gpt_config(cross_every=1), max_images=n)
    model, images, ids = shake(config(2)), photos(3), torch.tensor([[IMAGE_ID, IMAGE_ID, 5, 6]])
    last = lambda which: model(images[which], ids)[0][0, -1]
    assert (last([0, 1]) - last([1, 0])).abs().max() > 1e-4
    raises(ValueError, "3 images side by side, and max_images=2", model, images,
           torch.tensor([[IMAGE_ID, IMAGE_ID, IMAGE_ID]]))
    assert model(images, torch.tensor([[IMAGE_ID, IMAGE_ID, 5, IMAGE_ID]]))[0].isfinite().all()  # two, then one


def tiny_clip(**changes):
    vit = ViTConfig(image_size=8, patch_size=4, n_layer=1, n_head=2, n_embd=16, n_classes=0)
    sizes = dict(vit=vit, vocab_size=20, max_tokens=6, n_layer=1, n_head=2, n_embd=16, n_shared=12)
    return CLIP(CLIPConfig(**sizes | changes))


def test_clip_loss_by_hand_and_gradients():
    model = tiny_clip()
    images, texts = (F.normalize(torch.randn(3, 4), dim=1) for _ in range(2))
    scores = [[math.exp(images[i] @ texts[j] / 0.07) for j in range(3)] for i in range(3)]
    want = -sum(math.log(scores[i][i] / sum(scores[i])) + math.log(scores[i][i] / sum(row[i] for row in scores))
                for i in range(3)) / 6
    close(model.loss(images, texts), torch.tensor(want), 1e-4)
    model.log_scale.data.fill_(99.0)  # one over the temperature is at most 100
    close(model.loss(images, texts), (F.cross_entropy(100 * images @ texts.T, torch.arange(3))
                                      + F.cross_entropy(100 * texts @ images.T, torch.arange(3))) / 2, 1e-4)
    model = tiny_clip()
    ids = torch.tensor([[1, 5, 2, 0], [1, 6, 7, 2]])
    assert not unreached(model, lambda: model.loss(*model(photos(2), ids)[:2]))
    close(torch.cat(model(photos(2), ids)[:2]).norm(dim=1), torch.ones(4))


def test_clip_text_does_not_see_padding():
    model, ids = shake(tiny_clip()), torch.tensor([[1, 5, 2]])
    close(model.embed_texts(F.pad(ids, (0, 3))), model.embed_texts(ids), 1e-6)
    assert moved(model.embed_texts(torch.tensor([[5, 1, 2]])), model.embed_texts(ids)).max() > 1e-4


def test_clip_learns_which_text_is_whose():
    model, images = tiny_clip(), photos(6)
    ids = torch.randint(4, 20, (6, 5))
    fit(model, lambda: model.loss(*model(images, ids)[:2]), 60, 1e-2)
    images, texts, words = model(images, ids)
    assert (images @ texts.T).argmax(dim=1).tolist() == list(range(6)) and words is None


def test_clip_learns_the_words_of_a_photo():
    captions = [["ab", "abb"], ["ac"], ["a"], ["bd"]]
    shares = F.pad(vit.word_shares(captions, CharTokenizer("abcd")), (0, 16))  # to the model's vocabulary
    a, b, c = math.log(4 / 3), math.log(2), math.log(4)
    close(shares[0, :2], torch.tensor([a, b]) / (a + b), 1e-5)  # both words in both captions
    close(shares[1, [0, 2]], torch.tensor([a, c]) / (a + c), 1e-5)
    model, images, ids = tiny_clip(words=True), photos(4), torch.randint(4, 20, (4, 5))

    def loss():
        *vectors, words = model(images, ids)
        return model.loss(*vectors) + F.cross_entropy(words, shares)
    fit(model, loss, 100, 1e-2)
    assert model(images, ids)[2].argmax(dim=1).tolist() == [1, 2, 0, 3]
    assert not unreached(model, loss)


# ---------------------------------------------------------------------------------------------------------------------
# config: settings, checkpoints, logs, downloads


def settings_of(text, *argv):
    """What override() makes of a stage whose source is text."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "stage.py")
        file.write_text(text)
        with contextlib.redirect_stdout(io.StringIO()):
            return config.override({"__file__": str(file), "__doc__": "a stage"}, argv)


STAGE = 'lr = 0.1  # the rate\nsteps = 5\nname = "a"  # a # b\nfast = False\nlimit = max(1, 2)\nCONSTANT = 3\n'


def test_settings_are_overridden_from_left_to_right():
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder, "recipe.py")
        recipe.write_text('"""A recipe."""\nsteps = 7  # why\nname = "b"\n')
        got = settings_of(STAGE, "--steps=6", str(recipe), "--name=x=y", "--lr=1", "--fast=True")
    assert got == {"lr": 1.0, "steps": 7, "name": "x=y", "fast": True} and isinstance(got["lr"], float)
    assert settings_of(STAGE) == {"lr": 0.1, "steps": 5, "name": "a", "fast": False}


def test_wrong_settings_end_in_one_line():
    raises(SystemExit, "did you mean steps", settings_of, STAGE, "--step=1")
    raises(SystemExit, "unknown setting CONSTANT", settings_of, STAGE, "--CONSTANT=1")
    raises(SystemExit, "steps expects int", settings_of, STAGE, "--steps=1.5")
    raises(SystemExit, "lr expects float", settings_of, STAGE, "--lr=fast")
    raises(SystemExit, "fast expects bool", settings_of, STAGE, "--fast=1")
    raises(SystemExit, "--key=value", settings_of, STAGE, "--fast")
    raises(SystemExit, "no such config file", settings_of, STAGE, "config/nothing.py")
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder, "recipe.py")
        recipe.write_text("steps = 2 * 3\n")
        raises(SystemExit, "holds only lines of the form", settings_of, STAGE, str(recipe))


def test_every_recipe_sets_only_what_its_stage_has():
    stages = {"shakespeare": "gpt", "captions": "gpt", "cifar": "vit", "clip": "vit"}
    for recipe in sorted(Path(__file__).parent.glob("config/[!_]*.py")):
        stage = "scst" if "scst" in recipe.name else stages.get(recipe.stem.removesuffix("_cpu"), "mllm")
        known = config.read_settings(Path(__file__).parent / f"{stage}.py")
        for name, (value, _) in config.read_settings(recipe).items():
            assert name in known and type(value) is type(known[name][0]), f"{recipe.name}: {name}"


def test_help_lists_every_setting_and_its_reason():
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        gpt.main(["--help"])
    settings = config.read_settings(gpt.__file__)
    assert len(settings) > 20
    for name, (value, comment) in settings.items():
        assert comment and f"--{name}={value}" in printed.getvalue() and comment in printed.getvalue(), name


BARE = {"settings": {}, "config": {}, "model": {}, "step": 2, "dtype": "float32"}  # a checkpoint of nothing


def test_checkpoints_are_moved_into_place_and_hold_nothing_to_execute():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run", "best.pt")
        config.save(path, BARE | {"model": {"w": torch.arange(3)}, "stage": "gpt"})
        assert config.load(path, "gpt")["model"]["w"].tolist() == [0, 1, 2] and os.listdir(path.parent) == ["best.pt"]
        raises(SystemExit, "is no checkpoint of vit, but of gpt", config.load, path, "vit")
        raises(SystemExit, "train one first: python gpt.py", config.load, Path(folder, "none.pt"), "gpt")
        path.write_bytes(b"no checkpoint")
        raises(SystemExit, "no checkpoint that can be read", config.load, path, "gpt")
        torch.save({"evil": Path("x")}, path)
        raises(SystemExit, "no checkpoint that can be read", config.load, path, "gpt")


def test_a_new_run_replaces_no_old_checkpoint():
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as printed:
        for content in ("first", "second", "third"):
            Path(folder, "best.pt").write_text(content)
            config.set_aside(Path(folder), "mine")
        assert not Path(folder, "best.pt").exists() and "renamed" in printed.getvalue()
        names = ("best.old.pt", "best.old1.pt", "best.old2.pt")
        assert [Path(folder, name).read_text() for name in names] == ["first", "second", "third"]
        Path(folder, names[0]).unlink()  # the gap is filled, and nothing replaced
        Path(folder, "best.pt").write_text("fourth")
        config.set_aside(Path(folder), "mine")
        assert [Path(folder, name).read_text() for name in names] == ["fourth", "second", "third"]
        Path(folder, "last.pt").write_text("damaged")
        config.set_aside(Path(folder), "mine")
        assert Path(folder, "last.old.pt").read_text() == "damaged"
        config.save(Path(folder, "last.pt"), BARE | {"stage": "gpt", "dataset": "flickr8k"})
        raises(SystemExit, "holds a run on flickr8k", config.set_aside, Path(folder), "mine")
        assert Path(folder, "last.pt").exists()


def test_progress_is_by_whichever_of_steps_and_minutes_is_further():
    def new_run(max_steps, max_minutes, **more):
        settings = {"out_dir": "out/x", "max_steps": max_steps, "max_minutes": max_minutes, "eval_interval": 1}
        return config.Run("gpt", settings, "mine", None, [], None, **more)

    def progress(run, step, seconds):
        run.step, now[0] = step, run.began + seconds
        return round(run.progress(), 9)

    now = [100.0]
    with in_new_folder(), patched(config, "time", types.SimpleNamespace(monotonic=lambda: now[0])):
        assert [progress(new_run(10, 0.0), step, 1e6) for step in (0, 5, 11)] == [0, 0.5, 1]
        assert progress(new_run(0, 1.0), 10 ** 6, 30) == 0.5
        assert progress(new_run(10, 1.0), 5, 54) == 0.9 and progress(new_run(10, 100.0), 5, 54) == 0.5
        first = new_run(10, 2.0, end=0.5)  # a phase that ends in the middle
        assert progress(first, 4, 0) == 0.8 and progress(first, 5, 60) == 1
        second = new_run(10, 2.0, before=first)
        assert second.step == 5 and second.seconds() == 60 and progress(second, 5, 60) == 0
        assert progress(second, 6, 60) == 0.2 and progress(second, 6, 90) == 0.5 and progress(second, 6, 120) == 1
        run = new_run(0, 1.0)
        now[0] += 6
        with run.paused():
            now[0] += 20
            assert run.seconds() == 6
        now[0] += 6
        assert run.seconds() == 12
        run.stop()
        now[0] += 100
        assert run.seconds() == 12
        raises(SystemExit, "max_steps or max_minutes", new_run, 0, 0.0)


def test_number_type_is_the_one_that_multiplies_faster():
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        chosen = config.pick_dtype("auto", torch.device("cpu"))
    assert chosen in ("float32", "bfloat16") and f"dtype: {chosen}" in printed.getvalue()
    rates = [float(word.replace(",", "")) for word in printed.getvalue().split() if word.replace(",", "").isdigit()]
    assert (rates[1] > 1.3 * rates[0]) == (chosen == "bfloat16")
    assert config.pick_dtype("bfloat16", torch.device("cpu")) == "bfloat16"
    model = config.place(nn.Linear(2, 2), torch.device("cpu"), "bfloat16")
    with config.autocast(model):
        assert model(torch.ones(1, 2)).dtype == torch.bfloat16
    with config.autocast(nn.Linear(2, 2)):  # not placed
        assert model(torch.ones(1, 2)).dtype == torch.float32


def test_learning_rate_warms_up_and_cools_down():
    rate = lambda step, progress: config.lr_factor(step, progress, warmup_steps=10, cooldown=0.4)
    assert [rate(0, 0.0), rate(4, 0.1), rate(9, 0.5), rate(99, 0.6), rate(99, 1.0)] == [0.1, 0.5, 1.0, 1.0, 0.0]
    assert abs(rate(99, 0.8) - 0.5) < 1e-9 and config.lr_factor(0, 0.5, 0, 0.0) == 1.0


def test_rows_of_an_epoch_are_all_rows_in_another_order_each_time():
    rows = torch.cat([config.epoch_rows(10, 5, step, seed=1) for step in range(4)])
    assert rows[:10].sort().values.tolist() == rows[10:].sort().values.tolist() == list(range(10))
    assert not rows[:10].equal(rows[10:]) and rows[5:10].equal(config.epoch_rows(10, 5, 1, seed=1))


def test_update_clips_steps_and_reports_a_gradient_that_is_not_finite():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    sgd.param_groups[0]["peak_lr"] = 2.0
    for x, want in ((30.0, 0.5), (math.inf, math.nan)):
        loss = (model.weight * x).sum()
        loss.backward()
        got = config.update(model, [sgd], loss.detach(), factor=0.25, grad_clip=1.0).item()
        assert model.weight.grad is None and (
            math.isnan(got) if math.isnan(want) else abs(model.weight.item() + want) < 1e-5)


def test_muon_makes_momentum_nearly_orthogonal_as_torch_does():
    for shape in ((24, 8), (8, 24), (16, 16)):
        x = torch.randn(shape) + 2
        U, _, V = torch.linalg.svd(x, full_matrices=False)
        made = config.orthogonalize(x)
        values = torch.linalg.svdvals(made)
        assert 0.6 < values.min() and values.max() < 1.3, values
        assert (made * (U @ V)).sum() > 0.95 * made.norm() * (U @ V).norm()  # a cosine: it is near U V^T
        ours, theirs = (nn.Parameter(x.clone()) for _ in range(2))
        steps = [config.Muon([ours], 0.1, 0.5, torch.bfloat16), torch.optim.Muon([theirs], 0.1, 0.5)]
        for _ in range(3):
            ours.grad = theirs.grad = torch.randn(shape)
            for optimizer in steps:
                optimizer.step()
            assert torch.equal(ours, theirs)


def test_optimizers_take_every_parameter_once_and_muon_the_matrices_of_the_blocks():
    model = GPT(GPTConfig(vocab_size=11, n_layer=1, n_embd=8, n_head=2, positions="learned", tie_weights=False))
    muon, adam = config.optimizers(model, 0.01, 0.001)
    placed = config.place(tiny_clip(), torch.device("cpu"), "bfloat16")
    assert muon.dtype == torch.float32 and config.optimizers(placed, 0.01, 0.001)[0].dtype == torch.bfloat16
    taken = [id(p) for o in (muon, adam) for g in o.param_groups for p in g["params"]]
    assert sorted(taken) == sorted(id(p) for p in model.parameters())
    named = lambda model, optimizer: {name for name, p in model.named_parameters()
                                      if any(p is each for g in optimizer.param_groups for each in g["params"])}
    block = {f"{part}.weight" for part in ("attn.qkv", "attn.proj", "ff.up", "ff.proj")}
    assert named(model, muon) == {f"decoder.blocks.0.{name}" for name in block}
    decays = {name for name, p in model.named_parameters() if any(p is each for each in adam.param_groups[0]["params"])}
    assert decays == {"embedding.weight", "position.positions", "head.weight"}
    assert len(config.optimizers(model, 0.0, 0.001)) == 1
    tied = GPT(GPTConfig(vocab_size=11, n_layer=1, n_embd=8, n_head=2))
    assert "embedding.weight" not in named(tied, config.optimizers(tied, 0.01, 0.001)[0])
    clip = tiny_clip()  # neither its two output layers, nor convolutions, nor positions
    towers = {f"{tower}.blocks.0.{name}" for tower in ("vit.encoder", "encoder") for name in block}
    assert named(clip, config.optimizers(clip, 0.01, 0.001)[0]) == towers | {"vit.pool.score.weight"}
    frozen = tiny_mllm()
    frozen.vit.requires_grad_(False)
    assert not any("vit." in name for o in config.optimizers(frozen, 0.01, 0.001) for name in named(frozen, o))


def test_shift_and_mirror():
    images = torch.arange(2 * 3 * 5 * 5, dtype=torch.uint8).view(2, 3, 5, 5)
    same = data.shift_and_mirror(images, 0, torch.tensor([False, True]))
    assert torch.equal(same[0], images[0]) and torch.equal(same[1], images[1].flip(-1))
    seen = set()
    for _ in range(60):
        moved = data.shift_and_mirror(images[1:], 1, torch.tensor([False]))[0]
        padded = F.pad(images[1], (1, 1, 1, 1))
        fits = [(i, j) for i in range(3) for j in range(3) if torch.equal(moved, padded[:, i:i + 5, j:j + 5])]
        assert len(fits) == 1
        seen.add(fits[0])
    assert len(seen) == 9


def test_photos_are_cropped_mirrored_and_recoloured():
    ramp = torch.arange(8.0).expand(64, 3, 8, 8) * 20 + 20  # brighter to the right
    plain = [["a dog"]] * 64
    assert torch.equal(data.augment_photos(ramp, plain, 1.0, 0.0, False), ramp)
    mirrored = data.augment_photos(ramp, plain, 1.0, 0.0, True)
    flipped = [torch.allclose(image, ramp[0].flip(-1), atol=1e-3) for image in mirrored]
    assert 16 < sum(flipped) < 48 and all(f or torch.allclose(i, ramp[0], atol=1e-3) for f, i in zip(flipped, mirrored))
    sided = data.augment_photos(ramp, [["a dog", "on the left."]] * 64, 0.99999, 0.0, True)
    assert (sided[:, :, :, -1] > sided[:, :, :, 0]).all()
    seen = data.augment_photos(ramp, plain, 0.25, 0.0, False)
    width = (seen[:, 0, 0, -1] - seen[:, 0, 0, 0]) / 140  # the share of the ramp that is seen
    assert width.min() > 0.35 and width.max() < 1.01 and width.std() > 0.05
    assert (seen >= 20).all() and (seen <= 160).all()  # nothing from beyond the border
    coloured = data.augment_photos(ramp * torch.tensor([1.0, 0.5, 0.2]).view(3, 1, 1), plain, 1.0, 0.3, False)
    assert coloured.std(dim=0).min() > 1 and (coloured >= 0).all() and (coloured <= 255).all()


def test_parts_of_photos_have_the_size_that_is_asked_for():
    ramp = torch.arange(8.0).expand(2, 3, 8, 8) * 20 + 20
    half = data.augment_photos(ramp, [["a dog"]] * 2, 1.0, 0.0, False, size=4)
    close(half, ramp.view(2, 3, 4, 2, 4, 2).mean(dim=(3, 5)), 1e-3)
    assert data.augment_photos(ramp, [["a dog"]] * 2, 0.5, 0.1, True, size=16).shape == (2, 3, 16, 16)


def test_images_grow_in_equal_shares_to_their_full_size():
    with patched(vit, "growth", 0.8), patched(vit, "first_size", 32):
        assert [vit.size_at(p) for p in (0, 0.19, 0.2, 0.45, 0.79, 0.8, 1)] == [32, 32, 40, 48, 56, 64, 64]
    with patched(vit, "growth", 0.0):
        assert vit.size_at(0.0) == 64
    with patched(vit, "first_size", 64):
        assert vit.size_at(0.0) == 64
    with patched(vit, "first_size", 32), patched(vit, "train_size", 48):
        assert vit.size_at(0.0) == 32 and vit.size_at(1.0) == 48


def write_safetensors(path, tensors, change=lambda header: header, body=None, length=None):
    """tensors {name: float32 tensor} as *.safetensors; what tests break: the header, the body, the header's length."""
    header, raw = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        new = tensor.detach().contiguous().numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(raw), len(raw) + len(new)]}
        raw += new
    text = change(header)
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    Path(path).write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text
                           + (raw if body is None else body))


def test_safetensors_are_read_and_lies_refused():
    tensors = {"a": torch.randn(2, 3), "b": torch.randn(()), "c": torch.randn(0, 4), "d": torch.randn(5)}

    def changed(**entry):
        return lambda header: header | {"a": header["a"] | entry}

    with in_new_folder():
        write_safetensors("good.safetensors", tensors)
        read = pretrained.read_safetensors("good.safetensors")
        assert read.keys() == tensors.keys() and all(read[name].equal(tensors[name]) for name in tensors)
        bad = [changed(dtype="F31"), changed(dtype=7), changed(dtype=["F32"]), changed(dtype="F64"), changed(shape=[3]),
               changed(shape=[-2, -3]), changed(shape=[2.0, 3]), changed(shape="23"), changed(shape=None),
               changed(data_offsets=[0]), changed(data_offsets=[24, 0]), changed(data_offsets=[0, 2 ** 70]),
               changed(data_offsets=[4, 28]), changed(data_offsets=[-24, 0]), changed(data_offsets="ab"),
               lambda header: {"a": [1, 2]}, lambda header: [1], lambda header: b"\xff\xfe", lambda header: b"[" * 9999,
               lambda header: {name: header[name] for name in "ab"}, lambda header: header | {"e": header["d"]}]
        files = [{"change": change} for change in bad]
        files += [{"body": b""}, {"body": b"x" * 47}, {"body": b"x" * 49}, {"length": 2 ** 63}, {"length": 10}]
        for i, how in enumerate(files):
            write_safetensors("bad.safetensors", tensors, **how)
            raises(SystemExit, "bad.safetensors cannot be read", pretrained.read_weights, Path("bad.safetensors"))
        for raw in (b"", b"1234567", b"PK\x03\x04" + bytes(100)):
            Path("bad.safetensors").write_bytes(raw)
            raises(SystemExit, "bad.safetensors cannot be read", pretrained.read_weights, Path("bad.safetensors"))
        marker = Path("run")
        Path("bad.bin").write_bytes(pickle.dumps(RunsCode(str(marker))))
        raises(SystemExit, "bad.bin cannot be read", pretrained.read_weights, Path("bad.bin"))
        assert not marker.exists()


class RunsCode:
    """Unpickling it would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def write_pretrained(folder):
    """A small GPT-2 and a small CLIP as the hub has them, and our models with the same weights."""
    gpt = shake(GPT(GPTConfig(261, 128, 2, 1, 64, activation="gelu_tanh", norm="layer", positions="learned",
                              bias=True)), 0.1)
    own = gpt.state_dict()
    theirs = {"wte.weight": own["embedding.weight"], "wpe.weight": own["position.positions"],
              "ln_f.weight": own["decoder.norm.weight"], "ln_f.bias": own["decoder.norm.bias"],
              "h.0.attn.bias": torch.ones(1, 1, 128, 128)}
    for i, (old, new) in itertools.product(range(2), (
            ("ln_1", "norm1"), ("attn.c_attn", "attn.qkv"), ("attn.c_proj", "attn.proj"), ("ln_2", "norm2"),
            ("mlp.c_fc", "ff.up"), ("mlp.c_proj", "ff.proj"))):
        weight, bias = (own[f"decoder.blocks.{i}.{new}.{kind}"] for kind in ("weight", "bias"))
        theirs |= {f"h.{i}.{old}.weight": weight.t(), f"h.{i}.{old}.bias": bias}
    Path(folder, "gpt2").mkdir(parents=True)
    write_safetensors(Path(folder, "gpt2", "model.safetensors"), theirs)
    characters = [chr(b) for b in GPT2Tokenizer.printable] + [chr(256 + i) for i in range(68)]
    vocab = {c: i for i, c in enumerate([*characters, "he", "ll", "hell", "\u0120hell", "<|endoftext|>"])}
    Path(folder, "gpt2", "vocab.json").write_text(json.dumps(vocab), "utf-8")
    Path(folder, "gpt2", "merges.txt").write_text("#version: 0.2\nh e\nl l\nhe ll\n\u0120 hell\n", "utf-8")

    vit = shake(ViT(ViTConfig(24, 8, 2, 1, 64, 0, activation="quick_gelu", stem="patch", class_token=True,
                              pre_norm=True, last_norm=False)), 0.1)
    vit.patches.stem.bias.data.zero_()
    for name, values in (("pixel_mean", pretrained.CLIP_MEAN), ("pixel_std", pretrained.CLIP_STD)):
        getattr(vit, name).copy_(255 * torch.tensor(values).view(1, 3, 1, 1))
    own, embeddings = vit.state_dict(), "vision_model.embeddings"
    theirs = {f"{embeddings}.patch_embedding.weight": own["patches.stem.weight"],
              f"{embeddings}.class_embedding": own["class_token"][0, 0] - 1,
              f"{embeddings}.position_embedding.weight": torch.cat((torch.ones(1, 64), own["position.positions"])),
              "text_model.final_layer_norm.weight": torch.ones(64), "logit_scale": torch.ones(())}
    theirs |= {f"vision_model.pre_layrnorm.{kind}": own[f"pre_norm.{kind}"] for kind in ("weight", "bias")}
    for i, kind in itertools.product(range(2), ("weight", "bias")):
        prefix, block = f"vision_model.encoder.layers.{i}", f"encoder.blocks.{i}"
        for name, part in zip("qkv", own[f"{block}.attn.qkv.{kind}"].chunk(3)):
            theirs[f"{prefix}.self_attn.{name}_proj.{kind}"] = part
        for old, new in (("self_attn.out_proj", "attn.proj"), ("layer_norm1", "norm1"), ("layer_norm2", "norm2"),
                         ("mlp.fc1", "ff.up"), ("mlp.fc2", "ff.proj")):
            theirs[f"{prefix}.{old}.{kind}"] = own[f"{block}.{new}.{kind}"]
    Path(folder, "clip").mkdir()
    torch.save(theirs, Path(folder, "clip", "pytorch_model.bin"))
    return gpt, vit


def test_weights_of_gpt2_and_clip_are_those_of_the_hub():
    with in_new_folder():
        gpt, vit = write_pretrained("hub")
        loaded = pretrained.load_gpt2("hub/gpt2")
        model, ids = GPT(GPTConfig(**loaded["config"])).eval(), torch.randint(261, (2, 20))
        model.load_state_dict(loaded["model"])
        close(model(ids)[0][..., :261], gpt(ids)[0], 1e-4)
        tokenizer = tokenizer_from_state(loaded["tokenizer"])
        assert tokenizer.encode("a hell!") == [64, 259, 0]
        assert tokenizer.pad_id == 261 and model.config.vocab_size == 264
        loaded = pretrained.load_clip_vit("hub/clip")
        model, images = ViT(ViTConfig(**loaded["config"])).eval(), photos(2, size=24)
        model.pool, model.head = torch.nn.Identity(), torch.nn.Identity()  # what CLIP lacks; nothing else may miss
        model.load_state_dict(loaded["model"])
        close(model.features(images), vit.features(images), 1e-4)
        args = (*TOY[mllm], "--gpt_ckpt=hub/gpt2", "--vit_ckpt=hub/clip", "--fusion=prefix", "--max_tokens=100")
        printed = run(mllm, *args)
        assert "hub/gpt2, step 0" in printed and "hub/clip, step 0" in printed
        saved = torch.load("out/mllm/sft.pt", weights_only=True)
        assert saved["tokenizer"]["kind"] == "gpt2" and saved["config"]["eos_id"] == 263
        Image.new("RGB", (30, 30)).save("a.png")
        assert "a.png: " in run(mllm, *TOY[mllm], "--image=a.png")
        raises(SystemExit, "learnt positions, which end at 128", run, mllm, *args[:-1], "--max_tokens=130")
        Path("hub/gpt2/merges.txt").write_text("l l\nh e\n", "utf-8")
        raises(SystemExit, "do not number the merges alike", run, mllm, *args)
        Path("hub/gpt2/vocab.json").unlink()
        raises(SystemExit, "vocab.json is missing", run, mllm, *args)
        raises(SystemExit, "lacks embeddings.patch_embedding.weight", pretrained.load_clip_vit, "hub/gpt2")


@contextlib.contextmanager
def serving(answer):
    """The address of a server on this machine; answer(path, start) -> status, headers, body and how much of it is sent,
    for the bytes from start on."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, body, sent = answer(self.path, int(self.headers.get("Range", "bytes=0-")[6:-1]))
            self.send_response(status)
            for name, value in ({"Content-Length": len(body)} | headers).items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(body[:sent])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def part_of(content, start):
    """What a server answers that does as it should."""
    if start >= len(content):
        return 416, {"Content-Range": f"bytes */{len(content)}"}, b"", None
    where = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
    return 206 if start else 200, where, content[start:], None


def test_downloads_resume_and_fall_back_to_the_second_source():
    content, starts = bytes(range(256)) * 40, []

    def answer(path, start):
        starts.append(start)
        return (404, {}, b"", None) if "missing" in path else part_of(b"other" if "other" in path else content, start)

    md5 = hashlib.md5(content).hexdigest()
    with (serving(answer) as url, tempfile.TemporaryDirectory() as folder,
          contextlib.redirect_stdout(io.StringIO()) as printed):
        path = Path(folder, "data", "archive.zip")
        path.parent.mkdir()
        Path(f"{path}.partial").write_bytes(content[:1000])
        assert data.download(path, [url + "missing", url + "right"], md5).read_bytes() == content
        assert starts == [1000, 1000]
        path.unlink()
        assert data.download(path, [url + "other", url + "right"], md5).read_bytes() == content
        path.write_bytes(b"a person's own copy")
        assert data.download(path, [], md5).read_bytes() == b"a person's own copy"
        assert "not the official file" in printed.getvalue()
        path.unlink()
        raises(SystemExit, "fetch it by hand", data.download, path, [url + "missing"], md5)
        assert os.listdir(path.parent) == []
        with patched(data, "show_progress", lambda text: signal.raise_signal(signal.SIGINT)):  # Ctrl-C
            raises(KeyboardInterrupt, "", data.download, path, [url + "right"], md5)
        assert os.listdir(path.parent) == ["archive.zip.partial"] and data.download(path, [url + "right"], md5) == path


def test_faulty_downloads_end_whole_or_without_the_name():
    draw, whole = random.Random(0), 0
    for i in range(50):
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for name in "abc":
                archive.writestr(name, draw.randbytes(70_000))
        content = packed.getvalue()
        faults = draw.choices(["cut", "cut", "busy", "all again", "another part", "page", "none"], k=draw.randint(0, 6))
        second_has_it = draw.random() < 0.9

        def answer(path, start):
            fault = faults.pop() if faults and path == "/first" else ""
            status, headers, body, _ = part_of(content, start)
            if fault == "page" or path == "/second" and not second_has_it:
                return 200, {}, b"<html>log in, please</html>", None
            return {"cut": (status, headers, body, draw.randrange(len(body) + 1)), "busy": (503, {}, b"", None),
                    "all again": (200, {}, content, None), "none": (404, {}, b"", None),
                    "another part": (206, {"Content-Range": f"bytes 7-{len(content) - 1}/{len(content)}"}, content[7:],
                                     None)}.get(fault, (status, headers, body, None))

        with (serving(answer) as url, tempfile.TemporaryDirectory() as folder, patched(time, "sleep", lambda _: None),
              contextlib.redirect_stdout(io.StringIO())):
            path, there = Path(folder, "a.zip"), draw.choice([b"", content[:9999], draw.randbytes(9999),
                                                              content + b"more", draw.randbytes(len(content))])
            Path(f"{path}.partial").write_bytes(there)
            try:
                assert data.download(path, [url + "first", url + "second"], check=data.zip_problem) == path
                assert path.read_bytes() == content and os.listdir(folder) == ["a.zip"], i
                whole += 1
            except SystemExit as e:
                assert "fetch it by hand" in str(e) and not path.exists() and not second_has_it, (i, e)
    assert 40 <= whole < 50  # both ends are reached


# ---------------------------------------------------------------------------------------------------------------------
# metrics and reward


def test_words_are_cut_as_the_caption_evaluation_does():
    assert words_of('A man\'s T-shirt, "red"; he doesn\'t (quite) run.') == [
        "a", "man", "'s", "t-shirt", "red", "he", "does", "n't", "quite", "run"]
    assert words_of("two dogs ' toys ... 2.5 miles & cannot -- stop!") == [
        "two", "dogs", "toys", "2.5", "miles", "&", "can", "not", "stop"]


def test_bleu_by_hand():
    # the example of Papineni et al. 2002, section 2.1: "the" occurs at most twice in a reference, so 2 of 7 count
    the = bleu(["the the the the the the the"], [["The cat is on the mat.", "There is a cat on the mat."]])
    assert abs(the[0] - 2 / 7) < 1e-12 and the[1:] == [0, 0, 0]
    # 3 of 4 words and 2 of 3 pairs match; the reference is longer by one word: brevity exp(1 - 5/4)
    got, brevity = bleu(["a dog runs far"], [["a dog runs in grass"]]), math.exp(-0.25)
    assert abs(got[0] - brevity * 3 / 4) < 1e-12 and abs(got[1] - brevity * math.sqrt(3 / 4 * 2 / 3)) < 1e-12
    # counts are added over the corpus before they are divided; 2 words are as close to 1 as to 3, the shorter is taken
    assert abs(bleu(["a b", "c d"], [["a", "a x y"], ["c d"]])[0] - 3 / 4) < 1e-12
    assert bleu(["a b c d e"], [["x", "a b c d e"]]) == [1.0] * 4 and bleu([""], [["a"]]) == [0.0] * 4
    assert bleu(["a"], [[""]]) == [0.0] * 4
    raises(AssertionError, "at least one reference", bleu, ["a"], [[]])


def test_cider_of_the_only_reference_is_ten():
    dog, men = "a dog runs on grass", "two men play football now"
    mean, each = cider([dog, men], [["A dog runs on grass."], [men]])
    assert abs(mean - 10) < 1e-9 and each.shape == (2,)
    assert cider([men, dog], [[dog], [men]])[0] == 0 == cider(["", dog], [[dog], [""]])[0]
    raises(AssertionError, "at least one reference", cider, [men, dog], [[men], []])


def test_cider_by_hand():
    # two images; every ngram occurs in one image's references alone: idf = log 2, which cancels. Candidate "a b" has
    # the vector (a: 1, b: 1), the reference (a: 1, b: 1, c: 1): cosine 2 / sqrt(6); bigrams ab, (ab, bc): 1 / sqrt(2);
    # no longer ngrams. Lengths in bigrams 1 and 2: exp(-1 / 72). Mean over four n, times 10.
    want = 10 * math.exp(-1 / 72) * (2 / math.sqrt(6) + 1 / math.sqrt(2)) / 4
    assert abs(cider(["a b", "x"], [["a b c"], ["y z"]])[1][0] - want) < 1e-9
    # a second reference that shares nothing halves it
    assert abs(cider(["a b", "x"], [["a b c", "q r s"], ["y z"]])[1][0] - want / 2) < 1e-9
    # clipping: "a a" counts the one a of the reference once, min(2, 1) * 1 / (2 * 1) for n = 1; lengths 1 and 0
    assert abs(cider(["a a", "x"], [["a"], ["y"]])[1][0] - 10 * math.exp(-1 / 72) * 0.5 / 4) < 1e-9


def test_cider_weighs_by_document_frequency():
    references = [["a dog"], ["a cat"], ["a bird"]]
    words = [[words_of(r) for r in refs] for refs in references]
    counts, n = metrics.document_frequencies(words)
    assert n == 3 and counts[("a",)] == 3 and sorted(counts.values()) == [1] * 6 + [3]  # "a" is in all three
    _, each = cider(["a", "cat", "a bird"], references)
    assert each[0] == 0 and each[1] > 0  # "a" is in every image: it weighs nothing
    elsewhere = metrics.document_frequencies([[["x"]]] * 3)
    assert cider(["a", "cat", "a bird"], references, df=elsewhere)[1][0] > 0  # counted elsewhere, it does


def plain_cider(candidate, refs, all_refs):
    """CIDEr-D of one list of words, as its formula says: sums over dicts."""
    grams = lambda words, n: Counter(tuple(words[i:i + n]) for i in range(len(words) - n + 1))
    total = 0.0
    for n in range(1, 5):
        df = Counter(gram for each in all_refs for gram in {g for ref in each for g in grams(ref, n)})
        idf = lambda gram: math.log(len(all_refs)) - math.log(max(1, df[gram]))
        vector = lambda words: {gram: count * idf(gram) for gram, count in grams(words, n).items()}
        norm = lambda v: math.sqrt(sum(x * x for x in v.values()))
        c = vector(candidate)
        for ref in refs:
            r = vector(ref)
            dot = sum(min(x, r[gram]) * r[gram] for gram, x in c.items() if gram in r)
            gap = max(0, len(candidate) - 1) - max(0, len(ref) - 1)
            total += dot / (norm(c) * norm(r)) * math.exp(-gap * gap / 72) if norm(c) and norm(r) else 0.0
    return 10 * total / 4 / len(refs)


def test_cider_of_many_captions_at_once_equals_its_formula():
    rng = np.random.default_rng(0)
    text = lambda: [f"w{i}" for i in rng.zipf(1.5, rng.integers(0, 9)) % 12]
    references = [[text() for _ in range(rng.integers(1, 6))] for _ in range(30)]
    captions, images = [text() for _ in range(80)], rng.integers(0, 30, 80)
    captions[:10] = [references[image][0] for image in images[:10]]
    got = metrics.CiderD(references).scores(captions, images)
    want = [plain_cider(c, references[i], references) for c, i in zip(captions, images)]
    assert np.abs(got - want).max() < 1e-9 and (got > 1).sum() > 8


def kendall_tau_c(scores, grades):
    """Kendall's rank correlation tau-c (Stuart 1953) of (n,) scores and (n,) grades of few different values: 2 m (pairs
    in the same order less pairs in the other) / (n^2 (m - 1)), m the smaller number of different values."""
    order, levels = 0, np.unique(grades)
    for level in levels:
        lower, same = np.sort(scores[grades < level]), scores[grades == level]
        below, not_above = np.searchsorted(lower, same, "left"), np.searchsorted(lower, same, "right")
        order += below.sum() - (len(lower) - not_above).sum()
    m = min(len(levels), len(np.unique(scores)))
    return 2 * m * order / (len(scores) ** 2 * (m - 1))


def test_rank_correlation_equals_counting_pairs():
    rng = np.random.default_rng(0)
    scores, grades = rng.integers(0, 9, 60).astype(float), rng.integers(1, 5, 60)
    pairs = list(itertools.combinations(range(60), 2))
    order = sum(np.sign((scores[i] - scores[j]) * (grades[i] - grades[j])) for i, j in pairs)
    assert abs(kendall_tau_c(scores, grades) - 2 * 4 * order / (60 ** 2 * 3)) < 1e-12
    assert kendall_tau_c(np.arange(4.0), np.arange(4)) == 1.0


def test_metrics_agree_with_human_judgements_as_the_literature_reports():
    """Kendall's tau-c with the three experts who judged each photo-caption pair of Flickr8k (Hodosh et al. 2013), each
    rating by itself, a photo's own captions left out. Only where the archive lies in data/flickr8k."""
    archive = Path(__file__).parent / "data/flickr8k/Flickr8k_text.zip"
    if not archive.is_file():
        return print("   (not checked: no data/flickr8k/Flickr8k_text.zip)")
    with zipfile.ZipFile(archive) as texts:
        lines = lambda name: [line.split("\t") for line in texts.read(name).decode("utf-8").splitlines()]
        captions = {name: caption for name, caption in lines("Flickr8k.token.txt")}
        rows = [row for row in lines("ExpertAnnotations.txt") if row[0] != row[1].split("#")[0]]
    candidates = [captions[row[1]] for row in rows]
    references = [[captions[f"{row[0]}#{i}"] for i in range(5)] for row in rows]
    grades = np.array([[int(grade) for grade in row[2:]] for row in rows])  # (pairs, 3)
    assert grades.shape == (5664, 3)
    bleu1 = np.array([bleu([c], [refs])[0] for c, refs in zip(candidates, references)])
    for scores, want in ((cider(candidates, references)[1], 43.9), (bleu1, 32.3)):
        assert abs(100 * kendall_tau_c(scores.repeat(3), grades.flatten()) - want) < 0.05


def test_reward_sees_the_end_token_and_mixes_cider_with_bleu():
    photos = [["a dog runs", "the dog runs fast"], ["two men sit", "men on a bench"]]
    reward = scst.Reward(photos, cider_weight=1.0, bleu_weight=0.0)
    ended, cut = reward(["A dog runs."] * 2, [True, False], [0, 0]).tolist()
    assert ended > cut > 0
    mixed = scst.Reward(photos, cider_weight=0.5, bleu_weight=2.0)
    assert abs(mixed(["a dog runs"], [True], [0]).item() - (0.5 * ended + 2 * 1.0)) < 1e-5
    # "a dog", length 2, closest reference 4 with the end: 2/2, (1+1)/(1+1), (0+1)/(0+1) twice; brevity exp(1 - 4/2)
    bleu4 = scst.Reward(photos, cider_weight=0.0, bleu_weight=1.0)
    assert abs(bleu4(["a dog"], [False], [0]).item() - math.exp(-1)) < 1e-6


def test_an_exact_answer_is_worth_its_weight():
    reward = scst.Reward([["yes"], ["a red star", "red star"]], cider_weight=0.0, bleu_weight=0.0, exact_weight=2.0)
    assert reward(["yes", "yes", "red star", "red"], [True, False, True, True], [0, 0, 1, 1]).tolist() == [2, 0, 2, 0]


def tiny_judges(folder, vocab_size=500):
    """Judges of a GPT to which all ids are equally likely, and of an untrained CLIP, read from files."""
    tokenizer = BPETokenizer([])
    gpt_model = GPT(tiny_gpt_config(vocab_size=vocab_size, tie_weights=False))
    gpt_model.head.weight.data.zero_()
    clip = shake(CLIP(replace(tiny_clip().config, vocab_size=vocab_size)))
    for name, stage, judge in (("gpt.pt", "gpt", gpt_model), ("clip.pt", "vit", clip)):
        config.save(Path(folder, name), BARE | {"stage": stage, "config": asdict(judge.config),
                                                "model": judge.state_dict(), "tokenizer": tokenizer.state()})
    return judges.Judges(f"{folder}/gpt.pt", f"{folder}/clip.pt", photos(3), torch.device("cpu")), clip


def test_judges_say_how_likely_a_caption_is_and_how_near_to_its_photo():
    with tempfile.TemporaryDirectory() as folder:
        judge, clip = tiny_judges(folder)
        nats = judge.nats(["ab", ""])
        close(nats[:, :4], math.log(500) * torch.tensor([[1.0, 1, 1, 0], [1, 0, 0, 0]]))  # the end is a token
        for limit, worth in ((0.0, 1), (6.0, 0), (6.5, 1)):  # math.log(500) is 6.2
            reward = scst.Reward([["ab"]], 0.0, 0.0, exact_weight=1.0, max_surprise=limit, judges=judge)
            assert reward(["ab"], [True], [0]).tolist() == [worth]
        vectors = clip.eval().embed_images(judge.images)
        texts = clip.embed_texts(data.pad_texts(["a", "b"], BPETokenizer([]), clip.config.max_tokens))
        close(judge.cosines(["a", "b", "a"], [2, 0, 2]), (texts[[0, 1, 0]] * vectors[[2, 0, 2]]).sum(dim=1))
        scores = judge.scores(["ab", ""], [0, 1])
        assert abs(scores["nats"] - math.log(500)) < 1e-4 and scores["surprising"] == 100 and "clip" in scores
        judge.gpt.head.weight.data.normal_(std=50.0)  # sure of itself, so some tokens surprise it
        shares = [judge.scores([text], [0])["surprising"] for text in "abcdefgh"]
        assert 100 in shares
        assert judges.Judges("gpt2", f"{folder}/none.pt", photos(3), torch.device("cpu")).scores(["a"], [0]) == {}


def test_the_consensus_is_the_caption_most_like_the_others():
    texts = ["a dog runs in the snow", "a brown dog runs in the snow", "a man sits on a bench"]
    texts.append(texts[0])
    frequencies = metrics.document_frequencies([[words_of("a cat sleeps")], [words_of("the cat runs")]])
    assert metrics.most_alike(texts, metrics.CiderD([], frequencies)) in (0, 3)


def test_the_nearest_photos_lend_their_consensus():
    captions = [["a red ball"], ["a blue ball", "a blue ball"], ["two dogs"], ["a blue ball"]]
    vectors = F.normalize(torch.tensor([[0.0, 1], [1, 0.2], [1, 0.1], [1, 0]]), dim=1)
    assert metrics.nearest_captions(vectors, captions, [0, 1, 2], [3], 1) == ["two dogs"]
    assert metrics.nearest_captions(vectors, captions, [0, 1, 2], [3, 0], 2) == ["a blue ball"] * 2
    images = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    close(metrics.thumbnails(images).norm(dim=1), torch.ones(3))


def test_advantages_of_both_baselines():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    assert torch.allclose(scst.advantages(rewards, torch.tensor([2.0, 1.0])), torch.tensor([[-1., 0, 4], [-1, -1, 2]]))
    assert torch.allclose(scst.advantages(rewards), torch.tensor([[-3., -1.5, 4.5], [-1.5, -1.5, 3]]))


def test_prompts_of_one_length_stand_in_one_batch():
    lengths = torch.tensor([5, 3, 5, 3, 5, 3, 5, 3, 5])
    for epoch in range(2):
        batches = [scst.batch_of(lengths, 4, step, seed=1) for step in (2 * epoch, 2 * epoch + 1)]
        assert sorted(len(set(lengths[rows].tolist())) for rows in batches) == [1, 1]
        assert len(set(torch.cat(batches).tolist())) == 8
    assert not torch.cat(batches).equal(torch.cat([scst.batch_of(lengths, 4, step, seed=2) for step in (2, 3)]))


def test_scst_gradient_reaches_the_end_token_and_nothing_after_it():
    model, sampled = shake(tiny_mllm()), torch.tensor([[5, 2, 2, 2], [5, 6, 7, 8]])  # 2 is the end token
    tokens = model.encode(photos(2)).detach()
    every = model.log_probs(tokens, torch.cat((model.caption_prompt(tokens), sampled), dim=1))[:, -4:]
    log_probs = mllm.answer_log_probs(model, tokens, model.caption_prompt(tokens), sampled)
    close(log_probs, every * torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1]]))
    close(log_probs[:1], mllm.answer_log_probs(model, tokens[:1], model.caption_prompt(tokens[:1]), sampled)[:1])
    log_probs.retain_grad()
    scst.scst_loss(log_probs, torch.tensor([3.0, -6.0])).backward()
    close(log_probs.grad, torch.tensor([[-3.0] * 4, [6.0] * 4]))


def test_scst_trains_the_distribution_that_it_samples():
    model, prompt = shake(tiny_mllm()), torch.tensor([[5, 6]])
    tokens = model.encode(photos(1)).detach()
    prompt = torch.cat((model.caption_prompt(tokens), prompt), dim=1)
    logits = model(tokens, prompt)[0][:, -1]
    for temperature in (0.5, 2.0):
        log_p = mllm.answer_log_probs(model, tokens, prompt, torch.tensor([[7], [9]]), temperature)
        close(log_p[:, 0], (logits / temperature).log_softmax(dim=-1)[0, [7, 9]], 1e-5)


def test_captions_for_evaluation_are_written_without_dropout():
    vit_config = ViTConfig(image_size=8, patch_size=4, n_layer=1, n_head=2, n_embd=16, dropout=0.5)
    tokenizer = BPETokenizer.train(["a dog"], 261)
    gpt_config = GPTConfig(vocab_size=261, block_size=24, n_layer=1, n_head=2, n_embd=16, dropout=0.5)
    model, pixels = shake(MLLM(MLLMConfig(vit_config, gpt_config)), 0.5).train(), photos(20)
    prompts = [mllm.caption_sample(i) for i in range(20)]
    data = {"images": pixels, "layouts": torch.zeros(20).long(), "tokenizer": tokenizer}
    in_training = mllm.write_answers(model, data, prompts)
    expected = model.eval().generate(pixels, max_new_tokens=99).tolist()
    assert in_training == [[tokenizer.decode(row) for row in expected], [2 in row for row in expected]]


def test_a_caption_ends_badly_without_end_token_or_on_a_word_that_needs_another():
    assert ends_badly(["a", "dog"], False) and ends_badly(["a", "dog", "in", "the"], True) and ends_badly([], True)
    assert not ends_badly(["a", "dog", "runs"], True)


# ---------------------------------------------------------------------------------------------------------------------
# data


def test_drawn_images_show_what_their_five_captions_say():
    images, captions = shapes.draw_shapes(40, 48, seed=1)
    again, _ = shapes.draw_shapes(40, 48, seed=1)
    assert images.shape == (40, 3, 48, 48) and images.dtype == np.uint8 and np.array_equal(images, again)
    for image, five in zip(images, captions):
        said = {tuple(shapes.attributes(c)) for c in five}
        assert len(set(five)) == 5 and len(said) == 1 and len(next(iter(said))) in (1, 2)
        for _, colour, _, place in next(iter(said)):  # the middle of the named place has the named colour
            row, column = divmod(shapes.PLACES.index(place), 3)
            assert np.abs(image[:, 8 + 16 * row, 8 + 16 * column].astype(int) - shapes.COLOURS[colour]).max() < 60
    one = "a small red circle in the top left"
    got = [shapes.attributes(text) for text in ("a small red circle", one, f"{one} and {one}")]
    assert got[0] == [] and len(got[1]) == 1 and got[2] == 2 * got[1]


def test_answers_about_drawn_images_are_right():
    """Every answer about one image is worked out again, from its caption, by reading the question in another way."""
    images, groups = questions.draw_conversations(400, 48, seed=2)
    checked = Counter()
    for group in (group for group in groups if len(group[0]["images"]) == 1):
        talks = [[m["content"].replace("<image>", "") for m in sample["messages"]] for sample in group]
        caption = next(talk[1] for talk, sample in zip(talks, group) if sample["messages"][1]["kind"] == "caption")
        things = [dict(zip(("size", "colour", "shape", "place"), thing)) for thing in shapes.attributes(caption)]
        for thing in things:  # the middle of the named place has the named colour
            row, column = divmod(shapes.PLACES.index(thing["place"]), 3)
            pixel = images[group[0]["images"][0]][:, 8 + 16 * row, 8 + 16 * column].astype(int)
            assert np.abs(pixel - shapes.COLOURS[thing["colour"]]).max() < 60
        for talk, sample in zip(talks, group):
            kind, (question, answer) = sample["messages"][1]["kind"], talk[:2]
            asked = question.replace("how large", "")
            named = {name: v for name, values in questions.VALUES.items() for v in values
                     if re.search(rf"\b{v}(s|es)?\b", asked)}
            if place := re.search("in the ((top|middle|bottom) (left|center|right))", question):
                named["place"] = place[1]
            fits = [thing for thing in things if named.items() <= thing.items()]
            if kind == "count":
                number = ("none", "one", "two", "three", "four")[len(fits)]
                where = ", ".join(sorted((thing["place"] for thing in fits), key=shapes.PLACES.index))
                assert answer == (f"{where}: {number}" if fits else number), (caption, question, answer)
            elif kind == "exists":
                assert answer == ("yes" if fits else "no"), (caption, question, answer)
            elif kind in ("size", "colour", "shape", "place"):
                assert [thing[kind] for thing in fits] == [answer], (caption, question, answer)
            elif kind == "relation":
                (own,), way = fits, re.search("left of|right of|above|below", question)[0]
                where = lambda thing: divmod(shapes.PLACES.index(thing["place"]), 3)
                axis, sign = way in ("left of", "right of"), 1 if way in ("right of", "below") else -1
                there = [thing for thing in things if sign * (where(thing)[axis] - where(own)[axis]) > 0]
                assert len(there) < 2
                what = "a {size} {colour} {shape}".format(**there[0]) if there else "nothing"
                assert answer == f"{way} the {own['place']}: {what}", (caption, question, answer)
            checked[kind] += 1
    assert all(checked[kind] > 30 for kind in ("count", "exists", "size", "colour", "shape", "place", "relation"))


def test_the_answer_says_which_image_has_more():
    rng, seen = np.random.default_rng(0), Counter()
    for _ in range(100):
        scenes, talks = questions.ask_pair(rng)
        for (kind, question, answer), in talks:
            if kind == "more":
                what = re.search(rf"more ({'|'.join((*shapes.COLOURS, *shapes.SHAPES, 'shape'))})", question)[1]
                first, second = (sum(what == "shape" or what in thing.words() for thing in things) for things in scenes)
                assert answer == ("neither" if first == second else "the first" if first > second else "the second")
                seen[answer] += 1
    assert len(seen) == 3 and min(seen.values()) > 20


def test_the_answer_says_what_has_changed():
    rng, seen = np.random.default_rng(0), Counter()
    for _ in range(300):
        before = questions.make_scene(rng.integers(1, 5), rng)
        after, answer = questions.change(before, rng)
        gone, new = [thing for thing in before if thing not in after], [thing for thing in after if thing not in before]
        assert len({thing.place for thing in after}) == len(after) == len({thing[:3] for thing in after})
        if len(gone) == len(new) == 1:  # one attribute of one thing
            (was,), (now,) = gone, new
            name, = (name for name in was._fields if getattr(was, name) != getattr(now, name))
            value = "in the " * (name == "place") + getattr(now, name)
            assert answer == f"in the {was.place}, the {was.words()} is now {value}"
        else:
            name = "gone" if gone else "new" if new else "nothing"
            wordings = {"gone": "in the {0}, the {1} is gone", "new": "in the {0}, there is a new {1}"}
            words = [text for thing in gone + new for text in (thing.place, thing.words())]
            assert answer == wordings.get(name, name).format(*words)
        seen[name] += 1
    assert set(seen) == {"colour", "place", "size", "gone", "new", "nothing"} and min(seen.values()) > 20


def test_clips_show_what_their_answers_say():
    images, groups = questions.draw_conversations(200, 64, seed=3)
    images, seen = images.astype(int), Counter()

    def pixels(image, colour):
        """Where an image has about this colour: (n, 2) rows and columns."""
        return np.argwhere(np.abs(image - np.array(shapes.COLOURS[colour])[:, None, None]).max(axis=0) < 30)

    for messages, numbers in ((sample["messages"], sample["images"]) for group in groups for sample in group):
        if messages[1]["kind"] != "event":
            continue
        assert 4 <= len(numbers) <= 8
        for event in messages[1]["content"].split(", then "):
            _, _, colour, _, change, *way = event.split(" ")
            if messages[1]["content"].count(colour) == 2:
                continue
            before, after = (pixels(images[i], colour) for i in (numbers[0], numbers[-1]))
            rise = len(after) - len(before)
            if change == "moves":
                assert abs(rise) < 20
                down, right = after.sum(axis=0) - before.sum(axis=0)
                assert max((-right, "left"), (right, "right"), (-down, "up"), (down, "down"))[1] == way[0], event
            else:
                assert {"appears": rise > 30, "vanishes": rise < -30, "grows": rise > 30}[change], event
            seen[change] += 1
    assert min(seen[change] for change in ("moves", "appears", "vanishes", "grows")) > 5


def test_middle_frames_are_those_of_equal_parts():
    frames = list(range(12))
    assert [data.middle_frames(frames, n) for n in (1, 2, 3, 4, 12)] == [
        [6], [3, 9], [2, 6, 10], [1, 4, 7, 10], frames]
    assert data.middle_frames(frames, 99) == frames and data.middle_frames([5], 8) == [5]


def test_clips_and_several_images_are_opened_in_order():
    with in_new_folder():
        pictures = [Image.new("RGB", (40, 40), (20 * i, 0, 0)) for i in range(6)]
        for name in ("clip.gif", "clip.png", "clip.webp"):
            more = {"lossless": True} if name.endswith("webp") else {}
            pictures[0].save(name, save_all=True, append_images=pictures[1:], duration=50, **more)
        Path("clip").mkdir()
        for i, picture in enumerate(pictures):
            picture.save(f"clip/{i}.png")
        reds = lambda opened: [[to_pixels(image, 2)[0, 0, 0].item() for image in images] for _, images in opened]
        for name in ("clip.gif", "clip.png", "clip.webp"):
            assert reds(data.open_images(name, 3)[0]) == [[20, 60, 100]]
            assert reds(data.open_images(name)[0]) == [[60]]
        assert reds(data.open_images("clip", 3, clip=True)[0]) == [[20, 60, 100]]
        assert reds(data.open_images("clip", 3)[0]) == [[0], [20], [40], [60], [80], [100]]
        (name, _), = opened = data.open_images("clip/5.png,clip.gif, clip/0.png", 2)[0]
        assert reds(opened) == [[100, 20, 80, 0]] and name == "5.png, clip.gif, 0.png"
        Path("a.mp4").write_bytes(b"")
        raises(SystemExit, "ffmpeg -i a.mp4", data.open_images, "a.mp4")


def test_odd_images_are_seen_as_a_person_sees_them():
    grey = lambda value: (value,) * 3
    turned = Image.new("RGB", (4, 2), grey(0))
    turned.putpixel((0, 0), grey(255))
    way = Image.Exif()
    way[0x0112] = 6  # held upright, the camera was turned to the left: top left is top right
    palette = Image.new("P", (4, 4))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    pictures = {  # name: image, what save() takes, the pixel at the top left
        "sixteen.png": (Image.fromarray(np.full((4, 4), 40000, dtype=np.uint16)), {}, grey(156)),
        "large.png": (Image.fromarray(np.full((2, 2000), 65535, dtype=np.uint16)), {}, grey(255)),
        "float.tiff": (Image.fromarray(np.float32([[3.0, 0.0], [math.nan, 1.0]])), {}, grey(255)),
        "clear.png": (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), {}, grey(255)),
        "half.webp": (Image.new("RGBA", (4, 4), (255, 0, 0, 51)), {"lossless": True}, (255, 204, 204)),
        "grey.png": (Image.new("LA", (4, 4), (0, 51)), {}, grey(204)),
        "palette.gif": (palette, {"transparency": 0}, grey(255)),
        "palette.png": (palette, {}, (10, 20, 30)),
        "bit.png": (Image.new("1", (4, 4), 1), {}, grey(255)),
        "cmyk.jpg": (Image.new("CMYK", (8, 8), (255, 0, 0, 0)), {"quality": 100}, (0, 255, 255)),
        "turned.png": (turned, {"exif": way}, grey(0)),
        "strip.png": (Image.new("RGB", (1, 6000), (9, 9, 9)), {}, grey(9)),
        "dot.png": (Image.new("L", (1, 1), 7), {}, grey(7))}
    with in_new_folder():
        for name, (image, more, want) in pictures.items():
            image.save(name, **more)
            image, = data.open_file(name, 1)
            got = image.getpixel((0, 0))
            assert image.mode == "RGB" and all(abs(a - b) < 3 for a, b in zip(got, want)), (name, got)
            assert data.to_images([image], 16)[0].shape == (1, 3, 16, 16)
            assert data.to_images([image], 16, 4)[0].shape == (1, 4, 3, 16, 16)
        assert data.open_file("turned.png", 1)[0].getpixel((1, 0)) == grey(255)


def test_damaged_images_are_named_and_the_others_opened():
    draw, noise, broken = random.Random(0), np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8), 0
    with in_new_folder():
        Path("photos").mkdir()
        for ending in ("jpg", "png", "gif", "webp", "bmp"):
            Image.fromarray(noise).save(f"whole.{ending}")
            whole = Path(f"whole.{ending}").read_bytes()
            for i in range(60):
                content = bytearray(whole[:draw.randrange(len(whole))] if i % 2 else whole)
                for _ in range(i % 2 * (i % 3) or 3):
                    if content:
                        content[draw.randrange(len(content))] = draw.randrange(256)
                Path(f"photos/{i:02d}.{ending}").write_bytes(content)
        with warnings.catch_warnings(action="ignore"):  # Pillow's, of metadata
            opened, broken = data.open_images("photos")
        assert len(opened) + len(broken) == 300 and len(opened) > 30 and len(broken) > 100, len(broken)
        assert all(image.mode == "RGB" for _, images in opened for image in images)
        Image.new("1", (20_000, 10_000)).save("bomb.png")
        raises(SystemExit, "bomb.png: not an image that Pillow can read", data.open_images, "bomb.png")


def words_model(block_size=24, **changes):
    """A tiny MLLM and the data of four black images, with a tokenizer of bytes."""
    tokenizer = BPETokenizer([])
    sizes = dict(vocab_size=tokenizer.vocab_size, block_size=block_size) | changes
    data = {"images": photos(4), "layouts": torch.zeros(4).long(), "tokenizer": tokenizer}
    return tiny_mllm(gpt=tiny_gpt_config(**sizes)), data


def test_conversations_become_ids_and_the_targets_are_what_the_assistant_says():
    turns = [("user", "<image>or <image>?"), ("assistant", "a dog"), ("user", "why"), ("assistant", "so")]
    sample = {"images": [2, 0], "messages": [{"role": role, "content": text} for role, text in turns]}
    for cross_every, n in ((0, 4), (1, 1)):
        (model, data), image = words_model(40, cross_every=cross_every), [IMAGE_ID] * n
        or_, ask, dog, why, so = map(data["tokenizer"].encode, ("or ", "?", "a dog", "why", "so"))
        bos, eos, pad = 1, 2, 0
        ids = [*image, *or_, *image, *ask, bos, *dog, eos, *why, bos, *so, eos]
        numbers, which, inputs, targets, _ = mllm.collate(model, data, [[sample], [mllm.caption_sample(2, "a dog")]])
        wanted = [-1] * (2 * n + 4) + dog + [eos] + [-1] * 4 + so + [eos]
        assert inputs[0, :len(ids) - 1].tolist() == ids[:-1] and set(inputs[0, len(ids) - 1:].tolist()) <= {pad}
        assert targets[0, :len(wanted)].tolist() == wanted and set(targets[0, len(wanted):].tolist()) <= {-1}
        caption = [*image, bos, *dog]  # the answer to no question
        assert inputs[1, :len(caption)].tolist() == caption and set(inputs[1, len(caption):].tolist()) == {pad}
        assert targets[1, n:n + 6].tolist() == [*dog, eos] and (targets[1] >= 0).sum() == 6
        assert inputs.size(1) % 8 == 0 and numbers == [2, 0] and which.tolist() == [0, 1, 0]  # image 2 is shared


def test_a_conversation_that_is_too_long_is_cut_at_a_turn():
    turns = [("user", "<image>what?"), ("assistant", "a dog"), ("user", "so"), ("assistant", "yes")]
    messages = [{"role": role, "content": text} for role, text in turns]
    sample = {"images": [0], "messages": messages}
    for cross_every, n in ((0, 4), (1, 1)):
        # after the image 5 + 1 + 5 + 1 ids in the first turn, 2 + 1 + 3 + 1 in the second; the last is not read
        for block_size, learnt, asked in ((18, 4, 4), (17, 2, 4), (15, 2, 4), (14, 2, 2), (11, 2, 2), (10, 0, 2),
                                          (6, 0, 2), (5, 0, 0)):
            model, data = words_model(n + block_size, cross_every=cross_every)
            data["splits"] = {"train": [[sample]], "val": [[sample]]}
            if not learnt or not asked:
                empty = "train" if not learnt else "val"
                raises(SystemExit, f"no sample of {empty} fits the context of {n + block_size}", mllm.fit, data, model)
                continue
            with contextlib.redirect_stdout(io.StringIO()) as said:
                splits = mllm.fit(data, model)["splits"]
            for split, left in (("train", learnt), ("val", asked)):
                assert splits[split] == [[sample | {"messages": messages[:left]}]]
            counts = f"{4 - (learnt + asked) // 2} turns are cut off, and of 0 samples nothing is left"
            assert (counts in said.getvalue()) == (learnt + asked < 8)
            _, _, inputs, targets, _ = mllm.collate(model, data, splits["train"][0:1])
            assert (targets == 2).sum() == learnt // 2 and inputs.size(1) <= n + block_size
            said, _ = mllm.write_answers(model, data, mllm.prompts_of(splits["val"])[0])  # there is room for an answer
            assert len(said) == asked // 2


def test_the_loss_is_that_of_the_answers_and_their_ends_alone():
    turns = [("user", "<image>what?"), ("assistant", "a dog"), ("user", "so"), ("assistant", "yes")]
    sample = {"images": [0], "messages": [{"role": role, "content": text} for role, text in turns]}
    for cross_every in (0, 1):
        model, data = words_model(40, cross_every=cross_every)
        ids, _ = mllm.encode_messages(sample["messages"], data["tokenizer"], 1 if cross_every else 4)
        log_p = model.log_probs(data["images"][:1], torch.tensor([ids]))[0]
        spoken, answers = False, []  # in plain Python: what stands after bos, up to eos
        for t, i in enumerate(ids):
            answers += [t] * spoken
            spoken = (spoken or i == 1) and i != 2
        assert data["tokenizer"].decode([ids[t] for t in answers]) == "a dogyes" and len(answers) == 5 + 1 + 3 + 1
        images, _, inputs, targets, _ = mllm.collate(model, data, [[sample]])
        weights = [p for p in model.parameters() if p.requires_grad]
        got = torch.autograd.grad(model(data["images"][images], inputs, targets)[1], weights, allow_unused=True)
        want = torch.autograd.grad(-log_p[answers].mean(), weights, allow_unused=True)
        for a, b in zip(got, want):
            assert (a is None) == (b is None) and (a is None or (a - b).abs().max() < 1e-5)


def test_other_images_are_as_many_and_never_the_own():
    prompts = [{"images": images, "messages": [], "kind": str(i)}
               for i, images in enumerate([[0], [0], [1], [2, 3], [1], [4, 5], [6, 7, 8], [9, 10, 11]])]
    swapped = mllm.other_images(prompts)
    for before, after in zip(prompts, swapped):
        assert after["kind"] == before["kind"] and len(after["images"]) == len(before["images"])
        assert after["images"] != before["images"]


def total_loss(model, data, samples):
    numbers, which, inputs, targets, segments = mllm.collate(model, data, samples)
    tokens = model.encode(data["images"][numbers])[which] if numbers else torch.zeros(0, 4, 24)
    return model(tokens, inputs, targets, 0.0, segments)[1] * (targets >= 0).sum()


def test_samples_in_one_row_have_the_losses_that_they_have_alone():
    ask = lambda images, *texts: {"images": images, "messages": [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}
    for cross_every, positions in ((0, "rotary"), (1, "rotary"), (0, "sinusoidal"), (0, "learned")):
        longest = "y" * (28 if cross_every else 25)  # with the image, bos and eos one id more than block_size
        groups = [[ask([2], "<image>", longest), ask([2], "<image>so?", "yes", "why", "so"), ask([2], "<image>", "a")],
                  [ask([0, 1], "<image><image>or?", "no"), ask([0, 1], "<image><image>", "two")],
                  [ask([], "hi", "hello")], [ask([3], "so<image>?", "yes"), ask([3], "<image>?", "no")]]
        model, data = words_model(30, cross_every=cross_every, positions=positions)
        shake(model, 0.1)
        samples = [[sample] for group in groups for sample in group]
        rows = mllm.collate(model, data, groups)[2]
        assert len(rows) == 5 and rows.size(1) > 30  # the images are read once, and a row is longer than block_size
        n = sum(len(m["content"]) + 1 for sample in samples for m in sample[0]["messages"][1::2])  # bytes and ends
        apart = sum(total_loss(model, data, [sample]) for sample in samples)
        close(total_loss(model, data, groups) / n, apart / n, 1e-5)
        model.zero_grad()
        total_loss(model, data, groups).backward()
        together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        sum(total_loss(model, data, [sample]) for sample in samples).backward()
        for name, grad in together.items():
            close(grad / n, dict(model.named_parameters())[name].grad / n, 1e-5)


def test_rows_with_other_numbers_of_images_have_the_losses_that_they_have_alone():
    for cross_every in (0, 1):
        model, data = words_model(64, cross_every=cross_every)
        shake(model, 0.1)
        samples = [{"images": images, "messages": [{"role": "user", "content": "<image>" * len(images) + "so"},
                                                   {"role": "assistant", "content": text}]}
                   for images, text in (([], "none"), ([3], "one"), ([1, 3], "two of them"), ([0, 1, 2], "3"))]

        loss_of = lambda samples: total_loss(model, data, [[sample] for sample in samples])
        n = sum(len(sample["messages"][1]["content"]) + 1 for sample in samples)  # bytes and ends
        close(loss_of(samples) / n, sum(loss_of([sample]) for sample in samples) / n, 1e-5)
        before = loss_of(samples)
        for sample in samples:
            sample["messages"][0]["content"] = sample["messages"][0]["content"].replace("so", "no")
        assert abs(loss_of(samples) - before) > 1e-3  # what the user says is read, though not learnt


def test_a_batch_without_images_is_learnt_from():
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    for cross_every in (0, 1):
        model, data = words_model(30, cross_every=cross_every)
        images, layouts, which, *texts = mllm.get_batch(model, data, [[{"images": [], "messages": turns}]] * 2)
        assert mllm.augment_photos(images, [], 0.5, 0.2, True).shape == images.shape and len(images) == 0
        loss = model(model.encode(images, layouts)[which], *texts[:2], 0.0, texts[2])[1]
        loss.backward()
        assert loss.isfinite() and model.gpt.embedding.weight.grad.any()


def test_prepare_cifar_reads_the_binary_records():
    records = np.random.default_rng(0).integers(0, 10, (10_000, prepare_cifar.RECORD), dtype=np.uint8)
    blob = io.BytesIO()
    with tarfile.open(fileobj=blob, mode="w") as tar:
        for name, data in (("good.bin", records.tobytes()), ("short.bin", b"\0" * prepare_cifar.RECORD)):
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    blob.seek(0)
    with tarfile.open(fileobj=blob) as tar:
        labels, images = prepare_cifar.read_batch(tar, "good.bin")
        raises(ValueError, "no batch of CIFAR-10", prepare_cifar.read_batch, tar, "short.bin")
    assert np.array_equal(labels, records[:, 0]) and images.shape == (10_000, 3, 32, 32)
    assert images[7, 1, 2, 3] == records[7, 1 + 1024 + 2 * 32 + 3]  # red, then green, then blue; row by row


def test_archives_with_missing_extra_and_huge_members_end_in_one_line():
    half = zlib.compress(bytes(99))[:20]
    record = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
    meta = tarfile.TarInfo("cifar-10-batches-bin/batches.meta.txt")
    climbing, linked, folder, huge = map(copy.copy, [record] * 4)
    climbing.name, linked.type, folder.type = "../../evil", tarfile.SYMTYPE, tarfile.DIRTYPE
    linked.linkname, record.size, huge.size, climbing.size = "/etc/passwd", 5000, 10_000 * 3073 + 1, 4
    with in_new_folder():
        tar, zips = Path("data/cifar10/cifar-10-binary.tar.gz"), Path("data/flickr8k")
        tar.parent.mkdir(parents=True)
        zips.mkdir()
        for members, said in (([record], "batches.meta.txt"), ([climbing, meta], "data_batch_1.bin"),
                              ([meta, linked], "data_batch_1.bin is no file"),
                              ([meta, folder], "is no file of at most"), ([meta, huge], "of at most 30,730,000"),
                              ([meta, record], "is broken")):
            with tarfile.open(tar, "w:gz", compresslevel=1) as archive:
                for member in members:
                    archive.addfile(member, io.BytesIO(bytes(member.size if member.isreg() else 0)))
            raises(SystemExit, said, run, prepare_cifar)
            tar.write_bytes(tar.read_bytes()[:-30])
            raises(SystemExit, "delete it and run this again", run, prepare_cifar)
        texts = {"Flickr8k.token.txt": b"a.jpg#0\tA dog .\n", "Flickr_8k.trainImages.txt": b"a.jpg",
                 "Flickr_8k.devImages.txt": b"", "Flickr_8k.testImages.txt": b""}
        for more, members, said in (({}, {"../../evil.jpg": b""}, "are not Flickr8k"),
                                    ({"Flickr8k.token.txt": b"a.jpg#0 A dog"}, {"a.jpg": b""}, "is broken"),
                                    ({"Flickr8k.token.txt": b"\xff"}, {}, "not UTF-8"),
                                    ({"more.txt": bytes(101 * 10 ** 6)}, {}, "more.txt in data/flickr8k would be"),
                                    ({}, None, "is broken")):
            for name, content in (("Flickr8k_text.zip", texts | more), ("Flickr8k_Dataset.zip", members)):
                (zips / name).write_bytes(half)
                if content is not None:
                    with zipfile.ZipFile(zips / name, "w", zipfile.ZIP_DEFLATED) as archive:
                        for member, text in content.items():
                            archive.writestr(member, text)
            raises(SystemExit, said, run, prepare_flickr8k)
        assert sorted(os.listdir("data/flickr8k")) == ["Flickr8k_Dataset.zip", "Flickr8k_text.zip"]
        assert os.listdir(".") == ["data"] and os.listdir("data/cifar10") == [tar.name]


def test_prepare_shakespeare_cuts_the_last_tenth_off():
    with in_new_folder():
        Path("data/shakespeare").mkdir(parents=True)
        Path("data/shakespeare/input.txt").write_text("abcdefghij" * 10)
        assert "not the official file" in run(prepare_shakespeare)
        train, val = (np.load(f"data/shakespeare/{split}.npy") for split in ("train", "val"))
        assert len(train) == 90 and val.tolist() == list(range(10))


def test_prepare_flickr8k_packs_a_folder_of_ones_own_and_mllm_learns_from_it():
    with in_new_folder():
        make_captioned_folder("mine", 20)
        run(prepare_flickr8k, "--source=mine", "--out_dir=data/mine", "--size=16", "--vocab_size=280")
        table = json.loads(Path("data/mine/captions.json").read_text())
        assert {split: len(photos) for split, photos in table["splits"].items()} == {"train": 16, "val": 2, "test": 2}
        assert sorted(sum(table["splits"].values(), [])) == list(range(20))
        i = table["names"].index("3.png")
        assert table["captions"][i] == ["picture 3, said a", "picture 3, said b"]
        red, green, blue = np.load("data/mine/images.npy")[i]
        assert set(red.flat) == {30} and not green.any() and not blue.any()
        tokenizer = tokenizer_from_state(json.loads(Path("data/mine/tokenizer.json").read_text()))
        stream = np.load("data/mine/val.npy").tolist()
        assert stream.count(tokenizer.bos_id) == stream.count(tokenizer.eos_id) == 4
        assert "picture" in tokenizer.decode(stream)
        tiny = ("--max_steps=2", "--max_minutes=0", "--eval_interval=2", "--device=cpu", "--dataset=mine")
        run(gpt, "--out_dir=out/lm", *tiny, "--block_size=8", "--batch_size=2", "--n_layer=1", "--n_head=2",
            "--n_embd=8", "--max_new_tokens=5")
        said = run(mllm, "--out_dir=out/m", "--gpt_ckpt=out/lm/best.pt", "--image_size=16", "--vit_embd=8",
                   "--vit_head=2", "--vit_layer=1", *tiny, "--batch_size=4", "--align_share=0.5", "--mirror=True",
                   "--crop=0.8")
        assert "out/lm/best.pt" in said and "frozen: gpt\n" in said and "shuffled" in said
        raises(SystemExit, "holds a run on mine, this one is on shakespeare; give it --out_dir=out/lm_shakespeare",
               config.set_aside, Path("out/lm"), "shakespeare")
        Path("mine/3.png").write_bytes(Path("mine/3.png").read_bytes()[:50])
        raises(SystemExit, "3.png cannot be read as an", run, prepare_flickr8k, "--source=mine", "--out_dir=data/x")
        assert not list(Path("data/x").iterdir())
        Path("mine/captions.txt").write_text("image,caption\nnone.png,hello\n")
        raises(SystemExit, "none.png, which is not in", run, prepare_flickr8k, "--source=mine", "--out_dir=data/mine")
        Path("mine/captions.txt").write_text("image,caption\n0.png,hello\n,hello\n")
        raises(SystemExit, "line 3 names no image", run, prepare_flickr8k, "--source=mine", "--out_dir=data/mine")
        Path("mine/captions.txt").write_text("image;caption\n0.png;hello\n" + "x" * 10_001)
        raises(SystemExit, "line 3: 10,001 characters", run, prepare_flickr8k, "--source=mine", "--out_dir=data/x")
        Path("mine/captions.txt").write_text("image;caption\n0.png;hello\n")
        raises(SystemExit, "has no line of the form", run, prepare_flickr8k, "--source=mine", "--out_dir=data/x")
        raises(SystemExit, "--source=none is no folder", run, prepare_flickr8k, "--source=none", "--out_dir=data/x")
        make_captioned_folder("few", 19)
        raises(SystemExit, "19 images are too few", run, prepare_flickr8k, "--source=few", "--out_dir=data/few")
        raises(SystemExit, "captions.txt is missing", run, prepare_flickr8k, "--source=.", "--out_dir=data/mine")
        raises(SystemExit, "a folder of their own", run, prepare_flickr8k, "--source=mine")


def make_conversations(folder, n):
    """n plain images, and a conversation about each in the layout of MiniMind-V or, of every second, of LLaVA."""
    Path(folder).mkdir()
    lines = {"minimind.jsonl": [], "llava.jsonl": []}
    for i in range(n):
        Image.new("RGB", (20, 12), (10 * i, 0, 0)).save(f"{folder}/{i}.png")
        turns = ["What is this?\n<image>" if i % 4 else "What is this?", f"Picture {i}. A big one.", "Sure?", "Yes."]
        keys, names = (("from", "value"), ("human", "gpt")) if i % 2 else (("role", "content"), ("user", "assistant"))
        talk = [dict(zip(keys, (names[k % 2], turn))) for k, turn in enumerate(turns)]
        lines["llava.jsonl" if i % 2 else "minimind.jsonl"].append({"image": f"{i}.png", "conversations": talk})
    pair = [{"role": "user", "content": "<image>Or<image>?"}, {"role": "assistant", "content": "The first."}]
    lines["minimind.jsonl"] += [{"image": "0.png, 1.png", "conversations": pair}]
    pair = [{"from": "human", "value": "Hello."}, {"from": "gpt", "value": "Hi."}]
    lines["llava.jsonl"] += [{"image": ["2.png", "3.png"], "conversations": pair}, {"conversations": pair}]
    for name, some in lines.items():
        Path(folder, name).write_text("\n".join(map(json.dumps, some)) + "\n")


def test_prepare_flickr8k_packs_conversations_in_both_layouts_and_mllm_and_scst_learn_from_them():
    with in_new_folder():
        make_conversations("talks", 24)
        run(prepare_flickr8k, "--source=talks", "--out_dir=data/talks", "--size=16", "--vocab_size=280")
        table = json.loads(Path("data/talks/captions.json").read_text())
        splits, names = table["samples"], table["names"]
        of = {split: {names[i] for sample in samples for i in sample["images"]} for split, samples in splits.items()}
        assert sum(map(len, of.values())) == len(set.union(*of.values())) == len(names) == 24  # none in two splits
        assert sum(map(len, splits.values())) == 27 and len(splits["val"]) >= 2 and len(splits["test"]) >= 2
        said = {tuple(names[i] for i in sample["images"]): [m["content"] for m in sample["messages"]]
                for samples in splits.values() for sample in samples}
        for i in range(24):
            first = "What is this?<image>" if i % 4 else "<image>What is this?"
            assert said[(f"{i}.png",)] == [first, f"Picture {i}. A big one.", "Sure?", "Yes."]
        assert said["0.png", "1.png"] == ["<image>Or<image>?", "The first."]
        assert said["2.png", "3.png"] == ["<image><image>Hello.", "Hi."] and said[()] == ["Hello.", "Hi."]
        assert {m["role"] for samples in splits.values() for s in samples for m in s["messages"][::2]} == {"user"}
        images = np.load("data/talks/images.npy")
        assert all(set(images[i, 0].flat) == {10 * int(name[:-4])} for i, name in enumerate(names))
        stream, state = np.load("data/talks/val.npy"), json.loads(Path("data/talks/tokenizer.json").read_text())
        assert "What is this?Picture" in tokenizer_from_state(state).decode(stream.tolist())
        tiny = ("--max_steps=2", "--max_minutes=0", "--eval_interval=2", "--device=cpu", "--beams=1")
        for fusion in ("prefix", "cross"):
            args = (*tiny, f"--fusion={fusion}", f"--out_dir=out/{fusion}", "--dataset=talks", "--image_size=16",
                    "--vit_embd=8", "--vit_head=2", "--vit_layer=1", "--gpt_layer=1", "--gpt_embd=16", "--gpt_head=2")
            assert "turns are cut off" in run(mllm, *args, "--batch_size=8", "--max_tokens=16")
            assert "3.png, 2.png: " in run(mllm, *args, "--image=talks/3.png,talks/2.png", "--prompt=<image>in<image>?")
            assert "no image: " in run(mllm, *args, "--prompt=Hello.")
            raises(SystemExit, "3 images at once; this model has learnt at most 2", run, mllm, *args,
                   "--image=talks/3.png,talks/2.png,talks/1.png")
            raises(SystemExit, "stands 1 times in the prompt; no image: 0", run, mllm, *args, "--prompt=a <image>?")
            lines = iter(["What is this?", "Sure?", "x" * 200, "Why? " * 8, ""])
            with patched(builtins, "input", lambda prompt: next(lines)):
                said = run(mllm, *args, "--image=talks/3.png", "--chat=True")
            assert "too long" in said and "forgotten" in said
            raises(SystemExit, "a chat is about one image", run, mllm, *args, "--image=talks", "--chat=True")
            raises(SystemExit, "these samples hold questions", run, mllm, *args, "--baselines=True")
            more = ("--cider_weight=0.0", "--exact_weight=1.0", "--batch_size=4", "--out_dir=out/scst")
            said = run(scst, *tiny, f"--sft_dir=out/{fusion}", *more)
            assert "commonest" in said and "validation share right" in said
            assert "3.png: " in run(scst, *tiny, *more, "--image=talks/3.png", "--prompt=What is this?")
        raises(SystemExit, "CLIP learns from captions", run, vit, *TOY_CLIP, "--dataset=talks")


BAD_LINES = [  # a line of a *.jsonl, and what the error says
    ("{", "no JSON"), ("[]", 'no "conversations"'), ("{}", 'no "conversations"'),
    ('{"conversations": "hi"}', 'no "conversations"'), ('{"conversations": ["hi"]}', 'no "conversations"'),
    ('{"conversations": []}', "the last turn is not an answer"),
    *((json.dumps({"image": image, "conversations": [{"role": role, "content": text} for role, text in turns]}), why)
      for image, turns, why in [
        ("0.png", [("system", "a"), ("user", "a")], "turn 1 has the unknown role 'system'"),
        ("0.png", [("user", "a"), (["x"], "a")], "turn 2 has the unknown role"),
        ("0.png", [(None, "a")], "turn 1 has the unknown role None"),
        ("0.png", [("user", None), ("assistant", "a")], "turn 1 has no text"),
        ("0.png", [("user", "a"), ("assistant", 7)], "turn 2 has no text"),
        ("0.png", [("assistant", "a"), ("user", "b")], "turn 1 is out of order"),
        ("0.png", [("user", "a"), ("user", "b"), ("assistant", "c")], "turn 2 is out of order"),
        ("0.png", [("user", "a"), ("assistant", "b"), ("user", "c")], "the last turn is not an answer"),
        ("0.png", [("user", "a"), ("assistant", " ")], "turn 2 is an empty answer"),
        ("0.png", [("user", "a"), ("assistant", "<image>b")], "turn 2 is an answer with <image>"),
        ("0.png", [("user", "<image><image>a"), ("assistant", "b")], "stands 2 times in the text, and there are 1"),
        (None, [("user", "<image>a"), ("assistant", "b")], "stands 1 times in the text, and there are 0 images"),
        (7, [("user", "a"), ("assistant", "b")], '"image" is neither'),
        (["0.png", 7], [("user", "a"), ("assistant", "b")], '"image" is neither'),
        ("0.png,,1.png", [("user", "a"), ("assistant", "b")], '"image" is neither'),
        ("0.png, none.png", [("user", "a"), ("assistant", "b")], "there is no image none.png"),
        ("broken.png", [("user", "a"), ("assistant", "b")], "broken.png cannot be read as an image")])]


def test_a_bad_line_of_conversations_ends_with_file_line_and_reason():
    with in_new_folder():
        make_conversations("talks", 24)
        Path("talks/broken.png").write_bytes(Path("talks/0.png").read_bytes()[:40])
        good = Path("talks/llava.jsonl").read_bytes()
        few = ("--source=talks", "--out_dir=data/talks", "--size=16", "--vocab_size=280")
        lines = [*((line.encode(), why) for line, why in BAD_LINES), (b'{"a": "\xff"}', "can't decode byte 0xff")]
        for line, why in lines:
            Path("talks/llava.jsonl").write_bytes(good + b"\n" + line + b"\n" + good)  # after an empty line
            raises(SystemExit, why, run, prepare_flickr8k, *few)
            raises(SystemExit, f"llava.jsonl, line {good.count(10) + 2}: ", run, prepare_flickr8k, *few)
        Path("talks/llava.jsonl").write_bytes(good)
        Path("talks/captions.txt").write_text("0.png,a\n")
        raises(SystemExit, "holds both captions.txt and llava.jsonl", run, prepare_flickr8k, *few)
        make_conversations("few", 10)
        raises(SystemExit, "too few to split", run, prepare_flickr8k, "--source=few", "--out_dir=data/few")


def test_samples_that_share_an_image_stay_together():
    rng = np.random.default_rng(0)
    samples = [{"images": [str(i) for i in rng.choice(300, rng.integers(0, 4), replace=False)]} for _ in range(150)]
    splits = conversations.split_by_image(samples)
    assert sorted(map(id, sum(splits.values(), []))) == sorted(map(id, samples))
    images = {split: {name for sample in some for name in sample["images"]} for split, some in splits.items()}
    assert not images["train"] & images["val"] and not images["train"] & images["test"]
    assert not images["val"] & images["test"] and images["val"] and images["test"]


# ---------------------------------------------------------------------------------------------------------------------
# the stages, end to end at toy size


@contextlib.contextmanager
def in_new_folder():
    """An empty working directory, as of a person who has just begun."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def run(stage, *argv):
    """What stage.main(argv) prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        stage.main(list(argv))
    return printed.getvalue()


def make_captioned_folder(folder, n):
    """n plain images and a captions.txt with two captions of each, one of them quoted and both with a comma."""
    Path(folder).mkdir()
    lines = ["image, caption"]
    for i in range(n):
        Image.new("RGB", (20, 12), (10 * i, 0, 0)).save(f"{folder}/{i}.png")
        lines += [f'{i}.png,"Picture {i}, said A ."', f"{i}.png,Picture {i},  said B."]
    Path(folder, "captions.txt").write_text("\n".join(lines))


def make_toy_data():
    """data/shakespeare, data/cifar10 and data/mine, tiny."""
    text = "to be, or not to be: that is the question.\n" * 30
    Path("data/shakespeare").mkdir(parents=True)
    Path("data/shakespeare/input.txt").write_text(text)
    run(prepare_shakespeare)
    Path("data/cifar10").mkdir()
    rng = np.random.default_rng(0)
    for split, n in (("train", 48), ("test", 20)):
        np.save(f"data/cifar10/{split}_labels.npy", (np.arange(n) % 10).astype(np.uint8))
        np.save(f"data/cifar10/{split}_images.npy", rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8))
    Path("data/cifar10/classes.json").write_text(json.dumps([f"class{i}" for i in range(10)]))
    make_captioned_folder("mine", 40)
    run(prepare_flickr8k, "--source=mine", "--out_dir=data/mine", "--size=16", "--vocab_size=280")


COMMON = ("--device=cpu", "--dtype=float32", "--max_minutes=0", "--max_steps=6", "--eval_interval=2")
TOY = {  # at least one source of randomness of each kind is on: batches, dropout, augmentation, sampling
    gpt: (*COMMON, "--block_size=16", "--batch_size=4", "--n_layer=1", "--n_head=2", "--n_embd=16", "--dropout=0.1",
          "--max_new_tokens=20", "--out_dir=out/gpt"),
    vit: (*COMMON, "--n_val=16", "--batch_size=8", "--n_layer=1", "--n_head=2", "--n_embd=16", "--image_size=32",
          "--first_size=16", "--dropout=0.1", "--out_dir=out/vit"),
    mllm: (*COMMON, "--n_drawn=80", "--batch_size=8", "--image_size=24", "--vit_layer=1", "--vit_head=2",
           "--vit_embd=16", "--gpt_layer=1", "--gpt_head=2", "--gpt_embd=16", "--dropout=0.1", "--align_share=0.5",
           "--captions_per_photo=2", "--mirror=True", "--crop=0.8", "--jitter=0.1", "--word_dropout=0.1",
           "--out_dir=out/mllm"),
    scst: (*COMMON, "--batch_size=4", "--sft_dir=out/mllm", "--out_dir=out/scst"),
}
TOY_CLIP = (*TOY[vit][:-1], "--task=clip", "--dataset=mine", "--image_size=16", "--first_size=8", "--text_layer=1",
            "--text_embd=16", "--max_tokens=12", "--words_weight=0.5", "--out_dir=out/clip")


def log_rows(folder):
    """The rows of log.csv without the columns that tell the time."""
    with open(Path(folder, "log.csv"), newline="") as f:
        timing = ("ms_per_step", "items_per_second", "minutes", "reward_share")
        tells_time = lambda k: k in timing or k.endswith("per_second")
        return [{k: v for k, v in row.items() if not tells_time(k)} for row in csv.DictReader(f)]


def check_stage(stage, best, args=None):
    """A run; the same interrupted in a step, interrupted in an evaluation, killed before its last checkpoint, and
    resumed after each; the same with fewer evaluations: bit for bit."""
    args = args or TOY[stage]
    folder = args[-1].removeprefix("--out_dir=")
    printed = run(stage, *args)
    assert "step 6/6" in printed and Path(folder, best).exists() and list(Path(folder).glob("*.png"))
    rows, weights = log_rows(folder), load(f"{folder}/last.pt")["model"]
    elsewhere, resume = args + (f"--out_dir={folder}_killed",), ()
    for module, name, fault, said, step in (
            (config.Run, "advance", interrupt_at(2, config.Run.advance), "stopped by hand at step 3", 3),
            (config.Run, "log", interrupt_at(4, config.Run.log), "stopped by hand at step 4", 4),
            (config, "save", crash_at(6, config.save), "killed", 4)):
        with patched(module, name, fault):
            raises((SystemExit, Killed), said, run, stage, *elsewhere, *resume)
        resume = ("--init_from=resume",)
        assert load(f"{folder}_killed/last.pt")["step"] == step
    run(stage, *elsewhere, *resume)
    assert log_rows(f"{folder}_killed") == rows
    resumed = load(f"{folder}_killed/last.pt")["model"]
    assert all(torch.equal(w, resumed[name]) for name, w in weights.items())
    run(stage, *args, f"--out_dir={folder}_quiet", "--eval_interval=3")
    quiet = load(f"{folder}_quiet/last.pt")["model"]
    assert all(torch.equal(w, quiet[name]) for name, w in weights.items())


def load(path):
    """A checkpoint of any stage."""
    return config.load(path, "vit", "gpt", "mllm", "scst")


class Killed(Exception):
    pass


def crash_at(step, save):
    """config.save, until it is given a checkpoint of that step."""

    def crashing(path, checkpoint):
        if checkpoint["step"] == step:
            raise Killed("killed")
        save(path, checkpoint)

    return crashing


def interrupt_at(step, method):
    """A method of config.Run, with Ctrl-C at that step before it."""

    def interrupted(self, *args, **more):
        if self.step == step:
            signal.raise_signal(signal.SIGINT)
        return method(self, *args, **more)

    return interrupted


@contextlib.contextmanager
def patched(module, name, value):
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def moved_little(a, b):
    return (a - b).abs().max() < 0.1 and a.shape == b.shape


def test_gpt_runs_resumes_and_writes():
    with in_new_folder():
        make_toy_data()
        check_stage(gpt, "best.pt")
        assert Path("out/gpt/sample.txt").read_text()
        evaluation = (*TOY[gpt], "--eval_only=True")
        assert "val loss" in run(gpt, *evaluation)
        raises(SystemExit, "no split test in data/shakespeare; there are train, val", run, gpt, *evaluation,
               "--eval_split=test")
        raises(SystemExit, "another tokenizer than data/mine has", run, gpt, *evaluation, "--dataset=mine")
        Path("data/shakespeare/tokenizer.json").write_text(Path("data/mine/tokenizer.json").read_text())
        raises(SystemExit, "the data has another tokenizer", run, gpt, *TOY[gpt], "--init_from=resume")
        run(prepare_shakespeare)
        prompted = lambda n: run(gpt, *TOY[gpt], "--prompt=to be", f"--num_samples={n}").split("-" * 40)
        first, second, pace = prompted(2)
        assert "tokens per second" in pace and [first, second] == prompted(2)[:2]
        first = first[first.index("(command line)\nto be") + 15:]  # after what override() printed
        assert second.strip("\n").startswith("to be") and second.strip("\n") != first.strip("\n")
        assert len(prompted(1)) == 2
        raises(SystemExit, "'#' is not in the vocabulary", run, gpt, *TOY[gpt], "--prompt=#")
        ended = run(gpt, *TOY[gpt], "--max_steps=0", "--max_minutes=0.01", "--eval_interval=999", "--out_dir=out/timed")
        assert "lr 0.0e+00" in ended


def test_gpt_loss_of_a_split_is_over_all_of_it():
    model = GPT(GPTConfig(vocab_size=7, block_size=4, n_layer=1, n_head=1, n_embd=8))
    ids = torch.randint(7, (24,))
    got = gpt.evaluate(model, ids, 2)
    losses = [F.cross_entropy(model(ids[None, i:i + 4])[0][0][:len(ids) - 1 - i], ids[i + 1:i + 5], reduction="sum")
              for i in range(0, 23, 4)]
    assert abs(got - sum(losses).item() / 23) < 1e-5


def test_vit_runs_resumes_and_classifies():
    with in_new_folder():
        make_toy_data()
        check_stage(vit, "best.pt")
        assert Path("out/vit/predictions.png").exists() and "accuracy" in run(vit, *TOY[vit], "--init_from=resume")
        said = run(vit, *TOY[vit], "--eval_only=True", "--eval_split=test")
        words = said[said.index("per class"):].replace(",", " ").split()
        each = [float(word[:-1]) for word in words if word[-1] == "%"]
        accuracy = float(said.split("test_accuracy ")[1].split()[0])
        assert len(each) == 10 and abs(sum(each) / 10 - accuracy) < 0.1  # as many images of each class
        Image.new("RGB", (50, 40), (1, 2, 3)).save("photo.png")
        Image.new("L", (9, 9)).save("grey.png")
        said = run(vit, *TOY[vit], "--image=.")
        assert said.count("%") == 10 and "photo.png" in said and Path("out/vit/classified.png").exists()
        check_bad_images(vit)
        raises(SystemExit, "n_val=9: the run held 16", run, vit, *TOY[vit], "--eval_only=True", "--n_val=9")
        check_stage(vit, "best.pt", TOY_CLIP)
        printed = run(vit, *TOY_CLIP, "--vit_ckpt=out/vit/best.pt", "--out_dir=out/continued")
        assert "ViT of out/vit/best.pt" in printed
        assert float(log_rows("out/continued")[-1]["test_text10"]) == 100  # ten nearest of few photos' captions
        assert "val_recall" in run(vit, *TOY_CLIP, "--eval_only=True")
        said = run(vit, *TOY_CLIP, "--image=photo.png", "--texts=a picture, said b, said a")
        assert said.count("%") == 3 and "said a " in said
        fewer = tokenizer_from_state(json.loads(Path("data/mine/tokenizer.json").read_text())).state()
        fewer["merges"].pop()
        Path("data/mine/tokenizer.json").write_text(json.dumps(fewer))
        raises(SystemExit, "the data has another tokenizer", run, vit, *TOY_CLIP, "--init_from=resume")


def test_recall_counts_own_captions_among_the_nearest():
    apart = F.normalize(torch.eye(4) + 0.3, dim=1)  # 4 photos of two captions each
    owner, texts = torch.arange(4).repeat_interleave(2), apart.repeat_interleave(2, dim=0)
    right, wrong = vit.recalls(apart @ texts.T, owner), vit.recalls(apart @ texts.roll(2, dims=0).T, owner)
    assert right["_text1"] == right["_photo1"] == 100 and wrong["_text1"] == wrong["_photo1"] == 0
    assert wrong["_text10"] == 100  # there are only eight captions
    half = torch.stack([texts[i] if i % 2 else texts[(i + 2) % 8] for i in range(8)])  # half are the next photo's
    assert vit.recalls(apart @ half.T, owner)["_photo1"] == 50


def test_the_recipes_for_a_gpu_start():
    recipes = Path(__file__).parent / "config"
    with in_new_folder():
        make_toy_data()
        few = (*COMMON, "--max_steps=2", "--batch_size=4")
        assert "10,6" in run(gpt, str(recipes / "shakespeare.py"), *few, "--max_new_tokens=2")  # million parameters
        assert "step 2/2" in run(vit, str(recipes / "cifar.py"), *few, "--n_val=8")
        run(gpt, *TOY[gpt], "--dataset=mine", "--out_dir=out/words")
        small = ("--dataset=mine", "--image_size=16", "--first_size=8", "--vit_ckpt=")
        assert "step 2/2" in run(vit, str(recipes / "clip.py"), *few, *small)
        small = ("--dataset=mine", "--image_size=16", "--vit_ckpt=", "--gpt_ckpt=out/words/best.pt", "--vit_layer=1")
        assert "step 2/2" in run(mllm, str(recipes / "flickr8k.py"), *few, *small)
        assert "step 2/2" in run(scst, str(recipes / "flickr8k_scst.py"), *few)


def check_bad_images(stage):
    Path("text.txt").write_text("no image")
    raises(SystemExit, "text.txt: not an image", run, stage, *TOY[stage], "--image=text.txt")
    raises(SystemExit, "no such image", run, stage, *TOY[stage], "--image=none.png")
    for name in ("cut.png", "cut.jpg"):  # broken off in the middle
        whole = io.BytesIO()
        Image.effect_noise((64, 64), 50).save(whole, "png" if name.endswith("png") else "jpeg")
        Path(name).write_bytes(whole.getvalue()[:len(whole.getvalue()) // 2])
        raises(SystemExit, f"{name}: not an image", run, stage, *TOY[stage], f"--image={name}")


def test_mllm_and_scst_run_resume_and_caption():
    with in_new_folder():
        make_toy_data()
        run(vit, *TOY[vit])
        run(gpt, *TOY[gpt])
        check_stage(mllm, "sft.pt")
        assert Path("out/mllm/align.pt").exists()
        run(vit, *TOY_CLIP)
        for eye in ("vit", "clip"):
            said = run(mllm, *TOY[mllm], f"--vit_ckpt=out/{eye}/best.pt", "--out_dir=out/started", "--max_steps=2")
            assert f"out/{eye}/best.pt, step" in said
            first = load(f"out/{eye}/best.pt")["model"]
            started, prefix = load("out/started/last.pt")["model"], "vit." if eye == "clip" else ""
            name = "encoder.blocks.0.norm1.weight"  # two steps later still near
            assert moved_little(started[f"vit.{name}"], first[f"{prefix}{name}"])
        assert "cider" in run(mllm, *TOY[mllm], "--eval_only=True", "--eval_split=test")
        Image.new("RGB", (50, 40), (1, 2, 3)).save("photo.png")
        said = run(mllm, *TOY[mllm], "--image=photo.png")
        assert "photo.png: " in said and "(log p -" in said and Path("out/mllm/captioned.png").exists()
        assert run(mllm, *TOY[mllm], "--image=photo.png", "--num_captions=3").count("photo.png: ") == 3
        sampled = ("--num_captions=3", "--temperature=1.0", "--beams=1")
        assert run(mllm, *TOY[mllm], "--image=photo.png", *sampled).count("photo.png: ") == 3
        check_bad_images(mllm)
        table = run(mllm, "--baselines=True", "--device=cpu", "--out_dir=out/mllm")  # on the data of that run
        assert all(name in table for name in ("people", "nearest by 8x8 pixels", "this model"))
        crossed = (*TOY[mllm], "--fusion=cross", "--connector=linear", "--gpt_layer=2", "--cross_every=2")
        run(mllm, *crossed, "--out_dir=out/crossed")
        assert run(mllm, *crossed, "--out_dir=out/crossed", "--image=photo.png").count("photo.png: ") == 1
        run(scst, *TOY[scst], "--sft_dir=out/crossed", "--out_dir=out/more")
        check_stage(scst, "scst.pt")
        for more in (("--baseline=leave_one_out", "--samples=3", "--sample_temperature=0.5"), ("--bleu_weight=1.0",)):
            said = run(scst, *TOY[scst], *more, "--out_dir=out/more")
            assert "before" in said and "after" in said and "validation CIDEr" in said
        run(scst, *TOY[scst], "--dtype=bfloat16", "--out_dir=out/bf16")
        first, last = (load(f"out/{name}.pt")["model"] for name in ("mllm/sft", "bf16/last"))
        assert {name for name in first if not torch.equal(first[name], last[name])} == {
            name for name in first if name.split(".")[0] in ("connector", "gpt")}  # autocast loses no gradient
        assert "cider" in run(scst, *TOY[scst], "--eval_only=True")
        assert "photo.png: " in run(scst, *TOY[scst], "--image=photo.png")
        raises(SystemExit, "image_size=25 is not a multiple", run, mllm, *TOY[mllm], "--vit_ckpt=out/vit/best.pt",
               "--fusion=cross", "--image_size=25")
        other = (*TOY[mllm], "--vit_ckpt=out/gpt/best.pt")
        raises(SystemExit, "out/gpt/best.pt is no checkpoint of vit, but of gpt", run, mllm, *other)
        raises(SystemExit, "lr is 0.5 and was", run, scst, *TOY[scst], "--init_from=resume", "--lr=0.5")
        raises(SystemExit, "at least 2", run, scst, *TOY[scst], "--baseline=leave_one_out", "--samples=1")
        raises(SystemExit, "there is no file gpt_ckpt=''", run, scst, *TOY[scst], "--max_surprise=6")


# without what each process draws for itself: dropout and augmentation
FIXED = {gpt: ("--dropout=0.0",), vit: ("--dropout=0.0", "--shift=0", "--mirror=False"),
         mllm: ("--dropout=0.0", "--word_dropout=0.0", "--crop=1.0", "--jitter=0.0", "--mirror=False")}
FIXED_CLIP = (*FIXED[vit], "--crop=1.0", "--jitter=0.0")


def likely_tokens(logits, temperature=1.0, *_):
    """In the place of sample_next: the first of two samples is greedy, the second takes the second likeliest tokens."""
    rank = torch.arange(len(logits)) % 2 if temperature else torch.zeros(len(logits), dtype=torch.long)
    return logits.topk(2).indices.gather(1, rank[:, None]).squeeze(1)


def test_scenes_on_tiles_are_learnt_and_asked():
    with in_new_folder():
        args = (*(arg for arg in TOY[mllm] if arg.split("=")[0] not in ("--mirror", "--crop", "--jitter")),
                "--dataset=wide", "--fusion=cross", "--max_tokens=80", "--keep_blocks=0,", "--across_layer=1")
        printed = run(mllm, *args, "--max_tiles=4")
        assert "36 image tokens each" in printed and Path("out/mllm/captions.png").is_file()
        assert "right" in run(mllm, *args, "--eval_only=True")
        Image.new("RGB", (90, 30)).save("wide.png")
        assert "wide.png: " in run(mllm, *args, "--image=wide.png") and Path("out/mllm/captioned.png").is_file()
        assert "after" in run(scst, *TOY[scst], "--init_from=sft")
        raises(SystemExit, "not some of the blocks 0 to 0", run, mllm, *args, "--max_tiles=4", "--keep_blocks=0,0")
        raises(SystemExit, "tiles are not augmented", run, mllm, *TOY[mllm], "--dataset=wide", "--max_tiles=4")
        raises(SystemExit, "takes cross-attention", run, mllm, *args, "--max_tiles=4", "--fusion=prefix")
        raises(SystemExit, "shapes has images of 1 tiles", run, mllm, *args, "--max_tiles=4", "--dataset=shapes")
        make_captioned_folder("mine", 24)
        run(prepare_flickr8k, "--source=mine", "--out_dir=data/mine", "--size=24", "--max_tiles=4", "--vocab_size=300")
        assert np.load("data/mine/images.npy").shape == (24, 4, 3, 24, 24)
        assert set(np.load("data/mine/layouts.npy").tolist()) == {LAYOUTS.index((1, 2))}  # of 20x12 pixels
        run(mllm, *args, "--max_tiles=4", "--dataset=mine", "--out_dir=out/tiles")


def test_questions_about_drawn_images_are_learnt_and_asked():
    with in_new_folder():
        args = (*TOY[mllm][:-1], "--dataset=questions", "--connector=pixel_shuffle", "--image_size=48",
                "--max_tokens=64", "--n_drawn=160", "--max_steps=4",
                "--align_share=0.5", "--beams=1", "--train_vit=False", "--out_dir=out/asked")
        for fusion in ("prefix", "cross"):
            said = run(mllm, *args, f"--fusion={fusion}")
            table = {line.split("  ")[0]: line.split()[-3:] for line in said.splitlines() if line.endswith("%")}
            assert {"caption", "change", "event", "one image", "two images", "video", "all"} <= set(table)
            frames = [Image.new("RGB", (50, 40), (9 * i, 2, 3)) for i in range(5)]
            frames[0].save("clip.gif", save_all=True, append_images=frames[1:])
            said = run(mllm, *args, "--image=clip.gif", "--frames=4", "--prompt=what happens?")
            assert "clip.gif: " in said and Path("out/asked/captioned.png").exists()
        run(mllm, *TOY[mllm])
        for asks in ("--prompt=why?", "--chat=True"):
            raises(SystemExit, "has learnt captions and no questions", run, mllm, *TOY[mllm], "--image=clip.gif", asks)


def long_test_two_processes_and_accumulation_train_as_one_process_does():
    long = ("--max_steps=20", "--eval_interval=1")
    runs = [*((stage, (*TOY[stage], *FIXED[stage], *long)) for stage in (gpt, vit, mllm)),
            (mllm, (*TOY[mllm], *FIXED[mllm], *long, "--fusion=cross")), (vit, (*TOY_CLIP, *FIXED_CLIP, *long))]
    runs += [(stage, (*args, "--muon_lr=0.0")) for stage, args in runs]  # AdamW for all
    runs.append((scst, (*TOY[scst], "--sft_dir=out/fixed", *long)))  # of given samples
    script = "\n".join(f"{stage.__name__}.main({[*args, f'--out_dir=out/two{i}']})"
                       for i, (stage, args) in enumerate(runs))
    with in_new_folder():
        make_toy_data()
        run(mllm, *TOY[mllm], *FIXED[mllm], "--out_dir=out/fixed")  # what scst starts from
        Path("stages.py").write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
                                     f"import gpt, mllm, model, scst, test_model, vit\n"
                                     f"model.sample_next = test_model.likely_tokens\n{script}\n")
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                               "stages.py"], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        for i, (stage, args) in enumerate(runs):
            with patched(model, "sample_next", likely_tokens):
                run(stage, *args, f"--out_dir=out/one{i}")
                run(stage, *args, f"--out_dir=out/parts{i}", "--accumulation=2")
            one, two, parts = ([float(row["train"]) for row in log_rows(f"out/{name}{i}") if row["train"]]
                               for name in ("one", "two", "parts"))
            assert len(one) == len(two) == len(parts) == 20, (stage.__name__, len(one), len(two), len(parts))
            for other in (two, parts):
                worst = max(abs(a - b) for a, b in zip(one, other))
                assert worst < 1e-3, f"{stage.__name__}: losses differ by up to {worst}"
        raises(SystemExit, "cannot be cut into 3 equal parts", run, gpt, *TOY[gpt], "--accumulation=3")


def test_align_trains_what_no_checkpoint_brought_on_captions_alone():
    save = config.save
    with in_new_folder():
        make_toy_data()
        run(vit, *TOY[vit])
        run(gpt, *TOY[gpt], "--dataset=mine", "--out_dir=out/words")
        args = (*TOY[mllm], "--dataset=mine", "--image_size=16", "--vit_ckpt=out/vit/best.pt",
                "--gpt_ckpt=out/words/best.pt", "--max_steps=8", "--align_share=0.5")
        for fusion, new in (("prefix", set()), ("cross", {"marker", "gpt"})):
            seen = []  # the phase and weights of every checkpoint
            note = lambda path, saved: seen.append((saved["phase"], {k: w.clone() for k, w in saved["model"].items()}))
            with patched(config, "save", lambda path, checkpoint: (note(path, checkpoint), save(path, checkpoint))):
                run(mllm, *args, f"--fusion={fusion}")
            align = [weights for phase, weights in seen if phase == "align"]
            changed = {name for name, w in align[0].items() if not torch.equal(w, align[-1][name])}
            assert {name.split(".")[0] for name in changed} == {"connector"} | new
            assert all(".cross_" in name for name in changed if name.startswith("gpt"))
            sft = [weights for phase, weights in seen if phase == "sft"]
            assert {name.split(".")[0] for name in sft[-1] if not torch.equal(align[-1][name], sft[-1][name])} == {
                "vit", "connector", "gpt"} | (new and {"marker"})
        assert "frozen: none" in run(mllm, *TOY[mllm], "--out_dir=out/new").split("phase sft")[0]  # nothing to keep
    ask = lambda text, turns=1: {"images": [0], "messages": turns * [
        {"role": "user", "content": text}, {"role": "assistant", "content": "so"}]}
    samples = {"splits": {"train": [[ask("<image>"), ask("<image>why?"), ask("<image>", 2)], [ask("<image>who?")]],
                          "val": [[ask("hi")]]}}
    assert mllm.captions_of(samples)["splits"] == {"train": [[ask("<image>")]], "val": []}


def test_what_goes_wrong_ends_in_one_line():
    with in_new_folder():
        raises(SystemExit, "no data at data/shakespeare/tokenizer.json yet", run, gpt)
        raises(SystemExit, "make it first: python prepare_shakespeare.py", run, gpt)
        raises(SystemExit, "python prepare_cifar.py", run, vit)
        raises(SystemExit, "python prepare_flickr8k.py", run, mllm, "--dataset=flickr8k")
        raises(SystemExit, "train one first", run, gpt, "--prompt=a")
        raises(SystemExit, "train one first", run, vit, "--eval_only=True")
        raises(SystemExit, "train one first", run, mllm, "--image=a.png")
        raises(SystemExit, "train one first: python mllm.py", run, scst)
        raises(SystemExit, "train one first", run, mllm, *TOY[mllm], "--gpt_ckpt=none.pt")
        Path("config").mkdir()
        Path("config/eye.py").write_text('out_dir = "out/eye"\n')
        missing = "train one first: python vit.py config/eye.py"
        raises(SystemExit, missing, run, mllm, *TOY[mllm], "--vit_ckpt=out/eye/best.pt")
        torch.save({"weight": torch.zeros(2)}, "other.pt")
        raises(SystemExit, "other.pt is no checkpoint of vit", run, mllm, *TOY[mllm], "--vit_ckpt=other.pt")
        raises(SystemExit, "prompt is empty", run, gpt, "--prompt=")
        make_toy_data()
        raises(SystemExit, "grad_clip=-1.0: at least 0", run, gpt, *TOY[gpt], "--grad_clip=-1.0")
        raises(SystemExit, "starts from nothing", run, vit, *TOY[vit], "--vit_ckpt=out/vit/best.pt")
        raises(SystemExit, "not a multiple of n_head", run, gpt, *TOY[gpt], "--n_head=3")
        raises(SystemExit, "is not available here", run, gpt, *TOY[gpt], "--device=cuda:99")
        raises(SystemExit, "init_from=sft: scratch or resume", run, gpt, *TOY[gpt], "--init_from=sft")
        raises(SystemExit, "norm 'batch': layer, rms", run, gpt, *TOY[gpt], "--norm=batch")
        raises(SystemExit, "eval_interval=0: at least 1", run, gpt, *TOY[gpt], "--eval_interval=0")
        raises(SystemExit, "windows of block_size=9999", run, gpt, *TOY[gpt], "--block_size=9999")
        raises(SystemExit, "not a multiple of patch_size", run, vit, *TOY[vit], "--image_size=60")
        raises(SystemExit, "image_size=25 is not a multiple of patch_size=8", run, mllm, *TOY[mllm], "--image_size=25")
        raises(SystemExit, "no checkpoint none/best.pt yet; train one first: python gpt.py", run, mllm, *TOY[mllm],
               "--gpt_ckpt=none/best.pt")
        raises(SystemExit, "align_share=1.0", run, mllm, *TOY[mllm], "--align_share=1.0")
        raises(SystemExit, "connector 'qformer': linear", run, mllm, *TOY[mllm], "--connector=qformer")
        raises(SystemExit, "fusion=none: cross or prefix", run, mllm, *TOY[mllm], "--fusion=none")
        raises(SystemExit, "eval_split=none: test or train or val", run, mllm, *TOY[mllm], "--eval_split=none")
        raises(SystemExit, "dropout=1.0: at least 0 and at most 0.99", run, gpt, *TOY[gpt], "--dropout=1.0")
        raises(SystemExit, "temperature=-0.8: at least 0", run, gpt, *TOY[gpt], "--temperature=-0.8")
        raises(SystemExit, "dtype=float64", run, gpt, *TOY[gpt], "--dtype=float64")
        raises(SystemExit, "train one first", run, gpt, *TOY[gpt], "--init_from=resume")


def test_two_runs_in_one_folder_are_one_too_many():
    import fcntl  # not on Windows
    with in_new_folder():
        make_toy_data()
        Path("out/gpt").mkdir(parents=True)
        with open("out/gpt/lock", "w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            raises(SystemExit, "another run is writing to", run, gpt, *TOY[gpt])
        run(gpt, *TOY[gpt])


def test_a_full_disk_leaves_the_last_checkpoint_and_the_log():
    import resource  # not on Windows
    with in_new_folder():
        make_toy_data()
        run(gpt, *TOY[gpt], "--max_steps=2")
        before = {path: path.read_bytes() for path in Path("out/gpt").iterdir()}
        for most in (10_000, 10):  # bytes of a file: too few for a checkpoint; for log.csv too
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
            try:
                raises(SystemExit, "(is the disk full?)", run, gpt, *TOY[gpt], "--init_from=resume")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            after = {path: path.read_bytes() for path in Path("out/gpt").iterdir()}
            assert {p for p in before | after if before.get(p) != after.get(p)} <= {Path("out/gpt/log.csv")}
            assert len(log_rows("out/gpt")) >= 2
        run(gpt, *TOY[gpt], "--init_from=resume")


def test_damaged_checkpoints_end_in_one_line_and_run_nothing():
    class Evil:
        def __reduce__(self):
            return Path.touch, (Path("evil"),)

    with in_new_folder():
        make_toy_data()
        run(gpt, *TOY[gpt], "--max_steps=2")
        path, draw, noticed = Path("out/gpt/best.pt"), random.Random(0), 0
        whole, weights, checkpoint = path.read_bytes(), load("out/gpt/best.pt")["model"], load("out/gpt/best.pt")
        ask = lambda: run(gpt, *TOY[gpt], "--prompt=to be")
        for _ in range(50):
            path.write_bytes(whole[:draw.randrange(len(whole))])
            raises(SystemExit, "out/gpt/best.pt is no checkpoint that can be read", ask)
        for _ in range(50):
            where, flipped = draw.randrange(len(whole)), bytearray(whole)
            flipped[where] ^= 1 << draw.randrange(8)
            path.write_bytes(flipped)
            try:
                assert all(torch.equal(w, weights[name]) for name, w in load(path)["model"].items())  # padding, a date
            except SystemExit as e:
                noticed += "out/gpt/best.pt is" in str(e)
        assert noticed > 40, noticed
        for evil in (Evil(), {**checkpoint, "step": Evil()}):
            torch.save(evil, path)
            raises(SystemExit, "no checkpoint that can be read", ask)
            path.write_bytes(pickle.dumps(evil))
            raises(SystemExit, "no checkpoint that can be read", ask)
        assert not Path("evil").exists()
        for change, said in (({"stage": "vit"}, "no checkpoint of gpt, but of vit"),
                             ({"config": checkpoint["config"] | {"n_embd": 32}}, "do not fit its config: "),
                             ({"config": checkpoint["config"] | {"new": 1}}, "another version")):
            torch.save(checkpoint | change, path)
            raises(SystemExit, said, ask)
        del checkpoint["dtype"]
        torch.save(checkpoint, path)
        raises(SystemExit, "written by another version of gpt.py: it lacks dtype", ask)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step():
    with in_new_folder():
        make_toy_data()
        bad = (*TOY[gpt], "--adam_lr=1.0", "--weight_decay=1e9", "--grad_clip=0.0", "--warmup_steps=0",
               "--eval_interval=1", "--max_steps=20")
        raises(SystemExit, "at step", run, gpt, *bad)
        assert all(w.isfinite().all() for w in load("out/gpt/last.pt")["model"].values())


def test_a_stage_ends_with_status_1_and_no_traceback():
    root = Path(__file__).parent
    done = subprocess.run([sys.executable, root / "gpt.py", "--batchsize=3"], capture_output=True, text=True, cwd=root)
    assert done.returncode == 1 and "did you mean batch_size" in done.stderr and len(done.stderr.splitlines()) == 1


def test_only_the_five_packages_are_imported():
    root, allowed = Path(__file__).parent, {"torch", "numpy", "PIL", "requests", "matplotlib", *sys.stdlib_module_names}
    own = {p.stem for p in root.glob("*.py")} | {"config"}
    for file in (*root.glob("*.py"), *root.glob("config/**/*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {m.split(".")[0] for m in modules} <= allowed | own, file.name


# ---------------------------------------------------------------------------------------------------------------------
# hard use: python test_model.py --all


def run_in_child(stage, argv):
    with open("said.txt", "a") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        torch.set_num_threads(1)
        importlib.import_module(stage).main(argv)


def long_test_kills_at_random_moments_lose_nothing():
    processes, draw, kills, in_a_write = multiprocessing.get_context("forkserver"), random.Random(0), 0, 0
    processes.set_forkserver_preload(["gpt", "vit", "mllm", "scst"])
    with in_new_folder():
        make_toy_data()
        for stage, args in ((gpt, TOY[gpt]), (vit, TOY[vit]), (vit, TOY_CLIP), (mllm, TOY[mllm]), (scst, TOY[scst])):
            folder, args = Path(args[-1].removeprefix("--out_dir=")), (*args, "--max_steps=12", "--eval_interval=1")
            other, end, ended = Path(f"{folder}_killed"), kills + 24, False
            run(stage, *args)
            while kills < end or not ended:
                resume = ["--init_from=resume"] * (other / "last.pt").exists()
                argv = [*args, f"--out_dir={other}", *resume]
                for partial in other.glob("*.partial"):  # of the kill before
                    partial.unlink()
                child = processes.Process(target=run_in_child, args=(stage.__name__, argv))
                child.start()
                child.join(draw.uniform(0.5, 2.5) if kills < end else None)
                while kills % 2 and child.exitcode is None and not list(other.glob("*.partial")):
                    pass  # every second one is killed while it writes
                ended = child.exitcode is not None
                if not ended:
                    child.kill()
                    child.join()
                    kills, in_a_write = kills + 1, in_a_write + bool(list(other.glob("*.partial")))
                    continue
                assert child.exitcode == 0, Path("said.txt").read_text()[-2000:]
                assert log_rows(other) == log_rows(folder)
                resumed, whole = load(other / "last.pt")["model"], load(folder / "last.pt")["model"]
                assert all(torch.equal(w, resumed[name]) for name, w in whole.items())
                shutil.rmtree(other)
    print(f"{kills} kills, {in_a_write} of them while a file was written")


def long_test_wrong_settings_end_in_one_line():
    wrong = ["", "abc", "None", "[1]", "(1,)", "-1", "-0.5", "1e999", "nan", "9" * 11, "-" + "9" * 30, "0", "3.7"]
    odd = ["1", "2", "7", "33", "0.1", "True"]
    draw, tries, failed = random.Random(0), Counter(), []
    with in_new_folder():
        make_toy_data()
        run(mllm, *TOY[mllm], "--max_steps=2", "--eval_interval=1")
        for stage in (gpt, vit, mllm, scst):
            for name in config.read_settings(stage.__file__):
                for value in (*draw.sample(wrong, 3), *draw.sample(odd, 2)):
                    try:
                        run(stage, *TOY[stage], "--max_steps=1", f"--out_dir=out/tried_{stage.__name__}",
                            f"--{name}={value}")
                        tries["ran"] += 1
                    except SystemExit as e:
                        assert len(str(e).strip().splitlines()) == 1, e
                        tries["one line"] += 1
                    except Exception as e:
                        failed.append(f"{stage.__name__} --{name}={value}: {e!r}")
    print(dict(tries))
    assert not failed and sum(tries.values()) >= 500, "\n".join(failed)


def long_test_ten_thousand_generations_and_scst_steps_take_no_more_memory():
    used = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6  # MB
    with in_new_folder():
        run(mllm, *TOY[mllm], "--max_steps=2")
        model, checkpoint = mllm.load_captioner("out/mllm/sft.pt", "mllm", "cpu", "float32")
        tokens = model.encode(torch.zeros(1, 3, 24, 24, dtype=torch.uint8))
        for i in range(10_000):
            model.generate(tokens, max_new_tokens=1 + i % 5)
            first = used() if i == 999 else i and first
        assert used() < first + 10, (first, used())
        args = (*TOY[scst], "--batch_size=2", "--max_sample_tokens=4", "--eval_interval=1000")
        run(scst, *args, "--max_steps=1000")
        first = used()
        run(scst, *args, "--max_steps=10000", "--out_dir=out/more")
        print(f"{first:.0f} MB after 1,000 steps of SCST, {used():.0f} after 10,000 more")
        assert used() < first + 30, (first, used())


# ---------------------------------------------------------------------------------------------------------------------
# the runner


def main(pattern=""):
    """Run the tests whose name contains pattern, in order; --all: the long ones too. Returns the exit status, 1 if any
    failed."""
    kinds = ("test_", "long_test_") if pattern else "test_"
    pattern = pattern.removeprefix("--all")
    failed, tests = [], [(name, f) for name, f in globals().items() if name.startswith(kinds) and pattern in name]
    for name, test in tests:
        setup_function()
        start = time.time()
        try:
            test()
            print(f"ok {name} ({time.time() - start:.1f} s)", flush=True)
        except (Exception, SystemExit):
            failed.append(name)
            print(f"{traceback.format_exc()}FAILED {name}", flush=True)
    if failed:
        print("failed: " + ", ".join(failed))
    print(f"{len(tests) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
