"""
Stage 1: a vision transformer learns CIFAR-10, or to match photos with their captions (CLIP).

    python prepare_cifar.py && python vit.py config/cifar_cpu.py
    python vit.py config/cifar_cpu.py --image=cat.jpg
    python prepare_flickr8k.py && python vit.py config/clip_cpu.py
    python vit.py config/clip_cpu.py --image=photo.jpg --texts="a dog, a mountain, a street"
    python vit.py config/clip_cpu.py --eval_only=True --dataset=cifar10       zero-shot

A run writes log.csv, loss.png, the checkpoints best.pt and last.pt and, for CIFAR-10,
predictions.png to out_dir. The best checkpoint is chosen on validation data: 5,000 of CIFAR-10's
50,000 training images, or 1,000 photos.
"""

import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import config
from config.tools import run
from config.tools.data import (
    augment_photos,
    load_data,
    load_photos,
    open_images,
    pad_texts,
    shift_and_mirror,
    to_pixels,
    word_shares,
)
from config.tools.metrics import recalls
from config.tools.optim import lr_factor, make_optimizers, update
from config.tools.pictures import plot, save_grid
from config.tools.pretrained import load_part, load_weights
from model import CLIP, CLIPConfig, ViT, ViTConfig, evaluating, tokenizer_from_state

# the run
out_dir = "out/cifar"  # checkpoints, log and pictures
init_from = "scratch"  # or "resume": continue from out_dir/last.pt
eval_only = False  # evaluate out_dir/best.pt and stop
eval_split = "val"  # what eval_only evaluates: train, val or test
image = ""  # classify this file, folder or URL and stop
texts = "a dog, people, a bicycle, snow, a street"  # CLIP chooses among these for the image
device = "auto"  # cuda, mps or cpu
dtype = "auto"  # bfloat16 where the hardware has instructions for it, else float32
seed = 1337  # of everything random: weights, batches, augmentation, dropout
# data
task = "classify"  # learn the classes of CIFAR-10; or clip: match photos with their captions
dataset = "cifar10"  # for clip a folder under data/ of prepare_flickr8k.py, such as flickr8k
batch_size = 256  # images per step, over all processes
image_size = 64  # CIFAR's 32 pixels doubled: the stem halves them at once
first_size = 32  # images grow from this size: a quarter of the patches take a third of the time
train_size = 0  # clip: they grow to this size; things look larger in crops; 0: image_size
mirror = True  # mirror half of the training images, but no photo whose caption says left or right
crop = 0.5  # clip: smallest share of its area that is seen of a training photo
jitter = 0.3  # clip: brightness, contrast and saturation change by up to this factor
max_tokens = 32  # clip: longer captions are cut off
# model
vit_ckpt = ""  # clip: the classifier or CLIP whose ViT it starts from; empty: random weights
patch_size = 8  # of the doubled pixels: 8x8 tokens per image
n_layer = 6  # blocks
n_head = 6  # attention heads per block
n_embd = 192  # channels
dropout = 0.0  # augmentation does more at this size
patch_dropout = 0.0  # share of the patches that are left out in training
stem = "residual"  # convolutions; or patch: one linear layer as in the ViT paper, for more data
label_smoothing = 0.1  # share of CIFAR-10's target that is spread over all classes
# optimization
max_steps = 20000  # length of the run
muon_lr = 0.01  # peak rate of the weight matrices of linear layers; 0: AdamW for all
adam_lr = 4e-3  # peak rate of everything else
weight_decay = 0.05  # of matrices and embeddings, relative to the rate
warmup_steps = 100  # steps in which the rate rises to its peak
cooldown = 0.8  # the last part of the run, in which the rate falls to zero in a straight line
grad_clip = 1.0  # largest norm of the gradient; 0: none
eval_interval = 250  # steps between evaluations

N_VAL = 5000  # images held out from CIFAR-10's training set
SHIFT = 4  # CIFAR-10's images move by up to so many of their 32 pixels
PIXEL_MEAN = (125.3, 123.0, 113.9)  # of CIFAR-10's training images: red, green, blue
PIXEL_STD = (63.0, 62.1, 66.7)
GROWTH = 0.9  # the part of the run in which images grow


def resize(images, size):
    """(B, 3, H, W) -> (B, 3, size, size) float, still 0 to 255"""
    return F.interpolate(images.float(), (size, size), mode="bilinear")


def size_at(step):
    """Return the side of the images at a step: from first_size on, a patch more at equal intervals
    (Tan and Le 2021, EfficientNetV2, without their stronger augmentation of larger images)."""
    last_size = train_size or image_size
    sizes = range(min(first_size, last_size), last_size + 1, patch_size)
    progress = min(1.0, step / max_steps / GROWTH)
    return sizes[int(progress * (len(sizes) - 1))]


# CIFAR-10: what is in the image? ------------------------------------------------------------------


def load_cifar(device):
    """Return {images (60000, 3, 32, 32) uint8 and labels (60000,), on the device; splits: {train,
    val, test: indices}; about: what using the model needs to know}."""

    def read(name):
        return load_data(f"data/cifar10/{name}", "python prepare_cifar.py")

    images = np.concatenate((read("train_images.npy"), read("test_images.npy")))
    labels = np.concatenate((read("train_labels.npy"), read("test_labels.npy")))
    n, n_train = len(labels), len(read("train_labels.npy"))
    # the same split in every run
    order = torch.randperm(n_train, generator=torch.Generator().manual_seed(0))
    return {
        "images": torch.from_numpy(images).to(device),
        "labels": torch.from_numpy(labels).long().to(device),
        "splits": {"train": order[N_VAL:], "val": order[:N_VAL], "test": torch.arange(n_train, n)},
        "about": {"image_size": images.shape[-1], "classes": read("classes.json")},
    }


def vit_config(**others):
    """Return the ViTConfig of the settings, with values of other fields."""
    return ViTConfig(
        image_size,
        patch_size,
        n_layer,
        n_head,
        n_embd,
        dropout=dropout,
        stem=stem,
        pixel_mean=PIXEL_MEAN,
        pixel_std=PIXEL_STD,
        patch_dropout=patch_dropout,
        **others,
    )


def new_classifier(data):
    n_classes = len(data["about"]["classes"])
    return ViT(vit_config(n_classes=n_classes, label_smoothing=label_smoothing))


def learn_classes(model, data, rows, step):
    """Add the gradient of a batch, rows of the training images. Return the loss. Both are this
    process's share."""
    size = size_at(step)
    rows = data["splits"]["train"][run.my_share(rows)].to(data["images"].device)
    is_mirrored = (torch.rand(len(rows), device=rows.device) < 0.5) & mirror
    images = shift_and_mirror(data["images"][rows], SHIFT, is_mirrored)
    labels = data["labels"][rows]
    with run.autocast(model):
        _, loss = model(resize(images, size), labels)
    loss = loss / run.n_processes()
    loss.backward()
    return loss.detach()


@torch.no_grad()
def predict(model, images):
    """(n, 3, H, W) -> (n, n_classes) float32 logits on the CPU, the mean of those of an image and
    its mirror image."""
    logits = []
    with evaluating(model), run.autocast(model):
        for batch in images.split(250):
            x = resize(batch.to(run.device_of(model)), model.config.image_size)
            both = model(x)[0].float() + model(x.flip(3))[0].float()
            logits.append(both.cpu() / 2)
    return torch.cat(logits)


def evaluate_classes(model, data, split):
    """Return {split: loss, split_accuracy: per cent}."""
    rows = data["splits"][split]
    labels = data["labels"][rows].cpu()
    logits = predict(model, data["images"][rows])
    accuracy = (logits.argmax(dim=1) == labels).float().mean().item()
    return {split: F.cross_entropy(logits, labels).item(), f"{split}_accuracy": 100 * accuracy}


def draw_predictions(model, data, rows, path):
    """Draw images with the predicted class of each, and the right one in brackets."""
    images = data["images"][rows]
    classes = data["about"]["classes"]
    guesses = predict(model, images).argmax(dim=1)
    pairs = zip(guesses, data["labels"][rows])
    titles = [f"{classes[guess]} ({classes[label]})" for guess, label in pairs]
    save_grid(path, list(images), titles, columns=5)


# CLIP: which caption belongs to which photo? ------------------------------------------------------


def load_captioned():
    """Return {images (n, 3, image_size, image_size) uint8; splits: {train, val, test: the photos, a
    list of (index, captions)}; words: of the training photos, see word_shares(); tokenizer; about:
    what using the model needs to know}."""
    images, groups, tokenizer = load_photos(dataset, image_size)
    assert torch.is_tensor(images), f"data/{dataset} holds tiles, not whole photos"
    splits = {split: [captions_of(group) for group in rows] for split, rows in groups.items()}
    return {
        "images": images,
        "splits": splits,
        "words": word_shares([captions for _, captions in splits["train"]], tokenizer),
        "tokenizer": tokenizer,
        "about": {"image_size": image_size, "tokenizer": tokenizer.state()},
    }


def captions_of(group):
    """Return the index of a photo and its captions, of the samples about it."""
    conversations = [sample["messages"] for sample in group]
    assert all(messages[0]["content"] == "<image>" for messages in conversations), (
        f"data/{dataset} holds questions; CLIP learns from captions"
    )
    return group[0]["images"][0], [messages[1]["content"] for messages in conversations]


def new_clip(data):
    checkpoint = load_part(vit_ckpt, "vit") if vit_ckpt else None
    vit = ViTConfig(**checkpoint["config"]) if checkpoint else vit_config()
    vit = dataclasses.replace(vit, n_classes=0, dropout=dropout, patch_dropout=patch_dropout)
    model = CLIP(CLIPConfig(vit, data["tokenizer"].vocab_size, max_tokens, dropout=dropout))
    if checkpoint:
        load_weights(model.vit, checkpoint, "pixel_")
        print(f"ViT of {vit_ckpt}")
    return model


def learn_matching(model, data, rows, step):
    """Add the gradient of a batch, rows of the training photos, each with one of its captions.
    Return the loss. Both are this process's share."""
    size = size_at(step)
    draw = run.shared_generator(seed, step)
    pairs = []
    for photo, captions in [data["splits"]["train"][row] for row in rows.tolist()]:
        pairs.append((photo, captions[torch.randint(len(captions), (), generator=draw)]))
    photos, captions = zip(*run.my_share(pairs))
    dev = run.device_of(model)
    images = data["images"][list(photos)].to(dev)
    images = augment_photos(images, [[caption] for caption in captions], crop, jitter, mirror, size)
    ids = pad_texts(captions, data["tokenizer"], max_tokens).to(dev)
    words = data["words"][run.my_share(rows)].to(dev)
    vectors, word_logits = embed_pairs(model, images, ids)
    # every photo is compared with all texts of the batch
    loss = model.loss(*gather(vectors)) + F.cross_entropy(word_logits, words)
    loss = loss / run.n_processes()
    loss.backward()
    return loss.detach()


def gather(tensor):
    """Return the tensors of all processes, joined along their second dimension.

    The gradient of a loss that all processes compute reaches this process's part alone, so it is
    multiplied by their number.
    """
    n = run.n_processes()
    if n == 1:
        return tensor
    own = tensor.detach()
    tensors = [torch.empty_like(own) for _ in range(n)]
    dist.all_gather(tensors, own.contiguous())
    tensors[run.rank()] = own + n * (tensor - own)
    return torch.cat(tensors, dim=1)


def embed_pairs(model, images, ids):
    """Return the vectors of photos and of their texts, (2, B, n_shared), and the logits of the
    words in the photos, (B, vocab_size)."""
    with run.autocast(model):
        pooled = model.vit.pooled(images)
        vectors = torch.stack((model.embed_pooled(pooled), model.embed_texts(ids)))
        return vectors, model.words_head(pooled).float()


@torch.no_grad()
def embed(model, images, captions, tokenizer):
    """(n, 3, H, W) images and m str -> (n, n_shared) and (m, n_shared) unit vectors, on the CPU"""
    dev = run.device_of(model)
    ids = pad_texts(captions, tokenizer, model.config.max_tokens)
    with evaluating(model), run.autocast(model):
        image_vectors = [model.embed_images(batch.to(dev)).cpu() for batch in images.split(250)]
        text_vectors = [model.embed_texts(batch.to(dev)).cpu() for batch in ids.split(250)]
    return torch.cat(image_vectors), torch.cat(text_vectors)


def evaluate_matching(model, data, split):
    """Return {split_recall: the mean of text10 and photo10, and all of recalls()}."""
    photos, captions = zip(*data["splits"][split])
    owner = torch.tensor([i for i, photo_captions in enumerate(captions) for _ in photo_captions])
    texts = [caption for photo_captions in captions for caption in photo_captions]
    images, texts = embed(model, data["images"][list(photos)], texts, data["tokenizer"])
    scores = {f"{split}_{name}": value for name, value in recalls(images @ texts.T, owner).items()}
    recall = (scores[f"{split}_text10"] + scores[f"{split}_photo10"]) / 2
    return {f"{split}_recall": recall} | scores


def evaluate_zero_shot(model, data, split):
    """Return the accuracy of CLIP on CIFAR-10, in per cent: it takes the class whose text, "a
    <class>", is the nearest (Radford et al. 2021, section 3.1)."""
    tokenizer = tokenizer_from_state(run.load(Path(out_dir, "best.pt"), "vit")["tokenizer"])
    rows = data["splits"][split]
    texts = [f"a {name}" for name in data["about"]["classes"]]
    pixels = resize(data["images"][rows], model.config.vit.image_size)
    images, texts = embed(model, pixels, texts, tokenizer)
    is_right = (images @ texts.T).argmax(dim=1) == data["labels"][rows].cpu()
    return {f"{split}_accuracy": 100 * is_right.float().mean().item()}


# the run ------------------------------------------------------------------------------------------


def load_model(checkpoint):
    """Return the classifier or the CLIP that a run of this stage has saved."""
    c = checkpoint["config"]
    model = ViT(ViTConfig(**c)) if "classes" in checkpoint else CLIP(CLIPConfig.from_dict(c))
    model.load_state_dict(checkpoint["model"])
    return model


@torch.no_grad()
def classify(model, checkpoint):
    """Print the likeliest classes, or with CLIP the nearest of texts, of a user's images, and draw
    them."""
    opened = open_images(image)
    photos = [images[0] for _, images in opened]
    inputs = torch.stack([to_pixels(photo, checkpoint["image_size"]) for photo in photos])
    if "classes" in checkpoint:
        labels = checkpoint["classes"]
        logits = predict(model, inputs)
    else:
        # like the captions of the training
        labels = [text.lower().strip(" .") for text in texts.split(",")]
        tokenizer = tokenizer_from_state(checkpoint["tokenizer"])
        vectors = embed(model, inputs, labels, tokenizer)
        logits = model.logits(*(v.to(run.device_of(model)) for v in vectors)).cpu()
    titles = []
    for (name, _), probs in zip(opened, logits.softmax(dim=1)):
        top = probs.topk(min(5, len(labels)))
        lines = [
            f"{labels[i]} {100 * p:.1f}%" for p, i in zip(top.values.tolist(), top.indices.tolist())
        ]
        print(f"{name}: " + ", ".join(lines))
        titles.append("\n".join([name, *lines]))
    save_grid(Path(out_dir, "classified.png"), [to_pixels(photo, 256) for photo in photos], titles)
    print(f"wrote {out_dir}/classified.png")


@run.one_line_errors
def main(argv=None):
    settings = config.override(globals(), argv)
    out = Path(out_dir)
    assert task in ("classify", "clip"), f"task={task}: classify or clip"
    assert task != "clip" or dataset != "cifar10" or eval_only or image, (
        "task=clip learns from captions: see config/clip_cpu.py"
    )
    assert first_size % patch_size == train_size % patch_size == 0, (
        f"first_size and train_size must be multiples of patch_size={patch_size}"
    )
    learn, evaluate, score = learn_classes, evaluate_classes, "accuracy"
    if task == "clip":
        learn, evaluate, score = learn_matching, evaluate_matching, "recall"
        if dataset == "cifar10":
            evaluate = evaluate_zero_shot
    dev = run.pick_device(device)
    if image or eval_only:
        checkpoint = run.load(out / "best.pt", "vit")
        model = run.place(load_model(checkpoint), dev, dtype)
        if image:
            return classify(model, checkpoint)
        trained_task = checkpoint["settings"]["task"]
        assert trained_task == task, f"{out}/best.pt has learnt task={trained_task}; give that"

    on_photos = task == "clip" and dataset != "cifar10"
    data = load_captioned() if on_photos else load_cifar(dev)
    if eval_only:
        assert eval_split in data["splits"], f"eval_split={eval_split}: train, val or test"
        scores = evaluate(model, data, eval_split)
        print(
            f"{out}/best.pt: " + " | ".join(f"{name} {value:.4g}" for name, value in scores.items())
        )
        return
    n_train = len(data["splits"]["train"])
    assert n_train >= batch_size, (
        f"batch_size={batch_size} is larger than the training set of {n_train} images; lower it"
    )
    run.check_batch(batch_size, 1)

    torch.manual_seed(seed)
    model = new_classifier(data) if task == "classify" else new_clip(data)
    model = run.place(model, dev, dtype)
    optimizers = make_optimizers(model, muon_lr, adam_lr, weight_decay)
    resumed = run.start("vit", settings)
    step, seconds, best = 0, 0.0, -1.0
    if resumed:
        step, seconds, best = (resumed[name] for name in ("step", "seconds", "best"))
        run.restore(resumed, model, optimizers)
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{n_train:,} images to train on; {n_parameters:,} parameters on {dev}")

    losses = []  # since the last evaluation
    start = time.perf_counter()
    while True:
        factor = lr_factor(step, max_steps, warmup_steps, cooldown)

        if step % eval_interval == 0 or step == max_steps:
            row = {"step": step, "lr": factor * adam_lr} | run.pace(
                losses, time.perf_counter() - start
            )
            seconds += time.perf_counter() - start  # of training, without evaluations
            if run.is_main():
                row |= evaluate(model, data, "val") | {"minutes": seconds / 60}
                run.log(out, row, ("train", "val", f"val_{score}", "lr", "ms_per_step", "minutes"))
                is_best = row[f"val_{score}"] >= best
                best = max(row[f"val_{score}"], best)
                checkpoint = run.checkpoint(
                    "vit",
                    settings,
                    model,
                    optimizers,
                    step=step,
                    seconds=seconds,
                    best=best,
                    **data["about"],
                )
                if is_best:
                    run.save(out / "best.pt", checkpoint)
                run.save(out / "last.pt", checkpoint)
            losses = []
            start = time.perf_counter()
        if step == max_steps:
            break

        rows = run.epoch_rows(n_train, batch_size, step, seed)
        run.seed_step(seed, step)  # of augmentation and dropout
        loss = learn(model, data, rows, step)
        losses.append(update(model, optimizers, loss, factor, grad_clip))
        step += 1
        run.show_step(out, step, max_steps, loss=losses)

    if run.is_main():
        plot(out, right=(f"val_{score}",))
        model.load_state_dict(run.load(out / "best.pt", "vit")["model"])
        scores = evaluate(model, data, "test")
        run.log(out, {"step": step} | scores, scores)
        if task == "classify":
            draw_predictions(model, data, data["splits"]["test"][:25], out / "predictions.png")
        print(
            f"best validation {score} {best:.2f} after {seconds / 60:.1f} minutes of training; "
            f"wrote {out}/*.png"
        )


if __name__ == "__main__":
    main()
