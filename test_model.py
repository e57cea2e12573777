"""
The tests: plain functions and bare asserts, in the order of model.py. Each names what it holds model.py to.

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
from dataclasses import asdict, replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import (
    MLLM, BPETokenizer, CharTokenizer, DecoderBlock, EncoderBlock, FeedForward, GPT, GPTConfig, KVCache, LayerNorm,
    LearnedPositionalEncoding, MLLMConfig, MultiHeadAttention, PatchEmbedding, RMSNorm, RotaryEmbedding,
    SinusoidalPositionalEncoding, Transformer, TransformerDecoder, TransformerEncoder, ViT, ViTConfig, causal_mask,
    init_weights, padding_mask, sample_next, scaled_dot_product_attention, tokenizer_from_state,
)


def setup_function():
    """Before each test (pytest calls it by this name): the same random numbers, and one thread, as the models are tiny."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


def close(a, b, atol=1e-5):
    """Assert that two tensors have one shape and the same values (NaN equals nothing)."""
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    assert torch.allclose(a, b, atol=atol, rtol=1e-4), f"they differ by up to {(a - b).abs().max():.2g}"


def raises(exception, text, f, *args):
    """Assert that f(*args) raises exception (SystemExit too) with text in its message."""
    try:
        f(*args)
    except exception as e:
        assert text in str(e), f"{text!r} is not in {str(e)!r}"
        return
    raise AssertionError(f"no {exception.__name__}")


def shake(module, std=0.3):
    """module in eval mode with every weight random and large: fresh ones are so small that much would go unnoticed."""
    for p in module.parameters():
        nn.init.normal_(p, std=std)
    return module.eval()


def gradients(output, *tensors):
    """Of a fixed uneven sum of output, so that no two channels or positions count alike."""
    return torch.autograd.grad((output * torch.linspace(-1, 2, output.numel()).view_as(output)).sum(), tensors)


def unreached(model):
    """The names of the parameters that the last backward() gave no gradient."""
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    return [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def fit(model, loss_of, steps, lr):
    """The loss after so many steps of Adam on loss_of(step)."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(step)
        loss.backward()
        optimizer.step()
    return loss.item()


@torch.no_grad()
def greedy(logits_of, ids, n):
    """ids (B, T) and n more, each the likeliest of a full pass without cache."""
    for _ in range(n):
        ids = torch.cat((ids, logits_of(ids)[:, -1:].argmax(dim=-1)), dim=1)
    return ids


def tiny_vit(**changes):
    return ViT(ViTConfig(**{**dict(image_size=8, patch_size=4, n_layer=2, n_head=2, n_embd=16), **changes}))


def tiny_gpt(**changes):
    return GPT(GPTConfig(**{**dict(vocab_size=20, block_size=16, n_layer=2, n_head=2, n_embd=16), **changes}))


def tiny_mllm(**changes):
    """4 image tokens an image, 20 ids, a block of 24."""
    vit = ViTConfig(image_size=8, patch_size=4, n_layer=1, n_head=2, n_embd=16)
    gpt = GPTConfig(vocab_size=20, block_size=24, n_layer=2, n_head=2, n_embd=24)
    return MLLM(MLLMConfig(**{**dict(vit=vit, gpt=gpt), **changes}))


def photos(n, size=8):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# 1. tokenizers

CORPUS = ["the cat sat on the mat, the cat's hat\n", "that's the hat   that the cat had", "naïve café — naïve café 🙂🙂"]


def test_char_tokenizer_round_trip_and_unknown_character():
    tokenizer = CharTokenizer("hello\n")
    assert tokenizer.vocab_size == 5 and tokenizer.encode("\neh") == [0, 1, 2]
    assert tokenizer.decode(tokenizer.encode("hole\nhell")) == "hole\nhell"
    raises(ValueError, "'ß'", tokenizer.encode, "heßo")


def test_bpe_round_trip_loses_nothing_and_makes_no_special_id():
    tokenizer = BPETokenizer.train(CORPUS, 300)
    for text in ["", " ", "the cat", "  two   spaces  ", "a\n\n\tb\r\n", "\x00\x01\x1c\x7f\u2028", "Ünïcödé e\u0301",
                 "👩‍👩‍👧 🙂", "日本語", "it's '' 'tis", "_a_1²", "<image>", "<pad><bos></s><|endoftext|>", *CORPUS]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text, repr(text)
        assert all(BPETokenizer.n_special <= i < tokenizer.vocab_size for i in ids), repr(text)


def test_bpe_merges_worked_out_by_hand():
    # pieces: hug, _hug, _pug, _hugs. Pairs: ug 4, hu 3, _h 2, _p pu gs 1  ->  ug
    # then h+ug 3, _h 2, the rest 1  ->  hug; then _+hug 2, the rest 1  ->  _hug; then no pair occurs twice
    tokenizer = BPETokenizer.train(["hug hug pug hugs"], 400)
    assert tokenizer.bytes[260:] == [b"ug", b"hug", b" hug"] and tokenizer.vocab_size == 263
    assert tokenizer.encode("hugs") == [261, 4 + ord("s")]


def test_bpe_training_and_encoding_equal_a_naive_reference():
    def merge(ids, pair, new):
        for i in range(len(ids) - 1):
            if ids[i:i + 2] == list(pair):
                return ids[:i] + [new] + merge(ids[i + 2:], pair, new)
        return ids

    rng = np.random.default_rng(0)
    for letters in (2, 3, 5):  # few letters: many ties and many overlaps such as aaa
        words = ["".join(rng.choice(list("abcde")[:letters], rng.integers(1, 9))) for _ in range(60)]
        pieces, merges = [[4 + b for b in word.encode()] for word in words], []
        while len(merges) < 40:
            pairs = Counter(pair for piece in pieces for pair in zip(piece, piece[1:]))
            best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
            if best is None or pairs[best] < 2:
                break
            pieces = [merge(piece, best, 260 + len(merges)) for piece in pieces]
            merges.append(best)
        tokenizer = BPETokenizer.train(words, 260 + 40)
        assert tokenizer.merges == merges
        assert [tokenizer.encode(word) for word in words] == pieces


def test_bpe_vocab_size_and_reserved_ids():
    tokenizer = BPETokenizer.train(CORPUS, 270)
    assert tokenizer.vocab_size == 270 and max(i for text in CORPUS for i in tokenizer.encode(text)) == 269
    assert BPETokenizer.train(CORPUS, 260).encode("é") == [4 + 0xC3, 4 + 0xA9]  # bytes alone
    assert {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.image_id} == {0, 1, 2, 3}
    assert tokenizer.decode([1, *tokenizer.encode("the"), 3, *tokenizer.encode(" cat"), 2, 0]) == "the cat"
    raises(ValueError, "260", BPETokenizer.train, CORPUS, 259)


def test_tokenizers_come_back_from_their_state_through_json():
    for tokenizer in (CharTokenizer("".join(CORPUS)), BPETokenizer.train(CORPUS, 300)):
        back = tokenizer_from_state(json.loads(json.dumps(tokenizer.state())))
        assert type(back) is type(tokenizer) and back.vocab_size == tokenizer.vocab_size
        assert all(back.encode(text) == tokenizer.encode(text) for text in CORPUS)


# ---------------------------------------------------------------------------------------------------------------------
# 2. attention


def test_causal_mask_lets_the_last_query_see_the_last_key():
    assert causal_mask(2, 4).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert causal_mask(3, 3).int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_padding_mask_is_true_at_real_tokens():
    mask = padding_mask(torch.tensor([[5, 6, 0], [7, 0, 0]]), 0)
    assert mask.dtype == torch.bool and mask.shape == (2, 1, 1, 3)
    assert mask[:, 0, 0].int().tolist() == [[1, 1, 0], [1, 0, 0]]


def test_attention_function_equals_torch():
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 6, 8), torch.randn(2, 3, 6, 8)
    for mask in (None, causal_mask(4, 6), torch.tensor([1, 1, 0, 1, 0, 1]).bool().expand(2, 1, 1, 6)):
        out, weights = scaled_dot_product_attention(q, k, v, mask)
        close(out, F.scaled_dot_product_attention(q, k, v, mask))
        close(weights.sum(dim=-1), torch.ones(2, 3, 4))
        assert mask is None or not weights.masked_select(~mask).any()


def test_attention_row_that_sees_nothing_gives_zeros_and_finite_gradients():
    mask = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    mask[1, :, 2] = False
    q = torch.randn(2, 3, 4, 8, requires_grad=True)
    out, weights = scaled_dot_product_attention(q, q.detach(), q.detach(), mask)
    assert not out[1, :, 2].any() and not weights[1, :, 2].any() and out[1, :, 3].any()
    assert not gradients(out, q)[0][1, :, 2].any()
    for fused in (True, False):
        layer, x = MultiHeadAttention(16, 2, fused=fused), torch.randn(2, 4, 16, requires_grad=True)
        out = layer(x, mask=mask)
        close(out[1, 2], layer.proj.bias)
        assert all(g.isfinite().all() for g in gradients(out, x, *layer.parameters()))


def test_attention_dropout_changes_the_output_in_training_alone():
    q = torch.randn(1, 2, 6, 8)
    plain, weights = scaled_dot_product_attention(q, q, q)
    dropped, same = scaled_dot_product_attention(q, q, q, dropout_p=0.5)
    close(same, weights)  # the weights are returned before dropout
    assert not torch.allclose(plain, dropped)
    for fused in (True, False):
        layer, x = MultiHeadAttention(16, 2, dropout=0.5, fused=fused), torch.randn(1, 6, 16)
        assert not torch.allclose(layer(x), layer(x))
        layer.eval()
        close(layer(x), layer(x))


def test_rotary_keeps_norms_and_sees_distances_alone():
    rotary, q, k = RotaryEmbedding(8, 32), torch.randn(8), torch.randn(8)
    turned_q, turned_k = (rotary(x.expand(1, 1, 32, 8))[0, 0] for x in (q, k))  # the same vector at each position
    close(turned_q.norm(dim=-1), q.norm().expand(32))
    products = turned_q @ turned_k.T
    for distance in (-7, 0, 3):
        along = products.diagonal(distance)
        close(along, along[0].expand(len(along)), 1e-4)
    assert (products[0, 1:] - products[0, 0]).abs().min() > 1e-3  # another distance, another product


def test_rotary_start_equals_slicing_and_head_dim_is_even():
    rotary, x = RotaryEmbedding(8, 32), torch.randn(2, 3, 20, 8)
    close(rotary(x[:, :, 5:9], start=5), rotary(x)[:, :, 5:9])
    raises(ValueError, "even", RotaryEmbedding, 7, 32)


def copy_attention(ours, theirs):
    """Weights of a torch.nn.MultiheadAttention into a MultiHeadAttention."""
    ours.qkv.load_state_dict({"weight": theirs.in_proj_weight, "bias": theirs.in_proj_bias})
    ours.proj.load_state_dict(theirs.out_proj.state_dict())


def test_multi_head_attention_equals_torch_nn():
    theirs = shake(nn.MultiheadAttention(16, 4, batch_first=True))
    x, context = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    hidden = torch.tensor([0, 0, 0, 0, 1]).bool()
    for fused in (True, False):
        ours = MultiHeadAttention(16, 4, fused=fused)
        copy_attention(ours, theirs)
        close(ours(x), theirs(x, x, x)[0])
        close(ours(x, context), theirs(x, context, context)[0])
        close(ours(x, causal=True), theirs(x, x, x, attn_mask=~causal_mask(5, 5))[0])
        close(ours(x, mask=~hidden), theirs(x, x, x, key_padding_mask=hidden.expand(2, 5))[0])


def test_hand_written_attention_equals_fused_in_outputs_and_gradients():
    layer, mask = shake(MultiHeadAttention(16, 2, rotary=RotaryEmbedding(8, 12))), torch.rand(2, 1, 6, 6) > 0.4
    past, x = torch.randn(2, 4, 16), torch.randn(2, 6, 16, requires_grad=True)
    for chosen, causal, cached in [(None, False, False), (mask, False, False), (None, True, False), (mask, True, False),
                                   (None, True, True)]:
        results = []
        for layer.fused in (True, False):
            cache = KVCache(10) if cached else None
            if cached:  # 6 queries see 4 + 6 keys
                with torch.no_grad():
                    layer(past, causal=True, cache=cache)
            out = layer(x, mask=chosen, causal=causal, cache=cache)
            results.append((out, *gradients(out, x, *layer.parameters())))
        for a, b in zip(*results):
            close(a, b, 1e-4)


def test_attention_in_bfloat16_is_close_to_float32():
    layer, x = MultiHeadAttention(32, 4), torch.randn(2, 9, 32)
    expected = layer(x, causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        close(layer(x, causal=True).float(), expected, 0.02)
    out = layer.bfloat16()(x.bfloat16(), causal=True)
    assert out.dtype == torch.bfloat16
    close(out.float(), expected, 0.02)


def test_cached_self_attention_equals_one_full_pass():
    layer, x = shake(MultiHeadAttention(16, 2, rotary=RotaryEmbedding(8, 10))), torch.randn(2, 10, 16)
    for sizes in ([1] * 10, [4, 1, 3, 2]):
        cache = KVCache(10)
        parts = [layer(part, causal=True, cache=cache) for part in x.split(sizes, dim=1)]
        close(torch.cat(parts, dim=1), layer(x, causal=True))


def test_cached_cross_attention_reads_the_context_once():
    layer, x, context = shake(MultiHeadAttention(16, 2)), torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    cache, mask = KVCache(7), torch.tensor([1, 1, 1, 1, 1, 0, 0]).bool()
    first = layer(x[:, :1], context, mask, cache=cache)
    rest = layer(x[:, 1:], torch.full_like(context, math.nan), mask, cache=cache)
    close(torch.cat((first, rest), dim=1), layer(x, context, mask))


def test_heads_that_do_not_divide_the_width_are_an_error():
    raises(ValueError, "n_embd=10 is not a multiple of n_head=4", MultiHeadAttention, 10, 4)


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
    x = torch.randn(2, 5, 24)
    for activation in ("relu", "gelu", "swiglu"):
        layer = shake(FeedForward(24, activation=activation))
        h = x @ layer.up.weight.T + layer.up.bias
        if activation == "swiglu":
            h = h[..., :64] * h[..., :64].sigmoid() * h[..., 64:]  # 64 = 2/3 of 4 * 24
        else:
            h = h.clamp(min=0) if activation == "relu" else h * (1 + torch.erf(h / math.sqrt(2))) / 2
        close(layer(x), h @ layer.proj.weight.T + layer.proj.bias, 1e-4)
    raises(ValueError, "'tanh'", FeedForward, 24, None, "tanh")


def test_swiglu_has_about_as_many_weights_as_gelu():
    swiglu, gelu = (sum(p.numel() for p in FeedForward(96, None, kind).parameters()) for kind in ("swiglu", "gelu"))
    assert abs(swiglu / gelu - 1) < 0.02


def test_sinusoidal_positions_by_hand():
    added = SinusoidalPositionalEncoding(4, 8)(torch.ones(1, 8, 4))[0] - 1
    close(added[0], torch.tensor([0.0, 1.0, 0.0, 1.0]))
    close(added[3], torch.tensor([math.sin(3), math.cos(3), math.sin(0.03), math.cos(0.03)]))  # 10000^(2/4) = 100


def test_added_positions_start_where_they_are_told():
    x = torch.randn(2, 10, 6)
    for positions in (SinusoidalPositionalEncoding(6, 12), shake(LearnedPositionalEncoding(6, 12))):
        close(positions(x[:, 4:7], start=4), positions(x)[:, 4:7])
        assert not torch.allclose(positions(x[:, 4:7]), positions(x)[:, 4:7])


# ---------------------------------------------------------------------------------------------------------------------
# 4. blocks and 5. stacks


def copy_block(ours, theirs):
    """Weights of a torch.nn.TransformerEncoderLayer or -DecoderLayer into an EncoderBlock or a DecoderBlock."""
    norms = [ours.norm1, ours.norm2] if isinstance(ours, EncoderBlock) else [ours.norm1, ours.cross_norm, ours.norm2]
    pairs = [(ours.ff.up, theirs.linear1), (ours.ff.proj, theirs.linear2)]
    pairs += [(norm, getattr(theirs, f"norm{i}")) for i, norm in enumerate(norms, 1)]
    for mine, other in pairs:
        mine.load_state_dict(other.state_dict())
    copy_attention(ours.attn, theirs.self_attn)
    if hasattr(theirs, "multihead_attn"):
        copy_attention(ours.cross_attn, theirs.multihead_attn)


def test_transformer_encoder_equals_torch_nn():
    x, padded = torch.randn(2, 6, 16), torch.tensor([[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]]).bool()
    for activation in ("relu", "gelu"):
        block = nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, activation=activation, batch_first=True,
                                           norm_first=True)
        theirs = nn.TransformerEncoder(block, 2, nn.LayerNorm(16), enable_nested_tensor=False)
        shake(theirs).train()  # in eval mode torch takes a fast path that zeroes padded positions
        ours = TransformerEncoder(2, 16, 2, activation=activation)
        for mine, other in zip(ours.blocks, theirs.layers):
            copy_block(mine, other)
        ours.norm.load_state_dict(theirs.norm.state_dict())
        close(ours.blocks[0](x), theirs.layers[0](x), 1e-4)
        close(ours(x), theirs(x), 1e-4)
        close(ours(x, ~padded[:, None, None, :])[~padded], theirs(x, src_key_padding_mask=padded)[~padded], 1e-4)


def test_decoder_block_equals_torch_nn():
    theirs = shake(nn.TransformerDecoderLayer(16, 2, 64, dropout=0.0, activation="gelu", batch_first=True,
                                              norm_first=True))
    ours = DecoderBlock(16, 2, cross=True)
    copy_block(ours, theirs)
    x, memory, padded = torch.randn(2, 5, 16), torch.randn(2, 7, 16), torch.rand(2, 7) > 0.6
    expected = theirs(x, memory, tgt_mask=~causal_mask(5, 5), memory_key_padding_mask=padded)
    close(ours(x, memory, memory_mask=~padded[:, None, None, :]), expected, 1e-4)


def test_cross_attention_weights_exist_only_where_asked_for():
    assert not [name for name in DecoderBlock(16, 2).state_dict() if "cross" in name]
    assert [name for name in DecoderBlock(16, 2, cross=True).state_dict() if "cross" in name]


def test_decoder_output_does_not_depend_on_later_positions():
    decoder, x = shake(TransformerDecoder(2, 16, 2)), torch.randn(1, 8, 16)
    changed = x.clone()
    changed[:, 5] += 1
    moved = (decoder(x) - decoder(changed)).abs().amax(dim=-1)[0]
    assert moved[:5].max() == 0 and moved[5:].min() > 1e-4


def test_initial_weights_have_the_documented_deviations():
    decoder = TransformerDecoder(8, 64, 4, bias=True)
    init_weights(decoder, 8)
    for name, p in decoder.named_parameters():
        if p.ndim == 2:
            wanted = 0.02 / math.sqrt(16) if name.endswith("proj.weight") else 0.02
            assert abs(p.std().item() / wanted - 1) < 0.1, name
        else:
            assert (p == (1 if "norm" in name and name.endswith("weight") else 0)).all(), name


def tiny_transformer(**changes):
    return Transformer(**{**dict(vocab_size=11, n_layer=2, n_embd=32, n_head=4, max_len=16, dropout=0.0), **changes})


def test_transformer_padding_does_not_leak():
    model, source, target = shake(tiny_transformer()), torch.randint(3, 11, (2, 5)), torch.randint(3, 11, (2, 4))
    logits = model(source, target)
    close(model(F.pad(source, (0, 3)), F.pad(target, (0, 2)))[:, :4], logits, 1e-4)
    close(model(source, F.pad(target, (2, 0)))[:, 2:].isfinite().float(), torch.ones(2, 4, 11))  # a row sees nothing
    x, mask = torch.randn(2, 5, 32), padding_mask(torch.tensor([[4, 4, 4, 0, 0]] * 2), 0)
    changed = x.clone()
    changed[:, 3:] = torch.randn(2, 2, 32)
    close(model.encoder(x, mask)[:, :3], model.encoder(changed, mask)[:, :3])


def test_transformer_cached_generate_equals_uncached():
    model, source = shake(tiny_transformer()), torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0], [9, 0, 0, 0]])
    model.embedding.weight.data[0] = 0  # padding is never the likeliest token
    out = model.generate(source, bos_id=1, eos_id=99, max_new_tokens=10)
    assert out.equal(greedy(lambda target: model(source, target), torch.ones(3, 1).long(), 10))
    assert len(out[:, 1:].unique()) > 3


def test_transformer_learns_to_reverse_sequences():
    def batch(n):
        """source: 2 to 5 symbols, padded with 0; target: bos (1), the symbols in reverse order, eos (2), padded."""
        length, place = torch.randint(2, 6, (n, 1)), torch.arange(5)
        source = torch.randint(3, 11, (n, 5)) * (place < length)
        backward = source.gather(1, (length - 1 - place).clamp(min=0)) * (place < length)
        target = F.pad(F.pad(backward, (1, 0), value=1), (0, 1)).scatter(1, length + 1, 2)
        held_out = source.sum(dim=1) % 5 == 0  # a fifth of all sequences is never trained on
        return (source[~held_out], target[~held_out]), (source[held_out], target[held_out])

    def loss_of(step):
        source, target = batch(128)[0]
        return F.cross_entropy(model(source, target[:, :-1]).flatten(0, 1), target[:, 1:].flatten(), ignore_index=0)

    model = tiny_transformer(n_embd=64)
    fit(model, loss_of, 300, 2e-3)
    source, target = batch(1000)[1]
    out = model.eval().generate(source, bos_id=1, eos_id=2, max_new_tokens=6)
    expected = target.masked_fill(target == 0, 2)  # ended rows are filled with eos
    assert out.shape == expected.shape
    assert (out == expected).all(dim=1).float().mean() >= 0.9


# ---------------------------------------------------------------------------------------------------------------------
# 6. vision


def test_patch_embedding_equals_unfold_and_a_matrix():
    layer, images = shake(PatchEmbedding(4, 16)), torch.randn(2, 3, 8, 12)
    patches = F.unfold(images, 4, stride=4).transpose(1, 2)  # (B, N, 3 * 4 * 4), row by row
    close(layer(images), patches @ layer.stem.weight.flatten(1).T + layer.stem.bias, 1e-4)


def test_conv_stem_gives_one_token_a_patch_row_by_row():
    layer, images = PatchEmbedding(8, 16, stem="conv"), torch.zeros(1, 3, 64, 96)
    images[:, :, 33:39, 57:63] = 1  # inside the patch in row 4, column 7 of 8 x 12
    moved = (layer(images) - layer(torch.zeros_like(images))).abs().sum(dim=-1)
    assert moved.shape == (1, 96) and moved.argmax() == 4 * 12 + 7
    raises(ValueError, "power of 2", PatchEmbedding, 6, 16, "conv")
    raises(ValueError, "'dense'", PatchEmbedding, 8, 16, "dense")


def test_images_that_do_not_divide_into_patches_are_an_error():
    for stem in ("patch", "conv"):
        raises(ValueError, "8x10", PatchEmbedding(4, 16, stem), torch.zeros(1, 3, 8, 10))


def test_vit_takes_uint8_and_float_pixels_alike():
    model, images = shake(tiny_vit()), photos(4)
    logits, loss = model(images)
    close(model(images.float())[0], logits)
    assert logits.shape == (4, 10) and loss is None and model.features(images).shape == (4, 4, 16)


def test_vit_normalises_by_buffers_that_travel_with_the_weights():
    model, images, ones = shake(tiny_vit()), photos(2), torch.ones(1, 3, 1, 1)
    other = tiny_vit(pixel_mean=(1.0, 2.0, 3.0), pixel_std=(4.0, 5.0, 6.0)).eval()
    other.load_state_dict(model.state_dict())
    close(other(images)[0], model(images)[0])
    other.load_state_dict({**model.state_dict(), "pixel_mean": 0 * ones, "pixel_std": ones})
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (model.config.pixel_mean, model.config.pixel_std))
    close(other((images - mean) / std)[0], model(images)[0], 1e-4)


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
        assert abs(loss.item() - math.log(10)) < 0.1
        some = torch.where(torch.arange(64) < 20, labels, -1)
        close(model(images, some)[1], F.cross_entropy(logits[:20], labels[:20]))
        loss.backward()
        assert not unreached(model)


def test_vit_overfits_eight_random_images():
    model, images, labels = tiny_vit(n_embd=32), photos(8), torch.arange(8)
    assert fit(model, lambda step: model(images, labels)[1], 60, 3e-3) < 0.05


# ---------------------------------------------------------------------------------------------------------------------
# 7. language

POSITIONS = ("rotary", "learned", "sinusoidal")


def counting_gpt():
    """After id i comes i + 1 (mod 8): embeddings are unit vectors, blocks add nothing, the head shifts by one."""
    model = tiny_gpt(vocab_size=8, n_embd=8, tie_weights=False)
    for name, p in model.named_parameters():
        if name.endswith("proj.weight"):
            nn.init.zeros_(p)
    model.embedding.weight.data = torch.eye(8)
    model.head.weight.data = torch.eye(8).roll(1, dims=0)
    return model


def test_gpt_initial_loss_is_that_of_a_guess_and_gradients_reach_everything():
    for positions in POSITIONS:
        model = tiny_gpt(vocab_size=256, positions=positions, bias=True)
        ids = torch.randint(0, 256, (16, 17))
        loss = model(ids[:, :-1], ids[:, 1:])[1]
        assert abs(loss.item() - math.log(256)) < 0.1
        loss.backward()
        assert not unreached(model)


def test_gpt_logits_do_not_depend_on_later_tokens():
    for positions in POSITIONS:
        model, ids = shake(tiny_gpt(positions=positions, tie_weights=False)), torch.randint(0, 20, (1, 12))
        changed = ids.clone()
        changed[:, 7] = (ids[:, 7] + 1) % 20
        moved = (model(ids)[0] - model(changed)[0]).abs().amax(dim=-1)[0]
        assert moved[:7].max() == 0 and moved[7:].min() > 1e-4


def test_gpt_knows_the_order_of_its_tokens():
    for positions in POSITIONS:
        model, ids = shake(tiny_gpt(n_layer=1, positions=positions)), torch.tensor([[3, 4, 5, 6]])
        assert (model(ids)[0] - model(ids[:, [1, 0, 2, 3]])[0])[:, -1].abs().max() > 1e-3


def test_gpt_ignores_targets_of_minus_one():
    model, ids, targets = shake(tiny_gpt()), torch.randint(0, 20, (2, 8)), torch.randint(0, 20, (2, 8))
    logits = model(ids)[0]
    targets[:, ::2] = -1
    close(model(ids, targets)[1], F.cross_entropy(logits[:, 1::2].flatten(0, 1), targets[:, 1::2].flatten()))


def test_gpt_ties_the_output_layer_to_the_embedding_if_asked():
    tied, untied = tiny_gpt(), tiny_gpt(tie_weights=False)
    assert tied.head.weight is tied.embedding.weight
    assert untied.head.weight.data_ptr() != untied.embedding.weight.data_ptr()
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 20 * 16


def test_gpt_errors_for_long_input_and_unknown_positions():
    raises(ValueError, "block_size=16", tiny_gpt(), torch.zeros(1, 17).long())
    raises(ValueError, "'alibi'", GPT, GPTConfig(positions="alibi"))


def test_gpt_greedy_generation_with_cache_equals_full_passes():
    for positions in POSITIONS:
        model, ids = shake(tiny_gpt(positions=positions, tie_weights=False)), torch.randint(0, 20, (3, 4))
        out = model.generate(ids, 12, temperature=0)
        assert out.equal(greedy(lambda ids: model(ids)[0], ids, 12))
        assert len(out[:, 4:].unique()) > 3


def test_gpt_beyond_its_block_goes_on_from_the_newer_half():
    model = shake(tiny_gpt(block_size=8, tie_weights=False))
    for ids in (torch.randint(0, 20, (2, 5)), torch.randint(0, 20, (2, 11))):
        expected, start = ids, max(0, ids.size(1) - 8)
        for _ in range(20):
            if expected.size(1) - start > 8:
                start = expected.size(1) - 4
            expected = torch.cat((expected, greedy(lambda ids: model(ids)[0], expected[:, start:], 1)[:, -1:]), dim=1)
        assert model.generate(ids, 20, temperature=0).equal(expected)


def frequencies(probabilities, **how):
    """How often sample_next draws each id, in 20000 draws from a distribution."""
    logits = torch.tensor(probabilities).log().expand(20000, -1)
    return sample_next(logits, **how).bincount(minlength=len(probabilities)) / 20000


def test_sample_next_follows_temperature_and_top_k():
    p = torch.tensor([0.5, 0.05, 0.3, 0.15])
    close(frequencies([0.5, 0.05, 0.3, 0.15]), p, 0.02)
    close(frequencies([0.5, 0.05, 0.3, 0.15], temperature=0.5), p ** 2 / (p ** 2).sum(), 0.02)
    close(frequencies([0.5, 0.05, 0.3, 0.15], top_k=2), torch.tensor([5 / 8, 0, 3 / 8, 0]), 0.02)
    close(frequencies([0.5, 0.05, 0.3, 0.15], top_k=9), p, 0.02)
    logits = torch.randn(50, 20)
    assert sample_next(logits, top_k=1).equal(logits.argmax(dim=-1))
    assert sample_next(logits, temperature=0).equal(logits.argmax(dim=-1))


def test_sample_next_keeps_exactly_the_smallest_nucleus():
    for top_p, kept in [(0.3, [0]), (0.49, [0]), (0.51, [0, 2]), (0.79, [0, 2]), (0.81, [0, 2, 3]), (0.96, [0, 1, 2, 3])]:
        drawn = frequencies([0.5, 0.05, 0.3, 0.15], top_p=top_p)
        assert drawn.nonzero().flatten().tolist() == kept, top_p
    close(frequencies([0.5, 0.05, 0.3, 0.15], top_p=0.7), torch.tensor([5 / 8, 0, 3 / 8, 0]), 0.02)
    batch = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log()  # each row has a nucleus of its own
    assert sample_next(batch, top_p=0.7).tolist() == [0, 1]


def test_gpt_sampling_with_a_generator_is_reproducible_and_leaves_the_global_one_alone():
    def sample(seed):
        return model.generate(ids, 12, generator=torch.Generator().manual_seed(seed))

    model, ids = tiny_gpt(), torch.randint(0, 20, (3, 4))
    before = torch.get_rng_state()
    first, other = sample(1), sample(2)
    assert before.equal(torch.get_rng_state())
    torch.manual_seed(123)
    assert first.equal(sample(1)) and not first.equal(other)


def test_gpt_fills_ended_rows_with_eos_and_stops_when_all_have_ended():
    model, ids = counting_gpt(), torch.tensor([[2], [5]])
    assert model.generate(ids, 7, 0).tolist() == [[2, 3, 4, 5, 6, 7, 0, 1], [5, 6, 7, 0, 1, 2, 3, 4]]
    assert model.generate(ids, 9, 0, eos_id=7).tolist() == [[2, 3, 4, 5, 6, 7], [5, 6, 7, 7, 7, 7]]
    assert model.generate(ids, 3, 0, eos_id=7).tolist() == [[2, 3, 4, 5], [5, 6, 7, 7]]
    assert model.generate(ids, 0).equal(ids)


def test_gpt_generates_without_dropout_and_restores_the_training_mode():
    model, ids = shake(tiny_gpt(dropout=0.5, tie_weights=False)), torch.randint(0, 20, (3, 4))
    expected = model.generate(ids, 12, temperature=0)
    assert not model.training
    model.train()
    assert model.generate(ids, 12, temperature=0).equal(expected)
    assert all(module.training for module in model.modules())
    raises(IndexError, "", model.generate, ids + 20, 3)
    assert model.training  # after an error as well


def test_gpt_overfits_a_small_batch():
    model, ids = tiny_gpt(n_embd=32), torch.randint(0, 20, (4, 17))
    assert fit(model, lambda step: model(ids[:, :-1], ids[:, 1:])[1], 100, 5e-3) < 0.15


# ---------------------------------------------------------------------------------------------------------------------
# 8. multimodal

IMAGE = [3] * 4  # the placeholders of one image of tiny_mllm()
LAYOUTS = [[[1, 5, *IMAGE, 7, 8], [*IMAGE, 1, 9, 9, 6]], [[5, *IMAGE, 6, *IMAGE, 7]], [[1, 5], [6, 7]]]
EXAMPLE = torch.tensor(LAYOUTS[0])  # two rows, each with one image in a place of its own


def test_mllm_puts_image_tokens_where_the_placeholders_are():
    model, images = shake(tiny_mllm()), photos(2)
    first, second = model.encode(images)
    words = model.gpt.embedding.weight
    expected = torch.stack([torch.cat((words[[1, 5]], first, words[[7, 8]])), torch.cat((second, words[[1, 9, 9, 6]]))])
    close(model.embed(images, EXAMPLE), expected)
    two_in_a_row = torch.cat((words[[5]], first, words[[6]], second, words[[7]]))[None]
    close(model.embed(images, torch.tensor(LAYOUTS[1])), two_in_a_row)
    close(model(images, torch.tensor(LAYOUTS[1]))[0], model.gpt.head(model.gpt.hidden(two_in_a_row)))
    ids = torch.tensor(LAYOUTS[2])  # without an image it is the language model
    close(model(images[:0], ids)[0], model.gpt(ids)[0])


def test_mllm_prompt_is_the_placeholders_of_an_image_and_bos():
    assert tiny_mllm().prompt(2, 4).tolist() == [[*IMAGE, 1]] * 2


def test_mllm_errors_for_wrong_counts_long_input_and_unknown_connectors():
    model = tiny_mllm()
    raises(ValueError, "8 placeholders for 1 images of 4 tokens each", model, photos(1), EXAMPLE)
    raises(ValueError, "0 placeholders for 2 images", model, photos(2), torch.tensor([[1, 5]]))
    raises(ValueError, "block_size=24", model, photos(1), torch.tensor([[*IMAGE, *[5] * 21]]))
    raises(ValueError, "'qformer'", tiny_mllm().__class__, replace(model.config, connector="qformer"))


def test_mllm_text_sees_the_image_and_nothing_sees_later_text():
    model, images, ids = shake(tiny_mllm()), photos(2), EXAMPLE.clone()
    logits = model(images, ids)[0]
    images[0] = 255 - images[0]
    moved = (model(images, ids)[0] - logits).abs().amax(dim=-1)  # (B, T)
    assert moved[0, :2].max() == 0 and moved[0, 2:].min() > 1e-4 and moved[1].max() == 0
    images[0] = 255 - images[0]
    ids[:, 6] += 1
    moved = (model(images, ids)[0] - logits).abs().amax(dim=-1)
    assert moved[:, :6].max() == 0 and moved[:, 6:].min() > 1e-4


def test_mllm_loss_is_the_cross_entropy_at_the_positions_with_a_target():
    model, images = shake(tiny_mllm()), photos(2)
    targets = torch.tensor([[-1, -1, -1, -1, -1, 7, 8, 2], [-1, -1, -1, -1, 9, 9, 6, -1]])
    logits, (some, loss) = model(images, EXAMPLE)[0], model(images, EXAMPLE, targets)
    close(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1))
    close(some, logits[targets >= 0])


def test_mllm_log_probs_are_those_of_the_full_logits():
    model, images = shake(tiny_mllm()), photos(2)
    expected = model(images, EXAMPLE)[0].log_softmax(dim=-1)[:, :-1].gather(2, EXAMPLE[:, 1:, None])[:, :, 0]
    expected = F.pad(expected, (1, 0)).masked_fill(EXAMPLE == 3, 0)
    close(model.log_probs(images, EXAMPLE), expected, 1e-4)
    assert (expected != 0).sum() == 3 + 4 and not expected[:, 0].any()  # text, of which row 0 begins with one


def test_mllm_takes_encoded_tokens_in_the_place_of_pixels():
    model, images = shake(tiny_mllm()), photos(2)
    tokens = model.encode(images)
    assert tokens.shape == (2, 4, 24)
    close(model(tokens, EXAMPLE)[0], model(images, EXAMPLE)[0])
    close(model.log_probs(tokens, EXAMPLE), model.log_probs(images, EXAMPLE))
    assert model.generate(tokens, max_new_tokens=8).equal(model.generate(images, max_new_tokens=8))


def test_mllm_greedy_generation_equals_full_passes_in_a_batch_and_alone():
    model, images = shake(tiny_mllm(eos_id=-1)), photos(3)  # no id is -1: nothing ends
    out = model.generate(images, max_new_tokens=10)
    assert out.equal(greedy(lambda ids: model(images, ids)[0], model.prompt(3, 4), 10)[:, 5:])
    assert out.equal(torch.cat([model.generate(image[None], max_new_tokens=10) for image in images]))
    assert len(out.unique()) > 3 and len(out.unique(dim=0)) == 3  # each image has a caption of its own
    images = images[:2]
    out = model.generate(images, EXAMPLE, 10)
    assert out.equal(greedy(lambda ids: model(images, ids)[0], EXAMPLE, 10)[:, 8:])


def test_mllm_generation_ends_rows_with_eos():
    model, images = shake(tiny_mllm(eos_id=-1)), photos(2)
    expected = model.generate(images, max_new_tokens=10).tolist()
    eos = expected[0][2]
    model.config.eos_id = eos
    for row in expected:
        end = row.index(eos) if eos in row else 10
        row[end:] = [eos] * (10 - end)
    length = min(10, max(1 + row.index(eos) if eos in row else 10 for row in expected))
    assert model.generate(images, max_new_tokens=10).tolist() == [row[:length] for row in expected]


def test_mllm_sampling_is_reproducible_with_a_generator():
    model, images = tiny_mllm(), photos(2)
    first, again, other = (model.generate(images, temperature=1.0, max_new_tokens=12,
                                          generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first.equal(again) and not first.equal(other)


def test_mllm_generation_stops_where_the_block_is_full():
    model, images = shake(tiny_mllm(eos_id=-1)), photos(2)
    out = model.generate(images, max_new_tokens=100)
    assert out.shape == (2, 20)  # 5 of the prompt and 19 fill a block of 24; the 20th is never read
    assert out.equal(greedy(lambda ids: model(images, ids)[0], model.prompt(2, 4), 20)[:, 5:])


def test_mllm_restores_the_training_mode_after_generating():
    model, images = tiny_mllm().train(), photos(2)
    model.generate(images, max_new_tokens=3)
    assert all(module.training for module in model.modules())
    raises(ValueError, "placeholders", model.generate, images, torch.tensor([[1, 5]]))
    assert all(module.training for module in model.modules())  # after an error as well


def test_mllm_config_comes_back_from_a_dict():
    config = tiny_mllm(connector="linear", eos_id=9).config
    back = MLLMConfig.from_dict(asdict(config))
    assert back == config and isinstance(back.vit, ViTConfig) and isinstance(back.gpt, GPTConfig)
    MLLM(back).load_state_dict(tiny_mllm(connector="linear").state_dict())


def test_mllm_gradients_reach_everything_but_the_classifier():
    for connector in ("linear", "mlp"):
        model, targets = tiny_mllm(connector=connector), EXAMPLE.roll(-1, 1).masked_fill(EXAMPLE == 3, -1)
        loss = model(photos(2), EXAMPLE, targets)[1]
        assert abs(loss.item() - math.log(20)) < 0.3
        loss.backward()
        assert unreached(model) == ["vit.head.weight", "vit.head.bias"]


# ---------------------------------------------------------------------------------------------------------------------
# the stages, end to end


# ---------------------------------------------------------------------------------------------------------------------
# the runner


def main(pattern=""):
    """Run the tests whose name contains pattern, in order; the exit status: 1 if any failed."""
    failed, tests = 0, [(name, f) for name, f in globals().items() if name.startswith("test_") and pattern in name]
    for name, test in tests:
        setup_function()
        start = time.time()
        try:
            test()
        except Exception:
            failed += 1
            traceback.print_exc()
            print(f"FAILED {name}", flush=True)
        else:
            print(f"ok {name} ({time.time() - start:.1f} s)", flush=True)
    print(f"{len(tests) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
