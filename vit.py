"""
Stage 1: a vision transformer learns CIFAR-10, or to match photos with their captions (CLIP).

    python prepare_cifar.py && python vit.py config/cifar_cpu.py
    python vit.py config/cifar_cpu.py --image=cat.jpg
    python prepare_flickr8k.py && python vit.py config/clip_cpu.py
    python vit.py config/clip_cpu.py --image=photo.jpg --texts="a dog, a mountain, people in a street"

Expect 88% of the test images from config/cifar_cpu.py, in 40 minutes on two CPU cores with AVX512-BF16 (one seed); and
from config/clip_cpu.py, of 1,000 test photos, an own caption among the ten nearest for 30%, in 8 minutes.
Settings are overridden from the left to the right by config files and --key=value; --help lists them. A run writes
log.csv, loss.png, the checkpoints best.pt and last.pt and, of CIFAR-10, predictions.png and confusion.png to out_dir.
The best checkpoint is chosen on validation data: 5,000 of CIFAR-10's 50,000 training images, or 1,000 photos.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import config
from model import CLIP, CLIPConfig, ViT, ViTConfig, evaluating, tokenizer_from_state

# the run
out_dir = "out/cifar"  # checkpoints, log and pictures
init_from = "scratch"  # or "resume": go on from out_dir/last.pt
eval_only = False  # evaluate out_dir/best.pt and stop
eval_split = "val"  # what eval_only evaluates: train, val or test
image = ""  # classify this file, folder or URL and stop
device = "auto"  # cuda, mps or cpu
dtype = "auto"  # bfloat16 on CUDA, else float32
compile = False  # torch.compile: a minute at the start, faster steps on a GPU
seed = 1337  # of everything random: weights, batches, dropout, samples
texts = "a dog, a child, people, a ball, a bicycle, water, snow, a street"  # among which CLIP chooses for the image
# data
dataset = "cifar10"  # learn its classes; or flickr8k, the folder of photos with captions under data/: learn as CLIP
n_val = 5000  # images held out from CIFAR-10's training set
batch_size = 256  # images a step, over all processes and parts
accumulation = 1  # parts that a process cuts its share of the batch into: less memory, the same training
image_size = 64  # CIFAR's 32 pixels doubled: the stem's first convolution has stride 2, and stage 3 sees large photos
first_size = 32  # the images grow from this size, patch by patch: with a quarter of the tokens a step takes a third
growth = 0.7  # the share of the run in which they grow; 0: all images have image_size
shift = 4  # CIFAR-10's images move by up to so many of their 32 pixels, and half of them are mirrored
cutmix = 0.0  # share of CIFAR-10's batches in which each image gets a rectangle of another, and a share of its label
mirror_eval = True  # evaluate on CIFAR-10 by the mean of the logits of an image and of its mirror image
crop = 0.5  # CLIP: smallest share of its area that is seen of a training photo
jitter = 0.3  # CLIP: brightness, contrast and saturation of a training photo change by up to this factor
max_tokens = 32  # CLIP: longest caption
# model
vit_ckpt = ""  # CLIP: checkpoint of a classifier, whose ViT it starts from, as large as it is; empty: from nothing
patch_size = 8  # of the doubled pixels: 8x8 tokens an image
n_layer = 6  # blocks
n_head = 6  # attention heads a block
n_embd = 192  # channels
dropout = 0.0  # augmentation does more at this size
activation = "gelu"  # relu, gelu or swiglu
norm = "layer"  # or rms
stem = "conv"  # or patch: one linear layer a patch, as in the ViT paper; needs far more data
label_smoothing = 0.1  # share of CIFAR-10's target that is spread over all classes
text_layer = 2  # CLIP: blocks of the text encoder
text_embd = 128  # CLIP: its channels, and those of the space that photos and captions share
# optimization
max_steps = 20000  # 0: max_minutes alone decides
max_minutes = 0.0  # 0: max_steps alone decides; else whichever comes first
muon_lr = 0.01  # peak rate of the weight matrices of linear layers; 0: AdamW for all
adam_lr = 4e-3  # peak rate of everything else
weight_decay = 0.05  # of matrices and embeddings, in shares of the rate
warmup_steps = 100  # steps in which the rate rises to its peak
cooldown = 0.8  # the last part of the run, in which the rate falls to zero in a straight line
grad_clip = 1.0  # largest norm of the gradient; 0: none
eval_interval = 250  # steps between lines of the log


def resize(images, size):
    """(B, 3, H, W) -> (B, 3, size, size) float, still 0 to 255; channels last, which convolutions on CPUs prefer."""
    images = images.float().contiguous(memory_format=torch.channels_last)
    return images if images.size(-1) == size else F.interpolate(images, (size, size), mode="bilinear")


def lr_factor(step, progress):
    """The rates' share of their peaks: a linear warm-up, a plateau, then a straight line to zero at progress 1."""
    return min(1.0, (step + 1) / max(1, warmup_steps), (1.0 - progress) / max(cooldown, 1e-8))


def size_at(progress):
    """Pixels a side of the images at this share of the run: from first_size on, a patch more after equal times (as in
    Tan and Le 2021, EfficientNetV2, without their stronger augmentation for larger images)."""
    if progress >= growth or first_size == image_size:
        return image_size
    sizes = range(first_size, image_size, patch_size)
    return sizes[int(len(sizes) * progress / growth)]


def load_model(checkpoint):
    """The classifier or the CLIP that a run of this stage has saved."""
    c = checkpoint["config"]
    model = ViT(ViTConfig(**c)) if "classes" in checkpoint else CLIP(CLIPConfig.from_dict(c))
    model.load_state_dict(checkpoint["model"])
    return model


# ---------------------------------------------------------------------------------------------------------------------
# CIFAR-10: what is on the image?


def load_cifar():
    """{split: (images (n, 3, 32, 32) uint8, labels (n,) int64)} of train, val and test; the names of the classes."""
    read = lambda name: config.load_data(f"data/cifar10/{name}", "python prepare_cifar.py")
    array = lambda name: torch.from_numpy(np.array(read(name)))
    images, labels = array("train_images.npy"), array("train_labels.npy").long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # the same split in every run
    val, train = order[:n_val], order[n_val:]
    return {"train": (images[train], labels[train]), "val": (images[val], labels[val]),
            "test": (array("test_images.npy"), array("test_labels.npy").long())}, read("classes.json")


def mix(images, labels, n_classes):
    """CutMix (Yun et al. 2019): (B, 3, H, W) images, each with the same rectangle of another image of the batch, and
    (B, n_classes) targets, the classes by the area that is theirs. Draws from torch's global generator. In the paper a
    rectangle may reach beyond the border, where it is cut off; here all of it lies inside."""
    (B, _, H, W), dev = images.shape, images.device
    share, y, x = torch.rand(3).tolist()
    h, w = round(H * math.sqrt(share)), round(W * math.sqrt(share))
    top, left = round(y * (H - h)), round(x * (W - w))
    order, targets = torch.randperm(B, device=dev), F.one_hot(labels, n_classes).float()
    images = images.clone()
    images[:, :, top:top + h, left:left + w] = images[order, :, top:top + h, left:left + w]
    return images, targets.lerp(targets[order], h * w / (H * W))


@torch.no_grad()
def predict(model, images, dev, context, mirrored, batch_size=500):
    """(n, 3, H, W) -> (n, n_classes) float32 logits, on the CPU; mirrored: the mean with those of the mirror images"""
    logits, size = [], model.config.image_size
    with evaluating(model), context:
        for batch in images.split(batch_size):
            x = resize(batch.to(dev), size)
            both = [model(view)[0].float() for view in ((x, x.flip(3)) if mirrored else (x,))]
            logits.append(torch.stack(both).mean(dim=0).cpu())
    return torch.cat(logits)


class Classification:
    """The task of dataset=cifar10: its data, its loss, its evaluation."""

    score, columns = "val_accuracy", ("val", "val_accuracy", "test", "test_accuracy")

    def __init__(self, dev, context):
        self.data, self.classes = load_cifar()
        self.dev, self.context = dev, context
        self.images, self.labels = (t.to(dev) for t in self.data["train"])
        self.n_train = len(self.images)
        self.about = {"classes": self.classes, "image_transform": {"size": self.images.size(-1)}}  # for the checkpoint
        print(f"CIFAR-10: {self.n_train:,} images to train on, {n_val:,} to validate")

    def new_model(self):
        pixels = self.images.float()
        mean, std = pixels.mean(dim=(0, 2, 3)).tolist(), pixels.std(dim=(0, 2, 3)).tolist()
        return ViT(ViTConfig(image_size, patch_size, n_layer, n_head, n_embd, len(self.classes), dropout, activation,
                             norm, stem, label_smoothing, tuple(mean), tuple(std)))

    def load(self, checkpoint):
        return load_model(checkpoint)

    def example(self, model, size):
        """The loss of one image, for counting arithmetic."""
        return model(resize(self.images[:1], size), self.labels[:1])[1]

    def batch(self, rows):
        """Training images and labels of these rows, augmented."""
        rows = rows.to(self.dev)
        x = config.shift_and_mirror(self.images[rows], shift, torch.rand(len(rows), device=self.dev) < 0.5)
        if cutmix and torch.rand(()) < cutmix:
            return mix(x, self.labels[rows], len(self.classes))
        return x, self.labels[rows]

    def learn(self, model, run_model, batch, size, step):
        """Add the gradient of the loss of the batch to the weights; returns the loss."""
        (x, y), loss = batch, 0.0
        for part in config.parts(model, batch_size, accumulation, seed, step):
            with self.context:
                share = run_model(resize(x[part], size), y[part])[1] * len(x[part]) / batch_size  # of the batch's loss
            share.backward()
            loss += share.detach()
        return loss

    def evaluate(self, model, split):
        """{"": loss, "_accuracy": per cent} of a split; and confusion[i, j], the images of class i taken for class j"""
        images, labels = self.data[split]
        logits = predict(model, images, self.dev, self.context, mirror_eval)
        confusion = torch.zeros(logits.size(1), logits.size(1), dtype=torch.long)
        confusion.index_put_((labels, logits.argmax(dim=1)), torch.ones_like(labels), accumulate=True)
        accuracy = 100 * confusion.trace().item() / len(labels)
        return {"": F.cross_entropy(logits, labels).item(), "_accuracy": accuracy}, confusion

    def report(self, confusion, out):
        report(confusion, self.classes, out / "confusion.png")

    def finish(self, model, out):
        """What a run ends with; returns more numbers for the log."""
        images, labels = (t[:25] for t in self.data["test"])
        draw_predictions(model, images, labels, self.classes, out / "predictions.png", self.dev, self.context)
        return {}


def report(confusion, classes, path):
    """Print the accuracy of each class and draw the confusion matrix."""
    share = confusion / confusion.sum(dim=1, keepdim=True)
    print("per class: " + ", ".join(f"{name} {100 * share[i, i]:.1f}%" for i, name in enumerate(classes)))
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(7, 6))
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i, row in enumerate(confusion.tolist()):
        for j, count in enumerate(row):
            colour = "white" if share[i, j] > 0.5 else "black"
            axis.text(j, i, count, ha="center", va="center", fontsize=8, color=colour)
    axis.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axis.set_yticks(range(len(classes)), classes)
    axis.set(xlabel="what the model says", ylabel="what it is")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"wrote {path}")


@torch.no_grad()
def draw_predictions(model, images, labels, classes, path, dev, context):
    """Draw images (n, 3, H, W), each beside itself lit by how much the pooling attends to its parts, with the class
    that the model sees; where it is wrong, a red frame and what it is."""
    n, size = len(images), 128  # pixels a side of a picture
    with evaluating(model), context:
        features = model.features(resize(images.to(dev), model.config.image_size))
        weights = model.pool.weights(features).float().mean(dim=2)  # (n, N), the mean of the heads
        said = model.head(model.pool(features)).argmax(dim=1).tolist()
    grid = (weights / weights.amax(dim=1, keepdim=True)).view(n, 1, model.grid, model.grid)
    light = F.interpolate(grid, (size, size), mode="bilinear").cpu()  # (n, 1, size, size)
    photos = F.interpolate(images.float(), (size, size))
    pictures, titles = torch.cat((photos, photos * (0.2 + 0.8 * light)), dim=3).byte(), []
    for picture, i, label in zip(pictures, said, labels.tolist()):
        titles.append(classes[i] if i == label else f"{classes[i]}, wrong: {classes[label]}")
        if i != label:
            frame = torch.ones(picture.shape[1:], dtype=torch.bool)
            frame[4:-4, 4:-4] = False
            picture[:, frame] = torch.tensor([[220], [30], [30]], dtype=torch.uint8)
    config.save_grid(path, list(pictures), titles, columns=5)
    print(f"wrote {path}")


# ---------------------------------------------------------------------------------------------------------------------
# CLIP: which caption is whose?


def pad(texts, tokenizer, max_tokens):
    """A list of str -> (n, T) ids: bos, the text, eos, padding; T is the same for all, since a new shape is slow."""
    ids = torch.full((len(texts), max_tokens), tokenizer.pad_id)
    for row, text in zip(ids, texts):
        tokens = [tokenizer.bos_id, *tokenizer.encode(text)[:max_tokens - 2], tokenizer.eos_id]
        row[:len(tokens)] = torch.tensor(tokens)
    return ids


@torch.no_grad()
def embed(model, images, size, texts, tokenizer, dev, context, batch_size=500):
    """(n, 3, H, W) images, brought to size, and a list of m str -> (n, d) and (m, d) unit vectors, on the CPU"""
    longest = model.config.max_tokens
    with evaluating(model), context:
        seen = [model.embed_images(resize(some.to(dev), size)).cpu() for some in images.split(batch_size)]
        read = [model.embed_texts(some.to(dev)).cpu() for some in pad(texts, tokenizer, longest).split(batch_size)]
    return torch.cat(seen), torch.cat(read)


class Contrast:
    """The task of a folder of photos with captions, such as dataset=flickr8k."""

    score = "val_recall"  # at 10, the mean of both directions
    names = ("", "_recall", *[f"_{way}{k}" for k in (1, 5, 10) for way in ("text", "photo")])
    columns = (*[f"val{name}" for name in names], *[f"test{name}" for name in names], "test_zero_shot")

    def __init__(self, dev, context):
        images, table, state = config.load_captioned(dataset, image_size)
        self.images, self.tokenizer = torch.from_numpy(np.array(images)), tokenizer_from_state(state)
        self.captions, self.splits, self.dev, self.context = table["captions"], table["splits"], dev, context
        self.n_train = len(self.splits["train"])
        self.about = {"tokenizer": state, "image_transform": {"size": image_size}}
        print(f"{dataset}: {self.n_train:,} photos to train on, {len(self.splits['val']):,} to validate")

    def new_model(self):
        eye = ViTConfig(image_size, patch_size, n_layer, n_head, n_embd, text_embd, dropout, activation, norm, stem)
        if vit_ckpt:
            checkpoint = config.load(vit_ckpt, "python vit.py config/cifar_cpu.py", has=("n_classes",))
            eye = dataclasses.replace(ViTConfig(**checkpoint["config"]), n_classes=text_embd, dropout=dropout)
            if eye.patch_size != patch_size:
                config.fail(f"{vit_ckpt} has patch_size={eye.patch_size}; give that, instead of {patch_size}")
        model = CLIP(CLIPConfig(eye, self.tokenizer.vocab_size, max_tokens, text_layer, n_embd=text_embd,
                                dropout=dropout))
        if vit_ckpt:
            head = {f"head.{name}": w for name, w in model.vit.head.state_dict().items()}  # the old one told classes
            model.vit.load_state_dict(checkpoint["model"] | head)
            print(f"ViT of {vit_ckpt}, step {checkpoint['step']}")
        return model

    def load(self, checkpoint):
        self.tokenizer = tokenizer_from_state(checkpoint["tokenizer"])
        return load_model(checkpoint)

    def example(self, model, size):
        ids = pad(["a"], self.tokenizer, max_tokens).to(self.dev)
        return model.loss(*model(resize(self.images[:1].to(self.dev), size), ids))

    def batch(self, rows):
        """Photos and the ids of a caption of each, augmented: a photo's own captions are never taken for another's."""
        photos = [self.splits["train"][i] for i in rows.tolist()]
        picked = [self.captions[p][torch.randint(len(self.captions[p]), ()).item()] for p in photos]
        images = self.images[photos].to(self.dev)
        images = config.augment_photos(images, [[text] for text in picked], crop, jitter, True)
        return images, pad(picked, self.tokenizer, max_tokens).to(self.dev)

    def learn(self, model, run_model, batch, size, step):
        """Add the gradient of the loss of the batch to the weights; returns the loss. Every photo is compared with all
        texts of the batch: where it is cut into parts, a first pass without gradients embeds what the others hold."""
        (x, ids), loss, n_parts = batch, 0.0, config.n_parts(batch_size, accumulation)

        def embed_part(part):
            with self.context:
                return torch.stack(run_model(resize(x[part], size), ids[part]))  # (2, b, d): photos, texts

        if n_parts > 1:
            with torch.no_grad():
                mine = [embed_part(part) for part in config.parts(model, batch_size, accumulation, seed, step)]
            everyone = torch.cat(config.gather(torch.cat(mine, dim=1)), dim=1)  # (2, B, d)
        for part in config.parts(model, batch_size, accumulation, seed, step):
            own = embed_part(part)
            whole = torch.cat((everyone[:, :part.start], own, everyone[:, part.stop:]), dim=1) if n_parts > 1 else own
            whole = model.loss(*whole)  # of the batch, but with the gradient of this part's embeddings alone
            whole.backward()
            loss += whole.detach() / n_parts
        model.log_scale.grad /= n_parts  # each part gave all of it
        return loss

    def evaluate(self, model, split):
        """{"": loss, "_recall": ..., "_text1": ...} of a split, in per cent; and None. _text5: for how many photos one
        of the five captions nearest to it is its own; _photo5: for how many captions their photo is among the five
        nearest. _recall: the mean of _text10 and _photo10."""
        photos = self.splits[split]
        owner = torch.tensor([i for i, p in enumerate(photos) for _ in self.captions[p]])  # of each caption
        texts = [text for p in photos for text in self.captions[p]]
        seen, read = embed(model, self.images[photos], image_size, texts, self.tokenizer, self.dev, self.context)
        cosines, scores = seen @ read.T, {}  # (n, m)
        for k in (1, 5, 10):
            own = owner[cosines.topk(min(k, len(texts)), dim=1).indices] == torch.arange(len(photos))[:, None]
            scores[f"_text{k}"] = 100 * own.any(dim=1).float().mean().item()
            own = cosines.topk(min(k, len(photos)), dim=0).indices == owner
            scores[f"_photo{k}"] = 100 * own.any(dim=0).float().mean().item()
        counts = torch.tensor([len(self.captions[p]) for p in photos])
        first = counts.cumsum(dim=0) - counts  # the first caption of each photo
        losses = [model.loss(seen[some].to(self.dev), read[first[some]].to(self.dev)).item()
                  for some in torch.arange(len(photos)).split(batch_size)]
        return {"": float(np.mean(losses)), "_recall": (scores["_text10"] + scores["_photo10"]) / 2} | scores, None

    def report(self, _, out):
        print("text10, photo10: for how many photos one of the ten nearest captions is theirs, and for how many "
              "captions their photo is among the ten nearest; chance is ten over the number of photos")

    def finish(self, model, out):
        """Zero-shot CIFAR-10: the class whose prompt is nearest to the image."""
        if not Path("data/cifar10/test_images.npy").is_file():
            print("no data/cifar10: zero-shot classification left out (python prepare_cifar.py makes it)")
            return {}
        data, classes = load_cifar()
        images, labels = data["test"]
        prompts = [f"a photo of {'an' if name[0] in 'aeiou' else 'a'} {name}" for name in classes]
        seen, read = embed(model, images, image_size, prompts, self.tokenizer, self.dev, self.context)
        accuracy = 100 * ((seen @ read.T).argmax(dim=1) == labels).float().mean().item()
        trained = f", by a model whose ViT started from {vit_ckpt}" if vit_ckpt else ""
        print(f"zero-shot CIFAR-10: {accuracy:.2f}% of the test images (chance 10%){trained}")
        return {"test_zero_shot": accuracy}


# ---------------------------------------------------------------------------------------------------------------------
# the run


@torch.no_grad()
def classify(checkpoint, where, out, dev, context):
    """Print the five likeliest classes, or with CLIP the nearest of texts, of the images at where, and draw them."""
    photos = config.open_images(where)
    size = checkpoint["image_transform"]["size"]  # of the training images: a photo is to look like them
    inputs, titles = torch.stack([config.to_pixels(photo, size) for _, photo in photos]), []
    model = load_model(checkpoint).to(dev)
    if "classes" in checkpoint:
        names, logits = checkpoint["classes"], predict(model, inputs, dev, context, mirror_eval)
    else:
        tokenizer = tokenizer_from_state(checkpoint["tokenizer"])
        names = [text.lower().strip(" .") for text in texts.split(",") if text.strip(" .")]  # as in the training
        if not names:
            config.fail('texts is empty: what is the image to be taken for? Such as --texts="a dog, a cat"')
        seen, read = embed(model, inputs, size, names, tokenizer, dev, context)
        logits = model.logits(seen.to(dev), read.to(dev)).cpu()
    for (name, _), row in zip(photos, logits):
        top = row.softmax(dim=0).topk(min(5, len(names)))
        lines = [f"{names[i]} {100 * p:.1f}%" for p, i in zip(top.values.tolist(), top.indices.tolist())]
        print(f"{name}: " + ", ".join(lines))
        titles.append("\n".join([name, *lines]))
    pictures = [config.to_pixels(photo, 256) for _, photo in photos]
    config.save_grid(out / "classified.png", pictures, titles, min(4, len(photos)))
    print(f"wrote {out / 'classified.png'}")


@config.one_line_errors
def main(argv=None):
    settings = config.override(globals(), argv)
    dev, out, train_with = config.pick_device(device), Path(out_dir), "python vit.py (with the same config)"
    context = config.autocast(dev, dtype)
    config.one_of(("train", "val", "test"), eval_split=eval_split)
    if image:
        checkpoint = config.load(out / "best.pt", train_with, dev, has=("n_classes", "max_tokens"))
        classify(checkpoint, image, out, dev, context)
        return
    if eval_only:
        kind = "n_classes" if dataset == "cifar10" else "max_tokens"
        checkpoint = config.load(out / "best.pt", train_with, dev, has=(kind,))
        if dataset == "cifar10" and n_val != checkpoint["settings"]["n_val"]:
            kept = checkpoint["settings"]["n_val"]
            config.fail(f"n_val={n_val}: the run kept {kept} images from training; give that")
    elif vit_ckpt and dataset == "cifar10":
        config.fail(f"vit_ckpt={vit_ckpt} is for CLIP; a classifier of CIFAR-10 starts from nothing")

    config.at_least(1, eval_interval=eval_interval, batch_size=batch_size, n_val=n_val, n_layer=n_layer,
                    n_head=n_head, text_layer=text_layer)
    config.at_least(0, grad_clip=grad_clip)
    config.at_least(3, max_tokens=max_tokens)
    config.shares(growth=growth, cutmix=cutmix, crop=crop, jitter=jitter, dropout=dropout,
                  label_smoothing=label_smoothing, cooldown=cooldown)
    if growth and (first_size % patch_size or not 0 < first_size <= image_size):
        config.fail(f"first_size={first_size}: a multiple of patch_size={patch_size}, up to image_size={image_size}")
    task = (Classification if dataset == "cifar10" else Contrast)(dev, context)
    if eval_only:
        model = task.load(checkpoint).to(dev)
        scores, details = task.evaluate(model, eval_split)
        print(f"{out / 'best.pt'}, step {checkpoint['step']}: "
              + " | ".join(f"{eval_split}{name} {value:.4g}" for name, value in scores.items()))
        task.report(details, out)
        return

    if task.n_train < batch_size:
        config.fail(f"batch_size={batch_size} is larger than the training set of {task.n_train} images")
    config.n_parts(batch_size, accumulation)  # fails where the batch cannot be cut so
    resumed = config.resume(out, init_from, settings, train_with, tokenizer=task.about.get("tokenizer"))
    torch.manual_seed(seed)
    with config.one_line(ValueError):  # such as n_embd that is not a multiple of n_head
        model = task.load(resumed) if resumed else task.new_model()
    model = model.to(dev, memory_format=torch.channels_last)
    optimizers = config.optimizers(model, muon_lr, adam_lr, weight_decay)
    start, best = 0, -1.0
    if resumed:
        for optimizer, state in zip(optimizers, resumed["optimizers"]):
            optimizer.load_state_dict(state)
        start, best = resumed["step"], resumed["best"]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {dev}")
    flops = {size: config.count_flops(model, lambda: task.example(model, size))
             for size in range(first_size if growth else image_size, image_size + 1, patch_size)}  # of an image
    for size, count in flops.items():
        stem_share = next(n for name, n in count.items() if name.endswith(".patches")) / count["Global"]
        print(f"{size} pixels: {count['Global'] / 1e6:.0f} MFLOP an image, forward and backward, "
              f"{100 * stem_share:.1f}% of them in the stem")
    peak = config.matmul_peak(dev, context)
    clock = config.Clock(max_steps, max_minutes, resumed["seconds"] if resumed else 0.0)
    log = config.Log(out, ["train", *task.columns], clock, resumed, peak=peak)
    run_model = config.maybe_compile(model, compile)

    step, losses, work = start, [], []  # work: FLOPs of an image in each step
    steps_per_epoch = task.n_train // batch_size
    while True:
        progress = clock.shared_progress(step, dev)
        factor = lr_factor(step, progress)
        due = step % eval_interval == 0 or progress == 1
        if due and not (resumed and step == start) and config.is_main():
            with clock.paused():
                scores = {f"val{name}": value for name, value in task.evaluate(model, "val")[0].items()}
                config.check_finite(scores["val"], step, out)
                brief = {"train": torch.stack(losses).mean().item()} if losses else {}
                brief |= {name: scores.pop(name) for name in ("val", task.score)}
                log.flops = float(np.mean(work or [0]))
                log.write(step, brief, factor * adam_lr, batch_size, "img", file_only=scores)
                is_best, best = brief[task.score] > best, max(brief[task.score], best)
                checkpoint = {"model": model.state_dict(), "config": dataclasses.asdict(model.config),
                              "optimizers": [o.state_dict() for o in optimizers], "settings": settings, "step": step,
                              "best": best, "seconds": clock.seconds(), **task.about}
                if is_best:
                    config.save(out / "best.pt", checkpoint)
                config.save(out / "last.pt", checkpoint)  # last: a run killed in between does this evaluation again
        if due:
            losses, work = [], []
        if progress == 1:
            break
        epoch, position = divmod(step, steps_per_epoch)
        if position == 0 or step == start:  # each image once an epoch, in an order that depends on the epoch alone
            order = torch.randperm(task.n_train, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        torch.manual_seed(seed * 1_000_003 + step)  # augmentation and dropout hang on the step alone: resuming is exact
        batch = task.batch(order[position * batch_size:(position + 1) * batch_size])  # all of it in every process
        size = size_at(progress)
        work.append(flops[size]["Global"])
        loss = config.sum_gradients(model, task.learn(model, run_model, batch, size, step))
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        losses.append(loss + 0 * grad_norm)  # not finite where the gradient is not
        config.set_lr(optimizers, factor)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if len(losses) > 1:  # read one step late, so that a GPU goes on working meanwhile
            config.show_progress(f"step {step} | loss {config.check_finite(losses[-2], step - 2, out):.3f}")

    if not config.is_main():
        return
    config.plot(out, right=(task.score,))
    model.load_state_dict(config.load(out / "best.pt", train_with, dev)["model"])
    with clock.paused():
        scores, details = task.evaluate(model, "test")
        task.report(details, out)
        more = task.finish(model, out)
    log.write(step, {}, file_only={f"test{name}": value for name, value in scores.items()} | more)
    print("test: " + " | ".join(f"{name.strip('_') or 'loss'} {value:.4g}" for name, value in scores.items()))
    print(f"best validation {task.score.removeprefix('val_')} {best:.2f} "
          f"after {clock.seconds() / 60:.1f} minutes of training; wrote {out}/loss.png")


if __name__ == "__main__":
    main()
