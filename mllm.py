"""
Stage 3: a ViT, a connector and a GPT become one model that looks at a photo and writes a caption.

    python mllm.py                                      drawn shapes: no download, three minutes on two CPU cores
    python mllm.py --image=photo.png                    caption a picture with what that run has learnt
    python mllm.py config/flickr8k_cpu.py               photos, after the commands of README's "The chain on photos"
    python mllm.py config/flickr8k_cpu.py --image=photo.jpg --num_captions=5
    python mllm.py config/flickr8k_cpu.py --baselines=True                 what people and the nearest photos score

Expect every attribute right in 99% of held-out drawn images, and a test CIDEr of 34 to 37 from config/flickr8k_cpu.py:
26 minutes on two CPU cores with AVX512-BF16 or AMX.
Training has two phases: `align` trains only what is new, the connector and any cross-attention, between a ViT and a GPT
that are frozen as stages 1 and 2 left them; `sft` (supervised fine-tuning) trains all on the captions. A run writes
log.csv, loss.png, captions.png, align.pt, sft.pt (the best on validation by CIDEr, or captions all right) and last.pt.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np
import torch

import config
from config.tools.data import augment_photos, load_photos, open_images, to_pixels
from config.tools.metrics import bleu, caption_scores, cider, nearest_captions
from config.tools.pictures import draw_places, plot, save_grid
from config.tools.shapes import attributes, draw_shapes
from model import IGNORE_INDEX, IMAGE_ID, MLLM, BPETokenizer, GPTConfig, MLLMConfig, ViTConfig, evaluating, \
    tokenizer_from_state

# the run
out_dir = "out/shapes"  # checkpoints, log and pictures
init_from = "scratch"  # or "resume": continue from out_dir/last.pt
eval_only = False  # evaluate out_dir/sft.pt and stop
eval_split = "val"  # what eval_only and baselines evaluate: train, val or test
image = ""  # caption this file, folder or URL and stop
baselines = False  # print the scores of people, of the nearest photos' captions and of out_dir/sft.pt and stop
device = "auto"  # cuda, mps or cpu
dtype = "auto"  # float32 or bfloat16, whichever multiplies matrices faster here
compile = False  # torch.compile: a minute at the start, faster steps on a GPU
seed = 1337  # of everything random: weights, batches, dropout, samples
# data
dataset = "shapes"  # drawn here; or the folder under data/ that prepare_flickr8k.py wrote, such as flickr8k
n_drawn = 10000  # images to draw: a twentieth to validate, as many to test, the rest to train on
image_size = 48  # pixels a side that the model sees
crop = 1.0  # smallest share of its area that is seen of a training photo; 1 where captions name places
jitter = 0.0  # brightness, contrast and saturation of a training photo change by up to this factor
mirror = False  # mirror half of the training photos, but none with a caption in the batch that says left or right
word_dropout = 0.0  # share of the tokens that are hidden from the GPT while it learns to write the ones after them
batch_size = 64  # photos per step, over all processes
accumulation = 1  # parts that a process cuts its share of the batch into: less memory
captions_per_photo = 1  # captions per photo in a step: its image tokens are computed once
max_tokens = 40  # longest caption
# model: a checkpoint brings its own architecture
vit_ckpt = ""  # checkpoint of stage 1 to start from, a classifier or CLIP; empty: from nothing
gpt_ckpt = ""  # checkpoint of stage 2, trained on the same captions; empty: from nothing
fusion = "prefix"  # image tokens stand before the words; or cross: the words attend to them through gates
cross_every = 1  # with fusion=cross: every so many-th block of the GPT has cross-attention
connector = "mlp"  # or linear; pixel_shuffle: a quarter of the image tokens
patch_size = 8  # pixels a side of a patch
vit_layer = 3  # blocks of the ViT
vit_head = 4  # its attention heads
vit_embd = 128  # its channels
stem = "conv"  # or patch: one linear layer per patch
gpt_layer = 3  # blocks of the GPT
gpt_head = 4  # its attention heads
gpt_embd = 128  # its channels
dropout = 0.0  # in the ViT and the GPT
label_smoothing = 0.0  # share of the target that is spread over all words; the log's train holds it, its val does not
# optimization
align_share = 0.0  # part of the run for the phase align; 0 where ViT and GPT start from nothing
train_vit = True  # the phase sft trains the ViT too
max_steps = 0  # 0: max_minutes alone decides
max_minutes = 2.0  # 0: max_steps alone decides; else whichever comes first
muon_lr = 0.01  # peak rate of the weight matrices of linear layers; 0: AdamW for all
adam_lr = 2e-3  # peak rate of everything else
weight_decay = 0.05  # of matrices and embeddings, relative to the rate
warmup_steps = 50  # steps in which the rate rises to its peak, in each phase
cooldown = 0.8  # the last part of each phase, in which the rate falls to zero in a straight line
grad_clip = 1.0  # largest norm of the gradient; 0: none
eval_interval = 200  # steps between lines of the log, each with validation loss and CIDEr
# decoding: at the end of a run and with eval_only, in addition to greedy; with image, instead of it
beams = 5  # width of the beam search; 1: greedy
length_penalty = 0.6  # beams are compared by log p / length ** length_penalty
temperature = 0.0  # above 0: sample at this temperature; not at the end of a run
num_captions = 1  # with image: captions of each


# data ----------------------------------------------------------------------------------------------------------------
# A sample is {"images": [indices], "messages": [{"role": "user" or "assistant", "content": text}, ...]} with <image> in
# the text where an image stands. Samples about the same images are a group, such as the five captions of a photo.

def caption_sample(i, caption=None):
    """The sample in which the assistant describes image i without a question; without a caption, only its prompt."""
    answer = [] if caption is None else [{"role": "assistant", "content": caption}]
    return {"images": [i], "messages": [{"role": "user", "content": "<image>"}, *answer]}


def answers(group):
    """The last answer of each sample of a group: the references of what the model is to write."""
    return [sample["messages"][-1]["content"] for sample in group]


def load_samples(dataset, image_size, n_drawn):
    """{images (n, 3, image_size, image_size) uint8, names: n, drawn: whether they are drawn here, tokenizer, splits:
    {train, val, test: groups of samples}}"""
    if dataset == "shapes":
        images, captions = draw_shapes(n_drawn, image_size, seed=0)
        order, some = range(n_drawn), n_drawn // 20
        splits = {"train": order[2 * some:], "val": order[:some], "test": order[some:2 * some]}
        tokenizer = BPETokenizer.train((c for i in splits["train"] for c in captions[i]), 400)
        names = [f"drawn image {i}" for i in order]
    else:
        images, table, tokenizer = load_photos(dataset, image_size)
        names, captions, splits = table["names"], table["captions"], table["splits"]
    groups = {split: [[caption_sample(i, c) for c in captions[i]] for i in rows] for split, rows in splits.items()}
    return {"images": torch.from_numpy(images), "names": names, "drawn": dataset == "shapes", "tokenizer": tokenizer,
            "splits": groups}


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


def collate(model, data, samples):
    """Samples -> numbers, the list of their images, each once; which (n,), the place there of each sample's images in
    order; inputs and targets (B, T), the targets one token later, and -1 where the assistant does not speak. What
    exceeds the model's block_size is cut off. T is a multiple of 8: CPUs prepare a product anew for a new shape."""
    tokenizer, block_size = data["tokenizer"], model.config.gpt.block_size
    n = model.config.n_placeholders(data["images"].size(-1))
    numbers = list(dict.fromkeys(i for sample in samples for i in sample["images"]))
    which = torch.tensor([numbers.index(i) for sample in samples for i in sample["images"]])
    rows = [encode_messages(sample["messages"], tokenizer, n) for sample in samples]
    T = min(block_size, 8 * math.ceil((max(len(ids) for ids, _ in rows) - 1) / 8))
    inputs, targets = torch.full((len(rows), T), tokenizer.pad_id), torch.full((len(rows), T), IGNORE_INDEX)
    for row, target, (ids, said) in zip(inputs, targets, rows):
        if len(ids) > block_size + 1:
            ids, said = ids[:block_size] + [tokenizer.eos_id], said[:block_size + 1]
        ids, said = torch.tensor(ids), torch.tensor(said)
        row[:len(ids) - 1] = ids[:-1]
        target[:len(ids) - 1] = ids[1:].where(said[1:], IGNORE_INDEX)
    return numbers, which, inputs, targets


def get_batch(model, data, samples):
    """collate() for training, on the model's device: augmented images (M, 3, H, W) instead of their numbers, and hidden
    words in the inputs. Draws from torch's global generator."""
    dev, tokenizer = config.device_of(model), data["tokenizer"]
    numbers, which, inputs, targets = collate(model, data, samples)
    texts = [[answers([sample])[0] for sample in samples if i in sample["images"]] for i in numbers]
    if word_dropout:
        hidden = (torch.rand(inputs.shape) < word_dropout) & (inputs >= tokenizer.n_special)
        inputs = inputs.masked_fill(hidden, tokenizer.pad_id)
    images = augment_photos(data["images"][numbers].to(dev), texts, crop, jitter, mirror)
    return images, which.to(dev), inputs.to(dev), targets.to(dev)


# evaluation ----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def write_answers(model, images, tokenizer, samples, batch_size=250, **decoding):
    """What the model says next in each sample's conversation, greedy unless decoding (what MLLM.generate() takes) says
    otherwise: a list of n * num_captions str, sample by sample; whether the model ended each; and their (n *
    num_captions, T) ids. images: (n, 3, H, W), which the samples index."""
    texts, ended, written, dev = [], [], [], config.device_of(model)
    n = model.config.n_placeholders(images.size(-1))
    for first in range(0, len(samples), batch_size):
        some = samples[first:first + batch_size]
        prompts = [[*encode_messages(sample["messages"], tokenizer, n)[0], tokenizer.bos_id] for sample in some]
        pixels = images[[i for sample in some for i in sample["images"]]].to(dev)
        longest = model.config.gpt.block_size + 1 - len(prompts[0])
        with config.autocast(model):
            ids = model.generate(pixels, torch.tensor(prompts, device=dev), longest, **decoding)
        written.append(torch.nn.functional.pad(ids, (0, longest - ids.size(1)), value=tokenizer.eos_id))
        texts += [tokenizer.decode(row) for row in ids.tolist()]
        ended += [tokenizer.eos_id in row for row in ids.tolist()]
        config.show_progress(f"captioning: {len(texts)} written")
    config.show_progress("")
    return texts, ended, torch.cat(written)


def caption_mask(ids, eos_id):
    """(n, T) written ids -> (n, T) mask of the caption: its end token is part of it, what follows is not."""
    return (ids == eos_id).cumsum(dim=1) - (ids == eos_id).long() == 0


def caption_log_probs(model, tokens, ids):
    """(n, N, C) image tokens, (n, T) ids written about them -> (n, T) log-probabilities; 0 after the end."""
    prompts = model.caption_prompt(tokens)
    mask = torch.cat((torch.zeros_like(prompts, dtype=torch.bool), caption_mask(ids, model.config.eos_id)), dim=1)
    return model.log_probs(tokens, torch.cat((prompts, ids), dim=1), mask)[:, prompts.size(1):]


@torch.no_grad()
def validation_loss(model, data, split, batch_size=250):
    """Mean loss in nats per token, of one sample per group: the first of the first, the second of the second, ..."""
    samples = [group[i % len(group)] for i, group in enumerate(data["splits"][split])]
    total, count, dev = 0.0, 0, config.device_of(model)
    with evaluating(model), config.autocast(model):
        for first in range(0, len(samples), batch_size):
            numbers, which, inputs, targets = collate(model, data, samples[first:first + batch_size])
            _, loss = model(data["images"][numbers][which].to(dev), inputs.to(dev), targets.to(dev))
            n = (targets != IGNORE_INDEX).sum().item()
            total, count = total + loss.item() * n, count + n
    return total / count


def evaluate(model, data, split, **decoding):
    """(scores, captions) of a split: those of caption_scores(), and for drawn images the share of captions in which
    every attribute is right."""
    groups = data["splits"][split]
    prompts = [group[0] | {"messages": group[0]["messages"][:-1]} for group in groups]
    captions, ended, _ = write_answers(model, data["images"], data["tokenizer"], prompts, **decoding)
    references = [answers(group) for group in groups]
    scores = caption_scores(captions, ended, references)
    if data["drawn"]:
        right = [attributes(c) == attributes(refs[0]) for c, refs in zip(captions, references)]
        scores["all_right"] = 100 * float(np.mean(right))
    return scores, captions


def evaluate_both(model, data, split, beams, length_penalty):
    """(scores, captions) of evaluate(), greedy; with beam_cider and beam_bleu4, the scores of a beam search, and
    cider_others, against all references but the first, as people are scored."""
    scores, captions = evaluate(model, data, split)
    others = [answers(group)[1:] for group in data["splits"][split]]
    if all(others):
        scores["cider_others"] = 100 * cider(captions, others)[0]
    if beams > 1:
        by_beams, _ = evaluate(model, data, split, beams=beams, length_penalty=length_penalty)
        scores |= {f"beam_{name}": by_beams[name] for name in ("cider", "bleu4")}
    return scores, captions


def draw_captions(path, data, groups, texts):
    """Draw the image of each group with a text; photos with a human caption under it."""
    humans = ["" if data["drawn"] else f"\nhuman: {answers(group)[0]}" for group in groups]
    images = [data["images"][group[0]["images"][0]] for group in groups]
    save_grid(path, images, [text + human for text, human in zip(texts, humans)])


# the model -----------------------------------------------------------------------------------------------------------

def build_model(tokenizer):
    """A new MLLM, its ViT and GPT from vit_ckpt and gpt_ckpt where those are named; {part: where it came from}."""
    vit_config = ViTConfig(image_size, patch_size, vit_layer, vit_head, vit_embd, dropout=dropout, stem=stem)
    gpt_config = GPTConfig(tokenizer.vocab_size, 0, gpt_layer, gpt_head, gpt_embd, dropout, norm="layer")
    origin = dict.fromkeys(("vit", "connector", "gpt"), "new")
    if vit_ckpt:
        vit = config.load(vit_ckpt, "vit")
        vit_config = dataclasses.replace(ViTConfig(**vit["config"].get("vit", vit["config"])), dropout=dropout)
    if gpt_ckpt:
        gpt = config.load(gpt_ckpt, "gpt")
        if gpt["tokenizer"] != tokenizer.state():
            config.fail(f"{gpt_ckpt} was trained with another tokenizer than data/{dataset} has; train it on that data")
        gpt_config = dataclasses.replace(GPTConfig(**gpt["config"]), dropout=dropout)
        if gpt_config.positions == "learned":
            config.fail(f"{gpt_ckpt} has learnt positions, which end at {gpt_config.block_size}; rotary ones do not")
    if fusion == "cross":
        gpt_config = dataclasses.replace(gpt_config, cross_every=cross_every)
    sizes = MLLMConfig(vit_config, gpt_config, connector)
    room = dataclasses.replace(gpt_config, block_size=sizes.n_placeholders(image_size) + max_tokens)
    model = MLLM(dataclasses.replace(sizes, gpt=room))
    if vit_ckpt:  # of a classifier, or the ViT of CLIP; without its pooling and output layer
        prefix = "vit." if "vit" in vit["config"] else ""
        weights = {name.removeprefix(prefix): w for name, w in vit["model"].items() if name.startswith(prefix)}
        model.vit.load_state_dict({name: w for name, w in weights.items() if not name.startswith(("pool.", "head."))})
        origin["vit"] = f"{vit_ckpt}, step {vit['step']}"
    if gpt_ckpt:
        new = {name: w for name, w in model.gpt.state_dict().items() if ".cross_" in name}  # a text-only GPT has none
        model.gpt.load_state_dict(new | gpt["model"])
        origin["gpt"] = f"{gpt_ckpt}, step {gpt['step']}" + (", cross-attention new" if new else "")
    return model, origin


def freeze(model, phase):
    """Let only those parameters train that the phase trains, and say so."""
    frozen = ["vit", "gpt"] if phase == "align" else [] if train_vit else ["vit"]
    for name, p in model.named_parameters():  # cross-attention is new, as the connector is
        p.requires_grad_(name.split(".")[0] not in frozen or ".cross_" in name)
    n = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"phase {phase}: {n:,} parameters train; frozen: {', '.join(frozen) or 'none'}")


# using a captioner ---------------------------------------------------------------------------------------------------

def load_captioner(path, stage, device, dtype):
    """(model, checkpoint) from a file that this stage or scst.py saved."""
    checkpoint = config.load(path, stage)
    model = MLLM(MLLMConfig.from_dict(checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    return config.place(model, config.pick_device(device), dtype), checkpoint


def data_of(checkpoint):
    """The data that a captioner was trained on, as of load_samples(), with the tokenizer of its checkpoint."""
    sft = checkpoint.get("sft_settings", checkpoint["settings"])  # those of the run of this stage
    data = load_samples(sft["dataset"], sft["image_size"], sft["n_drawn"])
    return data | {"tokenizer": tokenizer_from_state(checkpoint["tokenizer"])}


@torch.no_grad()
def words_and_places(model, tokenizer, pixels, caption):
    """The words of a caption, and where the model looks as it writes each: a list of str, and (words, n) shares of the
    image. pixels: (1, 3, H, W)."""
    prompt = model.caption_prompt(model.encode(pixels))
    room = model.config.gpt.block_size + 1 - prompt.size(1)
    ids = torch.tensor(tokenizer.encode(caption)[:room], dtype=torch.long, device=prompt.device)
    seen = model.attention_to_images(pixels, torch.cat((prompt, ids[None, :-1]), dim=1))[0, prompt.size(1) - 1:]
    starts = [i for i, token in enumerate(ids.tolist()) if i == 0 or tokenizer.decode([token]).startswith(" ")]
    spans = [slice(*pair) for pair in zip(starts, [*starts[1:], len(ids)])]
    words = [tokenizer.decode(ids[span].tolist()).strip() for span in spans]
    return words, torch.stack([seen[span].mean(dim=0) for span in spans])


def caption_files(model, checkpoint, settings):
    """Print the captions of the images at settings["image"] with their log-probabilities, and draw them; of the first
    images also where the model looked for each word."""
    out, tokenizer = Path(settings["out_dir"]), tokenizer_from_state(checkpoint["tokenizer"])
    (photos, broken), each = open_images(settings["image"]), settings["num_captions"]
    inputs = torch.stack([to_pixels(photo, checkpoint["image_transform"]["size"]) for _, photo in photos])
    prompts = [caption_sample(i) for i in range(len(photos))]
    dev, log_probs = config.device_of(model), []
    captions, _, ids = write_answers(
        model, inputs, tokenizer, prompts, beams=max(settings["beams"], each), num_captions=each,
        length_penalty=settings["length_penalty"], temperature=settings["temperature"],
        generator=torch.Generator(dev).manual_seed(settings["seed"]))
    with torch.no_grad(), evaluating(model), config.autocast(model):
        for some, written in zip(inputs.split(50), ids.split(50 * each)):
            tokens = model.encode(some.to(dev)).repeat_interleave(each, dim=0)
            log_probs += caption_log_probs(model, tokens, written).sum(dim=1).tolist()
    lines = [f"{caption}  (log p {log_p:.1f})" for caption, log_p in zip(captions, log_probs)]
    for i, line in enumerate(lines):
        print(f"{photos[i // each][0]}: {line}")
    pictures = [to_pixels(photo, 256) for _, photo in photos]
    titles = ["\n".join(lines[i:i + each]) for i in range(0, len(lines), each)]
    save_grid(out / "captioned.png", pictures, titles, min(4, len(photos)))
    print(f"wrote {out / 'captioned.png'}")
    for i, picture in enumerate(pictures[:4]):
        if captions[i * each]:
            words, places = words_and_places(model, tokenizer, inputs[i:i + 1].to(dev), captions[i * each])
            draw_places(out / f"places_{i + 1}_{Path(photos[i][0]).stem}.png", picture, words, places.cpu())
    if broken:
        config.fail(f"not images that Pillow can read: {', '.join(broken)}")


def print_baselines(model, data, split):
    """A table of what people, the nearest training photos' captions and the model (or None) score on a split, all
    against the references but the first, which is the caption of the people."""
    texts = {group[0]["images"][0]: answers(group) for groups in data["splits"].values() for group in groups}
    train, photos = ([group[0]["images"][0] for group in data["splits"][name]] for name in ("train", split))
    captions, others = {"people": [texts[p][0] for p in photos]}, [texts[p][1:] for p in photos]
    if not all(others):
        config.fail("to compare people with each other takes two captions of each photo")
    captions["nearest training photos"] = nearest_captions(data["images"], texts, train, photos)
    if model:
        captions["this model, greedy"] = evaluate(model, data, split)[1]
    print(f"{split:<24}{'CIDEr':>8}" + "".join(f"{f'BLEU-{n}':>8}" for n in range(1, 5)))
    for name, said in captions.items():
        values = 100 * np.array([cider(said, others)[0], *bleu(said, others)])
        print(f"{name:<24}" + "".join(f"{value:>8.1f}" for value in values))


def use(path, stage, settings):
    """What --image, --eval_only or --baselines asks of the captioner at path; settings: of this stage or scst.py."""
    model, checkpoint = load_captioner(path, stage, settings["device"], settings["dtype"])
    if settings["image"]:
        return caption_files(model, checkpoint, settings)
    data, split = data_of(checkpoint), settings["eval_split"]
    if not settings["eval_only"]:
        return print_baselines(model, data, split)
    scores, _ = evaluate_both(model, data, split, settings["beams"], settings["length_penalty"])
    print(f"{path}, step {checkpoint['step']}, {split}: "
          + " | ".join(f"{name} {value:.2f}" for name, value in scores.items()))


# training ------------------------------------------------------------------------------------------------------------

def train(model, data, phase, settings, resumed, before):
    """One phase of training, after the run before, if there was one; returns its config.Run."""
    groups, dev = data["splits"]["train"], config.device_of(model)
    per_step = min(batch_size, len(groups))  # photos
    config.check_batch(per_step, accumulation)
    freeze(model, phase)
    optimizers = config.optimizers(model, muon_lr, adam_lr, weight_decay)
    end = align_share if phase == "align" else 1.0  # the share of the run at which the phase ends
    run = config.Run("mllm", settings, dataset, model, optimizers, resumed, f"{phase}.pt", end, before)
    run_model = config.maybe_compile(model, compile)

    while True:
        progress = run.progress()  # from 0 to 1, by steps or by minutes
        factor = config.lr_factor(run.step - run.first[0], progress, warmup_steps, cooldown)
        if run.due():
            with run.paused():
                numbers, scores = {"phase": phase, "val": validation_loss(model, data, "val")}, {}
                score = -numbers["val"]
                if phase == "sft":
                    scores, captions = evaluate(model, data, "val")
                    # for drawn images CIDEr tells which of the five wordings it chose, more than whether it is right
                    score = scores.get("all_right", scores["cider"])
                    draw_captions(run.out / "captions.png", data, data["splits"]["val"][:12], captions)
                scores = {f"val_{name}": value for name, value in scores.items()}
                brief = ("val_cider", "val_bleu4", "val_shuffled", "val_all_right")
                numbers |= {name: scores[name] for name in brief if name in scores}
                run.log(numbers, factor * adam_lr, per_step * captions_per_photo, "captions", file_only=scores)
                run.save(score, tokenizer=data["tokenizer"].state(), image_transform={"size": image_size}, phase=phase)
        if progress == 1:
            break
        draw, samples = config.shared_generator(seed, run.step), []
        for i in config.epoch_rows(len(groups), per_step, run.step, seed).tolist():
            order = torch.randperm(len(groups[i]), generator=draw).tolist()  # a photo with fewer captions repeats them
            samples.append([groups[i][order[j % len(order)]] for j in range(captions_per_photo)])
        config.seed_step(seed, run.step)  # of augmentation and dropout
        samples = config.my_share(samples)
        b = len(samples) // accumulation
        parts = [get_batch(model, data, sum(samples[i:i + b], [])) for i in range(0, len(samples), b)]
        counts = [(targets != IGNORE_INDEX).sum().item() for *_, targets in parts]
        n_targets, = config.sum_numbers(sum(counts), device=dev)  # of the whole batch
        loss = 0.0
        for (images, which, inputs, targets), n in zip(parts, counts):
            with config.autocast(model):
                tokens = model.encode(images)[which]  # (n, N, C): samples about the same image share its tokens
                part = run_model(tokens, inputs, targets, label_smoothing)[1] * n / n_targets  # of the batch's loss
            part.backward()
            loss += part.detach()
        run.advance(config.update(model, optimizers, loss, factor, grad_clip))
    run.stop()
    return run


@config.one_line_errors
def main(argv=None):
    settings, out = config.override(globals(), argv), Path(out_dir)
    if image or eval_only or baselines and (out / "sft.pt").is_file():
        return use(out / "sft.pt", "mllm", settings)
    data = load_samples(dataset, image_size, n_drawn)
    if baselines:
        return print_baselines(None, data, eval_split)

    dev, resumed = config.pick_device(device), config.resume("mllm", settings, tokenizer=data["tokenizer"].state())
    torch.manual_seed(seed)
    if resumed:
        model, origin = MLLM(MLLMConfig.from_dict(resumed["config"])), {"vit": out, "connector": out, "gpt": out}
    else:
        model, origin = build_model(data["tokenizer"])
    model = config.place(model, dev, resumed["dtype"] if resumed else dtype)
    print(f"{dataset}: " + ", ".join(f"{len(groups):,} photos to {split}" for split, groups in data["splits"].items())
          + f"; {model.config.n_image_tokens(image_size)} image tokens each; on {dev}")
    for part, where in origin.items():
        print(f"{part:<9} {sum(p.numel() for p in getattr(model, part).parameters()):>10,} parameters, {where}")

    run = None
    for phase in ("align", "sft"):
        if phase == "sft" or align_share and not (resumed and resumed["phase"] == "sft"):
            run, resumed = train(model, data, phase, settings, resumed, run), None

    if not config.is_main():
        return
    plot(out, right=("val_cider",))
    model.load_state_dict(config.load(out / "sft.pt", "mllm")["model"])
    scores, _ = evaluate_both(model, data, "test", beams, length_penalty)
    run.log({}, file_only={f"test_{name}": value for name, value in scores.items()})
    print("test: " + " | ".join(f"{name} {value:.2f}" for name, value in scores.items()))
    if "all_right" in scores:
        print(f"held-out drawn images whose caption has every attribute right: {scores['all_right']:.1f}%")
    print(f"best validation {'share all right' if data['drawn'] else 'CIDEr'} {run.best:.2f} after "
          f"{run.seconds() / 60:.1f} minutes of training; wrote {out}/captions.png, loss.png, sft.pt")


if __name__ == "__main__":
    main()
