"""
Stage 3: a ViT, a connector and a GPT become one model that looks at a photo and writes a caption,
or answers questions about one image, several, or a clip.

    python mllm.py                                      drawn shapes: no download
    python mllm.py --image=photo.png                    caption a picture with that model
    python mllm.py config/questions_cpu.py              questions about drawn images and clips
    python mllm.py config/questions_cpu.py --image=a.png,b.png --prompt="what has changed?"
    python mllm.py config/questions_cpu.py --image=clip.gif --chat=True
    python mllm.py config/flickr8k_cpu.py               photos: see "The chain on photos" in README
    python mllm.py config/flickr8k_cpu.py --image=photo.jpg --num_captions=5

Training has two phases: `align` trains what is new, such as the connector, while the parts from
stages 1 and 2 are frozen; `sft` (supervised fine-tuning) trains the parts that `train` names. A run
writes log.csv, loss.png, captions.png or answers.png, sft.pt (the best on validation) and last.pt
to out_dir.
"""

import dataclasses
import math
import re
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch

import config
from config.tools import answers, run
from config.tools.data import augment_photos, hide_words, keep_features, load_photos, texts_of
from config.tools.metrics import bleu, caption_scores, cider  # noqa: F401, for import from here
from config.tools.optim import lr_factor, make_optimizers, update
from config.tools.pictures import plot
from config.tools.pretrained import load_part, load_weights
from config.tools.questions import draw_dataset
from model import (
    IGNORE_INDEX,
    IMAGE_ID,
    BPETokenizer,
    GPTConfig,
    MLLMConfig,
    ViTConfig,
    evaluating,
    extend_context,
    make_mllm,
    tokenizer_from_state,
)

# the run
out_dir = "out/shapes"  # checkpoints, log and pictures
init_from = "scratch"  # or "resume": continue from out_dir/last.pt
eval_only = False  # evaluate out_dir/sft.pt and stop
eval_split = "val"  # what eval_only evaluates: train, val, test or sketches
image = ""  # caption this file, folder or URL and stop; a.png,b.png: both together
prompt = ""  # ask this about image instead of captioning it
chat = False  # talk about image in the terminal, turn by turn
device = "auto"  # cuda, mps or cpu
dtype = "auto"  # bfloat16 where the hardware has instructions for it, else float32
seed = 1337  # of everything random: weights, batches, dropout, samples
# data
dataset = "shapes"  # or questions or wide, also drawn; or a folder under data/, such as flickr8k
n_drawn = 20000  # images, or groups of them, to draw; up to 1,000 each for val and test
image_size = 64  # pixels a side that the model sees
max_tiles = 1  # 2 to 4: images keep their proportions, on up to so many tiles; needs fusion=cross
train_size = 0  # pixels a side of a training photo: things look larger in crops; 0: image_size
crop = 1.0  # smallest share of the area of a training photo that is seen; 1 if captions name places
jitter = 0.0  # brightness, contrast and saturation of a training photo change by up to this factor
mirror = False  # mirror half of the training photos, but none whose text says left or right
word_dropout = 0.0  # share of the tokens that are hidden from the GPT in training
batch_size = 64  # photos, or groups of samples about the same images, per step, over all processes
accumulation = 1  # parts that a process splits its share of the batch into, to need less memory
captions_per_photo = 1  # samples of a group in a step: its image tokens are computed once
max_tokens = 40  # longest text of a sample with the most images; longer samples are left out
# model: a checkpoint brings its own architecture
vit_ckpt = ""  # of stage 1 or a captioner; or openai/clip-vit-base-patch16; empty: new
gpt_ckpt = ""  # of stage 2 or a captioner; or gpt2; empty: new
mllm_ckpt = ""  # instead of both, a captioner that has learnt other data
fusion = "cross"  # the words attend to the image tokens; or prefix: these stand before the words
cross_layers = ()  # with fusion=cross: blocks of the GPT with cross-attention; (): all of them
connector = "linear"  # or mlp; fewer image tokens: pixel_shuffle, abstractor, resampler
patch_size = 8  # pixels a side of a patch
stem = "instance"  # how pixels become patches: instance, residual or patch, see PatchEmbedding
vit_layer = 1  # blocks of the ViT
vit_head = 4  # its attention heads
vit_embd = 96  # its channels
across_layer = 0  # with tiles: further blocks in which all tiles of an image attend to each other
keep_blocks = ()  # with tiles: outputs of these blocks go to the connector too, such as 0,1
gpt_layer = 2  # blocks of the GPT
gpt_head = 4  # its attention heads
gpt_embd = 96  # its channels
gpt_norm = "layer"  # or rms
gpt_activation = "gelu"  # relu, gelu or swiglu
n_experts = 0  # feed-forward layers in each of its blocks, a mixture of experts; 0: one dense layer
experts_per_token = 2  # how many of them a token passes through
dropout = 0.0  # in the ViT and the GPT
patch_dropout = 0.0  # share of the patches that are left out in training; needs fusion=cross
label_smoothing = 0.0  # share of the target that is spread over all words, in training
# optimization
align_share = 0.0  # part of the run for the phase align, which trains what is new
train = "vit,connector,gpt"  # parts that the phase sft trains; cross-attention is the connector's
max_steps = 1400  # length of the run
muon_lr = 0.014  # peak rate of the weight matrices of linear layers; 0: AdamW for all
conv_lr = 0.1  # the same of convolutions; 0: AdamW
adam_lr = 3e-3  # peak rate of everything else
weight_decay = 0.05  # of matrices and embeddings, relative to the rate
warmup_steps = 50  # steps in which the rate rises to its peak, in each phase
cooldown = 1.0  # the last part of each phase, in which the rate falls to zero in a straight line
grad_clip = 1.0  # largest norm of the gradient; 0: none
eval_interval = 700  # steps between evaluations
# decoding: at the end of a run and with eval_only, in addition to greedy; with image, instead of
# greedy
beams = 5  # width of the beam search; 1: greedy
length_penalty = 0.6  # beams are compared by log p / length ** length_penalty
temperature = 0.0  # with image, above 0: sample at this temperature
num_captions = 1  # with image: captions of each
context = 0  # above 0: read so many tokens at once, for long conversations, see extend_context()
yarn = 1.0  # with context: the new context over that of the training


BRIEF = ("train", "val", "val_cider", "val_right", "lr", "ms_per_step", "minutes")  # printed


# samples ------------------------------------------------------------------------------------------
# A sample is {"images": [indices], "messages": [{"role": "user" or "assistant", "content": text},
# ...]} with <image> in the text where an image belongs; tokenize() adds "ids" and "is_answer".
# Samples about the same images are a group.


def load_samples(dataset, image_size, n_drawn, max_tiles):
    """Return {images: (n, 3, image_size, image_size) uint8, or TiledImages; image_size; groups:
    {train, val, test, and of drawn images sketches: lists of groups}; texts: what is said about
    each training image; asks: whether there are questions; metric: the score that chooses the best
    checkpoint; tokenizer}."""
    drawn = dataset in ("shapes", "wide", "questions")
    if drawn:
        images, groups = draw_dataset(dataset, n_drawn, image_size, max_tiles)
    else:
        images, groups, tokenizer = load_photos(dataset, image_size)
    tiles = 1 if torch.is_tensor(images) else images.pixels.size(1)
    assert tiles == max_tiles, f"{dataset} has images of {tiles} tiles, not max_tiles={max_tiles}"
    samples = [sample for group in groups["train"] for sample in group]
    if drawn:
        all_texts = (text for sample in samples for text in texts_of(sample))
        tokenizer = BPETokenizer.train(all_texts, 600)  # an id for every word
    texts = defaultdict(list)
    for sample in samples:
        for i in sample["images"]:
            texts[i] += texts_of(sample)
    asks = any(question for sample in samples for question in texts_of(sample)[::2])
    return {
        "images": images,
        "image_size": image_size,
        "groups": groups,
        "texts": texts,
        "asks": asks,
        "metric": "right" if drawn or asks else "cider",
        "tokenizer": tokenizer,
    }


def encode(messages, tokenizer, n_placeholders):
    """Return two lists: the ids of a conversation, and for each id whether it is part of an answer,
    which is what the loss is on. messages: dicts with "role" and "content". For example, with two
    placeholders per image:

        user       <image>what?      IMG IMG what ?     False False False False
        assistant  a dog             bos a dog eos      False True  True  True
    """
    ids, is_answer = [], []
    for message in messages:
        if message["role"] == "assistant":
            new = [tokenizer.bos_id, *tokenizer.encode(message["content"]), tokenizer.eos_id]
            is_answer += [False] + [True] * (len(new) - 1)  # bos tells it to speak
        else:
            first, *others = message["content"].split("<image>")
            new = tokenizer.encode(first)
            for text in others:
                new += [IMAGE_ID] * n_placeholders + tokenizer.encode(text)
            is_answer += [False] * len(new)
        ids += new
    return ids, is_answer


def tokenize(data, model):
    """Add ids and is_answer to every sample. Leave out samples that are longer than the context of
    the model; where answers are only compared, those whose last question is. Print how many."""
    data["n_placeholders"] = model.config.n_placeholders(data["image_size"])
    block_size = model.config.gpt.block_size
    n_left_out = 0
    for split, groups in data["groups"].items():
        for sample in [sample for group in groups for sample in group]:
            ids, is_answer = encode(sample["messages"], data["tokenizer"], data["n_placeholders"])
            n_read = len(ids) - 1
            if split != "train":
                n_read = len(ids) - is_answer[::-1].index(False)
            sample |= {"ids": ids, "is_answer": is_answer, "fits": n_read <= block_size}
            n_left_out += not sample["fits"]
        fitting = [[sample for sample in group if sample["fits"]] for group in groups]
        data["groups"][split] = [group for group in fitting if group]
        assert data["groups"][split], (
            f"no sample of {split} fits the context of {block_size} tokens; raise max_tokens"
        )
    if n_left_out:
        print(f"left out: {n_left_out:,} samples, longer than the context of {block_size} tokens")


def add_features(data, model, settings):
    """Add the features of all images if they never change, because the ViT is frozen and sees the
    images as they are."""
    names = ("jitter", "mirror", "train_size", "patch_dropout")
    changes = settings["crop"] < 1 or any(settings[name] for name in names)
    is_frozen = "vit" not in settings["train"] and (settings["vit_ckpt"] or settings["mllm_ckpt"])
    if is_frozen and not changes and settings["max_tiles"] == 1 and len(data["images"]):
        data["features"] = keep_features(model, data["images"], settings["dataset"])


def prompts_of(data, split):
    """Split samples into prompts (everything before an assistant turn) and reference answers.
    Return a list of {images, ids, question: its last message, kind, references}; equal prompts are
    one, with several references."""
    prompts = {}
    for group in data["groups"][split]:
        for sample in group:
            for k, message in enumerate(sample["messages"]):
                if message["role"] == "user":
                    continue
                before = sample["messages"][:k]
                n_images = str(before).count("<image>")  # later ones are not seen yet
                images = sample["images"][:n_images]
                key = (*images, *(message["content"] for message in before))
                if key not in prompts:
                    ids, _ = encode(before, data["tokenizer"], data["n_placeholders"])
                    kind = "caption" if before[0]["content"] == "<image>" else "question"
                    prompts[key] = {
                        "images": images,
                        "ids": ids + [data["tokenizer"].bos_id],
                        "question": before[-1]["content"].replace("<image>", ""),
                        "kind": message.get("kind", kind),
                        "references": [],
                    }
                prompts[key]["references"].append(message["content"])
    return list(prompts.values())


# batches ------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Rows of samples. Samples of a group share a row if all begin with its images, which are then
    read once."""

    images: list  # the M indices of the images, each once
    which: torch.Tensor  # (n,), for each image of each row in order, its place among the M
    ids: torch.Tensor  # (B, T)
    targets: torch.Tensor  # (B, T), one token later; IGNORE_INDEX where it is not part of an answer
    segments: torch.Tensor | None  # (B, T), see MLLM; None if every row is one sample

    def n_targets(self):
        return (self.targets != IGNORE_INDEX).sum().item()


def make_row(samples, n_shared):
    """Return the ids, targets and segments of a row in which samples share their first n_shared
    ids, the images."""
    ids = [IMAGE_ID] * n_shared
    targets = [IGNORE_INDEX] * n_shared
    segments = [0] * n_shared
    for segment, sample in enumerate(samples, start=1):
        next_ids = sample["ids"][n_shared + 1 :]
        is_answer = sample["is_answer"][n_shared + 1 :]
        ids += sample["ids"][n_shared:-1]
        targets += [i if answer else IGNORE_INDEX for i, answer in zip(next_ids, is_answer)]
        segments += [segment] * len(next_ids)
    return ids, targets, segments


def collate(groups, data):
    """Return the Batch of groups of samples, padded to the longest row."""
    rows, images = [], []
    for group in groups:
        n_shared = data["n_placeholders"] * len(group[0]["images"])
        if any(set(sample["ids"][:n_shared]) != {IMAGE_ID} for sample in group):
            n_shared = 0
        for samples in [group] if n_shared else [[sample] for sample in group]:
            rows.append(make_row(samples, n_shared))
            images += samples[0]["images"]
    T = max(len(ids) for ids, _, _ in rows)
    padded = []
    for column, fill in zip(zip(*rows), (data["tokenizer"].pad_id, IGNORE_INDEX, -1)):
        padded.append(torch.tensor([values + [fill] * (T - len(values)) for values in column]))
    ids, targets, segments = padded
    distinct = list(dict.fromkeys(images))
    which = torch.tensor([distinct.index(i) for i in images], dtype=torch.long)
    if segments.max() <= 1:  # padding needs no segment: nothing attends to later tokens
        segments = None
    return Batch(distinct, which, ids, targets, segments)


def get_groups(groups, step):
    """Return this process's share of the groups of a step, each with captions_per_photo of its
    samples."""
    draw = run.shared_generator(seed, step)
    batch = []
    for i in run.epoch_rows(len(groups), min(batch_size, len(groups)), step, seed).tolist():
        order = torch.randperm(len(groups[i]), generator=draw).tolist()
        batch.append([groups[i][j] for j in order[:captions_per_photo]])
    batch = run.my_share(batch)
    # less padding in a part
    return sorted(batch, key=lambda group: sum(len(sample["ids"]) for sample in group))


def features_of(model, data, image_ids, **changes):
    """Return the (M, N, C) features of images: the kept ones, if any, see keep_features(); else
    those of their pixels, which are augmented if changes are given, see augment_photos()."""
    device = run.device_of(model)
    if "features" in data:
        return torch.from_numpy(data["features"][image_ids]).float().to(device)
    images = data["images"][image_ids].to(device)
    if changes and torch.is_tensor(images):  # tiles are not augmented
        images = augment_photos(images, [data["texts"][i] for i in image_ids], **changes)
    with run.autocast(model):
        return model.vit.features(images)


# evaluation ---------------------------------------------------------------------------------------


@torch.no_grad()
def encode_images(model, data, image_ids, batch_size=100):
    """Return the (M, N, C) image tokens of images, computed batch by batch."""
    with evaluating(model), run.autocast(model):
        starts = range(0, max(1, len(image_ids)), batch_size)
        batches = [features_of(model, data, image_ids[i : i + batch_size]) for i in starts]
        return torch.cat([model.connect(features) for features in batches])


def alike(prompts, batch_size=250):
    """Yield lists of indices of prompts with equally many ids and images, which can be answered
    together."""
    groups = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault((len(prompt["ids"]), len(prompt["images"])), []).append(i)
    for rows in groups.values():
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size]


@torch.no_grad()
def write_answers(model, data, prompts, **decoding):
    """Return the model's answers to prompts, a list of str, and their log-probabilities, a list of
    float. Greedy, unless decoding, further arguments of MLLM.generate(), says otherwise."""
    images = sorted({i for prompt in prompts for i in prompt["images"]})
    device = run.device_of(model)
    tokens = encode_images(model, data, images)
    place = {image: k for k, image in enumerate(images)}
    tokenizer = data["tokenizer"]
    texts, log_ps = [""] * len(prompts), [0.0] * len(prompts)
    for rows in alike(prompts):
        ids = torch.tensor([prompts[i]["ids"] for i in rows], device=device)
        own = tokens[[place[image] for i in rows for image in prompts[i]["images"]]]
        with evaluating(model), run.autocast(model):
            written = model.generate(own, ids, model.config.gpt.block_size, **decoding)
            log_p = answers.log_p_of(model, own, ids, written)
        for i, row, value in zip(rows, written.tolist(), log_p.tolist()):
            texts[i] = tokenizer.decode(row)
            log_ps[i] = value
        run.show_progress(f"answering {len(prompts)} prompts")
    return texts, log_ps


@torch.no_grad()
def validation_loss(model, data, split, batch_size=250):
    """Return the mean loss in nats per token of one sample per group: the first of the first group,
    the second of the second, and so on."""
    block_size = model.config.gpt.block_size
    samples = [group[i % len(group)] for i, group in enumerate(data["groups"][split])]
    samples = [sample for sample in samples if len(sample["ids"]) <= block_size + 1]
    device = run.device_of(model)
    total, count = 0.0, 0
    for start in range(0, len(samples), batch_size):
        groups = [[sample] for sample in samples[start : start + batch_size]]
        batch = collate(groups, data)
        tokens = encode_images(model, data, batch.images)[batch.which]
        with evaluating(model), run.autocast(model):
            _, loss = model(tokens, batch.ids.to(device), batch.targets.to(device))
        total += loss.item() * batch.n_targets()
        count += batch.n_targets()
    return total / count


def evaluate(model, data, split, **decoding):
    """Return the scores of the answers to all prompts of a split: those of caption_scores(), for
    drawn images and questions the share of right answers, and the log-probability that 99.9% of the
    answers exceed; and the answers."""
    prompts = prompts_of(data, split)
    texts, log_ps = write_answers(model, data, prompts, **decoding)
    scores = caption_scores(texts, [prompt["references"] for prompt in prompts])
    if data["metric"] == "right":
        n_right = sum(map(answers.is_right, prompts, texts))
        scores["right"] = 100 * n_right / len(prompts)
    scores["low_log_p"] = torch.tensor(log_ps).quantile(0.001).item()
    return scores, texts


def evaluate_all(model, data, split, beams, length_penalty):
    """Return the scores of greedy answers; beam_cider and so on, those of a beam search; for
    questions those by kind, of which it prints a table; and the greedy answers."""
    scores, texts = evaluate(model, data, split)
    if beams > 1:
        by_beams, _ = evaluate(model, data, split, beams=beams, length_penalty=length_penalty)
        scores |= {f"beam_{name}": by_beams[name] for name in ("cider", "bleu4")}
    if "right" in scores:
        prompts = prompts_of(data, split)
        other_images, _ = write_answers(model, data, answers.with_other_images(prompts))
        scores |= answers.print_kinds(prompts, {"right": texts, "other images": other_images})
    return scores, texts


# the model ----------------------------------------------------------------------------------------


def new_config(tokenizer, vit, gpt):
    """Return the MLLMConfig of the settings. vit, gpt: checkpoints, or None."""
    vit_config = ViTConfig(image_size, patch_size, vit_layer, vit_head, vit_embd, stem=stem)
    gpt_config = GPTConfig(
        tokenizer.vocab_size,
        0,
        gpt_layer,
        gpt_head,
        gpt_embd,
        0.0,
        gpt_activation,
        gpt_norm,
        n_experts=n_experts,
        experts_per_token=experts_per_token,
    )
    if vit:
        vit_config = ViTConfig(**vit["config"])
    if gpt:
        gpt_config = GPTConfig(**gpt["config"])
    if max_tiles > 1:
        vit_config = dataclasses.replace(
            vit_config,
            kind="tiles",
            max_tiles=max_tiles,
            across_layer=across_layer,
            keep=keep_blocks,
        )
    everywhere = tuple(range(gpt_config.n_layer))
    gpt_config.cross_layers = (cross_layers or everywhere) if fusion == "cross" else ()
    gpt_config.gated = gpt is not None
    return MLLMConfig(vit_config, gpt_config, connector, 1, tokenizer.bos_id, tokenizer.eos_id)


def build_model(data):
    """Return the MLLM for the samples of data: that of mllm_ckpt, or a new one with the ViT and the
    GPT of vit_ckpt and gpt_ckpt if there are any. A GPT brings its tokenizer to the data."""
    captioner = run.load(mllm_ckpt, "mllm", "scst") if mllm_ckpt else None
    vit = load_part(vit_ckpt, "vit") if vit_ckpt and not captioner else None
    gpt = load_part(gpt_ckpt, "gpt") if gpt_ckpt and not captioner else None
    if captioner or gpt:
        data["tokenizer"] = tokenizer_from_state((captioner or gpt)["tokenizer"])
    tokenizer = data["tokenizer"]
    assert isinstance(tokenizer, BPETokenizer), f"{gpt_ckpt} has no token for the end of an answer"
    c = MLLMConfig.from_dict(captioner["config"]) if captioner else new_config(tokenizer, vit, gpt)
    n_known, n_compared = c.gpt.block_size, c.max_images
    c.vit.dropout = c.gpt.dropout = dropout
    c.vit.patch_dropout = patch_dropout
    for group in sum(data["groups"].values(), []):
        c.max_images = max(c.max_images, *(len(sample["images"]) for sample in group))
    c.gpt.block_size = c.max_images * c.n_placeholders(image_size) + max_tokens
    assert c.gpt.positions != "learned" or c.gpt.block_size <= n_known, (
        f"{mllm_ckpt or gpt_ckpt} has too few positions for {c.gpt.block_size}; lower max_tokens"
    )
    model = make_mllm(c)
    if captioner:
        load_weights(model, captioner, r"^compare" if c.max_images > n_compared else r"$^")
    if vit:
        load_weights(model.vit, vit, r"tiles_|across\.|pixel_")
    if gpt:
        load_weights(model.gpt, gpt, r"cross_")
    for part, origin in (("vit", vit_ckpt), ("connector", ""), ("gpt", gpt_ckpt)):
        n_parameters = sum(p.numel() for p in getattr(model, part).parameters())
        print(f"{part:<9} {n_parameters:>10,} parameters, {mllm_ckpt or origin or 'new'}")
    return model


def part_of(name):
    """Return the part, vit, connector or gpt, that a parameter of an MLLM belongs to. What connects
    images and words, or the tiles of an image, is part of the connector."""
    part = name.split(".")[0]
    connects = part not in ("vit", "gpt") or re.search(r"\.(cross_|tiles_|across\.)", name)
    return "connector" if connects else part


def freeze(model, phase):
    """Let only the parameters train that the phase trains, and print how many."""
    trained = train.split(",")
    if phase == "align":
        origins = {"vit": mllm_ckpt or vit_ckpt, "gpt": mllm_ckpt or gpt_ckpt, "connector": ""}
        trained = [part for part, checkpoint in origins.items() if not checkpoint]
    for name, p in model.named_parameters():
        p.requires_grad_(part_of(name) in trained)
    n = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"phase {phase}: {n:,} parameters train, of {', '.join(trained)}; all others are frozen")


def load_captioner(path, stage, device, dtype):
    """Return the model and the checkpoint that this stage or scst.py has saved."""
    checkpoint = run.load(path, stage)
    model = make_mllm(MLLMConfig.from_dict(checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    return run.place(model, run.pick_device(device), dtype), checkpoint


def load_data(model, checkpoint):
    """Return the data that a captioner was trained on."""
    settings = checkpoint.get("sft_settings", checkpoint["settings"])  # of the run of this stage
    data = load_samples(
        *(settings[name] for name in ("dataset", "image_size", "n_drawn", "max_tiles"))
    )
    data["tokenizer"] = tokenizer_from_state(checkpoint["tokenizer"])
    tokenize(data, model)
    add_features(data, model, settings)
    return data


def use(stage, path, settings):
    """Do what --image, --prompt, --chat or --eval_only asks of a trained model, here and in
    scst.py."""
    model, checkpoint = load_captioner(path, stage, settings["device"], settings["dtype"])
    if settings.get("context"):
        extend_context(model.gpt, settings["context"], settings["yarn"])
        model.to(run.device_of(model))
    if settings["chat"]:
        answers.chat(model, checkpoint, settings, encode)
    elif settings["image"] or settings["prompt"]:
        answers.answer_files(model, checkpoint, settings, encode)
    else:
        data = load_data(model, checkpoint)
        split = settings["eval_split"]
        assert split in data["groups"], f"eval_split={split}: {', '.join(data['groups'])}"
        scores, _ = evaluate_all(model, data, split, settings["beams"], settings["length_penalty"])
        print(
            f"{path}, step {checkpoint['step']}, {split}: "
            + " | ".join(f"{name} {value:.2f}" for name, value in scores.items() if "," not in name)
        )


# training -----------------------------------------------------------------------------------------


def train_phase(model, data, phase, first_step, last_step, settings, resumed, seconds):
    """Train one phase, from first_step to last_step. Return the best validation score, and the
    seconds of training, which include those of the phase before."""
    out = Path(out_dir)
    device = run.device_of(model)
    tokenizer = data["tokenizer"]
    freeze(model, phase)
    optimizers = make_optimizers(model, muon_lr, adam_lr, weight_decay, conv_lr)
    step, best = first_step, -math.inf
    if resumed:
        step, seconds, best = (resumed[name] for name in ("step", "seconds", "best"))
        run.restore(resumed, model, optimizers)
    changes = {"crop": crop, "jitter": jitter, "mirror": mirror, "size": train_size}

    # for checkpoints
    about = {"phase": phase, "tokenizer": tokenizer.state(), "asks": data["asks"]}
    losses = []  # since the last evaluation
    start = time.perf_counter()
    while True:
        factor = lr_factor(step - first_step, last_step - first_step, warmup_steps, cooldown)

        if step % eval_interval == 0 or step == last_step:
            row = {"step": step, "phase": phase, "lr": factor * adam_lr}
            row |= run.pace(losses, time.perf_counter() - start)
            seconds += time.perf_counter() - start  # of training, without evaluations
            if run.is_main():
                row |= {"val": validation_loss(model, data, "val"), "minutes": seconds / 60}
                score = math.nan  # align has none, so it is never the best
                if phase == "sft":
                    scores, texts = evaluate(model, data, "val")
                    row |= {f"val_{name}": value for name, value in scores.items()}
                    score = scores[data["metric"]]
                    about["low_log_p"] = scores["low_log_p"]
                run.log(out, row, BRIEF)
                is_best, best = score >= best, max(best, score)
                about |= {"step": step, "seconds": seconds, "best": best}
                checkpoint = run.checkpoint("mllm", settings, model, optimizers, **about)
                if is_best:
                    run.save(out / "sft.pt", checkpoint)
                    picture = out / ("answers.png" if data["asks"] else "captions.png")
                    answers.draw_answers(picture, data, prompts_of(data, "val"), texts)
                run.save(out / "last.pt", checkpoint)
            losses = []
            start = time.perf_counter()
        if step == last_step:
            return best, seconds

        groups = get_groups(data["groups"]["train"], step)
        run.seed_step(seed, step)  # of augmentation and dropout
        n = len(groups) // accumulation
        parts = [groups[i : i + n] for i in range(0, len(groups), n)]
        batches = [collate(part, data) for part in parts]
        n_targets = run.sum_over_processes(sum(batch.n_targets() for batch in batches), device)
        loss = 0.0
        for batch in batches:
            ids, targets, segments = (t if t is None else t.to(device) for t in batch[2:])
            if word_dropout:
                ids = hide_words(ids, tokenizer, word_dropout)
            features = features_of(model, data, batch.images, **changes)
            with run.autocast(model):
                tokens = model.connect(features)
                _, mean_loss = model(tokens[batch.which], ids, targets, label_smoothing, segments)
                # part of the loss of the batch
                part_loss = mean_loss * batch.n_targets() / n_targets
            part_loss.backward()
            loss += part_loss.detach()
        losses.append(update(model, optimizers, loss, factor, grad_clip))
        step += 1
        run.show_step(out, step, max_steps, loss=losses)


@run.one_line_errors
def main(argv=None):
    settings = config.override(globals(), argv)
    out = Path(out_dir)
    assert context or yarn == 1, "yarn is for a longer context: give both"
    if image or prompt or chat or eval_only:
        return use("mllm", out / "sft.pt", settings)
    assert fusion in ("prefix", "cross"), f"fusion={fusion}: prefix or cross"
    assert set(train.split(",")) <= {"vit", "connector", "gpt"}, (
        f"train={train}: of vit, connector, gpt those that train, such as connector,gpt"
    )
    assert (
        max_tiles == 1 or fusion == "cross" and not (crop < 1 or jitter or mirror or train_size)
    ), "max_tiles above 1 needs fusion=cross, and tiles are not augmented"
    assert not train_size or fusion == "cross", "train_size needs fusion=cross"
    dev = run.pick_device(device)
    data = load_samples(dataset, image_size, n_drawn, max_tiles)
    run.check_batch(min(batch_size, len(data["groups"]["train"])), accumulation)

    torch.manual_seed(seed)
    model = run.place(build_model(data), dev, dtype)
    tokenize(data, model)
    add_features(data, model, settings)
    resumed = run.start("mllm", settings)
    print(f"{dataset}: {len(data['groups']['train']):,} groups of samples to train on; on {dev}")
    seconds = 0.0
    n_align = math.ceil(align_share * max_steps)
    if n_align and not (resumed and resumed["phase"] == "sft"):
        _, seconds = train_phase(model, data, "align", 0, n_align, settings, resumed, seconds)
        resumed = None
    best, seconds = train_phase(model, data, "sft", n_align, max_steps, settings, resumed, seconds)

    if run.is_main():
        plot(out, right=(f"val_{data['metric']}",))
        model.load_state_dict(run.load(out / "sft.pt", "mllm")["model"])
        row = {"step": max_steps}
        for split in ("test", "sketches"):
            if split in data["groups"]:
                scores, _ = evaluate_all(model, data, split, beams, length_penalty)
                row |= {f"{split}_{name}": value for name, value in scores.items()}
        run.log(out, row, [name for name in row if "," not in name and name != "step"])
        print(
            f"best validation {data['metric']} {best:.2f} after {seconds / 60:.1f} minutes; "
            f"wrote {out}/*.png, sft.pt"
        )


if __name__ == "__main__":
    main()
