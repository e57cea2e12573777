"""
The tests: plain functions and bare asserts, in the order of model.py. Each fails if what its name says breaks.

    python test_model.py            # all of them; ends with `N passed, M failed`
    python test_model.py bpe        # those with "bpe" in their name
    pytest test_model.py            # works as well, and is not needed
"""

import json
import math
import sys
import time
import traceback
from collections import Counter
from dataclasses import asdict

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import (
    GPT, MLLM, BPETokenizer, CharTokenizer, DecoderBlock, FeedForward, GPTConfig, KVCache, LayerNorm,
    LearnedPositionalEncoding, MLLMConfig, MultiHeadAttention, PatchEmbedding, RMSNorm, RotaryEmbedding,
    SinusoidalPositionalEncoding, Transformer, TransformerDecoder, TransformerEncoder, ViT, ViTConfig, causal_mask,
    padding_mask, sample_next, scaled_dot_product_attention, tokenizer_from_state,
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
    """Assert that f(*args) raises exception (SystemExit too) with text in its message."""
    try:
        f(*args)
    except exception as e:
        assert text in str(e), f"{text!r} is not in {str(e)!r}"
    else:
        raise AssertionError(f"no {exception.__name__}")


def shake(module, std=0.3):
    """module in eval mode, its weights far from where they start: they are so small there that much goes unnoticed."""
    for p in module.parameters():
        p.data += std * torch.randn_like(p)
    return module.eval()


def gradients(output, *tensors):
    """Of an uneven sum of output, so that no two of its numbers count alike."""
    return torch.autograd.grad((output * torch.linspace(-1, 2, output.numel()).view_as(output)).sum(), tensors)


def unreached(model, loss):
    """The parameters that loss gives no gradient, or one that is not finite."""
    loss.backward()
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
        assert all(4 <= i < tokenizer.vocab_size for i in ids), repr(text)


def test_bpe_pieces_and_merges_worked_out_by_hand():
    pieces = ["that", "'s", "  ", " the", " hat", "!", "\n", "ok"]
    assert BPETokenizer.pieces.findall("".join(pieces)) == pieces
    # pieces: hug, _hug, _pug, _hugs. Pairs: ug 4, hu 3, _h 2, _p pu gs 1  ->  ug
    # then h+ug 3, _h 2, the rest 1  ->  hug; then _+hug 2, the rest 1  ->  _hug; then no pair occurs twice
    tokenizer = BPETokenizer.train(["hug hug pug hugs"], 400)
    assert tokenizer.bytes[260:] == [b"ug", b"hug", b" hug"] and tokenizer.vocab_size == 263
    assert tokenizer.encode("hugs") == [261, 4 + ord("s")]


def test_bpe_training_and_encoding_equal_a_naive_reference():
    def merge(ids, pair, new):
        i = next((i for i in range(len(ids) - 1) if tuple(ids[i:i + 2]) == pair), None)
        return ids if i is None else ids[:i] + [new] + merge(ids[i + 2:], pair, new)

    rng = np.random.default_rng(0)
    for letters in ("ab", "abc", "abcde"):  # few letters: many ties and many overlaps such as aaa
        words = ["".join(rng.choice(list(letters), rng.integers(1, 9))) for _ in range(60)]
        pieces, merges = [[4 + b for b in word.encode()] for word in words], []
        for new in range(260, 320):
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
    assert BPETokenizer.train(CORPUS, 260).encode("é") == [4 + 0xC3, 4 + 0xA9]  # bytes alone
    assert [tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.image_id] == [0, 1, 2, 3]
    assert tokenizer.decode([1, *tokenizer.encode("the"), 3, *tokenizer.encode(" cat"), 2, 0]) == "the cat"
    raises(ValueError, "260", BPETokenizer.train, CORPUS, 259)


def test_tokenizers_come_back_from_their_state_through_json():
    for tokenizer in (CharTokenizer("".join(CORPUS)), BPETokenizer.train(CORPUS, 300)):
        back = tokenizer_from_state(json.loads(json.dumps(tokenizer.state())))
        assert type(back) is type(tokenizer) and back.vocab_size == tokenizer.vocab_size
        assert all(back.encode(text) == tokenizer.encode(text) for text in CORPUS)


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
    for layer in (MultiHeadAttention(16, 2, 0.5, fused=True), MultiHeadAttention(16, 2, 0.5, fused=False),
                  FeedForward(16, dropout=0.5)):
        assert not torch.allclose(layer(x), layer(x)) and layer.eval()(x).equal(layer(x))


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
    for ours, theirs in ((LayerNorm(16), nn.LayerNorm(16)), (RMSNorm(16), nn.RMSNorm(16, eps=1e-5))):
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


def test_initial_weights_are_small_and_smaller_into_the_residual_stream():
    for name, p in tiny_gpt(n_embd=64, n_layer=8).named_parameters():
        wanted = 0.02 / math.sqrt(2 * 8) if name.endswith("proj.weight") else 0.02
        assert p.ndim == 1 or abs(p.std().item() / wanted - 1) < 0.1, name


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


def test_transformer_cached_generate_equals_uncached():
    model, source = shake(tiny_transformer(dropout=0.5)), torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0], [9, 0, 0, 0]])
    target, caches = torch.randint(3, 11, (3, 8)), model.decoder.new_caches(8, 4)
    logits = [model.decode(target[:, t:t + 1], model.encode(source), source, caches) for t in range(8)]
    close(torch.cat(logits, dim=1), model(source, target), 1e-4)
    model.embedding.weight.data[0] = 0  # padding is never the likeliest token
    out = model.generate(source, bos_id=1, eos_id=99, max_new_tokens=10)
    assert out.equal(greedy(lambda target: model(source, target), torch.ones(3, 1).long(), 10))
    assert model.train().generate(source, 1, 99, 10).equal(out) and model.training  # it writes without dropout


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
    out = model.eval().generate(source, bos_id=1, eos_id=2, max_new_tokens=6)
    assert out.shape == target.shape
    assert (out == target.masked_fill(target == 0, 2)).all(dim=1).float().mean() >= 0.9  # eos fills ended rows
    ended = (target == 7).cumsum(dim=1) > 0
    assert (model.generate(source, bos_id=1, eos_id=7, max_new_tokens=6)[ended] == 7).float().mean() >= 0.9


# ---------------------------------------------------------------------------------------------------------------------
# 6. vision


def tiny_vit(**changes):
    return ViT(ViTConfig(**dict(image_size=8, patch_size=4, n_layer=2, n_head=2, n_embd=16) | changes))


def photos(n, size=8):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)


def test_patch_embedding_equals_unfold_and_a_matrix():
    layer, images = shake(PatchEmbedding(4, 16)), torch.randn(2, 3, 8, 12)
    patches = F.unfold(images, 4, stride=4).transpose(1, 2)  # (B, N, 3 * 4 * 4), row by row
    close(layer(images), patches @ layer.stem.weight.flatten(1).T + layer.stem.bias, 1e-4)
    assert PatchEmbedding(8, 16, "conv")(torch.randn(2, 3, 16, 32)).shape == (2, 8, 16)
    for stem in ("patch", "conv"):
        raises(ValueError, "8x10", PatchEmbedding(4, 16, stem), torch.zeros(1, 3, 8, 10))
    raises(ValueError, "power of 2", PatchEmbedding, 6, 16, "conv")
    raises(ValueError, "'dense'", PatchEmbedding, 8, 16, "dense")


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


def test_vit_initial_loss_ignored_labels_and_gradients():
    for stem in ("patch", "conv"):
        model, images, labels = tiny_vit(stem=stem), photos(64), torch.randint(0, 10, (64,))
        logits, loss = model(images, labels)
        assert abs(loss.item() - math.log(10)) < 0.1 and model(images)[1] is None
        some = labels.where(torch.arange(64) < 20, -1)
        close(model(images, some)[1], F.cross_entropy(logits[:20], labels[:20]))
        assert not unreached(model, loss)


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
        assert not unreached(model, loss)


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

IMAGE = [3] * 4  # the placeholders of one image of tiny_mllm()
EXAMPLE = torch.tensor([[1, 5, *IMAGE, 7, 8], [*IMAGE, 1, 9, 9, 6]])  # each row has its image in another place
TARGETS = torch.tensor([[5, -1, -1, -1, -1, 7, 8, 2], [-1, -1, -1, 1, 9, 9, 6, 2]])


def tiny_mllm(**changes):
    vit = ViTConfig(image_size=8, patch_size=4, n_layer=1, n_head=2, n_embd=16)
    gpt = GPTConfig(vocab_size=20, block_size=24, n_layer=2, n_head=2, n_embd=24)
    return MLLM(MLLMConfig(**dict(vit=vit, gpt=gpt) | changes))


def test_mllm_puts_image_tokens_where_the_placeholders_are():
    model, images = shake(tiny_mllm()), photos(2)
    (first, second), words = model.encode(images), model.gpt.embedding.weight
    expected = torch.stack([torch.cat((words[[1, 5]], first, words[[7, 8]])), torch.cat((second, words[[1, 9, 9, 6]]))])
    close(model.embed(images, EXAMPLE), expected)
    close(model(images, EXAMPLE)[0], model.logits(model.gpt.hidden(expected)))
    both = torch.cat((words[[5]], first, words[[6]], second, words[[7]]))[None]
    close(model.embed(images, torch.tensor([[5, *IMAGE, 6, *IMAGE, 7]])), both)  # two images in one row
    text = torch.tensor([[1, 5, 9], [6, 7, 2]])  # without an image it is the language model, but for the placeholder
    close(model(images[:0], text)[0], model.gpt(text)[0].index_fill(-1, torch.tensor([3]), -math.inf))


def test_mllm_errors_for_wrong_counts_long_input_and_unknown_connectors():
    model, full = tiny_mllm(), torch.tensor([[*IMAGE, *[5] * 21]])
    raises(ValueError, "8 placeholders for 1 images of 4 tokens each", model, photos(1), EXAMPLE)
    raises(ValueError, "0 placeholders for 2 images", model, photos(2), torch.tensor([[1, 5]]))
    raises(ValueError, "block_size=24", model, photos(1), full)
    raises(ValueError, "block_size=24", model.generate, photos(1), full)  # no room to write in
    raises(ValueError, "'qformer'", MLLM, MLLMConfig(connector="qformer"))


def test_mllm_text_sees_the_image_before_it_and_nothing_sees_later_text():
    model, images, ids, later = shake(tiny_mllm()), photos(2), EXAMPLE[:1], EXAMPLE[:1].clone()
    features = model.gpt.hidden(model.embed(images[:1], ids))
    by = moved(model.gpt.hidden(model.embed(images[1:], ids)), features)
    assert by[:2].max() == 0 and by[2:].min() > 1e-4
    later[:, 6] += 1
    by = moved(model.gpt.hidden(model.embed(images[:1], later)), features)
    assert by[:6].max() == 0 and by[6:].min() > 1e-4


def test_mllm_loss_and_log_probs_are_those_of_the_full_logits():
    model, images = shake(tiny_mllm()), photos(2)
    tokens = model.encode(images)
    close(tokens, model.connector(model.vit.features(images)))
    logits, (some, loss) = model(images, EXAMPLE)[0], model(tokens, EXAMPLE, TARGETS)  # tokens stand in for pixels
    close(some, logits[TARGETS >= 0])
    close(loss, F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten(), ignore_index=-1))
    expected = logits.log_softmax(dim=-1)[:, :-1].gather(2, EXAMPLE[:, 1:, None])[:, :, 0]
    for either in (images, tokens):
        close(model.log_probs(either, EXAMPLE), F.pad(expected, (1, 0)).masked_fill(EXAMPLE == 3, 0), 1e-4)
    close(model.log_probs(images[:1], torch.tensor([[1, 5, *IMAGE]]))[0, 1], expected[0, 0], 1e-4)  # ends with an image


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
    model.gpt.embedding.weight.data[3] *= 50  # a placeholder is likely, and yet never written
    first, other, again = (model.generate(images, None, 19, 1.0, generator=torch.Generator().manual_seed(i))
                           for i in (1, 2, 1))
    assert first.equal(again) and not first.equal(other)
    ended = (first == 2).cumsum(dim=1) > 0
    assert ended.any() and (first[ended] == 2).all() and not (first == 3).any()
    raises(ValueError, "placeholders", model.generate, images, torch.tensor([[1, 5]]))
    assert all(module.training for module in model.modules())  # after an error as well


def test_mllm_config_comes_back_from_a_dict():
    model = tiny_mllm(connector="linear", eos_id=9)
    back = MLLMConfig.from_dict(asdict(model.config))
    assert back == model.config and isinstance(back.vit, ViTConfig) and isinstance(back.gpt, GPTConfig)
    MLLM(back).load_state_dict(model.state_dict())


def test_mllm_initial_loss_and_gradients_through_each_connector():
    for connector in ("linear", "mlp"):
        model = tiny_mllm(connector=connector)
        loss = model(photos(2), EXAMPLE, TARGETS)[1]
        assert abs(loss.item() - math.log(20)) < 0.3
        assert not unreached(model, loss)


# ---------------------------------------------------------------------------------------------------------------------
# the stages, end to end


# ---------------------------------------------------------------------------------------------------------------------
# the runner


def main(pattern=""):
    """Run the tests whose name contains pattern, in order. Returns the exit status, 1 if any failed."""
    failed, tests = 0, [(name, f) for name, f in globals().items() if name.startswith("test_") and pattern in name]
    for name, test in tests:
        setup_function()
        start = time.time()
        try:
            test()
            print(f"ok {name} ({time.time() - start:.1f} s)", flush=True)
        except (Exception, SystemExit):
            failed += 1
            print(f"{traceback.format_exc()}FAILED {name}", flush=True)
    print(f"{len(tests) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
