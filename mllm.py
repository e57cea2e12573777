"""
Stage 3: a ViT, a connector and a GPT become one model that looks at a photo and writes a caption, or answers questions
about one image, several, or a clip.

    python mllm.py                                      drawn shapes: no download, three minutes on two CPU cores
    python mllm.py --image=photo.png                    caption a picture with what that run has learnt
    python mllm.py config/questions_cpu.py              questions about drawn images and clips: ten minutes
    python mllm.py config/questions_cpu.py --image=a.png,b.png --prompt="what has changed?"
    python mllm.py config/questions_cpu.py --image=clip.gif --chat=True
    python mllm.py config/flickr8k_cpu.py               photos, after the commands of README's "The chain on photos"
    python mllm.py config/flickr8k_cpu.py --image=photo.jpg --num_captions=5
    python mllm.py config/flickr8k_cpu.py --baselines=True                 what people and the nearest photos score

Expect every attribute right in 99% of held-out drawn images, and a test CIDEr of 34 to 37 from config/flickr8k_cpu.py:
33 minutes on two CPU cores with AVX512-BF16 or AMX.
Training has two phases: `align`, on captions alone, trains what is new, such as the connector, while what stages 1 and
2 brought is frozen; `sft` (supervised fine-tuning) trains all, or all but the ViT, on all samples. A run writes
log.csv, loss.png, captions.png or answers.png, align.pt, sft.pt (the best on validation by CIDEr, or by right answers)
and last.pt.
"""

import contextlib
import dataclasses
import math
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import config
from config.tools.data import augment_photos, join_tiles, load_photos, open_images, to_images
from config.tools.judges import Judges
from config.tools.metrics import CiderD, bleu, caption_scores, cider, document_frequencies, most_alike, \
    nearest_captions, thumbnails, words_of
from config.tools.pictures import draw_places, plot, save_grid, side_by_side
from config.tools.pretrained import gpt2_tokenizer, is_pretrained, load_clip_vit, load_gpt2
from config.tools.questions import draw_conversations
from config.tools.shapes import attributes, draw_shapes, draw_wide
from model import IGNORE_INDEX, IMAGE_ID, MLLM, BPETokenizer, Conversation, GPTConfig, MLLMConfig, ViTConfig, \
    evaluating, tokenizer_from_state

# the run
out_dir = "out/shapes"  # checkpoints, log and pictures
init_from = "scratch"  # or "resume": continue from out_dir/last.pt
eval_only = False  # evaluate out_dir/sft.pt and stop
eval_split = "val"  # what eval_only and baselines evaluate: train, val or test
image = ""  # caption this file, folder or URL and stop; a.png,b.png: both together; an animated file: its frames
prompt = ""  # ask this about image instead of captioning it
chat = False  # talk about image in the terminal, turn by turn
frames = 0  # how many frames of a clip are read; above 0 a folder is a clip too; 0: as many as the model has learnt
baselines = False  # print the scores of people, of the nearest photos' captions and of out_dir/sft.pt and stop
device = "auto"  # cuda, mps or cpu
dtype = "auto"  # float32 or bfloat16, whichever multiplies matrices faster here
compile = False  # torch.compile: a minute at the start, faster steps on a GPU
seed = 1337  # of everything random: weights, batches, dropout, samples
# data
dataset = "shapes"  # drawn here, as are questions and wide; or a folder under data/ of prepare_flickr8k.py: flickr8k
n_drawn = 10000  # images, or groups of them, to draw; a twentieth, at most 500, to validate and as many to test
image_size = 48  # pixels a side that the model sees
max_tiles = 1  # 2 to 4: images keep their proportions, on up to so many tiles of that size; needs fusion=cross
train_size = 0  # pixels a side of what is seen of a training photo, crops look larger than photos; 0: image_size
crop = 1.0  # smallest share of its area that is seen of a training photo; 1 where captions name places
jitter = 0.0  # brightness, contrast and saturation of a training photo change by up to this factor
mirror = False  # mirror half of the training photos, but none with a caption in the batch that says left or right
word_dropout = 0.0  # share of the tokens that are hidden from the GPT while it learns to write the ones after them
batch_size = 64  # photos per step, over all processes
accumulation = 1  # parts that a process cuts its share of the batch into: less memory
captions_per_photo = 1  # captions per photo in a step: its image tokens are computed once
max_tokens = 40  # longest text of a sample with the most images; one that is longer loses its last turns
# model: a checkpoint brings its own architecture
vit_ckpt = ""  # checkpoint of stage 1 to start from, or openai/clip-vit-base-patch16, or a folder of it; empty: nothing
gpt_ckpt = ""  # checkpoint of stage 2, trained on the same captions; or gpt2, or a folder of it; empty: nothing
fusion = "prefix"  # image tokens stand before the words; or cross: the words attend to them
cross_every = 1  # with fusion=cross: every so many-th block of the GPT has cross-attention
connector = "mlp"  # or linear; pixel_shuffle: a quarter of the image tokens
patch_size = 8  # pixels a side of a patch
vit_layer = 3  # blocks of the ViT
vit_head = 4  # its attention heads
vit_embd = 128  # its channels
stem = "conv"  # residual or patch, see vit.py
across_layer = 0  # with tiles: further blocks in which all tiles of an image attend to each other
keep_blocks = ()  # the outputs of these blocks of the ViT go to the connector too, such as 0,1 (or 0, for one)
gpt_layer = 3  # blocks of the GPT
gpt_head = 4  # its attention heads
gpt_embd = 128  # its channels
gpt_norm = "layer"  # or rms
gpt_activation = "gelu"  # relu, gelu or swiglu
n_experts = 0  # feed-forward layers in each of its blocks, a mixture of experts; 0: one dense layer
experts_per_token = 2  # how many of them a token passes through
dropout = 0.0  # in the ViT and the GPT
patch_dropout = 0.0  # share of the patches that the ViT does not get in training; needs fusion=cross
label_smoothing = 0.0  # share of the target that is spread over all words, in the training loss alone
# optimization
align_share = 0.0  # part of the run for the phase align: captions alone, and what a checkpoint brought is frozen
train_vit = True  # the phase sft trains the ViT too
max_steps = 0  # 0: max_minutes alone decides
max_minutes = 2.0  # 0: max_steps alone decides; else whichever comes first
muon_lr = 0.01  # peak rate of the weight matrices of linear layers; 0: AdamW for all
adam_lr = 2e-3  # peak rate of everything else
weight_decay = 0.05  # of matrices and embeddings, relative to the rate
warmup_steps = 50  # steps in which the rate rises to its peak, in each phase
cooldown = 0.8  # the last part of each phase, in which the rate falls to zero in a straight line
grad_clip = 1.0  # largest norm of the gradient; 0: none
eval_interval = 200  # steps between lines of the log, each with the validation loss, in sft with CIDEr
# decoding: at the end of a run and with eval_only, in addition to greedy; with image, instead of greedy
beams = 5  # width of the beam search; 1: greedy
length_penalty = 0.6  # beams are compared by log p / length ** length_penalty
temperature = 0.0  # above 0: sample at this temperature; not at the end of a run
num_captions = 1  # with image: captions of each
consensus = 0  # with eval_only: also caption by so many samples, of which the one most like the others is taken


# data ----------------------------------------------------------------------------------------------------------------
# A sample is {"images": [indices], "messages": [{"role": "user" or "assistant", "content": text}, ...]} with <image> in
# the text where an image stands. Samples about the same images are a group, such as the five captions of a photo.

def caption_sample(i, caption=None):
    """The sample in which the assistant describes image i without a question; without a caption, only its prompt."""
    answer = [] if caption is None else [{"role": "assistant", "content": caption}]
    return {"images": [i], "messages": [{"role": "user", "content": "<image>"}, *answer]}


def prompts_of(groups):
    """What a model is asked in groups of samples: the samples up to where the assistant speaks, and for each what it
    may say there. Equal ones are one, so a photo with five captions is a prompt with five references."""
    found = {}
    for sample in (sample for group in groups for sample in group):
        for k, message in enumerate(sample["messages"]):
            if message["role"] == "assistant":
                kind = message.get("kind", "caption" if sample["messages"][0]["content"] == "<image>" else "question")
                prompt = sample | {"messages": sample["messages"][:k], "kind": kind}
                found.setdefault(repr(prompt), (prompt, []))[1].append(message["content"])
    return [list(column) for column in zip(*found.values())]


def texts_of(samples):
    """All that is said in some samples."""
    return [message["content"].replace("<image>", "") for sample in samples for message in sample["messages"]]


def load_samples(dataset, image_size, n_drawn, max_tiles=1):
    """{images (n, 3, image_size, image_size) uint8, or with max_tiles > 1 (n, max_tiles, 3, image_size, image_size);
    layouts (n,) of their tiles, names: n, drawn: whether they are drawn here, asks: whether users say anything,
    tokenizer, splits: {train, val, test: groups of samples}}"""
    drawn, layouts = dataset in ("shapes", "wide", "questions"), None
    if drawn:
        if dataset == "questions":
            images, groups = draw_conversations(n_drawn, image_size, seed=0)
        else:
            images, captions = draw_shapes(n_drawn, image_size, 0) if dataset == "shapes" else draw_wide(n_drawn, 0)
            groups = [[caption_sample(i, c) for c in each] for i, each in enumerate(captions)]
        if dataset == "wide":
            images, layouts = to_images(images, image_size, max_tiles)
        some, names = min(n_drawn // 20, 500), [f"drawn image {i}" for i in range(len(images))]
        splits = {"train": groups[2 * some:], "val": groups[:some], "test": groups[some:2 * some]}
        texts = (text for group in splits["train"] for text in texts_of(group))
        tokenizer = BPETokenizer.train(texts, 600)  # an id for every word
    else:
        images, layouts, table, tokenizer = load_photos(dataset, image_size)
        names = table["names"]
        if "samples" in table:
            splits = {split: by_images(samples) for split, samples in table["samples"].items()}
        else:
            splits = {split: [[caption_sample(i, c) for c in table["captions"][i]] for i in rows]
                      for split, rows in table["splits"].items()}
    images = torch.as_tensor(images)
    layouts = torch.zeros(len(images), dtype=torch.long) if layouts is None else torch.as_tensor(layouts)
    if images[:1].shape[1:-3].numel() != max_tiles:
        config.fail(f"{dataset} has images of {images[:1].shape[1:-3].numel()} tiles, not max_tiles={max_tiles}; tiles "
                    "are drawn with dataset=wide, and packed by prepare_flickr8k.py with the same --max_tiles")
    asks = any(any(texts_of([sample])[::2]) for group in splits["train"] for sample in group)
    return {"images": images, "layouts": layouts, "names": names, "drawn": drawn, "asks": asks, "tokenizer": tokenizer,
            "splits": splits}


def by_images(samples):
    """Samples -> groups of those about the same images; a sample without images is its own group."""
    groups = {}
    for i, sample in enumerate(samples):
        groups.setdefault(tuple(sample["images"]) or i, []).append(sample)
    return list(groups.values())


def captions_of(data):
    """data with those samples alone that describe one image without a question."""
    is_caption = lambda messages: len(messages) == 2 and messages[0]["content"] == "<image>"
    captions = lambda group: [sample for sample in group if is_caption(sample["messages"])]
    return data | {"splits": {split: list(filter(None, map(captions, groups)))
                              for split, groups in data["splits"].items()}}


def encode_messages(messages, tokenizer, n_placeholders):
    """A conversation -> its ids, and for each whether the assistant says it: the user's text, with n_placeholders ids
    for an image; then bos, the answer, eos; and again for the next turn."""
    ids, said = [], []
    for message in messages:
        if message["role"] == "assistant":
            new = [tokenizer.bos_id, *tokenizer.encode(message["content"]), tokenizer.eos_id]
            said += [False] + [True] * (len(new) - 1)  # bos tells it to speak
        else:
            first, *others = map(tokenizer.encode, message["content"].split("<image>"))
            new = first + [i for text in others for i in [IMAGE_ID] * n_placeholders + text]
            said += [False] * len(new)
        ids += new
    return ids, said


def n_ids(model, data, samples):
    """How many ids some samples are together."""
    n = model.config.n_placeholders(data["images"].size(-1))
    return sum(len(encode_messages(sample["messages"], data["tokenizer"], n)[0]) for sample in samples)


def cut(sample, model, data, to_learn):
    """The sample without its last turns, as many as exceed the model's block_size; None where that is all of them. To
    learn from, the last answer fits as well; to be asked, what stands before it."""
    messages, block_size = sample["messages"], model.config.gpt.block_size
    room = block_size + 1 if to_learn else block_size - 1
    while messages:
        if n_ids(model, data, [{"messages": messages if to_learn else messages[:-1]}]) <= room:
            return sample | {"messages": messages}
        messages = messages[:-2]


def fit(data, model):
    """data with its samples cut() where they are too long; prints how many are."""
    splits, before, after, block_size = {}, [], [], model.config.gpt.block_size
    for split, groups in data["splits"].items():
        splits[split] = [[short for sample in group if (short := cut(sample, model, data, split == "train"))]
                         for group in groups]
        splits[split] = [group for group in splits[split] if group]
        if not splits[split]:
            config.fail(f"no sample of {split} fits the context of {block_size} tokens; raise max_tokens")
        before += [len(sample["messages"]) for group in groups for sample in group]
        after += [len(sample["messages"]) for group in splits[split] for sample in group]
    if sum(after) < sum(before):
        print(f"context of {block_size} tokens: {(sum(before) - sum(after)) // 2:,} turns are cut "
              f"off, and of {len(before) - len(after):,} samples nothing is left")
    return data | {"splits": splits}


def rows_of(groups):
    """Groups of samples about the same images -> lists of samples that stand in one row: all of a group, where their
    images stand first, so that the images are read once for all of them; else each alone."""
    rows = []
    for group in groups:
        opening = "<image>" * len(group[0]["images"])
        first = all(sample["messages"][0]["content"].startswith(opening) for sample in group)
        rows += [group] if first else [[sample] for sample in group]
    return rows


def collate(model, data, groups):
    """Groups of samples about the same images -> numbers, the list of their images, each once; which, for each image of
    each row in order, its place in numbers; inputs, targets and segments (B, T): the targets are one token later, and
    -1 where the assistant does not speak; segments as in MLLM, None where each row is one sample. T is a multiple of 8,
    or block_size: CPUs prepare a product anew for a new shape."""
    tokenizer, n, rows = data["tokenizer"], model.config.n_placeholders(data["images"].size(-1)), []
    groups, block_size = rows_of(groups), model.config.gpt.block_size
    for group in groups:
        first = n * len(group[0]["images"]) if len(group) > 1 else 0  # where the texts begin that share the images
        row = [IMAGE_ID] * first, [IGNORE_INDEX] * first, [0] * first
        for segment, sample in enumerate(group, start=1):
            ids, said = encode_messages(sample["messages"], tokenizer, n)
            after = [i if is_said else IGNORE_INDEX for i, is_said in zip(ids, said)][first + 1:]
            for column, new in zip(row, (ids[first:-1], after, [segment] * len(after))):
                column.extend(new)
        rows.append(row)
    numbers = list(dict.fromkeys(i for group in groups for i in group[0]["images"]))
    which = torch.tensor([numbers.index(i) for group in groups for i in group[0]["images"]], dtype=torch.long)
    T = 8 * math.ceil(max(len(ids) for ids, *_ in rows) / 8)
    columns = [torch.full((len(rows), T), fill) for fill in (tokenizer.pad_id, IGNORE_INDEX, -1)]
    for i, row in enumerate(rows):
        for column, values in zip(columns, row):
            column[i, :len(values)] = torch.tensor(values)
    inputs, targets, segments = columns
    if segments.max() <= 1:
        return numbers, which, inputs[:, :block_size], targets[:, :block_size], None
    return numbers, which, inputs, targets, segments


def get_batch(model, data, groups):
    """collate() for training, on the model's device: augmented images (M, 3, H, W) and their layouts instead of their
    numbers, or where data holds frozen_features() those; hidden words in the inputs. Draws from torch's global
    generator."""
    dev, tokenizer = config.device_of(model), data["tokenizer"]
    numbers, which, inputs, targets, segments = collate(model, data, groups)
    texts = [texts_of(sample for group in groups for sample in group if i in sample["images"]) for i in numbers]
    if word_dropout:
        special = torch.tensor([IMAGE_ID, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id])
        hidden = (torch.rand(inputs.shape) < word_dropout) & ~torch.isin(inputs, special)
        inputs = inputs.masked_fill(hidden, tokenizer.pad_id)
    if "features" in data:
        images = data["features"][numbers].to(dev)
    else:
        images = augment_photos(data["images"][numbers].to(dev), texts, crop, jitter, mirror, train_size)
    return images, *(None if tensor is None else tensor.to(dev)
                     for tensor in (data["layouts"][numbers], which, inputs, targets, segments))


# evaluation ----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def encode_images(model, images, layouts, batch_size=250):
    """(M, 3, H, W), or tiles with their layouts (M,) -> (M, N, C) image tokens, on the model's device"""
    dev = config.device_of(model)
    with evaluating(model), config.autocast(model):
        return torch.cat([model.encode(some.to(dev), their.to(dev))
                          for some, their in zip(images.split(batch_size), layouts.split(batch_size))])


@torch.no_grad()
def frozen_features(model, images, layouts, batch_size=250):
    """The features of the ViT, (M, N, C), on the CPU: a frozen ViT sees an image once, not in each epoch."""
    dev = config.device_of(model)
    with evaluating(model), config.autocast(model):
        return torch.cat([model.vit.features(some.to(dev), their.to(dev)).to(config.number_type(model)).cpu()
                          for some, their in zip(images.split(batch_size), layouts.split(batch_size))])


def prompt_ids(model, data, sample):
    """What the model reads before it answers: the ids of the conversation so far, then bos."""
    n = model.config.n_placeholders(data["images"].size(-1))
    return [*encode_messages(sample["messages"], data["tokenizer"], n)[0], data["tokenizer"].bos_id]


def prompts_by_length(model, data, samples, batch_size=250):
    """Yields the numbers of some samples, b with equally many images and equally long prompts; the ids (b, T) of these;
    and the numbers of all their images, in order."""
    prompts, alike = [prompt_ids(model, data, sample) for sample in samples], {}
    for i, sample in enumerate(samples):
        alike.setdefault((len(prompts[i]), len(sample["images"])), []).append(i)
    for those in alike.values():
        for rows in (those[i:i + batch_size] for i in range(0, len(those), batch_size)):
            ids = torch.tensor([prompts[i] for i in rows], device=config.device_of(model))
            yield rows, ids, [number for i in rows for number in samples[i]["images"]]


@torch.no_grad()
def answer_batches(model, data, samples, **decoding):
    """What the model says next in each sample's conversation, greedy unless decoding (what MLLM.generate() takes) says
    otherwise. Yields the numbers of some samples, the tokens of their images, their prompts' ids, and the ids that the
    model wrote. data: at least images, an (n, 3, H, W) tensor that the samples index, or tiles; their layouts; and the
    tokenizer."""
    numbers = sorted({i for sample in samples for i in sample["images"]})
    tokens = encode_images(model, data["images"][numbers], data["layouts"][numbers])
    where = {number: i for i, number in enumerate(numbers)}
    for rows, prompts, images in prompts_by_length(model, data, samples):
        some = tokens[[where[i] for i in images]]
        with config.autocast(model):
            yield rows, some, prompts, model.generate(some, prompts, model.config.gpt.block_size, **decoding)


def write_answers(model, data, samples, scorer=None, **decoding):
    """What the model says next in each sample's conversation, a list of str; and whether it ended each. Where decoding
    has num_captions, of these the one most like the others, by the CiderD scorer."""
    answers, each = {}, decoding.get("num_captions", 1)
    for rows, _, _, ids in answer_batches(model, data, samples, **decoding):
        for j, i in enumerate(rows):
            some = ids[j * each:(j + 1) * each].tolist()
            texts = [data["tokenizer"].decode(row) for row in some]
            best = most_alike(texts, scorer) if each > 1 else 0
            answers[i] = texts[best], data["tokenizer"].eos_id in some[best]
        config.show_progress(f"{len(answers)} answers written")
    config.show_progress("")
    return [list(column) for column in zip(*(answers[i] for i in range(len(samples))))]


def answer_mask(ids, eos_id):
    """(n, T) written ids -> (n, T) mask of the answer: its end token is part of it, what follows is not."""
    return (ids == eos_id).cumsum(dim=1) - (ids == eos_id).long() == 0


def answer_log_probs(model, tokens, prompts, ids, temperature=1.0):
    """The log-probabilities (b * K, T) of ids (b * K, T), K answers to each of the prompts (b, Tp); 0 after their end.
    tokens: (b * k, N, C), of the k images of each prompt; temperature: as they were sampled at."""
    K = len(ids) // len(prompts)
    prompts = prompts.repeat_interleave(K, dim=0)
    mask = torch.cat((torch.zeros_like(prompts, dtype=torch.bool), answer_mask(ids, model.config.eos_id)), dim=1)
    return model.log_probs(tokens, torch.cat((prompts, ids), dim=1), mask, K, temperature)[:, prompts.size(1):]


@torch.no_grad()
def validation_loss(model, data, split, batch_size=250):
    """Mean loss in nats per token, of one sample per group: the first of the first, the second of the second, ..."""
    samples = [cut(group[i % len(group)], model, data, True) for i, group in enumerate(data["splits"][split])]
    samples = [[sample] for sample in samples if sample]
    if not samples:  # of what fit() kept because it can be asked, no answer fits
        config.fail(f"no answer of {split} fits the context of {model.config.gpt.block_size} tokens; raise max_tokens")
    total, count, dev = 0.0, 0, config.device_of(model)
    with evaluating(model), config.autocast(model):
        for first in range(0, len(samples), batch_size):
            numbers, which, inputs, targets, _ = collate(model, data, samples[first:first + batch_size])
            tokens = encode_images(model, data["images"][numbers], data["layouts"][numbers])[which]
            _, loss = model(tokens, inputs.to(dev), targets.to(dev))
            n = (targets != IGNORE_INDEX).sum().item()
            total, count = total + loss.item() * n, count + n
    return total / count


def is_right(prompt, answer, references):
    """Whether an answer is one of the references; or a caption of a drawn image has every attribute right."""
    return answer in references or prompt["kind"] == "caption" and attributes(answer) == attributes(references[0]) != []


def evaluate(model, data, split, **decoding):
    """(scores, answers, answers written in a second) of a split, by greedy decoding unless decoding says otherwise.
    Scores: what caption_scores() and the judges give, and the share of right answers, for drawn images and questions.
    """
    prompts, references = prompts_of(data["splits"][split])
    began = time.perf_counter()
    said, ended = write_answers(model, data, prompts, **decoding)
    pace = len(said) / (time.perf_counter() - began)
    scores = caption_scores(said, ended, references)
    if "judges" in data and not data["asks"]:
        scores |= data["judges"].scores(said, [prompt["images"][0] for prompt in prompts])
    if data["drawn"] or data["asks"]:
        scores["right"] = 100 * float(np.mean(list(map(is_right, prompts, said, references))))
    return scores, said, pace


def evaluate_decodings(model, data, split, beams, length_penalty, consensus=0):
    """(scores, captions) of evaluate(), greedy, and cider_others, against all references but the first, as people are
    scored; with beam_cider and so on, the scores of a beam search, and consensus_cider and so on, those of most_alike()
    of so many samples at temperature 0.5."""
    scores, captions, scores["per_second"] = evaluate(model, data, split)
    others = [refs[1:] for refs in prompts_of(data["splits"][split])[1]]
    if all(others):
        scores["cider_others"] = 100 * cider(captions, others)[0]
    ways = {"beam": {"beams": beams, "length_penalty": length_penalty}} if beams > 1 else {}
    if consensus > 1:
        told = [[words_of(text) for text in refs] for refs in prompts_of(data["splits"]["train"])[1]]
        generator = torch.Generator(config.device_of(model)).manual_seed(0)
        ways["consensus"] = {"num_captions": consensus, "temperature": 0.5, "generator": generator,
                             "scorer": CiderD([], document_frequencies(told))}
    for way, decoding in ways.items():
        its, _, pace = evaluate(model, data, split, **decoding)
        scores |= {f"{way}_{name}": its[name] for name in ("cider", "bleu4", "surprising") if name in its}
        scores[f"{way}_per_second"] = pace
    return scores, captions


def other_images(prompts):
    """The same questions about the images of another prompt, one with as many."""
    alike, swapped = {}, list(prompts)
    for i, prompt in enumerate(prompts):
        alike.setdefault(len(prompt["images"]), []).append(i)
    for rows in alike.values():
        for i, j in zip(rows, rows[len(rows) // 2:] + rows[:len(rows) // 2]):
            swapped[i] = prompts[i] | {"images": prompts[j]["images"]}
    return swapped


def print_kinds(model, data, split, answers):
    """A table of how many of the answers are right, by kind of question and by number of images; beside it how many the
    model has right with other_images(), and how many the commonest answer of the kind in training. Returns its numbers
    as {column of the log: per cent}."""
    prompts, references = prompts_of(data["splits"][split])
    common = {}
    for prompt, texts in zip(*prompts_of(data["splits"]["train"])):
        common.setdefault(prompt["kind"], Counter()).update(texts)
    said = {"right": answers, "other images": write_answers(model, data, other_images(prompts))[0],
            "commonest": [common[prompt["kind"]].most_common(1)[0][0] for prompt in prompts]}
    right = {name: list(map(is_right, prompts, each, references)) for name, each in said.items()}
    rows, numbers = {}, {}
    for i, prompt in enumerate(prompts):
        more = "video" if data["drawn"] else "more images"
        about = ("no image", "one image", "two images", more)[min(3, len(prompt["images"]))]
        for name in (prompt["kind"], about, "all"):
            rows.setdefault(name, []).append(i)
    print(f"{split:<14}{'answers':>9}" + "".join(f"{name:>14}" for name in right))
    for row, some in sorted(rows.items(), key=lambda item: len(item[1])):
        shares = {name: 100 * float(np.mean([each[i] for i in some])) for name, each in right.items()}
        print(f"{row:<14}{len(some):>9}" + "".join(f"{share:>13.1f}%" for share in shares.values()))
        numbers |= {f"{name}, {row}": share for name, share in shares.items()}
    return numbers


def draw_answers(path, data, split, answers, n=12):
    """Draw the images of n prompts of a split with the last question and the model's answer; and of questions, at least
    one that it has wrong, if there is any, with the right answer under it."""
    prompts, references = prompts_of(data["splits"][split])
    seen, titles = [i for i, prompt in enumerate(prompts) if prompt["images"]], []
    wrong = [i for i in seen if not is_right(prompts[i], answers[i], references[i])] if data["asks"] else []
    rows = seen[::max(1, len(seen) // n) if data["asks"] else 1][:n]
    if wrong and not set(rows) & set(wrong):
        rows[-1] = wrong[0]
    for i in rows:
        question = prompts[i]["messages"][-1]["content"].replace("<image>", "")
        right = f"\n(right: {references[i][0]})" if i in wrong else ""
        titles.append((f"{question}\n" if question else "") + answers[i] + right)
    save_grid(path, [side_by_side([join_tiles(data["images"][j], data["layouts"][j]) for j in prompts[i]["images"]])
                     for i in rows], titles)


# the model -----------------------------------------------------------------------------------------------------------

def build_model(tokenizer, max_images):
    """A new MLLM for samples of up to max_images images, its ViT and GPT from vit_ckpt and gpt_ckpt where those are
    named; {part: where it came from}."""
    vit_config = ViTConfig(image_size, patch_size, vit_layer, vit_head, vit_embd, dropout=dropout, stem=stem)
    gpt_config = GPTConfig(tokenizer.vocab_size, 0, gpt_layer, gpt_head, gpt_embd, dropout, gpt_activation, gpt_norm,
                           n_experts=n_experts, experts_per_token=experts_per_token)
    origin = dict.fromkeys(("vit", "connector", "gpt"), "new")
    if vit_ckpt:
        vit = load_clip_vit(vit_ckpt) if is_pretrained(vit_ckpt) else config.load(vit_ckpt, "vit")
        vit_config = dataclasses.replace(ViTConfig(**vit["config"].get("vit", vit["config"])), dropout=dropout)
    vit_config = dataclasses.replace(vit_config, max_tiles=max_tiles, across_layer=across_layer, keep=keep_blocks,
                                     patch_dropout=patch_dropout)
    if gpt_ckpt:
        gpt = load_gpt2(gpt_ckpt) if is_pretrained(gpt_ckpt) else config.load(gpt_ckpt, "gpt")
        if gpt["tokenizer"] != tokenizer.state():
            config.fail(f"{gpt_ckpt} was trained with another tokenizer than data/{dataset} has; train it on that data")
        gpt_config = dataclasses.replace(GPTConfig(**gpt["config"]), dropout=dropout)
    if fusion == "cross":
        gpt_config = dataclasses.replace(gpt_config, cross_every=cross_every, gated=bool(gpt_ckpt))
    sizes = MLLMConfig(vit_config, gpt_config, connector, max(1, max_images), tokenizer.bos_id, tokenizer.eos_id)
    room = dataclasses.replace(gpt_config, block_size=max_images * sizes.n_placeholders(image_size) + max_tokens)
    if gpt_config.positions == "learned" and room.block_size > gpt_config.block_size:
        config.fail(f"{gpt_ckpt} has learnt positions, which end at {gpt_config.block_size}; {max_images} images and "
                    f"max_tokens together need {room.block_size}")
    model = MLLM(dataclasses.replace(sizes, gpt=room))
    if vit_ckpt:  # of a classifier, or the ViT of CLIP; without its pooling and output layer
        prefix = "vit." if "vit" in vit["config"] else ""
        weights = {name.removeprefix(prefix): w for name, w in vit["model"].items() if name.startswith(prefix)}
        weights = {name: w for name, w in weights.items() if not name.startswith(("pool.", "head."))}
        new = {name: w for name, w in model.vit.state_dict().items() if name.startswith(("tiles_", "across."))}
        model.vit.load_state_dict(new | weights)
        origin["vit"] = f"{vit_ckpt}, step {vit['step']}"
    if gpt_ckpt:
        new = {name: w for name, w in model.gpt.state_dict().items() if ".cross_" in name}  # a text-only GPT has none
        if gpt_config.positions == "learned":
            gpt["model"]["position.positions"] = gpt["model"]["position.positions"][:room.block_size]
        model.gpt.load_state_dict(new | gpt["model"])
        origin["gpt"] = f"{gpt_ckpt}, step {gpt['step']}" + (", cross-attention new" if new else "")
    return model, origin


def freeze(model, phase):
    """Let only those parameters train that the phase trains, and say so."""
    brought = [part for part, checkpoint in (("vit", vit_ckpt), ("gpt", gpt_ckpt)) if checkpoint]
    frozen = brought if phase == "align" else [] if train_vit else ["vit"]
    for name, p in model.named_parameters():  # cross-attention and what joins tiles are new, as the connector is
        p.requires_grad_(name.split(".")[0] not in frozen or bool(re.search(r"\.(cross_|tiles_|across\.)", name)))
    n = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"phase {phase}: {n:,} parameters train; frozen: {', '.join(frozen) or 'none'}")


# using a model -------------------------------------------------------------------------------------------------------

def load_captioner(path, stage, device, dtype):
    """(model, checkpoint) from a file that this stage or scst.py saved."""
    checkpoint = config.load(path, stage)
    model = MLLM(MLLMConfig.from_dict(checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    return config.place(model, config.pick_device(device), dtype), checkpoint


def data_of(model, checkpoint):
    """The data that a captioner was trained on, as of fit(), with the tokenizer of its checkpoint."""
    sft = checkpoint.get("sft_settings", checkpoint["settings"])  # those of the run of this stage
    data = load_samples(sft["dataset"], sft["image_size"], sft["n_drawn"], sft.get("max_tiles", 1))
    data["tokenizer"] = tokenizer_from_state(checkpoint["tokenizer"])
    data["judges"] = Judges(sft["gpt_ckpt"], sft["vit_ckpt"], data["images"], config.device_of(model))
    return fit(data, model)


@torch.no_grad()
def words_and_places(model, tokenizer, tokens, prompt, answer):
    """The words of an answer, and where the model looks as it writes each: a list of str, and (words, k * N) shares of
    the images. tokens: (k, N, C), of the images; prompt: (1, T) ids."""
    room = model.config.gpt.block_size + 1 - prompt.size(1)
    ids = torch.tensor(tokenizer.encode(answer)[:room], dtype=torch.long, device=prompt.device)
    seen = model.attention_to_images(tokens, torch.cat((prompt, ids[None, :-1]), dim=1))[0, prompt.size(1) - 1:]
    starts = [i for i, token in enumerate(ids.tolist()) if i == 0 or tokenizer.decode([token]).startswith(" ")]
    spans = [slice(*pair) for pair in zip(starts, [*starts[1:], len(ids)])]
    words = [tokenizer.decode(ids[span].tolist()).strip() for span in spans]
    return words, torch.stack([seen[span].mean(dim=0) for span in spans])


def read_inputs(model, checkpoint, settings):
    """What a user asks: data as of load_samples() of the images at settings["image"], with pictures of them to draw; a
    sample of each, or of several together, with settings["prompt"]; and the names of files that are no images."""
    size, most, prompt = checkpoint["image_transform"]["size"], model.config.max_images, settings["prompt"]
    sources, broken, samples, opened = [("no image", [])], [], [], []
    if (prompt or settings["chat"]) and not checkpoint.get("asks"):
        config.fail("this model has learnt captions and no questions; leave --prompt and --chat out")
    if settings["image"]:
        sources, broken = open_images(settings["image"], settings["frames"] or most, settings["frames"] > 0)
    for name, some in sources:
        if len(some) > most:
            config.fail(f"{name}: {len(some)} images at once; this model has learnt at most {most}")
        if prompt.count("<image>") not in (0, len(some)):
            config.fail(f"<image> stands {prompt.count('<image>')} times in the prompt; {name}: {len(some)} images")
        text = prompt if "<image>" in prompt else "<image>" * len(some) + prompt
        samples.append({"images": list(range(len(opened), len(opened) + len(some))),
                        "messages": [{"role": "user", "content": text}]})
        opened += some
    images, layouts = to_images(opened, size, model.config.vit.max_tiles)
    pictures = to_images(opened, 256)[0] if images.dim() == 4 else images  # to draw
    return {"images": images, "layouts": layouts, "pictures": pictures, "names": [name for name, _ in sources],
            "tokenizer": tokenizer_from_state(checkpoint["tokenizer"])}, samples, broken


def answer_files(model, checkpoint, settings):
    """Print what the model says about a user's images, with log-probabilities, and draw it; of the first images also
    where the model looked for each word."""
    data, samples, broken = read_inputs(model, checkpoint, settings)
    out, each, dev, lines, looks = Path(settings["out_dir"]), settings["num_captions"], config.device_of(model), {}, {}
    for rows, tokens, prompts, ids in answer_batches(
            model, data, samples, beams=max(settings["beams"], each), num_captions=each,
            length_penalty=settings["length_penalty"], temperature=settings["temperature"],
            generator=torch.Generator(dev).manual_seed(settings["seed"])):
        said = [data["tokenizer"].decode(row) for row in ids.tolist()]
        with torch.no_grad(), evaluating(model), config.autocast(model):
            log_probs = answer_log_probs(model, tokens, prompts, ids).sum(dim=1).tolist()
            for j, (i, own) in enumerate(zip(rows, tokens.chunk(len(rows)))):  # own: (k, N, C), of its k images
                lines[i] = [f"{said[k]}  (log p {log_probs[k]:.1f})" for k in range(j * each, (j + 1) * each)]
                if i < 4 and said[j * each] and samples[i]["images"]:
                    looks[i] = words_and_places(model, data["tokenizer"], own, prompts[j:j + 1], said[j * each])
    for i, name in enumerate(data["names"]):
        for line in lines[i]:
            print(f"{name}: {line}")
    if settings["image"]:
        strips = [side_by_side([join_tiles(data["pictures"][j], data["layouts"][j]) for j in sample["images"]])
                  for sample in samples]
        asked = [settings["prompt"]] if settings["prompt"] else []
        save_grid(out / "captioned.png", strips, ["\n".join(asked + lines[i]) for i in range(len(samples))])
        print(f"wrote {out / 'captioned.png'}")
    for i, (words, places) in sorted(looks.items()):
        path = out / f"places_{i + 1}_{Path(data['names'][i].split(',')[0]).stem[:50]}.png"
        draw_places(path, data["pictures"][samples[i]["images"]].flatten(0, -4), words, places.float().cpu())
    if broken:
        config.fail(f"not images that Pillow can read: {', '.join(broken)}")


def talk(model, checkpoint, settings):
    """Talk about a user's images in the terminal, until an empty line or the end of the input."""
    data, samples, broken = read_inputs(model, checkpoint, settings)
    if broken:
        print(f"left out, since Pillow cannot read them: {', '.join(broken)}")
    if len(samples) > 1:
        config.fail("a chat is about one image, several (--image=a.png,b.png) or a clip (a folder with --frames=8)")
    dev, tokenizer, block_size = config.device_of(model), data["tokenizer"], model.config.gpt.block_size
    conversation = None
    images, generator = data["images"], torch.Generator(dev).manual_seed(settings["seed"])
    opening = [IMAGE_ID] * (model.config.n_placeholders(images.size(-1)) * len(images))
    tokens = encode_images(model, images, data["layouts"])
    print("ask; an empty line ends the chat")
    with contextlib.suppress(EOFError), config.autocast(model):
        while text := input("> ").strip():
            ids = tokenizer.encode(text)
            if len(opening) + len(ids) + 2 > block_size:
                print(f"(too long for the context of {block_size} tokens)")
                continue
            if conversation and conversation.ids.size(1) + len(ids) + 32 > block_size:
                print("(the context is full: what was said until here is forgotten)")
                conversation = None
            if not conversation:
                conversation, ids = Conversation(model, tokens), opening + ids
            written, shown = [], ""
            for token in conversation.answer(torch.tensor([ids], device=dev), settings["temperature"], generator):
                written.append(token)
                said = tokenizer.decode(written)
                if not said.endswith("\ufffd"):  # a letter of which not all bytes are there yet
                    print(said[len(shown):], end="", flush=True)
                    shown = said
            print()


def print_baselines(model, data, split):
    """A table of what people, the captions of the nearest training photos and the model (or None) score on a split, all
    against the references but the first, which is the caption of the people; and what the judges say."""
    if data["asks"]:
        config.fail("the baselines are captions; these samples hold questions")
    photos, texts = {}, {}
    for name, groups in data["splits"].items():
        prompts, references = prompts_of(groups)
        photos[name] = [prompt["images"][0] for prompt in prompts]
        texts |= zip(photos[name], references)
    train, photos = photos["train"], photos[split]
    captions, others = {"people": [texts[p][0] for p in photos]}, [texts[p][1:] for p in photos]
    if not all(others):
        config.fail("to compare people with each other takes two captions of each photo")
    captions["nearest by 8x8 pixels"] = nearest_captions(thumbnails(data["images"].flatten(1, -3)), texts, train,
                                                         photos)
    if data["judges"].clip:
        vectors = data["judges"].embed(range(len(data["images"]))).cpu()
        captions["nearest by CLIP"] = nearest_captions(vectors, texts, train, photos)
    if model:
        captions["this model, greedy"] = evaluate(model, data, split)[1]
    table = {}
    for name, said in captions.items():
        values = 100 * np.array([cider(said, others)[0], *bleu(said, others)])
        table[name] = dict(zip(("cider", "bleu1", "bleu2", "bleu3", "bleu4"), values))
        table[name] |= data["judges"].scores(said, photos)
    print(f"{split:<24}" + "".join(f"{name:>11}" for name in table["people"]))
    for name, scores in table.items():
        print(f"{name:<24}" + "".join(f"{value:>11.2f}" for value in scores.values()))


def use(path, stage, settings):
    """What --image, --prompt, --chat, --eval_only or --baselines asks of the model at path; settings: of this stage or
    scst.py."""
    model, checkpoint = load_captioner(path, stage, settings["device"], settings["dtype"])
    if settings["chat"]:
        return talk(model, checkpoint, settings)
    if settings["image"] or settings["prompt"]:
        return answer_files(model, checkpoint, settings)
    data, split = data_of(model, checkpoint), settings["eval_split"]
    if not settings["eval_only"]:
        return print_baselines(model, data, split)
    scores, said = evaluate_decodings(model, data, split, settings["beams"], settings["length_penalty"],
                                 settings["consensus"])
    if "right" in scores:
        print_kinds(model, data, split, said)
    print(f"{path}, step {checkpoint['step']}, {split}: "
          + " | ".join(f"{name} {value:.2f}" for name, value in scores.items()))


# training ------------------------------------------------------------------------------------------------------------

def train(model, data, phase, settings, resumed, before):
    """One phase of training, after the run before, if there was one; returns its config.Run."""
    if phase == "align":
        data = captions_of(data)
        if not data["splits"]["train"] or not data["splits"]["val"]:
            config.fail("align_share: the phase align learns captions, and no sample is one image and its caption")
    groups, dev = data["splits"]["train"], config.device_of(model)
    per_step, units = min(batch_size, len(groups)), "groups" if data["asks"] else "photos"
    config.check_batch(per_step, accumulation)
    freeze(model, phase)
    optimizers = config.optimizers(model, muon_lr, adam_lr, weight_decay)
    end = align_share if phase == "align" else 1.0  # the share of the run at which the phase ends
    run = config.Run("mllm", settings, dataset, model, optimizers, resumed, f"{phase}.pt", end, before, phase=phase,
                     tokenizer=data["tokenizer"].state(), image_transform={"size": image_size}, asks=data["asks"])
    run_model = config.maybe_compile(model, compile)
    same_view = crop == 1 and not jitter and not mirror and not train_size and not patch_dropout and max_tiles == 1
    if phase == "sft" and not train_vit and same_view:
        data["features"] = frozen_features(model, data["images"], data["layouts"])

    while True:
        progress = run.progress()  # from 0 to 1, by steps or by minutes
        factor = config.lr_factor(run.step - run.first[0], progress, warmup_steps, cooldown)
        if run.due():
            with run.paused():
                numbers, scores = {"phase": phase, "val": validation_loss(model, data, "val")}, {}
                score = -numbers["val"]
                if phase == "sft":
                    scores, captions, _ = evaluate(model, data, "val")
                    # for drawn images CIDEr tells which of the five wordings it chose, more than whether it is right
                    score = scores.get("right", scores["cider"])
                    draw_answers(run.out / ("answers.png" if data["asks"] else "captions.png"), data, "val", captions)
                scores = {f"val_{name}": value for name, value in scores.items()}
                brief = ("val_cider", "val_bleu4", "val_shuffled", "val_right")
                numbers |= {name: scores[name] for name in brief if name in scores}
                run.log(numbers, factor * adam_lr, per_step, units, file_only=scores | model.gpt.expert_loads())
                run.save(score)
        if progress == 1:
            break
        draw, samples = config.shared_generator(seed, run.step), []
        for i in config.epoch_rows(len(groups), per_step, run.step, seed).tolist():
            order = torch.randperm(len(groups[i]), generator=draw).tolist()
            samples.append([groups[i][j] for j in order[:captions_per_photo]])
        config.seed_step(seed, run.step)  # of augmentation and dropout
        samples = sorted(config.my_share(samples), key=lambda some: n_ids(model, data, some))  # less padding in a part
        b = len(samples) // accumulation
        parts = [get_batch(model, data, samples[i:i + b]) for i in range(0, len(samples), b)]
        counts = [(targets != IGNORE_INDEX).sum().item() for *_, targets, _ in parts]
        n_targets, = config.sum_numbers(sum(counts), device=dev)  # of the whole batch
        loss = 0.0
        for (images, layouts, which, inputs, targets, segments), n in zip(parts, counts):
            with config.autocast(model):
                tokens = model.encode(images, layouts)[which]  # (n, N, C)
                _, mean = run_model(tokens, inputs, targets, label_smoothing, segments)
                part = mean * n / n_targets  # of the batch's loss
            part.backward()
            loss += part.detach()
        run.advance(config.update(model, optimizers, loss, factor, grad_clip))
    run.stop()
    return run


@config.one_line_errors
def main(argv=None):
    settings, out = config.override(globals(), argv), Path(out_dir)
    if image or prompt or chat or eval_only or baselines and (out / "sft.pt").is_file():
        return use(out / "sft.pt", "mllm", settings)
    data = load_samples(dataset, image_size, n_drawn, max_tiles)
    if train_size and (fusion != "cross" or max_tiles > 1 or train_size % patch_size):
        config.fail(f"train_size={train_size} takes fusion=cross, no tiles, and a multiple of patch_size={patch_size}")
    if max_tiles > 1 and (crop < 1 or jitter or mirror):
        config.fail("tiles are not augmented: with max_tiles above 1, crop is 1, jitter 0 and mirror False")
    dev = config.pick_device(device)
    data["judges"] = Judges(gpt_ckpt, vit_ckpt, data["images"], dev)
    if baselines:
        return print_baselines(None, data, eval_split)
    if is_pretrained(gpt_ckpt):
        data["tokenizer"] = gpt2_tokenizer(gpt_ckpt)

    resumed = config.resume("mllm", settings, tokenizer=data["tokenizer"].state())
    torch.manual_seed(seed)
    if resumed:
        model, origin = MLLM(MLLMConfig.from_dict(resumed["config"])), {"vit": out, "connector": out, "gpt": out}
    else:
        most = max(len(sample["images"]) for groups in data["splits"].values() for group in groups for sample in group)
        model, origin = build_model(data["tokenizer"], most)
    model, data = config.place(model, dev, resumed["dtype"] if resumed else dtype), fit(data, model)
    sizes = (f"{len(groups):,} {'groups' if data['asks'] else 'photos'} to {split}"
             for split, groups in data["splits"].items())
    print(f"{dataset}: " + ", ".join(sizes)
          + f"; {model.config.n_image_tokens(image_size)} image tokens each; on {dev}")
    for part, where in origin.items():
        print(f"{part:<9} {sum(p.numel() for p in getattr(model, part).parameters()):>10,} parameters, {where}")

    run = None
    for phase in ("align", "sft"):
        if phase == "sft" or align_share and not (resumed and resumed["phase"] == "sft"):
            run, resumed = train(model, data, phase, settings, resumed, run), None

    if not config.is_main():
        return
    plot(out, right=("val_right" if data["drawn"] or data["asks"] else "val_cider",))
    model.load_state_dict(config.load(out / "sft.pt", "mllm")["model"])
    scores, said = evaluate_decodings(model, data, "test", beams, length_penalty)
    kinds = print_kinds(model, data, "test", said) if "right" in scores else {}
    run.log({}, file_only={f"test_{name}": value for name, value in (scores | kinds).items()})
    print("test: " + " | ".join(f"{name} {value:.2f}" for name, value in scores.items()))
    print(f"best validation {'share right' if 'right' in scores else 'CIDEr'} {run.best:.2f} after "
          f"{run.seconds() / 60:.1f} minutes of training; wrote {out}/*.png, sft.pt")


if __name__ == "__main__":
    main()
