"""
The tests: plain functions and bare asserts, in the order of model.py. Each fails if what its name
says breaks.

    python test_model.py                         # all of them; ends with `N passed, M failed`
    python test_model.py bpe,cider               # those of two exercises, or with these in the name
    pytest test_model.py                         # works as well, and is not needed

Write the parts yourself: the list of exercises is at the end of this file.

    python test_model.py --exercise              # print the list
    python test_model.py --exercise=attention    # blank a part in a copy of the code, out/exercise
    python test_model.py --solution=attention    # print what was there
"""

import ast
import contextlib
import copy
import csv
import hashlib
import inspect
import io
import itertools
import json
import math
import operator
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

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
from config.tools import (
    answers,
    conversations,
    data,
    metrics,
    optim,
    pretrained,
    questions,
    run,
    shapes,
    sketches,
)
from config.tools.metrics import bleu, cider, words_of
from model import (
    CLIP,
    CONNECTORS,
    GPT,
    IGNORE_INDEX,
    IMAGE_ID,
    LAYOUTS,
    MLLM,
    VITS,
    AttentionPooling,
    BPETokenizer,
    CharTokenizer,
    CLIPConfig,
    Dropout,
    FeedForward,
    GPTConfig,
    ImageComparison,
    KVCache,
    MixtureOfExperts,
    MLLMConfig,
    MultiHeadAttention,
    PatchEmbedding,
    PixelShuffleConnector,
    RotaryEmbedding,
    SinusoidalPositionalEncoding,
    TiledViT,
    Transformer,
    TransformerDecoder,
    TransformerEncoder,
    ViT,
    ViTConfig,
    balance_loss,
    beam_search,
    causal_mask,
    extend_context,
    init_weights,
    make_mllm,
    make_norm,
    padding_mask,
    sample_next,
    scaled_dot_product_attention,
    separate_samples,
    tokenizer_from_state,
)


def setup_function():
    """Before each test (pytest knows the name): the same random numbers; one thread, as models are
    tiny."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


def close(a, b, atol=1e-5, hint=""):
    """Assert that two tensors have the same shape and values; NaN equals nothing. hint: what may be
    wrong, for those who write what is tested (see the exercises)."""
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}\n{hint}"
    difference = (a - b).abs().max()
    assert torch.allclose(a, b, atol=atol, rtol=1e-4), f"they differ by {difference:.2g}\n{hint}"


def raises(exception, text, f, *args):
    """Assert that f(*args) raises exception, or one of several, with text in its message."""
    try:
        f(*args)
    except exception as e:
        assert text in str(e), f"{text!r} is not in {str(e)!r}"
    else:
        raise AssertionError(f"no error with {text!r}")


def shake(module, std=0.3):
    """Return the module in eval mode, its weights moved far from their initial values."""
    for p in module.parameters():
        p.data += std * torch.randn_like(p)
    return module.eval()


def gradients(output, *tensors):
    """Return the gradients of a sum of output in which every number has another weight."""
    weights = torch.linspace(-1, 2, output.numel()).view_as(output)
    return torch.autograd.grad((output * weights).sum(), tensors)


def unreached(model, loss_of):
    """Return the parameters without a finite gradient of loss_of(), once no weight is 0."""
    shake(model, 0.1)
    loss_of().backward()
    names = []
    for name, p in model.named_parameters():
        if p.grad is None or not p.grad.any() or not p.grad.isfinite().all():
            names.append(name)
    return names


def fit(model, loss_of, steps, lr):
    """Return the loss after so many steps of Adam on loss_of()."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
    return loss.item()


@torch.no_grad()
def greedy(logits_of, ids, n):
    """Return ids (B, T) and n more, each the likeliest of a full pass without cache."""
    for _ in range(n):
        ids = torch.cat((ids, logits_of(ids)[:, -1:].argmax(dim=-1)), dim=1)
    return ids


def moved(a, b):
    """Return by how much logits or features (1, T, C) differ, by position."""
    return (a - b).abs().amax(dim=-1)[0]


def digits(rows):
    """Return rows of digits as words: [[1, 0], [1, 1]] as "10 11"."""
    return " ".join("".join(map(str, row)) for row in rows.int().tolist())


def differences(a, b):
    """Return where features (1, T, C) differ: "0011" at the last two of four positions."""
    return digits(moved(a, b)[None] > 1e-4)


# 1. tokenizers ------------------------------------------------------------------------------------

CORPUS = [
    "the cat sat on the mat, the cat's hat\n",
    "that's the hat   that the cat had",
    "naïve café — naïve café 🙂",
]


def test_char_tokenizer():
    tokenizer = CharTokenizer("hello\n")
    assert tokenizer.vocab_size == 5
    assert tokenizer.encode("\neh") == [0, 1, 2], "is an id a place in the sorted vocabulary?"
    assert tokenizer.decode(tokenizer.encode("hole\nhell")) == "hole\nhell"
    raises(AssertionError, "'ß'", tokenizer.encode, "heßo")


def test_bpe_round_trip_loses_nothing_and_makes_no_special_id():
    tokenizer = BPETokenizer.train(CORPUS, 300)
    for text in [
        "",
        "  two   spaces  ",
        "a\n\n\tb\r\n",
        "\x00\x01\x1c\x7f\u2028",
        "Ünïcödé e\u0301",
        "👩‍👩‍👧 🙂 日本語",
        "it's '' 'tis",
        "_a_1²",
        "<pad><bos></s><image><|endoftext|>",
        *CORPUS,
    ]:
        ids = tokenizer.encode(text)
        assert all(3 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.decode([tokenizer.pad_id, 1, *ids, tokenizer.eos_id]) == text
    assert tokenizer.decode(tokenizer.encode("\ud800")) == 3 * "\ufffd"  # not valid UTF-8


def test_bpe_pieces_and_merges_worked_out_by_hand():
    pieces = "that|'s|  | the| hat|!|\n|ok|'|tis| I|'ve| we|'ll| !".split("|")
    assert BPETokenizer.pieces.findall("".join(pieces)) == pieces
    # pieces: hug, _hug, _pug, _hugs. Pairs: ug 4, hu 3, _h 2, _p pu gs 1  ->  ug
    # then h+ug 3, _h 2, the rest 1  ->  hug; then _+hug 2  ->  _hug; then no pair occurs twice
    tokenizer = BPETokenizer.train(["hug hug pug hugs"], 400)
    assert tokenizer.bytes[259:] == [b"ug", b"hug", b" hug"], "does merge() replace every pair?"
    assert tokenizer.encode("hugs") == [260, 3 + ord("s")], "merge until no known pair is left"


def test_gpt2_tokenizer_cuts_and_numbers_as_gpt2_does():
    """The numbers are those of OpenAI's vocabulary, in which printable bytes come first."""
    merges = [(71, 68), (75, 75), (256, 257), (258, 78), (220, 258)]  # he, ll, hell, hello, _hell
    tokenizer = pretrained.GPT2Tokenizer(merges)
    assert tokenizer.encode("!aé \n") == [0, 64, 127, 102, 220, 198]
    assert tokenizer.encode("hello a hell") == [259, 220, 64, 260]
    assert tokenizer.vocab_size == 265
    assert tokenizer.decode([*tokenizer.encode(CORPUS[2]), tokenizer.eos_id]) == CORPUS[2]
    pieces = "don|'t| DON|'|T| ½²|x|_|Ⅳ〇|一| \x1c|ée|\u0301|  | 3|.|14|\u3000\t\t".split("|")
    assert tokenizer.pieces.findall("".join(pieces)) == pieces
    for c in map(chr, range(sys.maxunicode + 1)):
        continues = [tokenizer.pieces.match(start + c).end() == 2 for start in "a1\n"]
        is_number = c.isnumeric() and not c.isalpha()
        is_space = c.isspace() and not "\x1c" <= c <= "\x1f"
        assert continues == [c.isalpha(), is_number, is_space], repr(c)


def test_bpe_training_and_encoding_equal_a_naive_reference():
    rng = random.Random(0)
    for letters in ("ab", "abc", "abcde"):  # few letters: many ties, and overlaps such as aaa
        words = ["".join(rng.choices(letters, k=rng.randint(1, 8))) for _ in range(60)]
        pieces = ["".join(chr(3 + ord(c)) for c in word) for word in words]  # ids as characters
        merges = []
        for new_id in range(259, 275):
            counts = Counter(pair for piece in pieces for pair in zip(piece, piece[1:]))
            best = min(counts, key=lambda pair: (-counts[pair], pair))
            merges.append(tuple(map(ord, best)))
            pieces = [piece.replace("".join(best), chr(new_id)) for piece in pieces]
        tokenizer = BPETokenizer.train(words, 275)
        assert tokenizer.merges == merges
        for word, piece in zip(words, pieces):
            assert tokenizer.encode(word) == list(map(ord, piece))


def test_tokenizers_come_back_from_their_state_through_json():
    for tokenizer in (
        CharTokenizer("hello"),
        BPETokenizer.train(["hello"] * 2, 300),
        pretrained.GPT2Tokenizer([(71, 68)]),
    ):
        back = tokenizer_from_state(json.loads(json.dumps(tokenizer.state())))
        assert type(back) is type(tokenizer)
        assert back.encode("hello") == tokenizer.encode("hello")


# 2. attention -------------------------------------------------------------------------------------


def test_masks_are_true_where_a_query_may_attend():
    mask = causal_mask(2, 4)
    assert digits(mask) == "1110 1111", "the last of two queries is at the last of four keys"
    mask = padding_mask(torch.tensor([[5, 6, 0], [7, 0, 0]]), 0)
    assert mask.shape == (2, 1, 1, 3)
    assert digits(mask.flatten(1)) == "110 100", "False at padding, and only there"


def test_attention_function_equals_torch():
    q = torch.randn(2, 3, 4, 8)
    k, v = torch.randn(2, 2, 3, 6, 8)
    for mask in (None, causal_mask(4, 6), torch.rand(2, 1, 1, 6) < 0.7):
        out, weights = scaled_dot_product_attention(q, k, v, mask)
        hint = "are scores divided by sqrt(head_dim), and masked before the softmax?"
        close(out, F.scaled_dot_product_attention(q, k, v, mask), hint=hint)
        close(out, weights @ v)
        dropped, same = scaled_dot_product_attention(q, k, v, mask, 0.5)
        close(same, weights, hint="return the weights before dropout")
        assert not torch.allclose(dropped, out)


def test_rotary_turns_pairs_of_channels_like_complex_numbers():
    rotary = RotaryEmbedding(4, 8)
    assert not rotary.state_dict()
    x = torch.randn(2, 3, 5, 4)
    frequencies = torch.tensor([1, 0.01])  # 10000^(-2/4) = 0.01
    for positions in (torch.arange(5), torch.randint(8, (2, 5))):
        angles = positions.unsqueeze(-2)[..., None] * frequencies
        turned = torch.complex(*x.chunk(2, dim=-1)) * torch.exp(1j * angles)
        expected = torch.cat((turned.real, turned.imag), dim=-1)
        close(rotary(x, positions), expected, hint="channels i and i + head_dim / 2 are a pair")


def test_yarn_stretches_only_slow_pairs():
    """Of 32 channels, pair i turns 40.7 / 10^(i / 4) times in a context of 256 (Peng et al. 2023,
    section 3.2). More than twice, up to pair 5: it keeps its frequency. Less than half, from pair
    8: the frequency is divided by the factor. The others are in between."""
    gpt = tiny_gpt(n_embd=64, block_size=256)
    extend_context(gpt, 1024, 4.0)
    plain = 10 ** (-torch.arange(16) / 4)
    kept = ((256 / (2 * math.pi) * plain - 0.5) / 1.5).clamp(0, 1)
    assert kept[5] == 1
    assert kept[8] == 0
    for block in gpt.decoder.blocks:
        cos = block.attn.rotary.cos
        sin = block.attn.rotary.sin
        close(torch.atan2(sin, cos)[1, :16], kept * plain + (1 - kept) * plain / 4)
        size = 0.1 * math.log(4) + 1  # the square root of 1 / t in section 3.4
        close(torch.hypot(cos, sin), torch.full((1024, 32), size))
    assert gpt(some_ids(1, 1024))[0].isfinite().all()


RENAMED = {
    "layers": "blocks",
    "self_attn": "attn",
    "multihead_attn": "cross_attn",
    "in_proj_": "qkv.",
    "out_proj": "proj",
    "linear1": "ff.up",
    "linear2": "ff.proj",
}


def renamed(module):
    """Return the weights of a module of torch.nn under the names that ours have."""
    state = {}
    for name, p in module.state_dict().items():
        if isinstance(module, nn.TransformerDecoder):
            name = name.replace("norm2", "cross_norm").replace("norm3", "norm2")
        for theirs, ours in RENAMED.items():
            name = name.replace(theirs, ours)
        state[name] = p
    return state


def test_multi_head_attention_equals_torch_nn():
    theirs = shake(nn.MultiheadAttention(16, 4, batch_first=True))
    ours = MultiHeadAttention(16, 4)
    ours.load_state_dict(renamed(theirs))
    x = torch.randn(2, 5, 16)
    memory = torch.randn(2, 7, 16)
    mask = torch.arange(5) != 2
    seen = mask & causal_mask(5, 5)
    for ours.keep_weights in (False, True):
        expected, _ = theirs(x, x, x, attn_mask=~seen)
        hint = "project, split into heads of neighbouring channels, attend, join, project"
        close(ours(x, mask=mask, causal=True), expected, hint=hint)
        out, weights = theirs(x, memory, memory)
        close(ours(x, memory), out)
    close(ours.attn_weights.mean(dim=1), weights)
    without_bias = shake(MultiHeadAttention(16, 4, bias=False))
    close(without_bias(x, x), without_bias(x))
    rotary = shake(MultiHeadAttention(16, 2, rotary=RotaryEmbedding(8, 12)))
    positions = torch.arange(5)
    hint = "only the distance of query and key counts"
    close(rotary(x, positions=positions + 3), rotary(x), hint=hint)
    assert not torch.allclose(rotary(x, positions=2 * positions), rotary(x)), "rotate by positions"


def test_hand_written_attention_equals_fused_in_outputs_and_gradients():
    layer = shake(MultiHeadAttention(16, 2, rotary=RotaryEmbedding(8, 12)))
    x = torch.randn(2, 6, 16, requires_grad=True)
    mask = torch.rand(2, 1, 6, 6) > 0.4
    mask[1, :, 2] = False  # a row that sees nothing gives zeros
    close(layer(x, mask=mask)[1, 2], layer.proj.bias)
    for options in ({}, {"mask": mask}, {"causal": True}, {"mask": mask, "causal": True}):
        results = []
        for layer.keep_weights in (False, True):
            out = layer(x, **options)
            results.append((out, *gradients(out, x, *layer.parameters())))
        for fused, by_hand in zip(*results):
            close(fused, by_hand, 1e-4)


def test_cached_attention_equals_one_full_pass():
    x = torch.randn(2, 10, 16)
    layer = shake(MultiHeadAttention(16, 2, rotary=RotaryEmbedding(8, 10)))
    for sizes in ([1] * 10, [4, 1, 3, 2]):
        cache = KVCache(10)
        parts = [layer(part, causal=True, cache=cache) for part in x.split(sizes, dim=1)]
        hint = "write at `length`, which grows, and return all so far"
        close(torch.cat(parts, dim=1), layer(x, causal=True), hint=hint)
    layer = shake(MultiHeadAttention(16, 2))
    memory = torch.randn(2, 7, 16)
    mask = torch.arange(7)[None] < 5
    cache = KVCache()
    first = layer(x[:, :1], memory, mask, cache=cache)
    rest = layer(x[:, 1:], memory * math.nan, mask, cache=cache)  # the memory is read once
    close(torch.cat((first, rest), dim=1), layer(x, memory, mask))


# 3. layers ----------------------------------------------------------------------------------------


def test_norms_equal_torch():
    x = torch.randn(2, 5, 16) + 0.5
    x[1] /= 1000  # so small that eps counts
    for name, theirs in {"layer": nn.LayerNorm(16), "rms": nn.RMSNorm(16, 1e-5)}.items():
        ours = shake(make_norm(name, 16))
        theirs.load_state_dict(ours.state_dict())
        close(ours(x), theirs(x), hint="eps is added inside the root, to the mean of the squares")
    raises(AssertionError, "norm=batch: layer or rms", make_norm, "batch", 16)


def test_dropout_rate_and_scale():
    x = torch.ones(999, 1001)
    dropped = Dropout(0.25)(x)
    close(dropped.unique(), torch.tensor([0, 4 / 3]))
    assert abs(dropped.mean() - 1) < 0.002
    assert Dropout(0.7).p == 179 / 256


def test_each_dropout_acts_in_training_and_only_there():
    gpt = tiny_gpt(dropout=0.5, n_experts=2)
    vit = tiny_vit(dropout=0.5)
    tiled = TiledViT(replace(tiny_vit(**TILED, dropout=0.5).config, across_layer=1))
    clip = CLIP(replace(tiny_clip().config, dropout=0.5))
    clip.vit = None
    transformer = Transformer(20, 1, 16, 2, dropout=0.5)
    for module, forward, inputs, n_drops in (
        (gpt, gpt.hidden, torch.randn(1, 6, 16), 7),
        (vit, vit.features, photos(1), 5),
        (tiled, tiled.features, tiled_photos(), 9),
        (clip, clip.embed_texts, some_ids(1, 6), 3),
        (transformer, lambda ids: transformer(ids, ids), some_ids(1, 6), 5),
    ):
        shake(module)
        expected = forward(inputs)
        drops = [drop for drop in module.modules() if isinstance(drop, Dropout)]
        assert len(drops) == n_drops
        for drop in drops:
            drop.train()
            assert not torch.allclose(forward(inputs), expected)
            drop.eval()
        assert forward(inputs).equal(expected)


def test_feed_forward_equals_its_formula():
    x = torch.randn(2, 5, 96)
    formulas = {
        "relu": lambda h: h.clamp(min=0),
        "gelu": lambda h: h * (1 + torch.erf(h / math.sqrt(2))) / 2,
        "swiglu": lambda h: h[..., :256] * h[..., :256].sigmoid() * h[..., 256:],
    }
    for activation, formula in formulas.items():
        layer = shake(FeedForward(96, activation), 0.1)
        close(
            layer(x),
            layer.proj(formula(layer.up(x))),
            1e-4,
            "in swiglu, the first half is the gate",
        )
        n_weights = layer.up.weight.numel() + layer.proj.weight.numel()
        assert n_weights == 2 * 96 * 4 * 96
    assert FeedForward(16, "swiglu").proj.in_features == 40  # 64 * 2 / 3, rounded to eights
    raises(AssertionError, "activation=tanh", FeedForward, 24, "tanh")


def test_experts_equal_a_dense_sum_and_share_the_work():
    x = torch.randn(2, 7, 12)
    for k in (1, 2, 3):
        layer = shake(MixtureOfExperts(12, 3, k), 0.5).train()
        p = layer.router(x).softmax(dim=-1)
        is_chosen = p >= p.topk(k).values[..., -1:]
        weights = p * is_chosen
        if k > 1:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        outputs = torch.stack([expert(x) for expert in layer.experts], dim=-1)
        out = layer(x)
        close(out, (outputs * weights[:, :, None]).sum(dim=-1))
        load = is_chosen.float().mean(dim=(0, 1)) / k
        close(layer.balance, 3 * load @ p.mean(dim=(0, 1)))
        out.square().sum().backward()
        assert layer.router.weight.grad.any()  # not only from the balance
    for k in (0, 4):
        raises(AssertionError, f"experts_per_token={k}", MixtureOfExperts, 12, 3, k)


def test_gpt_with_experts_adds_their_balance_to_the_loss():
    model = shake(tiny_gpt(n_experts=4))
    ids = some_ids(8, 16)
    plain = model(ids, ids)[1]
    loss = model.train()(ids, ids)[1]
    first, second = [block.ff.balance for block in model.decoder.blocks]
    close(loss, plain + 0.01 * (first + second) / 2)
    assert not unreached(model, lambda: model(ids, ids)[1])


def test_sinusoidal_positions_by_hand():
    added = SinusoidalPositionalEncoding()(torch.zeros(1, 8, 4))[0]
    by_hand = [math.sin(3), math.cos(3), math.sin(0.03), math.cos(0.03)]  # 10000^(2/4) = 100
    close(added[3], torch.tensor(by_hand), hint="sines in even channels, cosines in odd ones")


# 4. blocks and 5. stacks --------------------------------------------------------------------------


LIKE_OURS = {"dim_feedforward": 64, "dropout": 0.0, "batch_first": True, "norm_first": True}


def test_encoder_equals_torch_nn():
    block = nn.TransformerEncoderLayer(16, 2, **LIKE_OURS)
    norm = nn.LayerNorm(16)
    theirs = shake(nn.TransformerEncoder(block, 2, norm, enable_nested_tensor=False)).train()
    ours = TransformerEncoder(2, 16, 2, activation="relu")
    ours.load_state_dict(renamed(theirs))
    x = torch.randn(2, 5, 16)
    is_token = table("1 1 1 1 1; 1 1 1 0 0") > 0
    expected = theirs(x, src_key_padding_mask=~is_token)
    hint = "norms come first, and what a sub-layer returns is added to what came before the norm"
    close(ours(x, is_token[:, None, None])[is_token], expected[is_token], hint=hint)


def test_transformer_equals_torch_nn():
    block = nn.TransformerDecoderLayer(16, 2, **LIKE_OURS)
    decoder = shake(nn.TransformerDecoder(block, 2, nn.LayerNorm(16)))
    model = shake(Transformer(11, n_layer=2, n_embd=16, n_head=2, dropout=0.0, pad_id=2))
    model.decoder.load_state_dict(renamed(decoder))
    source = table("3 4 5 6 7; 8 9 10 2 2")
    target = table("2 5 4 3; 10 9 2 2")
    words = model.embedding.weight
    source_x, target_x = (model.position(4 * words[ids]) for ids in (source, target))
    expected = decoder(
        target_x,
        model.encoder(source_x, padding_mask(source, 2)),
        tgt_mask=~causal_mask(4, 4),
        tgt_key_padding_mask=target == 2,
        memory_key_padding_mask=source == 2,
    )
    logits = model(source, target)
    close(logits[target > 2], (expected @ words.T)[target > 2], 1e-4)
    assert logits.isfinite().all()  # also where a target sees nothing


def test_decoder_has_cross_attention_in_chosen_blocks_behind_gates():
    decoder = TransformerDecoder(6, 16, 2, cross_layers=(2, 5), gated=True)
    assert [i for i, block in enumerate(decoder.blocks) if block.cross_attn] == [2, 5]
    raises(AssertionError, "the blocks 0 to 1", TransformerDecoder, 2, 16, 2, "rms", (2,))
    block = decoder.blocks[2]
    init_weights(block)  # so that only the cross-attention adds something
    assert abs(4 * block.cross_attn.proj.weight.std() - 1) < 0.1
    x = torch.randn(6, 5, 16)
    close(block(x), x)
    memory = torch.randn(2, 7, 16)
    attended = block.cross_attn(block.cross_norm(x), memory.repeat_interleave(3, dim=0))
    close(block(x, memory), x, hint="multiply by the tanh of the gate, which is 0 at first")
    block.cross_gate.data.fill_(0.5)
    expected = x + math.tanh(0.5) * attended
    close(block(x, memory), expected)
    block.drop.p = 0.5
    assert not torch.allclose(block.train()(x, memory), expected)


def test_initial_weights_keep_the_size_of_activations_and_blocks_add_nothing():
    gpt = tiny_gpt(vocab_size=500, n_embd=64, n_layer=8, positions="learned", bias=True)
    vit = tiny_vit(image_size=16, n_embd=64, n_head=8)
    transformer = Transformer(500, n_embd=64)
    assert abs(8 * transformer.embedding.weight.std() - 1) < 0.1
    small = ("embedding.weight", "position.positions", "head.weight")
    models = nn.ModuleList([gpt, vit, transformer.decoder])
    for name, p in models.named_parameters():
        if name.endswith(("proj.weight", "bias")):
            assert not p.any(), name
        elif p.ndim > 1:
            gain = 2 if p.ndim == 4 else 1
            std = 0.02 if name.endswith(small) else math.sqrt(gain / p[0].numel())
            assert abs(p.std() / std - 1) < 0.1, name
    tiled = TiledViT(replace(tiny_vit(**TILED).config, across_layer=1))
    x = torch.randn(2, 3, 16)
    close(tiled.across[0](x), x)  # its gates are shut, and open in training
    assert tiled.across[0].attn.proj.weight.any()
    captioner = tiny_mllm(cross_layers=ALL)
    assert not captioner.connector.up.bias.any()
    assert captioner.marker.weight.std() < 0.05


# 6. vision ----------------------------------------------------------------------------------------


def tiny_vit(**changes):
    sizes = {"image_size": 8, "patch_size": 4, "n_layer": 2, "n_head": 2, "n_embd": 16}
    return ViT(ViTConfig(**sizes | changes))


def photos(n, size=8):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)


def test_tiles_hold_the_image_and_nothing_else():
    pixels = torch.randint(0, 256, (30, 90, 3), dtype=torch.uint8)
    wide = Image.fromarray(pixels.numpy())
    images = data.to_images([wide], 30, 4)
    assert not images.pixels[0, 3].any()
    assert data.join_tiles(images, 0).equal(pixels.permute(2, 0, 1))
    tall = Image.new("RGB", (50, 120), "white")
    joined = data.join_tiles(data.to_images([tall], 40, 4), 0)
    assert joined.shape == (3, 120, 40)
    assert (joined[:, :96] == 255).all()
    assert not joined[:, 96:].any()
    assert data.join_tiles(data.to_images([wide], 40), 0).shape == (3, 40, 40)


def test_best_layout_enlarges_an_image_least_or_reduces_it_least():
    for width, height in (5 * torch.rand(99, 2)).tolist():
        scales = [min(columns / width, rows / height) for rows, columns in LAYOUTS]
        enlarging = [scale for scale in scales if scale >= 1]
        best = min(enlarging) if enlarging else max(scales)
        i = data.best_layout(width, height, 4)
        assert scales[i] == best
        assert math.prod(LAYOUTS[i]) == min(
            math.prod(layout) for layout, scale in zip(LAYOUTS, scales) if scale == best
        )


TILED = {
    "kind": "tiles",
    "max_tiles": 4,
    "keep": (0, 2),
    "n_layer": 3,
    "stem": "patch",
}
N_TILES = (1, 4, 4, 2, 3)


def tiled_photos():
    """Return five images, on N_TILES tiles; those on four are a row and a square."""
    return data.TiledImages(photos(20).unflatten(0, (5, 4)), torch.tensor([0, 3, 5, 1, 6]))


def test_tiles_are_plain_images_until_their_gates_open():
    plain = shake(tiny_vit(**TILED))
    tiled = TiledViT(plain.config).eval()
    tiled.load_state_dict(tiled.state_dict() | plain.state_dict())
    images = tiled_photos()
    features = tiled.features(images)  # (5, 4 * 4, 3 * 16)
    for pixels, x, n in zip(images.pixels, features, N_TILES):
        last, _, kept = x[: 4 * n].chunk(3, dim=1)
        close(last, plain.features(pixels[:n]).flatten(0, 1))
        close(last, plain.encoder.norm(kept))
        assert not x[4 * n :].any()
    layouts = torch.tensor([3, 5])
    x = torch.randn(2, 3, 5, 16)
    for tiles in (tiled.tiles_before, tiled.tiles_after):
        tiles.gate.data.fill_(0.5)
        vectors = tiles.vectors.weight[layouts].view(2, 4, 1, 16)
        close(tiles(x, layouts), x + math.tanh(0.5) * vectors[:, :3])
        assert not torch.allclose(tiled.features(images), features)
        tiles.gate.data.fill_(0.0)


def test_missing_tiles_change_nothing():
    vit = tiny_vit(**TILED, across_layer=1)
    gpt = tiny_gpt(cross_layers=(1,))
    model = shake(make_mllm(MLLMConfig(vit.config, gpt.config)))
    images = tiled_photos()
    changed = tiled_photos()
    for i, n in enumerate(N_TILES):
        changed.pixels[i, :n] = images.pixels[i, :n]
    ids = torch.tensor([[IMAGE_ID, 1, 5, 6, 7]] * 5)
    logits = model(images, ids)[0]
    close(model(changed, ids)[0], logits)
    after_a_word = F.pad(ids, (1, 0), value=5)
    other = data.TiledImages(255 - images.pixels, images.layouts)
    logits_of = lambda images: model(images, after_a_word)[0]
    assert differences(logits_of(images), logits_of(other)) == "011111"
    changed.layouts[0] = 3  # four tiles instead of one
    assert differences(model(changed, ids)[0], logits) == "11111"
    assert not unreached(model, lambda: model(images, ids, ids.clamp(min=-1))[1])


def test_patch_embedding_equals_unfold_and_a_matrix():
    layer = shake(PatchEmbedding(4, 16, "patch"))
    images = torch.randn(2, 3, 8, 12)
    patches = F.unfold(images, 4, stride=4).transpose(1, 2)  # (B, N, 3 * 4 * 4), row by row
    expected = F.linear(patches, layer.linear.weight.flatten(1), layer.linear.bias)
    close(layer(images), expected, 1e-4, "the order is row by row, and channels come last")
    raises(AssertionError, "10x10", layer, torch.zeros(1, 3, 10, 10))


def test_stems_halve_the_image_and_double_the_channels():
    x = torch.randn(2, 8, 6, 6)
    for stem, groups in (("residual", 1), ("instance", 8)):
        layer = PatchEmbedding(8, 16, stem)
        assert layer(torch.randn(2, 3, 32, 32)).shape == (2, 16, 16)
        convs = [conv for conv in layer.stem.modules() if isinstance(conv, nn.Conv2d)]
        assert [conv.out_channels for conv in convs] == [4, 8, 8, 8, 16, 16, 16, 16]
        raises(AssertionError, f"{stem}: patch_size", PatchEmbedding, 6, 16, stem)
        block = layer.stem[6]
        assert block(x).equal(x) == (stem == "residual")
        assert gradients(block(x), *block.parameters())[-2].any()  # it learns to add something
        conv1, norm1, _, conv2, norm2 = shake(block).layers
        h = F.conv2d(x, conv1.weight, padding=1)
        h = F.group_norm(h, groups, norm1.weight, norm1.bias).relu()
        h = F.conv2d(h, conv2.weight, padding=1)
        close(block(x), x + F.group_norm(h, groups, norm2.weight, norm2.bias), 1e-4)


def test_attention_pooling_is_a_weighted_mean_of_each_head():
    layer = shake(AttentionPooling(6, 2))
    x = torch.randn(3, 5, 6)
    weights = (x @ layer.score.weight.T).softmax(dim=1)  # (3, 5, 2)
    heads = torch.einsum("bnh,bnhc->bhc", weights, x.view(3, 5, 2, 3))
    close(layer(x), heads.flatten(1), hint="the softmax is over the patches")


def test_vit_normalises_pixels_by_buffers_that_travel_with_the_weights():
    model = tiny_vit(pixel_mean=(1.0, 2.0, 3.0), pixel_std=(4.0, 5.0, 6.0))
    images = photos(2).float()
    channel = torch.arange(3).view(3, 1, 1)
    expected = model.position(model.patches((images - 1 - channel) / (4 + channel)))
    close(model.embed_patches(images), expected)
    other = tiny_vit()
    other.load_state_dict(model.state_dict())
    close(other.embed_patches(images.byte()), expected)


def test_vit_interpolates_positions_for_other_sizes():
    model = tiny_vit(image_size=16)
    model.patches.stem[-1].weight.data.zero_()  # leaves the positions alone
    table = model.position.positions
    close(model.embed_patches(photos(1, 16))[0], table)
    table.data = torch.arange(16)[:, None].expand(16, 16) // 4.0  # the number of the row
    large = model.embed_patches(photos(1, 28)).view(7, 7, 16)
    close(large, large[:, :1, :1].expand(7, 7, 16))
    assert (large[:, 0, 0].diff() > 0).all()
    assert abs(large[3, 0, 0] - 1.5) < 1e-4


def test_patch_dropout_leaves_patches_out_in_training_and_only_there():
    model = tiny_vit(image_size=16, n_layer=0, patch_dropout=0.3)  # without blocks, patches stay
    images = photos(4, 16)
    part = model.features(images)
    whole = model.eval().features(images)
    is_kept = (part[:, :, None] - whole[:, None]).abs().amax(dim=-1) < 1e-5
    assert is_kept.shape == (4, 12, 16)
    assert (is_kept.sum(dim=2) == 1).all()
    assert is_kept.sum(dim=1).max() == 1
    assert len(is_kept.any(dim=1).unique(dim=0)) > 1  # each image loses others
    for language, connector in ((tiny_gpt(), "mlp"), (tiny_gpt(cross_layers=ALL), "pixel_shuffle")):
        config = MLLMConfig(model.config, language.config, connector)
        raises(AssertionError, "patch_dropout", MLLM, config)


def test_vit_initial_loss_ignored_labels_smoothing_and_gradients():
    images = photos(64)
    labels = torch.randint(0, 10, (64,))
    for stem in ("patch", "residual"):
        model = tiny_vit(stem=stem, label_smoothing=0.1).eval()
        logits, no_loss = model(images)
        assert no_loss is None
        loss = model(images, labels)[1]
        assert abs(loss - math.log(10)) < 0.1, f"at first all classes are likely: ln 10, not {loss}"
        some_labels = labels.where(torch.arange(64) < 20, -1)
        close(model(images, some_labels)[1], F.cross_entropy(logits[:20], labels[:20]))
        spread = -logits.log_softmax(dim=1).mean()
        close(model.train()(images, labels)[1], 0.9 * loss + 0.1 * spread)
        assert not unreached(model, lambda: model(images, labels)[1])


def test_vit_overfits_eight_random_images():
    model = tiny_vit(n_embd=32)
    images = photos(8)
    labels = torch.arange(8)
    assert fit(model, lambda: model(images, labels)[1], 60, 3e-3) < 0.05


# 7. language --------------------------------------------------------------------------------------


def tiny_gpt(**changes):
    sizes = {"vocab_size": 20, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16}
    return GPT(GPTConfig(**sizes | changes))


def lively_gpt(**changes):
    """Return a GPT with an output layer of its own, so that it does not repeat its input."""
    model = shake(tiny_gpt(**changes))
    model.head.weight = nn.Parameter(torch.randn_like(model.head.weight))
    return model


def some_ids(*shape):
    return torch.randint(0, 20, shape)


def test_gpt_initial_loss_ignored_targets_and_gradients():
    for positions in ("rotary", "learned"):
        model = tiny_gpt(positions=positions, bias=True)
        ids = some_ids(16, 16)
        targets = some_ids(16, 16)
        assert model.head.weight is model.embedding.weight
        logits, no_loss = model(ids)
        assert no_loss is None
        assert abs(model(ids, targets)[1] - math.log(20)) < 0.1
        some_targets = targets.where(torch.arange(16) < 8, -1)
        expected = F.cross_entropy(logits[:, :8].flatten(0, 1), targets[:, :8].flatten())
        close(model(ids, some_targets)[1], expected, hint="targets of -1 do not count in the mean")
        assert not unreached(model, lambda: model(ids, targets)[1])
        raises(AssertionError, "block_size=16", model, some_ids(1, 17))
    plain = tiny_gpt(cross_layers=ALL, norm="rms").state_dict()
    assert not any(name.endswith("bias") for name in plain)


def test_gpt_sees_the_order_of_earlier_tokens_and_no_later_ones():
    for positions in ("rotary", "learned"):
        model = lively_gpt(n_layer=1, positions=positions)
        ids = torch.arange(8)[None]
        changed = ids + 9 * (ids == 3)
        swapped = ids[:, [1, 0, *range(2, 8)]]
        assert differences(model(ids)[0], model(changed)[0]) == "00011111"
        assert differences(model(ids)[0], model(swapped)[0]) == "11111111"


def test_gpt_overfits_a_small_batch():
    model = tiny_gpt(n_embd=32)
    ids = some_ids(4, 17)
    assert fit(model, lambda: model(ids[:, :-1], ids[:, 1:])[1], 100, 5e-3) < 0.15


def test_gpt_greedy_generation_with_cache_and_without_dropout_equals_full_passes():
    for options in ({}, {"positions": "learned"}, {"n_experts": 4}):
        model = lively_gpt(dropout=0.5, **options)
        prompt = some_ids(3, 4)
        expected = greedy(lambda ids: model(ids)[0], prompt, 12)
        written = model.generate(prompt, 12, temperature=0)
        assert written.equal(expected), "is each token read once, at its own position?"
        assert not model.training
        model.train()
        twice = list(model.stream(prompt, 12, temperature=0, num_samples=2))
        assert torch.stack(twice, dim=1).equal(expected[:, 4:].repeat_interleave(2, dim=0))
        raises(IndexError, "", model.generate, prompt + 20, 3)
        assert all(module.training for module in model.modules())  # after an error as well


def test_gpt_beyond_its_block_goes_on_from_the_newer_half():
    model = lively_gpt(block_size=8)
    for ids in (some_ids(2, 5), some_ids(2, 11)):
        expected = ids
        start = max(0, ids.size(1) - 8)
        for _ in range(20):
            if expected.size(1) - start > 8:
                start = expected.size(1) - 4
            logits, _ = model(expected[:, start:])
            expected = torch.cat((expected, logits[:, -1:].argmax(dim=2)), dim=1)
        assert model.generate(ids, 20, temperature=0).equal(expected)


def frequencies(**sampling):
    """Return how often sample_next() draws each of four ids, in 20000 draws."""
    logits = torch.tensor([0.5, 0.05, 0.3, 0.15]).log()
    return sample_next(logits.expand(20000, 4), **sampling).bincount(minlength=4) / 20000


def test_sample_next_follows_temperature_and_top_k():
    p = torch.tensor([0.5, 0.05, 0.3, 0.15])
    best_two = torch.tensor([5, 0, 3, 0]) / 8
    close(frequencies(), p, 0.02)
    close(frequencies(temperature=0.5), p**2 / (p**2).sum(), 0.02)
    close(frequencies(top_k=2), best_two, 0.02, "others get -inf before the softmax")
    close(frequencies(top_p=0.7), best_two, 0.02)
    for options in ({"temperature": 0}, {"top_k": 3, "top_p": 0.51}):
        assert frequencies(**options)[0] == 1
    assert frequencies(temperature=0.5, top_p=0.6)[0] == 1  # the nucleus at this temperature


def test_sample_next_keeps_exactly_the_smallest_nucleus():
    nuclei = {0.49: "0", 0.51: "02", 0.79: "02", 0.81: "023", 0.96: "0123"}
    for top_p, ids in nuclei.items():
        found = digits(frequencies(top_p=top_p).nonzero().T)
        assert found == ids, (
            f"top_p={top_p} keeps {found}, not {ids}: the one that reaches it stays"
        )
    rows = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log()  # each has a nucleus of its own
    assert sample_next(rows.repeat(100, 1), top_p=0.7).tolist() == [0, 1] * 100


def test_gpt_fills_ended_rows_with_eos_and_stops_when_all_have_ended():
    model = tiny_gpt(vocab_size=8, n_embd=8)
    model.embedding.weight.data = torch.eye(8)
    model.head.weight = nn.Parameter(torch.eye(8).roll(1, dims=0))  # after id i comes i + 1
    ids = torch.tensor([[2], [5]])
    for n, options, expected in (
        (7, {}, "23456701 56701234"),
        (9, {"eos_id": 7}, "234567 567777"),
        (3, {"eos_id": 7}, "2345 5677"),
        (0, {}, "2 5"),
    ):
        assert digits(model.generate(ids, n, temperature=0, **options)) == expected
    texts, _ = beam_search(model, (model.embedding(ids[1:]), None, None), 9, 1, 7)
    assert digits(texts[0]) == "67"


# 8. multimodal ------------------------------------------------------------------------------------


def table(text):
    """Return the tensor of rows of numbers, such as "1 2; 3 4". IMG is a placeholder."""
    rows = text.replace("IMG", str(IMAGE_ID)).split(";")
    return torch.tensor([list(map(int, row.split())) for row in rows])


def tiny_gpt_config(**changes):
    """Return the config of a vocabulary of 20, a context of 24, and two blocks."""
    return replace(GPTConfig(20, 24, n_layer=2, n_head=2, n_embd=24), **changes)


def tiny_vit_config(**changes):
    """Return the config of images of 8x8 pixels in patches of 4x4."""
    return replace(ViTConfig(8, 4, n_layer=1, n_head=2, n_embd=16), **changes)


def tiny_mllm(connector="mlp", max_images=1, eos_id=2, **gpt_changes):
    """Return an MLLM whose images have four tokens, or one with a connector that needs a grid."""
    parts = tiny_vit_config(), tiny_gpt_config(**gpt_changes)
    return MLLM(MLLMConfig(*parts, connector, max_images, eos_id=eos_id))


ALL = (0, 1)  # blocks
EXAMPLE = table("1 5 IMG IMG IMG IMG 7 8; IMG IMG IMG IMG 1 9 9 6")
TARGETS = table("5 -1 -1 -1 -1 7 8 2; -1 -1 -1 1 9 9 6 2")


def test_pixel_shuffle_folds_neighbouring_patches():
    layer = shake(PixelShuffleConnector(1, 8))
    x = torch.arange(16.0).view(1, 16, 1)  # a grid of 4x4 patches
    squares = table("0 1 4 5; 2 3 6 7; 8 9 12 13; 10 11 14 15").float()
    mlp = layer.mlp
    expected = mlp.down(F.gelu(mlp.up(squares)))
    close(layer(x)[0], expected, hint="four neighbours are channels of one token, row by row")
    assert layer.n_tokens(6) == 9
    raises(AssertionError, "even side, not 9 patches", layer, torch.zeros(1, 9, 1))


def test_prefix_puts_image_tokens_in_the_places_of_their_placeholders():
    model = shake(tiny_mllm())
    words = model.gpt.embedding.weight
    a, b, c = tokens = torch.randn(3, 2, 24)
    ids = table("IMG IMG 5 6 IMG IMG 7 8; 5 IMG IMG 6 7 8 9 10")
    x, *_ = model.embed(tokens, ids)
    expected = torch.cat((a, words[5:7], b, words[7:9]))
    close(x[0], expected, hint="image tokens fill the placeholders in order")
    close(x[1], torch.cat((words[5:6], c, words[6:11])))
    close(model(tokens, ids)[0], model.gpt.head(model.gpt.hidden(x)))
    images = photos(2)
    close(model.encode(images), model.connector(model.vit.features(images)))
    text = some_ids(2, 3)  # without an image, the model is the GPT
    close(model(photos(0), text)[0], model.gpt(text)[0])


def test_mllm_refuses_what_does_not_fit():
    model = tiny_mllm()
    text = some_ids(1, 25)
    for message, n_images, ids in (
        ("8 placeholders; the images need 4", 1, EXAMPLE),
        ("0 placeholders; the images need 8", 2, text),
        ("25 positions do not fit block_size=24", 0, text),
    ):
        raises(AssertionError, "25 tokens of prompt exceed 24", model.generate, photos(0), text, 9)
    unknown = replace(model.config, connector="qformer")
    raises(AssertionError, "connector=qformer", unknown.n_placeholders, 8)
    vit_config = tiny_vit_config(patch_dropout=0.5)
    cross = MLLMConfig(vit_config, tiny_gpt_config(cross_layers=ALL))
    assert MLLM(cross).compare is None
    for wrong in (MLLMConfig(vit_config), replace(cross, connector="pixel_shuffle")):
        raises(AssertionError, "patch_dropout needs fusion=cross", MLLM, wrong)


def test_mllm_loss_is_the_cross_entropy_of_the_targets():
    model = shake(tiny_mllm(n_experts=2))
    images = photos(2)
    logits, _ = model(images, EXAMPLE)
    tokens = model.encode(images)  # in place of pixels
    _, loss = model(tokens, EXAMPLE, TARGETS)
    has_target = TARGETS >= 0
    logits = logits[has_target]
    close(loss, F.cross_entropy(logits, TARGETS[has_target]))
    _, smoothed = model(tokens, EXAMPLE, TARGETS, label_smoothing=0.1)
    spread = -logits.log_softmax(dim=1).mean()
    close(smoothed, 0.9 * loss + 0.1 * spread, hint="label smoothing is that of F.cross_entropy")
    segments = EXAMPLE // 5  # any whole numbers
    x = model.embed(tokens, EXAMPLE)[0]
    expected = model.gpt.head(model.gpt.hidden(x, None, None, None, *separate_samples(segments)))
    hint = "segments give a mask and positions: see separate_samples()"
    close(model(tokens, EXAMPLE, segments=segments)[0], expected, hint=hint)
    _, in_training = model.train()(tokens, EXAMPLE, TARGETS)
    close(in_training, loss + balance_loss(model), hint="balance_loss() is added")


def test_log_probs_are_those_of_a_pass_over_each_prompt_with_its_answer():
    for cross_layers, text in (
        ((), "IMG IMG IMG IMG IMG IMG IMG IMG 1; 5 IMG IMG IMG IMG 6 6 6 1"),
        (ALL, "IMG IMG 1; 5 IMG 1"),
    ):
        model = shake(tiny_mllm(cross_layers=cross_layers), 0.5)
        images = photos(3)
        prompts = table(text)
        answers = some_ids(6, 5)  # three to each
        expected = []
        for i, answer in enumerate(answers):
            own = images[:2] if i < 3 else images[2:]
            logits, _ = model(own, torch.cat((prompts[i // 3], answer))[None])
            log_p = (logits[0, -6:-1] / 0.7).log_softmax(dim=1)
            expected.append(log_p[range(5), answer])
        expected = torch.stack(expected)
        close(model.log_probs(images, prompts, answers, temperature=0.7), expected, 1e-4)
        mask = torch.rand(6, 5) < 0.5
        tokens = model.encode(images)
        close(model.log_probs(tokens, prompts, answers, mask, 0.7), expected * mask, 1e-4)


def test_generation_with_a_cache_equals_full_passes_and_rows_do_not_mix():
    for cross_layers, n_images, text in (
        ((), 3, "5 IMG IMG IMG IMG IMG IMG IMG IMG 1; IMG IMG IMG IMG 7 6 8 9 1 3"),
        (ALL, 4, "IMG 5 IMG IMG 1; 5 IMG 6 7 1"),
    ):
        model = shake(tiny_mllm(cross_layers=cross_layers, eos_id=-1), 0.6)  # nothing ends
        images = photos(n_images)
        prompts = table(text)
        T = prompts.size(1)
        n = 25 - T  # the last one is not read
        expected = greedy(lambda ids: model(images, ids)[0], prompts, n)[:, T:]
        assert model.generate(images, prompts, 100).equal(expected)
        embedded = model.embed(model.encode(images), prompts)
        one_beam, _ = beam_search(model.gpt, embedded, n, 1, -1)
        assert one_beam[:, 0].equal(expected)
        best, second = model.generate(images[:-1], prompts[:1], 9, beams=2, num_captions=2)
        assert not best.equal(second)
        beams = model.generate(images, prompts, 9, beams=2)
        first = model.generate(images[:-1], prompts[:1], 9, beams=2)
        second = model.generate(images[-1:], prompts[1:], 9, beams=2)
        assert beams.equal(torch.cat((first, second)))


def test_samples_are_reproducible_and_share_the_reading_of_the_image():
    for cross_layers, prompt in (((), "IMG IMG IMG IMG 1"), (ALL, "IMG 1")):
        model = shake(tiny_mllm(cross_layers=cross_layers), 0.1).train()
        images = photos(3)
        modes = []
        model.vit.encoder.register_forward_hook(lambda encoder, *_: modes.append(encoder.training))
        torch.manual_seed(5)
        prompts = table(prompt).repeat(12, 1)
        shared = model.generate(images, prompts[:3], 19, 1.0, beams=2, num_captions=4)
        generator = torch.Generator().manual_seed(5)
        images = images.repeat_interleave(4, dim=0)
        assert shared.equal(model.generate(images, prompts, 19, 1.0, generator=generator))
        assert not shared.equal(model.generate(images, prompts, 19, 1.0))
        ended = (shared == 2).cumsum(dim=1) > 0
        assert ended.any() and (shared[ended] == 2).all()
        assert all(module.training for module in model.modules())
        assert modes and not any(modes)


def test_a_wide_beam_search_finds_the_best_of_all_texts():
    model = shake(tiny_mllm(vocab_size=6), 0.5)
    images = photos(2)
    texts = torch.cartesian_prod(*[torch.arange(6)] * 3)
    texts = texts.masked_fill(~scst.answer_mask(texts, 2), 2).unique(dim=0)  # 2 is the end
    mask = scst.answer_mask(texts, 2)
    prompt = table("IMG IMG IMG IMG 1")
    for penalty in (0.0, 1.0, 2.0):
        prompts = prompt.repeat(2, 1)
        found = model.generate(images, prompts, 3, 0.0, 200, penalty, num_captions=30)
        for image, captions in zip(images, found.split(30)):
            scores = model.log_probs(image[None], prompt, texts, mask).sum(dim=1)
            best = (scores / mask.sum(dim=1) ** penalty).topk(30).indices
            assert captions.equal(texts[best]), (
                "an ended text keeps its score, and eos counts as one"
            )
        embedded = model.embed(model.encode(image[None]), prompt)
        _, found = beam_search(model.gpt, embedded, 3, 200, 2, penalty)
        ordered = (scores / mask.sum(dim=1) ** penalty).sort(descending=True).values
        close(found[0], ordered, 1e-4)  # no more than there are texts


def test_mllm_initial_loss_and_gradients_through_each_connector_and_fusion():
    for connector, cross_layers in itertools.product(CONNECTORS, ((), (1,))):
        model = tiny_mllm(connector, max_images=2, cross_layers=cross_layers, block_size=40)
        assert model.compare is not None
        n = model.config.n_placeholders(8)
        assert n == (1 if cross_layers else model.encode(photos(1)).size(1))
        ids = F.pad(table("1 5 6"), (2 * n, 0), value=IMAGE_ID)
        targets = F.pad(table("5 6 2"), (2 * n, 0), value=-1)
        loss_of = lambda: model(photos(2), ids, targets)[1]
        assert abs(loss_of().item() - math.log(20)) < 0.3
        assert not unreached(model, loss_of), (connector, cross_layers)


def test_cross_attention_behind_a_shut_gate_leaves_the_text_model_as_it_is():
    model = shake(tiny_mllm(cross_layers=(1,)))
    model.gpt.decoder.blocks[1].cross_gate.data.zero_()
    text = GPT(tiny_gpt_config())
    weights = model.gpt.state_dict()
    text.load_state_dict({name: weights[name] for name in text.state_dict()})
    ids = some_ids(3, 5)
    close(model(photos(0), ids)[0], text(ids)[0])
    two_before = F.pad(ids, (2, 0), value=IMAGE_ID)
    markers = model.marker.weight.expand(3, 2, -1)
    embedded = torch.cat((markers, text.embedding(ids)), dim=1)
    close(model(photos(6), two_before)[0], text.head(text.hidden(embedded)))


def test_a_row_does_not_depend_on_the_images_of_other_rows():
    for cross_layers, n_images in itertools.product(((), ALL), (0, 1)):
        model = shake(tiny_mllm(cross_layers=cross_layers, bias=True))
        n = model.config.n_placeholders(8)
        images = photos(n_images + 2)
        first, second = (F.pad(some_ids(1, 12), (k * n, 0), value=IMAGE_ID) for k in (n_images, 2))
        T = first.size(1)
        beside = torch.cat((first, second[:, :T]))
        hint = "rows with fewer images than others see no padding"
        close(model(images, beside)[0][:1], model(images[:n_images], first)[0], hint=hint)


def visible(ids, n_before=0):
    """Return for each id of a row the images that it sees; n_before images are in other rows."""
    seen = []
    group = []
    for i, before in zip(ids, [None, *ids]):
        if i == IMAGE_ID:
            group = [*group, n_before] if before == IMAGE_ID else [n_before]
            n_before += 1
        seen.append(group)
    return seen


def test_an_image_changes_the_logits_of_those_that_see_it_and_of_no_others():
    """A block attends to words before it sees images, so one block tells them nothing of others."""
    for max_images in [1, 9] * 8:  # above 1, an image is compared with the one before it
        model = shake(tiny_mllm(cross_layers=(0,), n_layer=1, max_images=max_images))
        ids = torch.randint(4, 8, (3, 7))
        ids[ids > 5] = IMAGE_ID
        seen = []
        n_images = 0
        for row in ids.tolist():
            seen.append(visible(row, n_images))
            n_images += row.count(IMAGE_ID)
        tokens = torch.randn(n_images, 4, 24)
        logits, _ = model(tokens, ids)
        for image in range(n_images):
            changed = tokens.clone()
            changed[image] += torch.randn(4, 24)
            by = (model(changed, ids)[0] - logits).abs().amax(dim=2)
            found = digits(by > 1e-6)
            expected = digits(torch.tensor([[image in group for group in row] for row in seen]))
            assert found == expected, (
                f"image {image} changes {found}, not {expected}; are memory and mask passed on?"
            )


def test_adjacent_images_learn_their_place_and_what_has_changed():
    compare = shake(ImageComparison(2, 3))
    a, b, c, d = tokens = torch.randn(4, 2, 3)
    first, second = compare.order.weight
    change = compare.change(b - a)
    expected = torch.stack((a + first, b + second + change, c + first, d + first))
    close(compare(tokens, table("1 1 0 1; 1 0 0 0") > 0), expected)
    two_each = table("1 1 1 1 0 1 1; 1 1 0 0 0 0 0")  # placeholders of an image
    close(compare(tokens, two_each > 0), expected)


def test_attention_to_images_is_the_mean_over_layers_and_heads():
    for cross_layers, ids in (((), EXAMPLE), (ALL, table("1 IMG 7; IMG 1 9"))):
        model = shake(tiny_mllm(cross_layers=cross_layers))
        layers = [block.cross_attn or block.attn for block in model.gpt.decoder.blocks]
        kept = []
        for layer in layers:
            layer.register_forward_hook(lambda layer, *_: kept.append(layer.attn_weights))
        seen = answers.attention_to_images(model, model.encode(photos(2)), ids)
        weights = torch.stack(kept).mean(dim=(0, 2))  # (B, T, Tk)
        if not cross_layers:
            weights = torch.stack([w[:, row == IMAGE_ID] for w, row in zip(weights, ids)])
        close(seen, weights / weights.sum(dim=2, keepdim=True).clamp(min=1e-9))
        assert not any(layer.keep_weights for layer in layers)


def test_encode_marks_answers_and_their_ends():
    messages = sample_of([], "<image>what?", "a dog", "and <image>?", "no")["messages"]
    ids, is_answer = mllm.encode(messages, BPETokenizer([]), 2)
    assert shown(ids) == "##what?<a dog>and ##?<no>", shown(ids)
    found = digits(torch.tensor([is_answer]))
    assert found == "0000000011111100000000111", f"{found}: bos is given, eos is to be written"


def tiny_clip(vocab_size=20):
    """Return a CLIP of texts of 6 tokens, a block of 2 heads, and vectors of 12 dimensions."""
    return CLIP(CLIPConfig(tiny_vit_config(n_classes=0), vocab_size, 6, 1, 2, 16, 12))


def test_clip_loss_by_hand():
    model = tiny_clip()
    images, texts = F.normalize(torch.randn(2, 3, 4), dim=2)
    scores = (images @ texts.T / 0.07).exp()
    shares = scores.diag() ** 2 / (scores.sum(dim=0) * scores.sum(dim=1))
    close(model.loss(images, texts), -shares.log().mean() / 2, 1e-4, "the mean of both directions")
    model.log_scale.data.fill_(99.0)  # the temperature is at least 0.01
    close(model.logits(images, texts), 100 * images @ texts.T, 1e-4)


def test_clip_text_is_the_mean_of_its_tokens_without_padding():
    model = shake(tiny_clip())
    x = model.embedding.weight[[1, 5, 2]] + model.position.positions[:3]
    mean = model.encoder(x[None]).mean(dim=1)
    expected = F.normalize(model.text_head(mean), dim=1)
    model.config.pad_id = 9
    close(model.embed_texts(table("1 5 2 9 9 9")), expected)


def test_word_shares_by_hand():
    rare, common = math.log(4), math.log(4 / 3)
    for captions, expected in (
        ([["ab", "abb"], ["a"], ["a"], ["c"]], [common, rare, 0]),  # both captions have both words
        ([["bc", "c"]] + [["b"]] * 99 + [["a"]] * 100, [0, math.log(2), 2 * 5]),  # 5 < log(200)
    ):
        shares = vit.word_shares(captions, CharTokenizer("abc"))
        close(shares[0], torch.tensor(expected) / sum(expected))


def test_clip_learns_which_text_is_whose_and_the_words_of_a_photo():
    model = tiny_clip()
    images = photos(4)
    ids = torch.randint(4, 20, (4, 6))
    words = torch.tensor([11, 12, 10, 13])

    def loss_of():
        word_logits = model.words_head(model.vit.pooled(images))
        matching = model.loss(model.embed_images(images), model.embed_texts(ids))
        return matching + F.cross_entropy(word_logits, words)

    assert fit(model, loss_of, 60, 1e-2) < 0.1
    for vectors in (model.embed_images(images), model.embed_texts(ids)):
        close(vectors.norm(dim=1), torch.ones(4))
    assert not unreached(model, loss_of)


def test_clip_learns_photos_each_with_one_of_its_captions():
    model = shake(tiny_clip(259), 0.1)
    tokenizer = BPETokenizer([])
    pixels = photos(3)
    words = torch.rand(3, 259).softmax(dim=1)
    photo_data = {
        "images": pixels,
        "words": words,
        "tokenizer": tokenizer,
        "splits": {"train": [(1, ["b"]), (2, ["c"]), (0, ["a"])]},
    }
    rows = torch.tensor([2, 0])  # photos 0 and 1
    pooled = model.vit.pooled(pixels[:2])
    ids = data.pad_texts("ab", tokenizer, 6)
    expected = model.loss(model.embed_pooled(pooled), model.embed_texts(ids))
    expected = expected + F.cross_entropy(model.words_head(pooled), words[rows])
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    settings = {
        "image_size": 8,
        "first_size": 8,
        "max_tokens": 6,
        "crop": 1.0,
        "jitter": 0.0,
        "mirror": False,
    }
    with mock.patch.multiple(vit, **settings):
        close(vit.learn_matching(model, photo_data, rows, step=0), expected)
    for p, gradient in zip(model.parameters(), gradients):
        close(p.grad, gradient)


# metrics and reward -------------------------------------------------------------------------------


def test_words_are_those_of_the_caption_evaluation():
    for text, words in (
        ("A man's T-shirt, \"red\"; he doesn't (run).", "a man 's t-shirt red he does n't run"),
        ("dogs ' toys ... 2.5 miles & cannot -- stop!", "dogs toys 2.5 miles & can not stop"),
        ("We’re a_b", "we 're a b"),
        ("一只狗, Cafe\u0301", "一 只 狗 café"),
    ):
        assert words_of(text) == words.split()


def test_bleu_by_hand():
    # Papineni et al. 2002, section 2.1: "the" occurs at most twice in a reference, so 2 of 7 count
    cat = ["The cat is on the mat.", "There is a cat on the mat."]
    brevity = math.exp(1 - 5 / 4)  # the closest reference is longer by one word
    for candidates, references, bleu1, bleu2 in (
        (["the " * 7], [cat], 2 / 7, 0),
        (["a dog far off"], [["x", "a dog runs on grass"]], brevity / 2, brevity * (1 / 6) ** 0.5),
        # counts are added over the corpus; 1 and 3 words are as close to 2, and the shorter counts
        (["a b", "c d"], [["a", "a x y"], ["c d"]], 0.75, 0.375**0.5),
        ([""], [["a"]], 0, 0),
    ):
        found = bleu(candidates, references)
        hint = f"{found[:2]}, not {[bleu1, bleu2]}, of {candidates} and {references}"
        assert np.allclose(found, [bleu1, bleu2, 0, 0]), hint
    assert bleu(["a b c d e"], [["x", "a b c d e"]]) == [1.0] * 4


def test_cider_by_hand():
    dog = "a dog runs on grass"
    men = "two men play football now"
    hint = "captions that equal their only references score 10"
    assert np.isclose(cider([dog, men], [["A dog runs on grass."], [men]])[0], 10), hint
    raises(AssertionError, "at least one reference", cider, [men], [[]])
    # of two images, every n-gram is in the references of one: idf = log 2, which cancels
    unigrams = 2 / math.sqrt(2 * 3)  # of (a: 1, b: 1) and (a: 1, b: 1, c: 1)
    bigrams = 1 / math.sqrt(1 * 2)
    penalty = math.exp(-1 / 72)  # the lengths, in words, are 2 and 3
    want = 10 * penalty * (unigrams + bigrams) / 4
    for candidate, references, value in (
        ("a b", ["a b c"], want),
        ("a b", ["a b c", "q r s"], want / 2),  # the second shares nothing
        ("a a", ["a"], 10 * penalty * 0.5 / 4),  # one of the two counts: min(2, 1) * 1 / (2 * 1)
        ("a", ["a a"], 10 * penalty / 4),  # the same direction: min(1, 2) * 2 / (1 * 2)
    ):
        _, scores = cider([candidate, "x"], [references, ["y z"]])
        assert np.isclose(scores[0], value), (
            f"{candidate} and {references}: {scores[0]}, not {value}"
        )


def test_cider_weighs_by_document_frequency():
    references = [["a b", "a b"], ["a c"], ["d"]]  # a is in two of three
    _, scores = cider(["", "a x", ""], references)  # no reference has x: as rare as c
    a, c = math.log(3 / 2), math.log(3 / 1)
    assert np.isclose(scores[1], 10 * a**2 / (a**2 + c**2) / 4), "x has the largest idf, log 3"
    assert cider(["a", "a"], [["a"], ["a"]])[0] == 0  # what is in all images weighs nothing


def test_an_evaluation_reports_what_its_names_say():
    texts = [f"dog {i % 3} man {i % 4} red" for i in range(8)]
    references = [[text, f"a {text}"] for text in texts]
    captions = [*texts[:5], texts[4], f"{texts[6]} the", ""]
    scores = metrics.caption_scores(captions, references)
    for name, value in {
        "cider": cider(captions, references)[0],
        "shuffled": cider(captions, references[1:] + references[:1])[0],
        "bleu4": bleu(captions, references)[3],
    }.items():
        assert np.isclose(scores[name], 100 * value), name


def test_the_judge_says_how_surprising_each_token_of_a_caption_is():
    language_model = shake(GPT(tiny_gpt_config(vocab_size=259, dropout=0.5)), 0.2)
    tokenizer = BPETokenizer([])
    checkpoint = {
        "config": asdict(language_model.config),
        "model": language_model.state_dict(),
        "tokenizer": tokenizer.state(),
    }
    judge = metrics.LanguageJudge(checkpoint, torch.device("cpu"), "float32")
    texts = ["ab", "", "a dog", "b" * 40]  # the last is longer than the context
    nats = judge.nats(texts)
    for text, row in zip(texts, nats):
        ids = torch.tensor([1, *tokenizer.encode(text)[:22], 2])
        logits, _ = language_model(ids[None, :-1])
        expected = F.cross_entropy(logits[0], ids[1:], reduction="none")
        close(row, F.pad(expected, (0, 24 - len(ids))))


def test_reward_is_the_weighted_sum_of_its_terms():
    references = [["a dog runs", "the dog runs fast"], ["a red star"]]
    reward = scst.Reward(references)
    ended, cut = reward(["A dog runs."] * 2, [True, False], [0, 0])
    assert ended > cut > 0  # the end is a word
    for weight, text, end, row, expected in (
        # 1/2, (0+1)/(1+1), (0+1)/(0+1) twice; with its end the closest reference has 4 words
        (0.0, "a cat", False, 0, 2 * 0.25**0.25 * math.exp(1 - 4 / 2)),
        (0.0, "a red star", False, 1, 2 * math.exp(1 - 4 / 3)),
        (0.5, "A dog runs.", True, 0, 0.5 * ended + 2 + 3),
    ):
        weights = {"cider_weight": weight, "bleu_weight": 2.0, "exact_weight": 3.0}
        with mock.patch.multiple(scst, **weights):
            assert abs(reward([text], [end], [row]) - expected) < 1e-5


def test_a_caption_with_a_surprising_token_is_worth_nothing():
    judge = mock.Mock()
    judge.nats.return_value = table("1 3; 2 0").float()
    with mock.patch.multiple(scst, exact_weight=1.0, max_surprise=2.0):
        reward = scst.Reward([["yes"]], judge)
        assert reward(["yes", "yes"], [True, True], [0, 0]).tolist() == [0, 1]


def test_advantages_of_both_baselines():
    rewards = table("2 4 12; 0 0 6") / 2
    greedy_rewards = torch.tensor([2.0, 1.0])
    close(scst.advantages(rewards, greedy_rewards), table("-1 0 4; -1 -1 2").float())
    hint = "the baseline of a sample is the mean of the others, without itself"
    close(scst.advantages(rewards), table("-6 -3 9; -3 -3 6") / 2, hint=hint)


def test_an_answer_reaches_to_its_end_token():
    mask = scst.answer_mask(table("5 2 2 2; 5 6 7 8"), eos_id=2)
    assert mask.equal(table("1 1 0 0; 1 1 1 1") > 0)


def test_scst_loss_by_hand():
    log_probs = torch.randn(2, 4)
    loss = scst.scst_loss(log_probs, torch.tensor([3.0, -6.0]))
    expected = 6 * log_probs[1].sum() - 3 * log_probs[0].sum()
    close(loss, expected, hint="a sum; log p is to rise where the advantage is positive")


def test_rollouts_hold_samples_their_rewards_and_no_graph():
    captioner = shake(tiny_mllm(vocab_size=259, dropout=0.5))
    captioner.gpt.embedding.weight.data[2] *= 3  # so that some texts end
    photo_data = {"images": photos(4), "tokenizer": BPETokenizer([]), "texts": [["left"]] * 4}
    one = {"question": "", "references": [], "ids": [IMAGE_ID] * 4 + [1]}
    two = one | {"images": [3, 0], "ids": [IMAGE_ID] * 8 + [1]}
    prompts = [one | {"images": [0]}, two, one | {"images": [3]}]
    augmentation = {
        "size": 0,
        "crop": 1.0,
        "jitter": 0.0,
        "mirror": True,  # but no image about which a text says left or right
    }

    def reward(texts, ended, rows):
        lengths = [len(text) for text in texts]
        return torch.tensor(lengths) + 1e3 * torch.tensor(ended) + 1e4 * torch.tensor(rows)

    # without dropout, although in training
    texts, _ = mllm.write_answers(captioner.train(), photo_data, prompts)
    greedy_rewards = reward(texts, [True] * 3, [0, 1, 2])
    captioner.eval()
    for baseline in ("greedy", "leave_one_out"):
        with mock.patch.multiple(scst, baseline=baseline, samples=3):
            parts = scst.rollout(captioner, photo_data, prompts, [2, 1, 0], reward, augmentation)
        for part, rows in zip(parts, ([2, 0], [1]), strict=True):
            assert not any(tensor.requires_grad for tensor in part)
            pixels = photo_data["images"][[3, 0]].float()
            close(part.features, captioner.vit.features(pixels))
            assert part.prompts[0].tolist() == prompts[rows[0]]["ids"]
            assert part.mask.equal(scst.answer_mask(part.samples, 2))
            ended = (part.samples == 2).any(dim=1).tolist()
            texts = map(photo_data["tokenizer"].decode, part.samples.tolist())
            close(part.rewards.flatten(), reward(texts, ended, np.repeat(rows, 3)))
            compared = greedy_rewards[rows] if baseline == "greedy" else None
            close(part.advantages, scst.advantages(part.rewards, compared).flatten())


# --------------------------------------------------------------------------------------------------
# config: settings, runs, optimization, augmentation, pretrained weights, downloads


@contextlib.contextmanager
def empty_workplace():
    """Change to an empty folder. Yield what is printed meanwhile, a StringIO."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            yield printed


STAGE = """
lr = 0.1  # the rate
steps = 5
name = "a"
fast = False
blocks = (1,
          2)
limit = max(1, 2)
CONSTANT = 3
"""


def override_stage(recipe, *argv):
    """Return the settings of a stage with the source STAGE, for which there is a recipe.py."""
    with empty_workplace(), mock.patch.object(sys, "argv", ["stage.py", *argv]):
        Path("stage.py").write_text(STAGE)
        Path("recipe.py").write_text(recipe)
        stage = {"__file__": "stage.py"}
        settings = config.override(stage)
    assert stage.items() > settings.items()
    return settings


def test_settings_are_overridden_from_left_to_right():
    defaults = "{'lr': 0.1, 'steps': 5, 'name': 'a', 'fast': False, 'blocks': (1, 2)}"
    assert str(override_stage("")) == defaults
    recipe = '"""A recipe."""\nsteps = 7  # why\nname = "8"\nblocks = (3,)\n'
    argv = ("--steps=6", "recipe.py", "--name=x=y", "--lr=1", "--fast=True")
    settings = override_stage(recipe, *argv)
    assert str(settings) == "{'lr': 1.0, 'steps': 7, 'name': 'x=y', 'fast': True, 'blocks': (3,)}"


def test_wrong_settings_are_refused():
    for arg, message in (
        ("--step=1", "unknown setting step (command line); did you mean steps?"),
        ("--CONSTANT=1", "unknown setting CONSTANT (command line); --help lists all"),
        ("--lr=fast", "lr expects float, such as 0.1, not 'fast'"),
        ("--fast=1", "fast expects bool"),
        ("--fast", "--fast: write --name=value"),
        ("config", "config: neither a recipe (*.py) nor --name=value"),
    ):
        raises(AssertionError, message, override_stage, "", arg)
    for recipe, message in (
        ("lr = 1.0\nsteps = 2 * 3", "recipe.py, line 2: a recipe holds only lines"),
        ("lr = 1.0\nsteps = ", "recipe.py, line 2: invalid syntax"),
        ("CONSTANT = 1", "unknown setting CONSTANT (recipe.py)"),
    ):
        raises(AssertionError, message, override_stage, recipe, "recipe.py")
    with empty_workplace():
        file = Path("recipe.py")
        file.write_bytes(b"\xef\xbb\xbflr = 1.0  # \xc3\xa9")
        assert config.read_settings(file) == {"lr": (1.0, "\xe9")}
        file.write_bytes(b"lr = 1.0\n\xe9")
        raises(AssertionError, "recipe.py, line 2: not UTF-8", config.read_settings, file)


def test_every_recipe_sets_only_what_its_stage_has():
    stages = {"shakespeare": gpt, "captions": gpt, "cifar": vit, "clip": vit}
    for recipe in Path(config.__file__).parent.glob("[!_]*.py"):
        name = recipe.stem.removesuffix("_cpu")
        stage = scst if "scst" in name else stages.get(name, mllm)
        with empty_workplace():
            config.override({"__file__": stage.__file__}, [str(recipe)])


def test_help_lists_every_setting_and_its_reason():
    for stage in (vit, gpt, mllm, scst):
        with empty_workplace() as printed:
            raises(SystemExit, "0", stage.main, ["--seed=1", "--help"])
        for name, (value, comment) in config.read_settings(stage.__file__).items():
            assert f"--{name}={value} " in printed.getvalue()
            assert comment and comment in printed.getvalue(), name


def test_what_a_user_can_cause_ends_in_one_line():
    for error, expected, message in (
        (AssertionError("a message"), SystemExit, "error: a message"),
        (OSError("a file"), SystemExit, "error: a file"),
        (KeyboardInterrupt(), SystemExit, "error: stopped; --init_from=resume continues"),
        (AssertionError(), AssertionError, ""),
        (ValueError("a bug"), ValueError, "a bug"),
    ):
        raises(expected, message, run.one_line_errors(mock.Mock(side_effect=error)))
    source = """
from config.tools import run
@run.one_line_errors
def main(argv):
    print("unseen")
    assert False, "it broke"
main()
"""
    folder = Path(gpt.__file__).parent
    command = f"cd {folder} && RANK=1 {sys.executable} -c '{source}'"
    status, output = subprocess.getstatusoutput(command)
    assert (status, output) == (1, "error: it broke")


def test_a_new_run_sets_an_earlier_one_aside_and_a_resumed_one_continues_it():
    with empty_workplace():
        files = ["best.pt", "last.pt", "log.csv"]
        renamed = ["best.old.pt", "last.old.pt"]
        for name in files:
            run.save(f"out/{name}", {"stage": "gpt", "step": 2, "settings": {}})
        resume = {"out_dir": "out", "init_from": "resume"}
        assert run.start("gpt", resume)["step"] == 2
        for rank, names in (("1", files), ("0", renamed), ("0", renamed)):
            with mock.patch.dict(os.environ, RANK=rank):
                assert run.start("gpt", resume | {"init_from": "scratch"}) is None
            assert sorted(os.listdir("out")) == names


def test_the_log_has_one_row_per_step_and_forgets_later_steps():
    with empty_workplace() as printed:
        for row in (
            {"step": 0, "val": 3.0},
            {"step": 10, "train": 2.5, "val": 2.0},
            {"step": 20, "val": 1.0},
            {"step": 10, "train": 2.25, "phase": "sft"},
            {"step": 10, "test": 0.123456789},
        ):
            run.log(Path("out"), row, ("train", "val"))
        for loss in (math.nan, math.inf):
            message = "the loss is not finite before step 11"
            raises(AssertionError, message, run.log, Path("out"), {"step": 11, "train": loss})
        log = Path("out/log.csv").read_text()
    assert log == "step,val,train,phase,test\n0,3,,,\n10,2,2.25,sft,0.123457\n"
    assert (
        printed.getvalue()
        == """\
step 0 | val 3
step 10 | train 2.5 | val 2
step 20 | val 1
step 10 | train 2.25
"""
    )
    assert run.pace([], 1.0) == {}
    losses = torch.tensor([1.0, 3.0]).unbind()
    assert run.pace(losses, 0.5) == {"train": 2.0, "ms_per_step": 250.0}


def test_the_number_type_is_one_that_the_hardware_has_instructions_for():
    table = """
        cpu   avx512  bfloat16
        cpu   cuda    float32
        cuda  avx512  float32
        cuda  cuda    bfloat16
        mps   avx512  float32
    """
    for row in table.strip().splitlines():
        device, feature, dtype = row.split()
        with (
            mock.patch.object(torch.cpu, "_is_avx512_bf16_supported", lambda: feature == "avx512"),
            mock.patch.object(torch.cuda, "is_bf16_supported", lambda **_: feature == "cuda"),
        ):
            assert run.pick_dtype("auto", torch.device(device)) == getattr(torch, dtype), row
    run.pick_device("auto")  # an unavailable one would end the run
    layer = run.place(nn.Linear(2, 2), "cpu", "bfloat16")
    with run.autocast(layer):
        assert layer(torch.ones(1, 2)).dtype == torch.bfloat16


def test_random_numbers_depend_on_seed_step_and_process():
    def draw(seed, step, rank):
        with mock.patch.dict(os.environ, RANK=rank):
            run.seed_step(seed, step)
            shared = torch.rand((), generator=run.shared_generator(seed, step))
            return shared.item(), torch.rand(()).item()

    shared, own = zip(draw(0, 1, "0"), draw(0, 1, "1"), draw(1, 0, "0"))
    assert shared[0] == shared[1]
    assert len({*shared, *own}) == 5  # all others differ


def test_rows_of_an_epoch_are_all_rows_in_another_order_each_time():
    rows = [run.epoch_rows(11, 5, step, seed=1).tolist() for step in range(4)]
    assert len({*rows[0], *rows[1]}) == len({*rows[2], *rows[3]}) == 10  # one row is left over
    assert rows[:2] != rows[2:]
    assert rows[0] != run.epoch_rows(11, 5, 0, seed=2).tolist()


def test_learning_rate_warms_up_and_cools_down():
    factors = {0: 0.1, 4: 0.5, 9: 1.0, 60: 1.0, 70: 0.75, 90: 0.25, 100: 0.0}
    for step, factor in factors.items():
        assert abs(optim.lr_factor(step, 100, 10, 0.4) - factor) < 1e-9
    assert optim.lr_factor(99, 100, 0, 0.0) == 1.0


def test_update_clips_and_steps():
    for gradient, grad_clip, move in ((3.0, 0.0, 1.5), (0.4, 1.0, 0.2), (3.0, 1.0, 0.5)):
        used, unused, frozen = (nn.Parameter(torch.zeros(n)) for n in (1, 4, 9))
        frozen.requires_grad_(False)
        used.grad = torch.tensor([gradient])
        model = nn.ParameterList([used, unused, frozen])
        sgd = torch.optim.SGD([{"params": model.parameters(), "peak_lr": 2.0}], lr=1.0)
        loss = optim.update(model, [sgd], torch.tensor(7.0), 0.25, grad_clip)
        assert loss == 7
        assert abs(used.item() + move) < 1e-5
        assert used.grad is None


def test_muon_is_that_of_torch():
    for shape in ((24, 8), (8, 24), (16, 16), (6, 2, 3, 3)):  # the last one is a convolution's
        ours = nn.Parameter(torch.randn(shape))
        theirs = nn.Parameter(ours.detach().flatten(1))
        our_muon = optim.Muon([{"params": [ours], "lr": 0.1}], 0.5, torch.bfloat16)
        their_muon = torch.optim.Muon([theirs], 0.1, 0.5)
        for _ in range(3):
            ours.grad = torch.randn(shape)
            theirs.grad = ours.grad.flatten(1)
            our_muon.step()
            their_muon.step()
            assert ours.flatten(1).equal(theirs)


def test_optimizers_take_every_parameter_once_and_muon_the_matrices_of_the_blocks():
    clip = tiny_clip()
    clip.position.requires_grad_(False)
    names = {p: name for name, p in clip.named_parameters() if p.requires_grad}
    muon, adam = optim.make_optimizers(clip, 0.01, 0.001, 0.2, 0.1)
    rates = {names[p]: group["peak_lr"] for group in muon.param_groups for p in group["params"]}
    matrices, vectors = (group["params"] for group in adam.param_groups)
    assert sorted([*rates, *(names[p] for p in matrices + vectors)]) == sorted(names.values())
    convolutions = {name for name, rate in rates.items() if rate == 0.1}
    assert convolutions == {name for p, name in names.items() if p.ndim == 4}
    hidden = [name for name, rate in rates.items() if rate == 0.01]
    assert len(hidden) == 4 + 4 + 1 and "vit.pool.score.weight" in hidden
    assert min(p.ndim for p in matrices) == 2 > max(p.ndim for p in vectors)
    assert [group["weight_decay"] for group in adam.param_groups] == [0.2, 0.0]
    (adam,) = optim.make_optimizers(clip, 0.0, 0.001, 0.1)
    assert sum(len(group["params"]) for group in adam.param_groups) == len(names)


def test_shift_and_mirror():
    image = torch.arange(3 * 5 * 5).view(3, 5, 5)
    padded = F.pad(image, (1, 1, 1, 1))
    windows = {str(padded[:, i : i + 5, j : j + 5]) for i in range(3) for j in range(3)}
    images = image.expand(400, 3, 5, 5)
    shifted = data.shift_and_mirror(images, 1, torch.arange(400) < 200)
    for views in (shifted[:200].flip(3), shifted[200:]):
        assert {str(view) for view in views} == windows


def test_photos_are_cropped_and_mirrored():
    ramp = torch.arange(8.0).expand(64, 3, 8, 8) * 20 + 20  # brighter to the right
    plain = [["a dog"]] * 64
    assert data.augment_photos(ramp, plain, 1.0, 0.0, False).equal(ramp)
    mirrored = data.augment_photos(ramp, plain, 1.0, 0.0, True)
    is_mirrored = mirrored[:, 0, 0, 0] > 100
    assert 16 < is_mirrored.sum() < 48
    close(mirrored, torch.where(is_mirrored.view(64, 1, 1, 1), ramp.flip(-1), ramp), 1e-3)
    for side in ("left", "right"):
        sided = data.augment_photos(ramp, [["a dog", f"on the {side}."]] * 64, 0.9, 0.0, True)
        assert (sided[:, :, :, -1] > sided[:, :, :, 0]).all()
    assert data.augment_photos(ramp + 90, plain, 1.0, 0.5, False).max() == 255
    half = data.augment_photos(ramp, plain, 1.0, 0.0, False, size=4)
    close(half, F.avg_pool2d(ramp, 2), 1e-3)
    cropped = data.augment_photos(ramp, plain, 0.25, 0.0, False)
    assert 20 <= cropped.min() and cropped[:, 0, 0, 0].max() > 40  # nothing black from beyond


def test_brightness_contrast_and_saturation_change_by_factors():
    def measure(x):
        grey = x.mean(dim=1)
        return torch.stack((grey.mean((1, 2)), grey.std((1, 2)), (x[:, 0] - grey)[:, 0, 0]))

    photos = (100 + 20 * torch.rand(3, 4, 4)).expand(300, 3, 4, 4)
    changed = data.augment_photos(photos, [[]] * 300, 1.0, 0.3, False)
    brightness, contrast, saturation = measure(changed) / measure(photos)
    for factors in (brightness, contrast / brightness, saturation / contrast):
        assert 0.6999 < factors.min() < 0.72
        assert 1.28 < factors.max() < 1.3001


def test_images_grow_in_equal_shares_of_the_run_to_their_full_size():
    for first_size, train_size, sizes in (
        (32, 0, [32, 32, 40, 48, 56, 64, 64, 64]),
        (32, 48, [32, 32, 32, 40, 40, 48, 48, 48]),
    ):
        changes = {"max_steps": 100, "image_size": 64, "patch_size": 8}
        with mock.patch.multiple(vit, first_size=first_size, train_size=train_size, **changes):
            assert [vit.size_at(step) for step in (0, 22, 23, 50, 89, 90, 91, 100)] == sizes


def write_safetensors(path, tensors, **changes):
    """Write a *.safetensors file. changes: of what its header says about each tensor."""
    header = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, tensor in tensors.items():
        begin = len(body)
        body += tensor.flatten().view(torch.uint8).numpy().tobytes()
        entry = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [begin, len(body)]}
        header[name] = entry | changes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def test_safetensors_are_read_and_lies_refused():
    with empty_workplace():
        path = Path("a.safetensors")
        for name, dtype in {
            "F16": torch.float16,
            "BF16": torch.bfloat16,
            "BOOL": torch.bool,
            "F32": torch.float32,
        }.items():
            tensor = torch.arange(6).view(2, 3).to(dtype)
            write_safetensors(path, {"a": tensor}, dtype=name)
            assert pretrained.read_weights(path)["a"].equal(tensor)
        refused = SystemExit, "cannot be read as weights", pretrained.read_weights
        whole = path.read_bytes()
        for content in (b"", whole[:-1], b"\xff" * 8 + whole[8:]):
            path.write_bytes(content)
            raises(*refused, path)
        for changes in (
            {"dtype": "F31"},
            {"dtype": "F16"},
            {"data_offsets": [24, 0]},
        ):
            write_safetensors(path, {"a": tensor}, **changes)
            raises(*refused, path)
        for value in (1, Path("code")):
            torch.save({"a": value}, "a.bin")
            raises(*refused, Path("a.bin"))
        for content, kind in (
            (b"version https://git-lfs.github.com", "a Git LFS pointer"),
            (b"<!DOCTYPE html>", "a web page"),
            (Path("a.bin").read_bytes(), "objects, which could run code"),
            (b"GIF89a", "damaged"),
        ):
            path.write_bytes(content)
            raises(SystemExit, kind, pretrained.read_weights, path)


def hub_model(activation, prefix, layers, norm):
    """Return an encoder of torch's and a norm, and their weights by the hub's names of layers."""
    block = nn.TransformerEncoderLayer(
        128, 4, 512, 0.0, activation, batch_first=True, norm_first=True
    )
    encoder = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
    model = shake(nn.ModuleList([encoder, nn.LayerNorm(128)]), 0.1)
    names = [f"{prefix}.{i}.{layer}" for i in range(2) for layer in layers.split()] + [norm]
    keys = [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    return *model, dict(zip(keys, model.state_dict().values(), strict=True))


def write_config(folder, **values):
    values = {"n_head": 4, "num_attention_heads": 4} | values
    (folder / "config.json").write_text(json.dumps(values))


def write_gpt2(folder, ids):
    """Write a small GPT-2 as on the hub. Return its logits of ids."""
    encoder, norm, weights = hub_model(
        lambda x: F.gelu(x, approximate="tanh"),
        "transformer.h",
        "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj ln_1 ln_2",
        "transformer.ln_f",
    )
    weights = {name: w.t() for name, w in weights.items()}
    words, positions = torch.randn(258, 128), torch.randn(128, 128)
    folder.mkdir(parents=True)
    weights |= {"wte.weight": words, "wpe.weight": positions}
    write_safetensors(folder / "model.safetensors", weights)
    write_config(folder)
    (folder / "vocab.json").write_text('{"h": 71, "e": 68, "he": 256}')
    (folder / "merges.txt").write_text("#version: 0.2\nh e\n")
    T = ids.size(1)
    mask = nn.Transformer.generate_square_subsequent_mask(T)
    return norm(encoder(words[ids] + positions[:T], mask, is_causal=True)) @ words.T


def write_clip(folder, images, name, activation):
    """Write a small vision tower of CLIP as on the hub. Return its features of images."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, hidden_act=name)
    encoder, norm, weights = hub_model(
        activation,
        "encoder.layers",
        "self_attn.in_proj self_attn.out_proj mlp.fc1 mlp.fc2 layer_norm1 layer_norm2",
        "pre_layrnorm",
    )
    for name, w in list(weights.items()):
        if "in_proj" in name:
            for part, third in zip("qkv", w.chunk(3)):
                weights[name.replace("in_", f"{part}_")] = third
    kernel, first, positions = torch.randn(128, 3, 8, 8), torch.randn(128), torch.randn(10, 128)
    weights["embeddings.patch_embedding.weight"] = kernel
    weights["embeddings.class_embedding"] = first
    weights["embeddings.position_embedding.weight"] = positions
    weights = {f"vision_model.{name}": w for name, w in weights.items()}
    weights["text_model.encoder.layers.2.layer_norm1.weight"] = first
    torch.save(weights, folder / "pytorch_model.bin")
    statistics = [[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]]
    mean, std = torch.tensor(statistics).view(2, 3, 1, 1)
    x = F.conv2d((images / 255 - mean) / std, kernel, stride=8).flatten(2).mT
    x = torch.cat((first.expand(len(x), 1, -1), x), dim=1) + positions
    return encoder(norm(x))[:, 1:]


def test_weights_of_gpt2_and_clip_are_those_of_the_hub():
    with empty_workplace():
        ids = torch.randint(258, (2, 20))
        logits = write_gpt2(Path("hub/gpt2"), ids)
        checkpoint = pretrained.load_part("hub/gpt2/model.safetensors", "gpt")
        model = GPT(GPTConfig(**checkpoint["config"])).eval()
        model.load_state_dict(checkpoint["model"])
        close(model(ids)[0][..., :258], logits, 1e-4)
        assert tokenizer_from_state(checkpoint["tokenizer"]).encode("he!") == [256, 0]

        images = torch.randint(256, (2, 3, 24, 24))
        for name, f in (("gelu", F.gelu), ("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x))):
            features = write_clip(Path("hub/clip"), images, name, f)
            checkpoint = pretrained.load_part("hub/clip", "vit")
            model = VITS["clip"](ViTConfig(**checkpoint["config"])).eval()
            model.load_state_dict(model.state_dict() | checkpoint["model"])
            close(model.features(images), features, 1e-4)

        args = "--vit_ckpt=hub/clip --gpt_ckpt=hub/gpt2 --image_size=24 --n_drawn=40 --beams=1"
        args += " --batch_size=4 --max_steps=1 --device=cpu --out_dir=out --max_tokens="
        mllm.main(f"{args}100".split())
        loaded = mllm.load_captioner("out/sft.pt", "mllm", "cpu", "auto")
        assert mllm.load_data(*loaded)["tokenizer"].vocab_size == 261
        raises(SystemExit, "hub/gpt2 has too few", mllm.main, f"{args}130".split())
        Path("hub/gpt2/merges.txt").write_text("! !")
        message = "do not number the merge ! ! alike"
        raises(AssertionError, message, pretrained.load_gpt2, "hub/gpt2")
        message = "lacks embeddings.patch_embedding.weight"
        raises(AssertionError, message, pretrained.load_clip_vit, "hub/gpt2")


def test_an_architecture_is_read_and_what_is_not_ours_refused():
    with empty_workplace():
        folder = Path("hub/gpt2")
        write_gpt2(folder, torch.zeros(1, 1).long())
        whole = pretrained.load_gpt2(folder)["model"]
        weights = pretrained.read_weights(folder / "model.safetensors")
        shards = {name: f"{i % 2}.bin" for i, name in enumerate(weights)}
        for shard in ("0.bin", "1.bin"):
            torch.save({k: w for k, w in weights.items() if shards[k] == shard}, folder / shard)
        index = folder / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": shards}))
        (folder / "model.safetensors").unlink()

        def read():
            checkpoint = pretrained.load_part("hub/gpt2", "gpt")
            return GPT(GPTConfig(**checkpoint["config"])) and checkpoint["model"]

        found = read()
        assert all(w.equal(found[k]) for k, w in whole.items() if w.size(0) == 128)
        for values, message in (
            ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06 is not supported"),
            ({"n_inner": 256}, "n_inner=256 is not supported"),
            ({"model_type": "llama"}, "model_type='llama' is not supported, only 'gpt2'"),
            ({"activation_function": "silu"}, "activation=silu: relu, gelu"),
        ):
            write_config(folder, **values)
            raises(AssertionError, message, read)
        write_config(folder)
        (folder / "1.bin").unlink()
        raises(OSError, "1.bin", read)
        index.write_text("{")
        raises(SystemExit, "index.json: not JSON", read)
        raises(AssertionError, "or one of gpt2, ", pretrained.load_part, "gpt3", "gpt")


def test_downloads_resume_and_fall_back_to_the_second_source():
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a", random.Random(0).randbytes(200_000))
    content = packed.getvalue()
    md5 = hashlib.md5(content).hexdigest()
    statuses, starts = [], []  # what the server replies, and the first bytes it is asked for

    def get(url, headers, **_):
        """Reply, but break off after 140,000 bytes."""
        start = int(headers["Range"][6:-1])
        starts.append(start)
        reply = data.requests.Response()
        reply.status_code = statuses.pop(0)
        body = {200: content, 206: content[start:]}.get(reply.status_code, b"")
        length = {"Content-Length": str(len(body))}
        sent = io.BytesIO(body[:140_000])
        urllib3 = data.requests.packages.urllib3
        reply.raw = urllib3.HTTPResponse(sent, length, preload_content=False)
        reply.history = [mock.Mock(headers={"X-Linked-Etag": f'"{etag}"'})]
        return reply

    with (
        mock.patch.object(data.requests, "get", get),
        mock.patch.object(time, "sleep"),
        empty_workplace(),
    ):
        for before, replies, *later_starts in (
            (b"", [200, 206], 131_072),
            (content[:99], [404, 206, 206], 99, 131_171),
            (content[:99], [200, 206], 131_072),
            (content, [416]),
            (b"another file", [416, 200, 206], 0, 131_072),
        ):
            for name, checksum, etag in (
                ("a.bin", md5, ""),
                ("a.zip", None, "of another kind"),
                ("a.bin", None, hashlib.sha256(content).hexdigest()),
            ):
                path = Path(name)
                Path(f"{name}.partial").write_bytes(before)
                statuses += replies
                assert data.download(path, ["a", "b"], checksum).read_bytes() == content
                assert starts == [len(before), *later_starts]
                assert os.listdir() == [name]
                starts.clear()
                path.unlink()
        statuses += [404] * 8
        raises(SystemExit, "fetch it by hand from a or b", data.download, path, ["a", "b"])


# --------------------------------------------------------------------------------------------------
# drawn images and questions, images that a user points to


PLAIN = {name: shapes.random_colour(name, np.random.default_rng(116)) for name in shapes.COLOURS}


@contextlib.contextmanager
def plain_drawings():
    """Let everything be drawn in one colour per name, on black paper."""

    def black(*_):
        return shapes.Paper(np.zeros((2, 3)), 0.0, 0.0, 0.0, True)

    colours = {name: ("#%02x%02x%02x" % rgb,) for name, rgb in PLAIN.items()}
    with (
        mock.patch.multiple(shapes, random_colour=lambda name, _: PLAIN[name], random_paper=black),
        mock.patch.object(questions, "random_paper", black),
        mock.patch.multiple(sketches, COLOURS=colours, PAPERS=("black",)),
    ):
        yield


def pixels_of(image, colour):
    """Return the rows and columns (n, 2) of the pixels of a plain drawing with this colour."""
    difference = image.astype(int) - np.reshape(PLAIN[colour], (3, 1, 1))
    return np.argwhere(np.abs(difference).max(axis=0) < 50)


def test_drawn_images_show_what_their_five_captions_say():
    areas = {"circle": 3.14, "square": 3.24, "triangle": 1.57, "star": 1.62, "cross": 2.15}
    n_measured = 0
    with plain_drawings():
        assert np.array_equal(shapes.draw_shapes(5, 48, 1)[0], shapes.draw_shapes(5, 48, 1)[0])
        images, captions = shapes.draw_shapes(150, 96, seed=1)
        sketched, more_captions = shapes.draw_shapes(150, 96, 1, sketches.sketch)
    for image, texts in zip([*images, *sketched], captions + more_captions, strict=True):
        things = shapes.attributes(texts[0])
        assert list(map(shapes.attributes, texts)) == [things] * 5
        assert len(set(texts)) == 5
        if len({colour for _, colour, *_ in things}) < len(things):
            continue
        for size, colour, shape, place in things:
            pixels = pixels_of(image, colour)
            row, column = (pixels.mean(axis=0) // 32).astype(int)
            assert shapes.PLACES[3 * row + column] == place, texts[0]
            if pixels.min() > 0 and pixels.max() < 95:  # the edge of the image hides nothing
                radius = math.sqrt(len(pixels) / areas[shape]) / 96
                low, high = shapes.RADII[size]
                assert 0.8 * low < radius < 1.1 * high, (texts[0], radius)
                n_measured += 1
    assert n_measured > 100
    assert shapes.attributes("a small red circle") == []


def named_in(question):
    """Return the set of the sizes, colours, shapes and places that a question names."""
    question = question.replace("how large", "")
    values = [value for values in questions.VALUES.values() for value in values]
    named = {value for value in values if re.search(rf"\b{value}(e?s)?\b", question)}
    return named | {place for place in shapes.PLACES if f"the {place}" in question}


def test_answers_about_one_image_are_right():
    """Work out every answer again, from the caption and what the question names."""
    _, groups = questions.draw_conversations(400, 20, 16, seed=2)
    numbers = "none one two three four".split()
    steps = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
    checked = Counter()
    for group in groups[:400:8] + groups[1:400:8] + groups[400::5]:
        caption = group[0]["messages"][1]["content"]
        things = [shapes.Thing(*thing) for thing in shapes.attributes(caption)]
        things.sort(key=lambda thing: shapes.PLACES.index(thing.place))
        for sample in group:
            (_, question), (_, answer, kind) = map(dict.values, sample["messages"][:2])
            fits = [thing for thing in things if named_in(question) <= set(thing)]
            places = ", ".join(thing.place for thing in fits)
            expected = {
                "caption": caption,
                "count": f"{places}: {numbers[len(fits)]}" if fits else "none",
                "exists": "yes" if fits else "no",
            }.get(kind)
            if kind == "relation":
                (thing,) = fits
                (way,) = re.findall("|".join(steps), question)
                found = [
                    f"a {other}"
                    for other in things
                    if (shapes.position(other) - shapes.position(thing)) @ steps[way] > 0
                ]
                assert len(found) < 2
                expected = f"{way} the {thing.place}: {''.join(found) or 'nothing'}"
            elif not expected:
                (thing,) = fits
                expected = getattr(thing, kind)
            assert answer == expected, question
            checked[kind] += 1
    assert len(checked) == 8 and min(checked.values()) > 30


def test_answers_about_two_images_are_right():
    rng = np.random.default_rng(0)
    seen = Counter()
    for _ in range(100):
        scenes, conversations = questions.ask_pair(rng)
        for ((kind, question, answer),) in conversations:
            if kind == "more":
                named = named_in(question)
                first, second = (sum(named <= set(thing) for thing in scene) for scene in scenes)
                winner = "the first" if first > second else "the second"
                assert answer == (winner if first != second else "neither"), question
                seen[answer] += 1
    for _ in range(300):
        before = questions.make_scene(rng.integers(1, 5), rng)
        after, answer = questions.change(before, rng)
        assert len({thing.place for thing in after}) == len(after) == len(set(map(str, after)))
        gone, new = set(before) - set(after), set(after) - set(before)
        if gone and new:  # one attribute of one thing has changed
            (old,), (thing,) = gone, new
            ((kind, value),) = thing._asdict().items() - old._asdict().items()
            where = "in the " if kind == "place" else ""
            expected = f"in the {old.place}, the {old} is now {where}{value}"
        elif gone:
            kind = "gone"
            expected = "in the {0.place}, the {0} is gone".format(*gone)
        elif new:
            kind = "new"
            expected = "in the {0.place}, there is a new {0}".format(*new)
        else:
            kind = expected = "nothing"
        assert answer == expected
        seen[kind] += 1
    assert len(seen) == 9 and min(seen.values()) > 20


def test_clips_show_what_their_answers_say():
    with plain_drawings():
        images, groups = questions.draw_conversations(200, 0, 64, seed=3)
    seen = Counter()
    for group in groups[5::8] + groups[6::8] + groups[7::8]:
        text = group[0]["messages"][1]["content"]
        sentences = text.split(", then ")
        first, *_, last = group[0]["images"]
        seen[last - first + 1] += 1
        for sentence in sentences:
            article, _, colour, _, event, *direction = sentence.split(" ")
            assert article == ("a" if event == "appears" else "the")
            if text.count(colour) > 1:
                continue
            before, after = pixels_of(images[first], colour), pixels_of(images[last], colour)
            growth = len(after) - len(before)
            if event == "moves":
                down, right = after.sum(axis=0) - before.sum(axis=0)
                shifts = {"left": -right, "right": right, "up": -down, "down": down}
                assert [max(shifts, key=shifts.get)] == direction, sentence
                assert abs(growth) < 0.5 * len(before)
            else:
                assert (-growth if event == "vanishes" else growth) > 10, sentence
            seen[event] += 1
    assert set(seen) == {4, 5, 6, 7, 8, "moves", "appears", "vanishes", "grows"}
    assert min(seen.values()) > 5


def test_clips_and_several_images_are_opened_in_order():
    with empty_workplace():
        frames = [Image.new("RGB", (40, 40), (20 * i, 0, 0)) for i in range(6)]
        frames[0].save("clip.gif", save_all=True, append_images=frames[1:])
        Path("clip").mkdir()
        for i, frame in enumerate(frames):
            frame.save(f"clip/{i}.png")
        Path("clip/a.txt").touch()
        for where, n_frames, reds in (
            ("clip.gif", 3, [[20, 60, 100]]),
            ("clip.gif", 9, [[0, 20, 40, 60, 80, 100]]),
            ("clip.gif", 1, [[60]]),
            ("clip", 3, [[0], [20], [40], [60], [80], [100]]),
            ("clip/5.png,clip.gif, clip/0.png", 2, [[100, 20, 80, 0]]),
        ):
            opened = data.open_images(where, n_frames)
            seen = [[image.getpixel((0, 0))[0] for image in images] for _, images in opened]
            assert seen == reds, where
        assert opened[0][0] == "5.png, clip.gif, 0.png"
        Path("a.mp4").touch()
        raises(AssertionError, "can read: a.mp4", data.open_images, "a.mp4")
        Path("empty").mkdir()
        raises(AssertionError, "can read: empty", data.open_images, "empty")


def test_odd_images_are_seen_as_a_person_sees_them():
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    image = data.to_pixels(Image.fromarray(pixels), 4)
    assert image.permute(1, 2, 0).tolist() == pixels.tolist()
    turned = Image.new("RGB", (4, 2))
    turned.putpixel((0, 1), (255, 255, 255))
    turned.getexif()[0x0112] = 6  # the camera was turned: the bottom left is the top left
    with empty_workplace():
        for name, image, pixel in (
            ("sixteen.png", Image.fromarray(np.full((4, 4), 40000, np.uint16)), 156),
            ("half.png", Image.new("RGBA", (4, 4), (255, 0, 0, 51)), (255, 204, 204)),
            ("turned.png", turned, 255),
            ("strip.png", Image.new("L", (1, 6000), 9), 9),
        ):
            image.save(name, exif=image.getexif())
            (image,) = data.open_file(name, 1)
            assert image.mode == "RGB" and max(image.size) <= 1024
            assert np.abs(np.subtract(image.getpixel((0, 0)), pixel)).max() < 3, name


def test_damaged_images_are_named_and_the_others_opened():
    rng = random.Random(0)
    with empty_workplace() as printed:
        Path("photos").mkdir()
        for ending in ("jpg", "png", "gif", "webp", "bmp"):
            Image.linear_gradient("L").save(f"a.{ending}")
            content = Path(f"a.{ending}").read_bytes()
            for i in range(30):
                damaged = bytearray(content[: rng.randrange(9, 2 * len(content))])
                damaged[rng.randrange(len(damaged))] ^= 255
                Path(f"photos/{i}.{ending}").write_bytes(damaged)
        with warnings.catch_warnings(action="ignore"):  # Pillow's, of metadata
            opened = data.open_images("photos")
        skipped = 150 - len(opened)
        assert min(len(opened), skipped) > 30
        assert printed.getvalue().count(", ") == skipped - 1


# samples of conversations -------------------------------------------------------------------------


def sample_of(images, *texts):
    """Return a sample in which user and assistant say the texts in turn."""
    roles = itertools.cycle(("user", "assistant"))
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    return {"images": images, "messages": messages}


def byte_captioner(groups, **gpt_changes):
    """Return a tiny MLLM of bytes and its data: four images, and groups to validate on."""
    captioner = shake(tiny_mllm(max_images=3, vocab_size=259, **gpt_changes), 0.1)
    photo_data = {"images": photos(4), "image_size": 8, "tokenizer": BPETokenizer([])}
    photo_data["groups"] = {"val": groups}
    mllm.tokenize(photo_data, captioner)
    return captioner, photo_data


def shown(ids):
    """Return ids of bytes as text, with # for an image, < and > for bos and eos, and _ for padding;
    a dot is a place without a target."""
    special = {IMAGE_ID: "#", 0: "_", 1: "<", 2: ">", IGNORE_INDEX: "."}
    return "".join(special[i] if i in special else chr(i - 3) for i in ids)


def test_conversations_become_ids_and_the_targets_are_what_the_assistant_says():
    pair = sample_of([2, 0], "<image>or <image>?", "a dog", "why", "so")
    groups = [[pair], [sample_of([2], "<image>", "a dog")]]
    for cross_layers, image in (((), "####"), (ALL, "#")):
        captioner, photo_data = byte_captioner(groups, block_size=40, cross_layers=cross_layers)
        batch = mllm.collate(groups, photo_data)
        n = len(image)
        T = 2 * n + 17
        ids = f"{image}or {image}?<a dog>why<so", f"{image}<a dog".ljust(T, "_")
        targets = "." * (2 * n + 4) + "a dog>....so>", ("." * n + "a dog>").ljust(T, ".")
        for row in (0, 1):
            assert shown(batch.ids[row].tolist()) == ids[row]
            assert shown(batch.targets[row].tolist()) == targets[row]
        assert batch.n_targets() == len("a dog>so>a dog>")
        assert batch.images == [2, 0]
        assert batch.which.tolist() == [0, 1, 0]  # image 2 is shared
        texts = ["or ?", "a dog", "why", "so"]
        loaded = photo_data["images"], {"train": groups}, None
        changes = {"crop": 0.5, "jitter": 0.0, "mirror": True}
        with (
            mock.patch.object(mllm, "load_photos", return_value=loaded),
            mock.patch.object(mllm, "augment_photos", wraps=mllm.augment_photos) as augment,
        ):
            loaded = mllm.load_samples("mine", 8, 0, 1)
            mllm.features_of(captioner, loaded, [2, 0], **changes)
        assert augment.call_args.args[1] == [[*texts, "", "a dog"], texts]
        assert augment.call_args.kwargs == changes


def test_samples_longer_than_the_context_are_left_out_and_counted():
    long = sample_of([0], "<image>what?", "a dog", "so", "yes")  # ####what?<a dog>so<yes
    short = sample_of([], "hi", "yo")
    for block_size, n_train, n_val in ((22, 2, 2), (21, 1, 2), (19, 1, 2), (18, 1, 1)):
        captioner, photo_data = byte_captioner([[short]], block_size=block_size)
        groups = photo_data["groups"] = {"train": [[long, short]], "val": [[long, short]]}
        with empty_workplace() as printed:
            mllm.tokenize(photo_data, captioner)
        assert len(groups["train"][0]) == n_train
        assert len(groups["val"][0]) == n_val
        n_left_out = 4 - n_train - n_val
        assert (f"left out: {n_left_out} samples" in printed.getvalue()) == (n_left_out > 0)
        prompts = mllm.prompts_of(photo_data, "val")
        mllm.write_answers(captioner, photo_data, prompts)  # there is room for an answer


def test_prompts_are_questions_with_all_their_references():
    groups = [
        data.caption_samples(3, ["a dog", "dogs"]),
        [sample_of([1], "<image>what?", "a cat", "why", "so")],
        [sample_of([], "hi", "yo")],
    ]
    groups[1][0]["messages"][3]["kind"] = "reason"
    _, photo_data = byte_captioner(groups)
    prompts = mllm.prompts_of(photo_data, "val")
    found = [[p["images"], p["question"], p["kind"], p["references"]] for p in prompts]
    assert found == [
        [[3], "", "caption", ["a dog", "dogs"]],
        [[1], "what?", "question", ["a cat"]],
        [[1], "why", "reason", ["so"]],
        [[], "hi", "question", ["yo"]],
    ]
    assert shown(prompts[2]["ids"]) == "####what?<a cat>why<"
    later = {"groups": {"val": [[sample_of([2], "hi", "yo", "<image>what?", "a cat")]]}}
    found = mllm.prompts_of(photo_data | later, "val")
    assert [prompt["images"] for prompt in found] == [[], [2]]
    written = ["dogs", "a cat", "", "yo"], [-2.0, -1.0, 0.0, 0.0]
    photo_data |= {"metric": "right", "groups": {"val": groups, "train": groups[1:]}}
    with mock.patch.object(mllm, "write_answers", return_value=written) as write:
        scores, _ = mllm.evaluate(None, photo_data, "val", beams=3)
        assert write.call_args.kwargs == {"beams": 3}
        assert scores["right"] == 75 and abs(scores["low_log_p"] + 2) < 0.01
        with empty_workplace():
            scores, _ = mllm.evaluate_all(None, photo_data, "val", 1, 0.6)
    assert write.call_args.args[2] == answers.with_other_images(prompts)


def test_other_images_are_as_many_and_never_the_own():
    images = [[0], [0], [1], [2, 3], [1], [4, 5]]
    prompts = [{"images": own, "kind": str(i)} for i, own in enumerate(images)]
    for before, after in zip(prompts, answers.with_other_images(prompts), strict=True):
        assert after["kind"] == before["kind"]
        assert len(after["images"]) == len(before["images"])
        assert after["images"] != before["images"]


def test_right_answers_are_counted_by_kind_and_number_of_images():
    small = "a small red star in the top left"
    prompts = [
        {"images": [0], "kind": "caption", "references": [small]},
        {"images": [1], "kind": "caption", "references": ["a large red star in the top left"]},
        {"images": [2, 3], "kind": "number", "references": ["two", "2"]},
        {"images": [], "kind": "number", "references": [small]},
    ]
    reworded = "there is a small red star at the top left"
    with empty_workplace():
        shares = answers.print_kinds(prompts, {"x": [reworded, reworded, "2", reworded]})
    assert shares == {
        "x, caption": 50,
        "x, number": 50,
        "x, no image": 0,
        "x, one image": 50,
        "x, two images": 100,
        "x, all": 50,
    }


def total_loss(captioner, photo_data, *groups):
    """Return the sum of the losses at all answer tokens of groups of samples."""
    batch = mllm.collate(groups, photo_data)
    tokens = captioner.encode(photo_data["images"][batch.images])[batch.which]
    _, loss = captioner(tokens, batch.ids, batch.targets, 0.0, batch.segments)
    return loss * batch.n_targets()


def test_samples_in_one_batch_have_the_losses_that_they_have_alone():
    for cross_layers, positions in itertools.product(((), ALL), ("rotary", "learned")):
        longest = "y" * (28 if cross_layers else 25)  # with image, bos and eos one id too many
        talk = sample_of([2], "<image>so?", "yes", "why", "so")
        groups = [
            [sample_of([2], "<image>", longest), talk],
            [sample_of([0, 1], "<image><image>?", "no"), sample_of([0, 1], "<image><image>", "a")],
            [sample_of([], "hi", "hello")],
            [sample_of([3], "so<image>?", "yes"), sample_of([3], "<image>?", "no")],
            [sample_of([0, 1, 2], 3 * "<image>", "three")],
        ]
        sizes = {"block_size": 30, "cross_layers": cross_layers, "positions": positions}
        captioner, photo_data = byte_captioner(groups, **sizes)
        rows = mllm.collate(groups, photo_data).ids
        assert len(rows) == 6
        assert rows.size(1) > 30  # the first row is longer than block_size
        samples = [sample for group in groups for sample in group]
        alone = sum(total_loss(captioner, photo_data, [sample]) for sample in samples)
        together = total_loss(captioner, photo_data, *groups)
        close(together, alone, 1e-4)
        weights = list(captioner.parameters())
        gradients_of = [torch.autograd.grad(loss, weights) for loss in (together, alone)]
        for a, b in zip(*gradients_of):
            close(a, b, 1e-3)
        chosen = [group[i % len(group)] for i, group in enumerate(groups)]
        n_targets = sum(sum(sample["is_answer"]) for sample in chosen)
        expected = sum(total_loss(captioner, photo_data, [sample]) for sample in chosen) / n_targets
        assert abs(mllm.validation_loss(captioner, photo_data, "val", 2) - expected) < 1e-4


def test_a_step_has_some_samples_of_each_group():
    groups = [[{"ids": i * [0], "name": (i, k)} for k in range(4)] for i in range(6)]
    seen = []
    with mock.patch.multiple(mllm, batch_size=3, captions_per_photo=2):
        for step in range(40):
            for group in mllm.get_groups(groups, step):
                seen += [sample["name"] for sample in group]
    assert Counter(i for i, _ in seen[:12]) == dict.fromkeys(range(6), 2)  # an epoch
    assert len(set(seen[:12])) == 12
    assert len(set(seen)) == 24


def test_word_dropout_hides_words_alone():
    ids = torch.tensor([IMAGE_ID, 1, 2, 65] * 1000)
    read = data.hide_words(ids, BPETokenizer, 0.3)
    is_hidden = read != ids
    assert 250 < is_hidden.sum() < 350
    assert set(ids[is_hidden].tolist()) == {65}
    assert set(read[is_hidden].tolist()) == {0}


# preparing data -----------------------------------------------------------------------------------

COMMON = "--device=cpu --dtype=float32 --max_steps=6 --eval_interval=2 --warmup_steps=1"
SMALL = f"{COMMON} --n_layer=1 --n_head=2 --n_embd=16 --dropout=0.1 --batch_size=8"
TOYS = {  # with all kinds of randomness: batches, dropout, augmentation, samples
    "cifar": (prepare_cifar, ""),
    "shakespeare": (prepare_shakespeare, ""),
    "flickr8k": (prepare_flickr8k, ""),
    "mine": (prepare_flickr8k, "--source=mine --out_dir=data/mine --size=16 --vocab_size=280"),
    "gpt": (gpt, f"{SMALL} --block_size=16 --max_new_tokens=20 --out_dir=out/gpt"),
    "vit": (vit, f"{SMALL} --image_size=32 --first_size=16 --out_dir=out/vit"),
    "clip": (
        vit,
        f"{SMALL} --task=clip --dataset=mine --image_size=16 --first_size=8 --max_tokens=12"
        " --out_dir=out/clip",
    ),
    "mllm": (
        mllm,
        f"{COMMON} --n_drawn=80 --batch_size=8 --image_size=24 --vit_layer=1 --vit_head=2"
        " --vit_embd=16 --gpt_layer=1 --gpt_head=2 --gpt_embd=16 --dropout=0.1 --align_share=0.45"
        " --fusion=prefix --adam_lr=2e-3 --cooldown=0.8 --captions_per_photo=2 --mirror=True"
        " --crop=0.8 --jitter=0.1 --word_dropout=0.1"
        " --out_dir=out/mllm",
    ),
    "scst": (scst, f"{COMMON} --batch_size=4 --sft_dir=out/mllm --out_dir=out/scst"),
}


def output_of(name, options="", printed=None):
    """Return what a toy run prints, with options like those on a command line."""
    stage, settings = TOYS[name]
    with contextlib.redirect_stdout(printed or io.StringIO()) as printed:
        stage.main(shlex.split(f"{settings} {options}"))
    return printed.getvalue()


def fails(text, name, options=""):
    """Assert that a toy run ends with exit status 1 and one line, an error with text in it."""
    printed = io.StringIO()
    try:
        output_of(name, options, printed)
    except SystemExit as e:
        message = str(e)
    else:
        raise AssertionError(f"no error with {text!r}")
    assert text in message, f"{text!r} is not in {message!r}"
    assert message.startswith("error: ") and "\n" not in message, message
    assert printed.getvalue()[-1:] in ("", "\n")  # the message has a line of its own


def write_cifar(files):
    """Write the archive of CIFAR-10 with {name: bytes} in it, and return its path."""
    Path("data/cifar10").mkdir(parents=True, exist_ok=True)
    archive = Path("data/cifar10/cifar-10-binary.tar.gz")
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return archive


def test_prepare_cifar_reads_the_binary_records():
    records = np.zeros((10_000, 3073), dtype=np.uint8)
    records[7] = np.arange(4, 4 + 3073) % 10
    files = {"batches.meta.txt": b"cat\ndog\n", "one.bin": bytes(3073)}
    splits = {"train": ["one.bin", "one.bin"], "test": ["one.bin"]}
    with empty_workplace(), mock.patch.dict(prepare_cifar.FILES, splits):
        write_cifar(files)
        fails("one.bin in the archive is too short", "cifar")
        files["one.bin"] = records.tobytes()
        archive = write_cifar(files)
        whole = archive.read_bytes()
        archive.write_bytes(whole[: len(whole) // 2])
        fails("is not CIFAR-10 or is damaged", "cifar")
        assert os.listdir("data/cifar10") == [archive.name]
        archive.write_bytes(whole)
        assert "is not the official file" in output_of("cifar")
        labels = np.load("data/cifar10/train_labels.npy")
        images = np.load("data/cifar10/train_images.npy")
    assert images.shape == (20_000, 3, 32, 32)
    assert np.flatnonzero(labels).tolist() == [7, 10_007]
    assert labels[7] == 4
    assert images[7, 1, 2, 3] == (4 + 1 + 1024 + 2 * 32 + 3) % 10  # colour by colour, row by row


def write_zip(name, files):
    with zipfile.ZipFile(f"data/flickr8k/{name}", "w") as archive:
        for member, content in files.items():
            archive.writestr(member, content)


def test_prepare_flickr8k_reads_the_official_archives():
    names = [f"{i}.jpg" for i in range(8)]
    splits = {"train": names[:6], "val": names[6:7], "test": names[7:]}
    texts = {prepare_flickr8k.SPLITS[split]: "\n".join(part) for split, part in splits.items()}
    lines = [f"{name}#{k}\tPhoto {name} , no. {k} ." for name in names for k in range(2)]
    texts["Flickr8k.token.txt"] = "\n".join(lines)
    jpegs = {f"Flicker8k_Dataset/{i}.jpg": b"" for i in range(8)}
    with empty_workplace():
        folder = Path("data/flickr8k")
        folder.mkdir(parents=True)
        write_zip("Flickr8k_text.zip", texts)
        write_zip("Flickr8k_Dataset.zip", jpegs)
        found, _ = prepare_flickr8k.read_flickr8k(folder)
        fails("0.jpg cannot be read as an image", "flickr8k")
        write_zip("Flickr8k_text.zip", {"more.txt": b""})
        fails("Flickr8k_text.zip/Flickr8k.token.txt", "flickr8k")
        (folder / "Flickr8k_text.zip").write_bytes(b"PK")
        fails("is not a zip archive", "flickr8k")
    for split, part in splits.items():
        assert [sample["images"] for sample in found[split]] == [[i] for i in part for _ in "01"]
    captions = ["photo 6.jpg , no. 0", "photo 6.jpg , no. 1"]
    assert found["val"] == data.caption_samples("6.jpg", captions)


def test_prepare_shakespeare_cuts_the_last_tenth_off():
    with empty_workplace():
        Path("data/shakespeare").mkdir(parents=True)
        file = Path("data/shakespeare/input.txt")
        file.write_bytes(b"\xef\xbb\xbf" + b"bcdefghij\r\n" * 10)
        output_of("shakespeare")
        assert len(np.load("data/shakespeare/train.npy")) == 90
        assert np.load("data/shakespeare/val.npy").tolist() == [*range(1, 10), 0]
        file.write_bytes(b"")
        fails("input.txt has only 0 characters", "shakespeare")


def draw_plain_images(n):
    """Write n plain images, each of another red, into the folder mine."""
    Path("mine").mkdir()
    for i in range(n):
        Image.new("RGB", (20, 12), (6 * i, 0, 0)).save(f"mine/{i}.png")


def make_captions(n):
    """Write n images with two captions each, one of them quoted and both with a comma."""
    draw_plain_images(n)
    lines = ["image, caption"]
    for i in range(n):
        lines.append(f'{i}.png,"Picture {i}, said A ."')
        lines.append(f"{i}.png,Picture {i},  said B.")
    Path("mine/captions.txt").write_text("\n".join(lines))


def load_json(name):
    return json.loads(Path(f"data/mine/{name}.json").read_text())


def test_prepare_flickr8k_packs_captioned_images():
    with empty_workplace():
        make_captions(20)
        output_of("mine")
        table = load_json("samples")
        assert [len(samples) for samples in table["splits"].values()] == [32, 4, 4]
        i = table["names"].index("3.png")
        captions = ["picture 3, said a", "picture 3, said b"]
        found = [s for s in sum(table["splits"].values(), []) if s["images"] == [i]]
        assert found == data.caption_samples(i, captions)
        pixels = np.load("data/mine/images.npy")[i].reshape(3, -1)
        assert np.unique(pixels, axis=1).tolist() == [[18], [0], [0]]
        tokenizer = tokenizer_from_state(load_json("tokenizer"))
        assert tokenizer.vocab_size == 280
        stream = np.load("data/mine/val.npy").tolist()
        assert stream[0] == 1 and stream[-1] == 2
        assert tokenizer.decode(stream).count("picture") == 4
        output_of("mine", "--max_tiles=4")
        assert np.load("data/mine/images.npy").shape == (20, 4, 3, 16, 16)
        assert set(np.load("data/mine/layouts.npy")) == {LAYOUTS.index((1, 2))}
        for n in (1, 20):  # broken images
            for i in range(n):
                Path(f"mine/{i}.png").write_bytes(b"\x89PNG")
            if n == 1:
                assert output_of("mine", "--vocab_size=5").count("left out: mine/0.png cannot") == 1
        fails("no image of train can be read", "mine")
        samples = sum(load_json("samples")["splits"].values(), [])
        names = [table["names"][i] for sample in samples for i in sample["images"]]
        assert sorted(set(names)) == sorted(f"{i}.png" for i in range(1, 20))
    big = mock.Mock(encode=lambda text: [70_000], bos_id=1)
    assert prepare_flickr8k.encode([["a"]], big).tolist() == [70_000, 1]


def test_captions_are_read_as_people_write_them():
    lines = (
        "\ufeffimage_name, comment",
        './0.png,"A red, ""large"" dog',
        ' on grass."',
        "x\\..\\0.png , A cat.",
        "\xe9.png,eh",
        "e\u0301.png,oh",
        '1.png,"not closed',
        '"mine/2.png",a 12" wheel',
        '2.png, "fine, too"',
        "2.png, so, so",
        "no comma",
        "2.png,...",
    )
    with empty_workplace() as printed:
        draw_plain_images(3)
        shutil.copy("mine/0.png", "mine/e\u0301.png")
        file = Path("mine/captions.txt")
        file.write_bytes("\r".join(lines).encode())
        assert prepare_flickr8k.read_captions(file, file.parent) == {
            "0.png": ['a red, "large" dog on grass', "a cat"],
            "e\u0301.png": ["eh", "oh"],
            "1.png": ["not closed"],
            "2.png": ['a 12" wheel', "fine, too", "so, so"],
        }
    assert f"left out 2 lines without a caption; the first is {file}, line 11" in printed.getvalue()


def test_wrong_captions_end_in_one_line():
    with empty_workplace():
        make_captions(2)
        for text, error in (
            ("image,caption\nnone.png,hello", "captions.txt, line 2: there is no image 'none.png'"),
            ("0.png,hello\n,hello", "captions.txt, line 2: there is no image ''"),
            ("image;caption\n0.png;hello", "line 1: the columns are not `image,caption`"),
            ("0.png\thello", "captions.txt has no line of the form"),
            ("0.png,hello", "1 images, or groups of samples that share images, are too few"),
        ):
            Path("mine/captions.txt").write_text(text)
            fails(error, "mine")
        fails("--source=none is not a folder", "mine", "--source=none")
        fails("captions.txt is missing", "mine", "--source=.")
        fails("a folder of their own", "flickr8k", "--source=mine")
        assert os.listdir() == ["mine"]


def make_conversations():
    """Write images and conversations in the layouts of MiniMind-V, LLaVA and LLaMA-Factory."""
    draw_plain_images(24)
    samples = [
        sample_of(["0.png", "1.png"], "<image>Or\n<image>?<image>", "The first."),  # one too many
        sample_of(["2.png", "3.png"], "Hello.", "Hi."),
        sample_of([], "Hello.", "Hi."),
    ]
    for i in range(24):
        question = "What is this?\n<image>" if i % 4 else "What is this?"
        texts = [question, f"Picture {i}. A big one.", "Sure?", "Yes."]
        samples.append(sample_of([f"{i}.png"], *texts))
    lines = [], [], []
    for i, sample in enumerate(samples):
        images = sample["images"] if i % 3 else ", ".join(sample["images"])
        turns = sample["messages"]
        if i % 3 == 2:
            turns = [{"role": "system", "content": "Be kind."}, *turns]
        line = {"id": "a.b", "image": images, "conversations": turns}
        lines[i % 3].append(json.dumps(line))
    minimind, llava, factory = map(",\n".join, lines)
    names = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}
    for name, other_name in names.items():
        llava = llava.replace(f'"{name}"', f'"{other_name}"')
    factory = factory.replace('"image"', '"images"').replace("conversations", "messages")
    Path("mine/minimind.jsonl").write_text(minimind.replace(",\n", "\n"))
    Path("mine/llava.json").write_text(f"[{llava}]")
    Path("mine/factory.json").write_text(f"[{factory}]")


def test_prepare_flickr8k_packs_conversations_in_all_layouts():
    with empty_workplace():
        make_conversations()
        assert "dropped 1 times <image>" in output_of("mine")
        table = load_json("samples")
        names = table["names"]
        images = []
        found = {}
        for samples in table["splits"].values():
            assert len(samples) > 1
            images += {i for sample in samples for i in sample["images"]}
            for sample in samples:
                found[tuple(names[i] for i in sample["images"])] = sample["messages"]
        assert sorted(images) == list(range(24))  # none is in two splits
        expected = [
            sample_of(("0.png", "1.png"), "<image>Or<image>?", "The first."),
            sample_of(("2.png", "3.png"), "<image><image>Hello.", "Hi."),
            sample_of((), "Be kind.\nHello.", "Hi."),
        ]
        for i in range(24):
            question = "Be kind.\n" * (i % 3 == 2) + "What is this?"
            question = f"{question}<image>" if i % 4 else f"<image>{question}"
            texts = [question, f"Picture {i}. A big one.", "Sure?", "Yes."]
            expected.append(sample_of((f"{i}.png",), *texts))
        assert found == {sample["images"]: sample["messages"] for sample in expected}
        reds = np.load("data/mine/images.npy")[:, 0, 0, 0]
        assert [f"{red // 6}.png" for red in reds] == names
        tokenizer = tokenizer_from_state(load_json("tokenizer"))
        assert "What is this?Picture" in tokenizer.decode(np.load("data/mine/val.npy").tolist())


BAD_LINES = (  # what is replaced in a good line, by what, and the error
    ("{", "", "not JSON"),
    ("ask", "\xff", "not UTF-8"),
    ('"conversations"', '"turns"', 'no "conversations"'),
    ("[{", '["hi", {', "turn 1 is not"),
    ("}]", '}, {"role": "user", "content": "ask"}]', "the last turn is not an answer"),
    ('"user"', '"assistant"', "turn 1 has the role 'assistant' instead of user or human"),
    ('"assistant"', '["x"]', "turn 2 has the role ['x'] instead of assistant or gpt"),
    ('"<image>ask"', "null", "turn 1 has no text"),
    ("answer", " ", "turn 2 is an empty answer"),
    ("answer", "<image>", "turn 2 is an answer with <image>"),
    ("0.png", "0.png, 1.png", "<image> occurs 1 times in the text, and there are 2 images"),
    ('"image": "0.png"', '"id": 0', "<image> occurs 1 times in the text, and there are 0 images"),
    ('"image"', '"img"', 'the key "img" is unknown'),
    ('"0.png"', '"0.png", "images": []', 'both "image" and "images"'),
    ('"0.png"', "7", "the images are neither"),
    ("0.png", "none.png", "there is no image 'none.png'"),
)


def test_a_bad_line_of_conversations_ends_with_file_line_and_reason():
    turns = sample_of([], "<image>ask", "answer")["messages"]
    good = json.dumps({"image": "0.png", "conversations": turns})
    with empty_workplace():
        make_conversations()
        for old, new, error in BAD_LINES:
            bad = good.replace(old, new)
            Path("mine/more.jsonl").write_text(f"{good}\n\n{bad}\n{good}", "latin-1")
            fails(error, "mine")
            fails("more.jsonl, line 3: ", "mine")
        Path("mine/captions.txt").write_text("0.png,a")
        fails("holds both captions.txt and factory.json", "mine")


def test_samples_that_share_an_image_stay_together():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 4, 150)
    samples = [{"images": [*map(str, rng.choice(300, n, replace=False))]} for n in counts]
    splits = conversations.split_by_image(samples)
    assert sorted(map(id, sum(splits.values(), []))) == sorted(map(id, samples))
    images = [{i for sample in part for i in sample["images"]} for part in splits.values()]
    assert all(images)
    assert len(set.union(*images)) == sum(map(len, images))


# the stages, end to end ---------------------------------------------------------------------------


@contextlib.contextmanager
def toy_workplace():
    """Change to a folder with data/shakespeare, data/cifar10 and data/mine, all of them tiny.

    Pictures stay empty, since drawing them takes longest.
    """
    with (
        empty_workplace(),
        mock.patch.object(vit, "N_VAL", 16),
        mock.patch("matplotlib.figure.Figure.savefig", lambda _, path, **__: Path(path).touch()),
    ):
        Path("data/shakespeare").mkdir(parents=True)
        text = "to be, or not to be: that is the question.\n" * 30
        Path("data/shakespeare/input.txt").write_text(text)
        output_of("shakespeare")
        Path("data/cifar10").mkdir()
        rng = np.random.default_rng(0)
        for split, n in (("train", 60), ("test", 12)):
            images = rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
            np.save(f"data/cifar10/{split}_images.npy", images)
            np.save(f"data/cifar10/{split}_labels.npy", np.arange(n) % 10)
        Path("data/cifar10/classes.json").write_text(json.dumps(list("abcdefghij")))
        make_captions(40)
        output_of("mine")
        yield


def log_of(run_name):
    """Return the rows of a run's log without the columns about time."""
    with open(f"out/{run_name}/log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["minutes"], row["ms_per_step"]
    return rows


def saved(name):
    return torch.load(f"out/{name}.pt", weights_only=True)


def changed(before, after):
    """Return the names of the weights that differ between two checkpoints."""
    before, after = saved(before)["model"], saved(after)["model"]
    return {name for name, w in before.items() if not torch.equal(w, after[name])}


def parts_of(names):
    return {name.split(".")[0] for name in names}


def check_resume(name, best_name, column, best_of=max, n_updates=(3,)):
    """Train a toy; again with interruptions, resumed after each; again with other evaluations.

    n_updates: after how many steps each interruption comes. column: that of the log which is best
    where the checkpoint best_name was saved.
    """
    output_of(name)
    options = "--out_dir=out/again"
    for n in n_updates:
        effects = [mock.DEFAULT] * n + [KeyboardInterrupt]
        stage, _ = TOYS[name]
        with mock.patch.object(stage, "update", wraps=optim.update, side_effect=effects) as update:
            fails("stopped; --init_from=resume continues", name, options)
        *_, factor, grad_clip = update.call_args.args
        assert grad_clip == 1.0
        options = "--out_dir=out/again --init_from=resume"
    assert 0 < factor < 1
    output_of(name, options)
    rows = log_of(name)
    assert {"0", "2", "4", "6"} <= {row["step"] for row in rows}
    assert log_of("again") == rows
    assert not changed(f"{name}/last", "again/last")
    output_of(name, "--out_dir=out/quiet --eval_interval=4")
    assert not changed(f"{name}/last", "quiet/last")
    evaluated = [row for row in rows[::-1] if row.get(column)]  # the last of equal scores
    best = best_of(evaluated, key=lambda row: float(row[column]))
    checkpoint = saved(f"{name}/{best_name}")
    assert checkpoint["step"] == int(best["step"])
    assert abs(checkpoint["best"] - float(best[column])) < 1e-3
    assert "'dropout': 0.0" not in str(checkpoint["config"])


def test_gpt_resumes_and_writes():
    with toy_workplace():
        check_resume("gpt", "best", "val", min)
        loss = min(float(row["val"]) for row in log_of("gpt") if row["val"])
        assert f"val loss {loss:.4f}" in output_of("gpt", "--eval_only=True")
        longer = output_of("gpt", "--eval_only=True --context=32 --yarn=2")
        plain = output_of("gpt", "--eval_only=True --context=32")
        losses = {re.search("val loss .*", output)[0] for output in (longer, plain)}
        assert len(losses | {f"val loss {loss:.4f}"}) == 3
        assert "to\nbe" in output_of("gpt", r"--prompt='to\nbe'")
        fails("yarn is for a longer context", "gpt", "--eval_only=True --yarn=2")
        fails("data/mine has another tokenizer", "gpt", "--eval_only=True --dataset=mine")
        fails("'#' is not in the vocabulary", "gpt", "--prompt=#")
        fails("no token for the end", "mllm", "--gpt_ckpt=out/gpt/best.pt")
        output_of("gpt", "--dataset=mine")
        output = output_of("gpt", "--prompt='to be'")
        checkpoint = saved("gpt/best")
        language = GPT(GPTConfig(**checkpoint["config"]))
        language.load_state_dict(checkpoint["model"])
        text = gpt.write_text(language, tokenizer_from_state(checkpoint["tokenizer"]), "to be")
        assert text.startswith("to be")
        assert output.endswith(text.rstrip("\ufffd") + "\n")  # without half a character
        val, test = (
            output_of("gpt", f"--dataset=mine --eval_only=True --eval_split={split}").split()[-1]
            for split in ("val", "test")
        )
        assert val != test


def test_gpt_batches_are_windows_from_everywhere():
    with mock.patch.multiple(gpt, batch_size=64, block_size=16):
        x, y = gpt.get_batch(torch.arange(18), 0)
    assert x.shape == (64, 16)
    assert set(x[:, 0].tolist()) == {0, 1}
    assert y.equal(x + 1)


def test_gpt_loss_of_a_split_is_over_all_of_it():
    language = shake(GPT(GPTConfig(7, block_size=4, n_layer=1, n_head=1, n_embd=8, dropout=0.5)))
    for n in (25, 24, 3):
        ids = torch.randint(7, (n,))
        total = 0.0
        for inputs, targets in zip(ids[:-1].split(4), ids[1:].split(4)):
            total += language(inputs[None], targets[None])[1].item() * len(targets)
        loss = gpt.evaluate(language.train(), ids, 2)
        assert abs(loss - total / (n - 1)) < 1e-5
        language.eval()


def test_vit_resumes_and_classifies():
    with toy_workplace():
        check_resume("vit", "best", "val_accuracy")
        cifar = vit.load_cifar("cpu")
        train, val, test = cifar["splits"].values()
        assert len(val) == 16
        assert sorted([*train, *val]) == list(range(60))
        labels = cifar["labels"][test]
        assert labels.tolist() == [*range(10), 0, 1]
        classifier = vit.load_model(saved("vit/best")).eval()
        images = cifar["images"][test]
        logits = (classifier(images)[0] + classifier(images.flip(3))[0]) / 2
        close(vit.predict(classifier, images), logits)
        accuracy = 100 * (logits.argmax(dim=1) == labels).float().mean()
        assert abs(float(log_of("vit")[-1]["test_accuracy"]) - accuracy) < 0.01
        expected = f"test_accuracy {accuracy:.4g}"
        assert expected in output_of("vit", "--eval_only=True --eval_split=test")
        assert output_of("vit", "--image=mine").count("%") == 40 * 5
        with mock.patch.object(vit, "resize", wraps=vit.resize) as resize:
            output_of("vit")
        assert {call.args[1] for call in resize.call_args_list} == {16, 24, 32}


def test_clip_resumes_and_matches():
    with toy_workplace():
        check_resume("clip", "best", "val_recall")
        output_of("vit")
        again = "--vit_ckpt=out/clip/best.pt --max_steps=0 --out_dir=out/again"
        assert "ViT of out/clip/best.pt" in output_of("clip", again)
        options = "--vit_ckpt=out/vit/best.pt --max_steps=0 --out_dir=out/continued"
        assert "ViT of out/vit/best.pt" in output_of("clip", options)
        continued = saved("continued/last")["model"]
        for name, w in saved("vit/best")["model"].items():
            assert name.startswith("head.") or continued[f"vit.{name}"].equal(w)
        fails("has learnt task=clip", "vit", "--eval_only=True --out_dir=out/clip")
        output = output_of("clip", "--image=mine/3.png --texts='said b, Picture 3.'")
        shares = map(float, re.findall(r"([\d.]+)%", output))
        assert abs(sum(shares) - 100) < 0.2
        assert "picture 3 " in output
        assert "val_accuracy" in output_of("clip", "--eval_only=True --dataset=cifar10")
        cifar = vit.load_cifar("cpu")
        images = F.one_hot(cifar["labels"][cifar["splits"]["val"]]).float()
        for texts, accuracy in ((torch.eye(10), 100), (torch.eye(10).roll(1, 0), 0)):
            with mock.patch.multiple(vit, out_dir="out/clip", embed=lambda *_: (images, texts)):
                scores = vit.evaluate_zero_shot(vit.load_model(saved("clip/best")), cifar, "val")
            assert scores == {"val_accuracy": accuracy}


def test_recall_counts_own_captions_among_the_nearest():
    apart = F.normalize(torch.eye(4) + 0.3, dim=1)  # 4 photos of two captions each
    owner = torch.arange(4).repeat_interleave(2)
    texts = apart.repeat_interleave(2, dim=0)
    right = metrics.recalls(apart @ texts.T, owner)
    wrong = metrics.recalls(apart @ texts.roll(2, dims=0).T, owner)
    assert len(right) == 6 and set(right.values()) == {100}
    assert wrong["text1"] == wrong["photo1"] == 0
    texts[::2] = texts[::2].roll(1, dims=0)  # half are of the photo before
    assert metrics.recalls(apart @ texts.T, owner)["photo1"] == 50


def test_mllm_and_scst_resume_and_caption():
    with toy_workplace():
        check_resume("mllm", "sft", "val_right", n_updates=(1, 3, 2))
        rows = log_of("mllm")
        assert [(row["phase"], float(row["lr"])) for row in rows if row["val"]] == [
            ("align", 0.002),
            ("align", 0.000833333),
            ("align", 0.0),
            ("sft", 0.00166667),
            ("sft", 0.0),
        ]
        assert [row["step"] for row in rows if row["loss"]] == ["1", "2", "3", "4", "5", "6"]
        options = "--sft_dir= --baseline=leave_one_out --out_dir=out/more"
        assert "starting from out/quiet/sft.pt" in output_of("scst", options)  # the newest
        assert parts_of(changed("quiet/sft", "more/last")) == {"connector", "gpt"}
        check_resume("scst", "scst", "val_cider")
        kept = []

        def evaluate(model, *args):
            kept.append(copy.deepcopy(model.state_dict()))
            return mllm.evaluate(model, *args[:2])

        with mock.patch.object(mllm, "evaluate_all", evaluate):
            output_of("scst", "--bleu_weight=1.0 --out_dir=out/far")
        before, _ = kept  # training, and after
        assert all(w.equal(before[name]) for name, w in saved("mllm/sft")["model"].items())
        assert parts_of(changed("mllm/sft", "scst/last")) == {"connector", "gpt"}
        shutil.copy("mine/3.png", "mine/a:b*.png")  # no name for Windows
        for name in ("mllm", "scst"):
            for options in ("", "--temperature=1.0 --beams=1"):
                output = output_of(name, f"--image='mine/a:b*.png' --num_captions=3 {options}")
                assert output.count("(log p") == 3
                assert "/places_1_a_b_.png" in output
            assert "beam_cider" in output_of(name, "--eval_only=True --eval_split=test")
        for low_log_p in (-999.0, 0.0):  # without and with a hint
            run.save("out/mllm/sft.pt", saved("mllm/sft") | {"low_log_p": low_log_p})
            assert (answers.UNLIKE in output_of("mllm", "--image=mine/3.png")) == (low_log_p == 0)
        fails("eval_split=new: train, val, test", "mllm", "--eval_only=True --eval_split=new")
        fails("a new run would rename out/mllm/sft.pt", "scst", "--out_dir=out/mllm")
        fails("needs samples of at least 2", "scst", "--baseline=leave_one_out --samples=1")
        fails("has learnt captions, not questions", "mllm", "--prompt=why?")
        fails("max_surprise needs a captioner", "scst", "--max_surprise=6")


def test_scst_says_when_nothing_is_earned_and_when_no_step_helps():
    with toy_workplace():
        output_of("mllm")
        results = [({"cider": cider, "low_log_p": 0.0}, ["a"] * 99) for cider in (2.0, 1.0)]
        with (
            mock.patch.object(scst.Reward, "__call__", lambda *args: torch.zeros(len(args[3]))),
            mock.patch.object(mllm, "evaluate", side_effect=results),
            mock.patch.object(mllm, "evaluate_all", return_value=results[0]),
        ):
            output = output_of("scst", "--max_steps=20 --eval_interval=20")
        assert "no sample has earned a reward" in output
        assert "no evaluation was as good as the first" in output


def test_a_phase_trains_its_parts_alone():
    captioner = tiny_mllm(cross_layers=ALL)
    settings = {"train": "connector,gpt", "vit_ckpt": "a.pt", "gpt_ckpt": "b.pt"}
    with mock.patch.multiple(mllm, **settings), empty_workplace():
        for phase, parts in (("align", {"connector"}), ("sft", {"connector", "gpt"})):
            mllm.freeze(captioner, phase)
            trained = [name for name, p in captioner.named_parameters() if p.requires_grad]
            assert set(map(mllm.part_of, trained)) == parts, f"{phase}: {trained} train"


def test_align_trains_what_no_checkpoint_brought():
    with toy_workplace():
        output_of("vit")
        output_of("clip")
        output_of("gpt", "--dataset=mine")
        for fusion, eye, prefix, new in (
            ("prefix", "vit", "", set()),
            ("cross", "clip", "vit.", {"marker", "gpt"}),
        ):
            options = (
                f"--dataset=mine --image_size=16 --fusion={fusion} --gpt_ckpt=out/gpt/best.pt"
                f" --vit_ckpt=out/{eye}/best.pt --max_steps=2 --align_share=0.0"
                " --crop=1.0 --jitter=0.0 --mirror=False --weight_decay=0.0"
            )
            output_of("mllm", f"{options} --max_steps=0 --out_dir=out/begun")
            output_of("mllm", f"{options} --align_share=1.0 --out_dir=out/aligned")
            output_of("mllm", f"{options} --train=connector,gpt --out_dir=out/frozen")
            output_of("mllm", f"{options} --out_dir=out/tuned")
            begun = saved("begun/last")["model"]
            assert any("gate" in name for name in begun) == (fusion == "cross")
            block = "encoder.blocks.0.attn.qkv.weight"
            assert begun[f"vit.{block}"].equal(saved(f"{eye}/best")["model"][prefix + block])
            for name, w in saved("gpt/best")["model"].items():
                assert begun[f"gpt.{name}"].equal(w)
            aligned = changed("begun/last", "aligned/last")
            assert parts_of(aligned) == {"connector"} | new
            assert all(".cross_" in name for name in aligned if name.startswith("gpt."))
            assert parts_of(changed("begun/last", "frozen/last")) == {"connector", "gpt"} | new
            more = "--mllm_ckpt=out/tuned/last.pt --train=connector --out_dir=out/more"
            output_of("mllm", f"{options} {more}")
            assert parts_of(changed("tuned/last", "more/last")) == {"connector"} | new
            tuned = parts_of(changed("begun/last", "tuned/last"))
            assert tuned == {"vit", "connector", "gpt"} | new
            output_of("mllm", f"{options} --train=vit,connector --out_dir=out/around")
            assert parts_of(changed("begun/last", "around/last")) == {"vit", "connector"} | new
            around, _ = mllm.load_captioner("out/around/last.pt", "mllm", "cpu", "float32")
            language = metrics.LanguageJudge(saved("gpt/best"), "cpu", "float32").gpt
            ids = torch.randint(280, (2, 9))  # text alone, as before the GPT saw images
            assert around.eval()(photos(0), ids)[0].equal(language(ids)[0])
            again = "--gpt_ckpt=out/tuned/last.pt --dataset=shapes --image_size=24 --max_steps=0"
            output_of("mllm", f"{options} {again} --out_dir=out/again")
            assert parts_of(changed("tuned/last", "again/last")) == {"vit", "connector"} | new
            assert saved("again/last")["tokenizer"] == saved("gpt/best")["tokenizer"]
        with mock.patch.object(scst, "Reward", wraps=scst.Reward) as reward:
            output_of("scst", "--sft_dir=out/tuned --max_surprise=6 --max_steps=2")
        assert isinstance(reward.call_args.args[-1], metrics.LanguageJudge)


def test_features_of_a_frozen_clip_are_computed_once_and_kept():
    recipe = Path(config.__file__).with_name("clip_flickr8k_cpu.py")
    plain = (
        f"{recipe} {COMMON} --vit_ckpt=hub/clip --gpt_ckpt=out/gpt/best.pt --dataset=mine"
        " --image_size=24 --batch_size=8 --dropout=0.0 --word_dropout=0.0"
    )

    def train(run_name, change=""):
        options = f"{plain} {change} --out_dir=out/{run_name}"
        with contextlib.redirect_stdout(io.StringIO()):
            mllm.main(options.split())
        return {path.name for path in Path("data/mine").glob("features_*")}

    with toy_workplace():
        write_clip(Path("hub/clip"), torch.zeros(1, 3, 24, 24), "gelu", F.gelu)
        output_of("mine", "--size=24")
        output_of("gpt", "--dataset=mine --block_size=40")
        changes = "train_size=16 jitter=0.5 crop=0.5 mirror=True patch_dropout=0.5 train=vit,gpt"
        for change in changes.split():
            assert train("changed", f"--max_steps=0 --{change}") == set(), change
        with mock.patch.object(mllm, "add_features"):
            train("anew")
        (kept,) = train("mllm")
        check_losses("mllm", "anew")
        with mock.patch.object(data, "save_parts") as save:
            output_of("scst", "--sft_dir=out/mllm")
        assert not save.called
        write_clip(Path("hub/clip"), torch.zeros(1, 3, 24, 24), "gelu", F.gelu)  # other weights
        assert len(train("other")) == 2


def test_conversations_are_learnt_and_continued():
    with empty_workplace():
        make_conversations()
        output_of("mine")
        turns = ["What is this?", "Sure?", "x" * 200, "Why? " * 8, ""]
        for fusion in ("prefix", "cross"):
            options = (
                f"--dataset=mine --image_size=16 --fusion={fusion} --align_share=0.0"
                " --max_tokens=28 --max_steps=2 --beams=1"
            )
            aligned = output_of("mllm", f"{options} --align_share=1.0 --out_dir=out/aligned")
            assert "of vit, gpt, connector; all" in aligned
            output_of("mllm", options)
            pair = "--image=mine/3.png,mine/2.png"
            assert "3.png, 2.png: " in output_of("mllm", f"{pair} --prompt='<image>in<image>?'")
            assert "no image: " in output_of("mllm", "--prompt=Hello.")
            fails("has learnt at most 2", "mllm", f"{pair},mine/1.png")
            fails("1 times <image>, and there are 2", "mllm", f"{pair} --prompt='a <image>?'")
            fails("a chat is about one image", "mllm", "--image=mine --chat=True")
            long = f"--image=mine/3.png --prompt={200 * 'x'}"
            fails("tokens of prompt exceed 3", "mllm", long)
            assert "3.png: " in output_of("mllm", f"{long} --context=300 --yarn=4")
            with (
                mock.patch("builtins.input", side_effect=turns),
                mock.patch.object(model, "sample_next", end_at_once),
                mock.patch.object(mllm, "encode", wraps=mllm.encode) as encode,
            ):
                assert "forgotten" in output_of("mllm", "--image=mine/3.png --chat=True")
            said = [[m["content"] for m in call.args[0]] for call in encode.call_args_list]
            assert said[0] == ["<image>What is this?"]
            assert said[1][::2] == [*said[0], "Sure?"] and len(said[2]) == 5
            assert said[-1] == ["<image>" + turns[-2].strip()]
            exact = "--cider_weight=0.0 --exact_weight=1.0 --beams=1 --max_steps=2"
            assert "other images" in output_of("scst", exact)
            question = "--image=mine/3.png --prompt='What is this?'"
            assert "3.png: " in output_of("scst", question)
        fails("holds questions; CLIP learns from captions", "clip")
        lines = [{"messages": sample_of((), f"{i}?", "Yes.")["messages"]} for i in range(20)]
        for file in Path("mine").glob("*.json*"):
            file.unlink()
        Path("mine/text.json").write_text(json.dumps(lines))
        for tiles in ("", " --max_tiles=2"):
            assert ", 3, 16, 16)" in output_of("mine", tiles)
            plain = f"{options} --crop=1.0 --jitter=0.0 --mirror=False{tiles}"
            assert "no image " in output_of("mllm", plain)  # the table of answers


def end_at_once(logits, **_):
    """Replace sample_next(): write nothing, which is faster."""
    return torch.full((len(logits),), 2)


def test_scenes_on_tiles_are_learnt_and_captioned():
    with empty_workplace(), mock.patch.object(model, "sample_next", end_at_once):
        options = (
            "--dataset=wide --fusion=cross --max_tiles=4 --across_layer=1 --keep_blocks=0,"
            " --mirror=False --crop=1.0 --jitter=0.0 --max_tokens=80 --max_steps=2"
        )
        assert "wide: 72 groups" in output_of("mllm", options)
        Image.new("RGB", (90, 30)).save("wide.png")
        assert "wide.png: " in output_of("mllm", "--image=wide.png")
        assert "after" in output_of("scst", "--max_steps=2")
        fails("tiles are not augmented", "mllm", f"{options} --crop=0.5")
        fails("needs fusion=cross", "mllm", f"{options} --fusion=prefix")
        fails("shapes has images of 1 tiles", "mllm", f"{options} --dataset=shapes")


def test_questions_about_drawn_clips_are_learnt_and_asked():
    with empty_workplace(), mock.patch.object(model, "sample_next", end_at_once):
        options = (
            "--dataset=questions --connector=pixel_shuffle --image_size=48 --max_tokens=64"
            " --n_drawn=160 --max_steps=4 --beams=1"
        )
        lines = output_of("mllm", options).splitlines()
        kinds = {line.split("  ")[0] for line in lines if line.endswith("%")}
        assert {"caption", "change", "event", "one image", "more images", "all"} <= kinds
        frames = [Image.new("RGB", (50, 40), (9 * i, 2, 3)) for i in range(5)]
        frames[0].save("clip.gif", save_all=True, append_images=frames[1:])
        options = "--image=clip.gif --prompt='what happens?' --beams=1"
        assert "clip.gif: " in output_of("mllm", options)


PLAIN_RUNS = {  # without what each process draws for itself
    "gpt": "--dropout=0.0",
    "vit": "--dropout=0.0 --mirror=False",
    "clip": "--dropout=0.0 --mirror=False --crop=1.0 --jitter=0.0",
    "mllm": "--dropout=0.0 --mirror=False --crop=1.0 --jitter=0.0 --word_dropout=0.0"
    " --align_share=0.0 --dataset=mixed --image_size=16",
    "scst": "--sft_dir=out/start --lr=0.01 --batch_size=2",
}


def likely_tokens(logits, temperature=0.0, **_):
    """Replace sample_next(): greedy, but with a temperature the second likeliest tokens."""
    return logits.topk(2).indices[:, int(temperature > 0)]


def train_plain(run_name, options=""):
    """Train all toys without what each process draws for itself."""
    with mock.patch.multiple(vit, N_VAL=16, SHIFT=0):
        with mock.patch.object(model, "sample_next", likely_tokens):
            for name, plain in PLAIN_RUNS.items():
                folder = f"--out_dir=out/{name}_{run_name}"
                more = options * (name not in ("vit", "clip"))  # which have no parts
                output_of(name, f"{plain} {more} {folder} --max_steps=4 --eval_interval=4")


def check_losses(one, other):
    """Assert that two runs have logged the same losses, about."""
    for row, other_row in zip(log_of(one), log_of(other), strict=True):
        for column in ("loss", "train", "val", "reward"):
            if row.get(column):
                assert abs(float(row[column]) - float(other_row[column])) < 1e-3, (other, column)


def test_two_processes_and_accumulation_train_as_one_process_does():
    with toy_workplace():
        shutil.copytree("data/mine", "data/mixed")
        asked = sample_of([0], "<image>what?", "a dog", "why", "so")
        three = sample_of([3, 1, 2], "<image><image>or <image>?", "a cat")
        text = sample_of([], "hi", "hello")
        samples = [asked, three, text, text]  # a process may have no image
        table = {"splits": dict.fromkeys(("train", "val", "test"), samples)}
        Path("data/mixed/samples.json").write_text(json.dumps(table))
        output_of("mllm", f"{PLAIN_RUNS['mllm']} --fusion=cross --out_dir=out/start")
        Path("train.py").write_text(
            "import torch.distributed as dist\n"
            "dist.init_process_group('gloo')\n"
            "dist.init_process_group = lambda backend: None  # once for all runs\n"
            f"import {Path(__file__).stem} as tests\n"
            "tests.train_plain('two')\n"
        )
        launch = [sys.executable, "-m", "torch.distributed.run"]
        launch += ["--standalone", "--nproc_per_node=2", "train.py"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(launch, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        train_plain("one")
        train_plain("parts", "--accumulation=2")
        for name in PLAIN_RUNS:
            check_losses(f"{name}_one", f"{name}_two")
            check_losses(f"{name}_one", f"{name}_parts")


# what goes wrong ----------------------------------------------------------------------------------

WRONG_USES = (
    ("gpt", "--batchsize=3", "unknown setting batchsize (command line); did you mean batch_size?"),
    ("gpt", "--batch_size=x", "batch_size expects int, such as 64, not 'x'"),
    ("gpt", "config/none.py", "config/none.py: no such recipe"),
    ("vit", "--n_head=3", "n_embd=16 is not a multiple of n_head=3"),
    ("gpt", "--device=cuda:99", "device=cuda:99 is not available here"),
    ("gpt", "--dtype=float64", "dtype=float64: auto, float32 or bfloat16"),
    ("gpt", "--accumulation=3", "batch_size=8 cannot be split into 3 equal parts"),
    ("gpt", "--block_size=9999", "data/shakespeare is too small for block_size=9999"),
    ("gpt", "--init_from=resume", "no checkpoint out/gpt/last.pt yet; train one first: python gpt"),
    ("gpt", "--init_from=sft", "init_from=sft: scratch or resume"),
    (
        "gpt",
        "--dataset=a",
        "or from data/a/input.txt: python prepare_shakespeare.py --out_dir=data/a",
    ),
    ("gpt", "--adam_lr=1e30 --grad_clip=0.0", "the loss is not finite before step"),
    ("vit", "--first_size=20", "must be multiples of patch_size=8"),
    ("vit", "--task=clip", "task=clip learns from captions"),
    ("vit", "--batch_size=48", "larger than the training set of 44 images"),
    ("vit", "--image=mine", "no checkpoint out/vit/best.pt yet"),
    ("mllm", "--image_size=25", "25x25 pixels do not divide into patches of 8x8"),
    ("mllm", "--vit_ckpt=none.pt", "no checkpoint none.pt yet; train one first: python vit.py"),
    ("mllm", "--connector=none", "connector=none: linear, mlp"),
    ("mllm", "--fusion=none", "fusion=none: prefix or cross"),
    ("mllm", "--max_tokens=1", "fits the context of 10 tokens; raise max_tokens"),
    ("scst", "", "no out/mllm/sft.pt yet; train one first: python mllm.py"),
)


def test_wrong_uses_end_in_one_line():
    with empty_workplace():
        fails("make it first: python prepare_shakespeare.py", "gpt")
        fails("make it first: python prepare_cifar.py", "vit")
        fails("make it first: python prepare_flickr8k.py", "mllm", "--dataset=flickr8k")
    with toy_workplace():
        for name, options, error in WRONG_USES:
            fails(error, name, options)
        output_of("vit")
        fails("eval_split=new: train, val or test", "vit", "--eval_only=True --eval_split=new")
        Path("data/shakespeare/val.npy").write_bytes(b"")
        fails("data/shakespeare/val.npy is damaged", "gpt")
        fails("none.png: no such image file", "vit", "--image=none.png")
        Path("text.png").write_text("no image")
        fails("can read: text.png", "vit", "--image=text.png")


class RunsCode:
    """Unpickling it would make a folder."""

    def __reduce__(self):
        return os.mkdir, ("made",)


def test_damaged_checkpoints_end_in_one_line_and_run_nothing():
    with toy_workplace():
        output_of("gpt")
        path = Path("out/gpt/best.pt")
        whole = path.read_bytes()
        torch.save(RunsCode(), "code.pt")
        for content in (whole[: len(whole) // 2], Path("code.pt").read_bytes()):
            path.write_bytes(content)
            fails("out/gpt/best.pt is damaged, or no checkpoint", "gpt", "--prompt=to")
        torch.save({"model_args": {}}, path)  # such as nanoGPT's
        fails("out/gpt/best.pt is a checkpoint of another project", "gpt", "--prompt=to")
        assert not Path("made").exists()


def fill_disk(checkpoint, path):
    path.write_bytes(b"half")
    raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_the_last_checkpoint():
    with toy_workplace():
        output_of("gpt")
        path = Path("out/gpt/last.pt")
        whole = path.read_bytes()
        with mock.patch.object(torch, "save", fill_disk):
            fails("could not write out/gpt/best.pt (is the", "gpt", "--init_from=resume")
        assert path.read_bytes() == whole


ROOT = Path(gpt.__file__).parent


# exercises ----------------------------------------------------------------------------------------
# Each needs only those before it: what to write, where, and the tests that say whether it is right.

EXERCISES = """
characters: the ids of the characters of a text, and back
    model.py:CharTokenizer.encode
    model.py:CharTokenizer.decode
    test_char_tokenizer
bpe: merge pairs of bytes, those that were learnt first before others (Sennrich et al. 2016)
    model.py:BPETokenizer.merge
    model.py:BPETokenizer.encode_piece
    test_bpe_pieces_and_merges_worked_out_by_hand
masks: which keys a query may attend to (Vaswani et al. 2017, section 3.2.3)
    model.py:causal_mask
    model.py:padding_mask
    test_masks_are_true_where_a_query_may_attend
attention: scaled dot-product attention by hand (Vaswani et al. 2017, equation 1)
    model.py:scaled_dot_product_attention
    test_attention_function_equals_torch
rotary: positions as rotations of queries and keys (Su et al. 2021, section 3.4.2)
    model.py:RotaryEmbedding.forward
    test_rotary_turns_pairs_of_channels_like_complex_numbers
heads: several attentions, each on a part of the channels (Vaswani et al. 2017, section 3.2.2)
    model.py:MultiHeadAttention.split_heads
    model.py:MultiHeadAttention.forward
    test_multi_head_attention_equals_torch_nn
norms: LayerNorm (Ba et al. 2016) and RMSNorm (Zhang and Sennrich 2019, equation 4)
    model.py:LayerNorm.forward
    model.py:RMSNorm.forward
    test_norms_equal_torch
feed_forward: two layers at each position (Vaswani et al. 2017, section 3.3); SwiGLU (Shazeer 2020)
    model.py:swiglu
    model.py:FeedForward.forward
    test_feed_forward_equals_its_formula
sinusoids: positions as sines and cosines (Vaswani et al. 2017, section 3.5)
    model.py:SinusoidalPositionalEncoding.forward
    test_sinusoidal_positions_by_hand
encoder: the block of an encoder, norms first (Xiong et al. 2020, figure 1b)
    model.py:EncoderBlock.forward
    test_encoder_equals_torch_nn
decoder: the block of a decoder; cross-attention behind a gate (Alayrac et al. 2022, section 2.2)
    model.py:DecoderBlock.forward
    test_transformer_equals_torch_nn
    test_decoder_has_cross_attention_in_chosen_blocks_behind_gates
cache: keys and values of earlier positions, each computed once
    model.py:KVCache.append
    test_cached_attention_equals_one_full_pass
patches: an image becomes a sequence (Dosovitskiy et al. 2020, equation 1)
    model.py:PatchEmbedding.forward
    test_patch_embedding_equals_unfold_and_a_matrix
pooling: a sequence becomes one vector (Hassani et al. 2021)
    model.py:AttentionPooling.forward
    test_attention_pooling_is_a_weighted_mean_of_each_head
vit: classify images (Dosovitskiy et al. 2020)
    model.py:ViT.forward
    test_vit_initial_loss_ignored_labels_smoothing_and_gradients
    test_vit_overfits_eight_random_images
gpt: predict the next token (Radford et al. 2018, equations 1 and 2)
    model.py:GPT.forward
    test_gpt_initial_loss_ignored_targets_and_gradients
    test_gpt_overfits_a_small_batch
sampling: temperature, top-k, and nucleus sampling (Holtzman et al. 2020, section 3.1)
    model.py:keep_likely
    model.py:sample_next
    test_sample_next_follows_temperature_and_top_k
    test_sample_next_keeps_exactly_the_smallest_nucleus
generation: write token after token with a cache
    model.py:GPT.stream
    test_gpt_greedy_generation_with_cache_and_without_dropout_equals_full_passes
connector: from the channels of the ViT to those of the GPT (Liu et al. 2024; Chen et al. 2024)
    model.py:MLPConnector.forward
    model.py:PixelShuffleConnector.forward
    test_pixel_shuffle_folds_neighbouring_patches
prefix: image tokens in the places of their placeholders; logits and loss (Liu et al. 2023)
    model.py:MLLM.embed_prefix
    model.py:MLLM.forward
    test_prefix_puts_image_tokens_in_the_places_of_their_placeholders
    test_mllm_loss_is_the_cross_entropy_of_the_targets
cross: words attend to the images before them (Alayrac et al. 2022, section 2.3)
    model.py:group_images
    model.py:MLLM.embed_cross
    test_an_image_changes_the_logits_of_those_that_see_it_and_of_no_others
    test_a_row_does_not_depend_on_the_images_of_other_rows
answers: a conversation as ids, and those that the loss is on: answers alone
    mllm.py:encode
    test_encode_marks_answers_and_their_ends
freezing: the parts that each of two phases trains (Liu et al. 2023, section 4.2)
    mllm.py:freeze
    test_a_phase_trains_its_parts_alone
beams: beam search with a length penalty
    model.py:beam_search
    test_a_wide_beam_search_finds_the_best_of_all_texts
clip: find the text of each photo and the photo of each text (Radford et al. 2021, figure 3)
    model.py:CLIP.loss
    test_clip_loss_by_hand
bleu: precision of n-grams, and a penalty for brevity (Papineni et al. 2002, sections 2.1 to 2.3)
    config/tools/metrics.py:bleu_of_words
    test_bleu_by_hand
cider: similarity of n-grams, rare ones above all: CIDEr-D (Vedantam et al. 2015)
    config/tools/metrics.py:CiderD.vectors
    config/tools/metrics.py:CiderD.score
    test_cider_by_hand
    test_cider_weighs_by_document_frequency
scst: the advantage of a sample over a baseline, and the loss (Rennie et al. 2017, equation 7)
    scst.py:advantages
    scst.py:scst_loss
    test_advantages_of_both_baselines
    test_scst_loss_by_hand
"""
SOLUTIONS = ROOT.parents[1] if ROOT.name == "exercise" else ROOT  # the folder of the whole code
FOLDER = SOLUTIONS / "out/exercise"


def read_exercises():
    """Return {name: (the places to write, as (file, function); the names of the tests)}."""
    exercises = {}
    for name, lines in re.findall(r"(?m)^(\w+): .*\n((?: .*\n)+)", EXERCISES):
        lines = lines.split()
        places = [line.split(":") for line in lines if ":" in line]
        exercises[name] = places, lines[len(places) :]
    return exercises


def cut_out(path, function):
    """Return the text of a file before, of and after the body of a function, such as Class.method,
    without its docstring."""
    source = path.read_text()
    node = ast.parse(source)
    for name in function.split("."):
        (node,) = (child for child in node.body if getattr(child, "name", "") == name)
    first = node.body[0]
    start = first.end_lineno if ast.get_docstring(node) else first.lineno - 1
    lines = source.splitlines(keepends=True)
    parts = lines[:start], lines[start : node.end_lineno], lines[node.end_lineno :]
    return map("".join, parts)


def blank(file, function):
    """Take the body of a function out of the copy of the code, once."""
    begun = FOLDER / "begun.txt"  # the functions that were taken out, one per line
    if not FOLDER.exists():
        shutil.copytree(SOLUTIONS / "config", FOLDER / "config")
        for path in SOLUTIONS.glob("*.py"):
            shutil.copy(path, FOLDER)
        begun.touch()
    path = FOLDER / file
    functions = begun.read_text().splitlines()
    if function in functions:
        print(f"{path}: {function} is yours already")
        return
    before, body, after = cut_out(path, function)
    indent = re.match(" *", body)[0]
    path.write_text(f"{before}{indent}# write this\n{indent}raise NotImplementedError\n{after}")
    begun.write_text("\n".join([*functions, function]))
    print(f"{path}: {function} is yours to write")


def show(file, function):
    """Print the body of a function."""
    _, solution, _ = cut_out(SOLUTIONS / file, function)
    print(f"{file}: {function}\n{solution}")


@run.one_line_errors
def practise(argument):
    """Do what --exercise, --exercise=NAME,... or --solution=NAME,... asks."""
    option, _, value = argument.partition("=")
    act = {"--exercise": blank, "--solution": show}.get(option)
    exercises = read_exercises()
    if not act or not value:
        print(EXERCISES)
        return
    for name in exercises if value == "all" else value.split(","):
        assert name in exercises, f"{name}: no such exercise; --exercise lists all"
        places, _ = exercises[name]
        for place in places:
            act(*place)


def test_every_exercise_fails_while_blank_and_passes_in_order():
    with empty_workplace(), mock.patch.dict(globals(), FOLDER=Path("exercise").absolute()):
        practise("--exercise=all")
        modules = {}  # the blank ones
        for file in {file for places, _ in read_exercises().values() for file, _ in places}:
            names = {"__name__": "blank"}
            exec((FOLDER / file).read_text(), names)
            modules[file] = SimpleNamespace(**names)
        shutil.copy(SOLUTIONS / "scst.py", FOLDER)  # a solution
        practise("--exercise=scst")
        assert "# write this" not in (FOLDER / "scst.py").read_text()
    solutions = {}
    for places, _ in read_exercises().values():
        for file, function in places:
            find = operator.attrgetter(function)
            original = inspect.unwrap(find(sys.modules[file[:-3].replace("/", ".")]))
            solutions[function] = original, original.__code__
            original.__code__ = inspect.unwrap(find(modules[file])).__code__
    for places, tests in read_exercises().values():
        for test in tests:
            raises(NotImplementedError, "", globals()[test])
        for _, function in places:
            original, code = solutions[function]
            original.__code__ = code
        for test in tests:
            setup_function()
            globals()[test]()


# the runner ---------------------------------------------------------------------------------------


def main(pattern=""):
    """Run the tests of exercises, or those whose names contain a pattern: both separated by commas.
    Return 1 if any failed or there are none, else 0."""
    if pattern.startswith("--"):
        return practise(pattern)
    print(f"tests of {ROOT}")
    failed = []
    exercises = read_exercises()
    names = []
    for part in pattern.split(","):
        found = [name for name in globals() if name.startswith("test_") and part in name]
        if part in exercises:
            _, found = exercises[part]
        if not found:
            print(f"{part}: no test or exercise has this name")
        names += found
    for name in names:
        setup_function()
        start = time.time()
        try:
            globals()[name]()
            print(f"ok {name} ({time.time() - start:.1f} s)", flush=True)
        except (Exception, SystemExit):
            failed.append(name)
            print(f"{traceback.format_exc()}FAILED {name}", flush=True)
    if failed:
        print("failed: " + ", ".join(failed))
    print(f"{len(names) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed or not names else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
