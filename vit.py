"""
Stage 1: a vision transformer learns CIFAR-10, or to match photos with their captions (CLIP).

    python prepare_cifar.py && python vit.py config/cifar_cpu.py
    python vit.py config/cifar_cpu.py --image=cat.jpg
    python prepare_flickr8k.py && python vit.py config/clip_cpu.py
    python vit.py config/clip_cpu.py --image=photo.jpg --texts="a dog, a mountain, people in a street"

Expect 85% of the test images from config/cifar_cpu.py, in 20 minutes on two CPU cores with AVX512-BF16 (one seed); and
from config/clip_cpu.py, for 30% of 1,000 test photos, an own caption among the ten nearest, in 10 minutes.
A run writes log.csv, loss.png, the checkpoints best.pt and last.pt and, for CIFAR-10, predictions.png to out_dir. The
best checkpoint is chosen on validation data: 5,000 of CIFAR-10's 50,000 training images, or 1,000 photos.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import config
from config.tools.data import augment_photos, load_data, load_photos, open_images, pad_texts, shift_and_mirror, \
    to_pixels
from config.tools.pictures import plot, save_grid
from model import CLIP, CLIPConfig, ViT, ViTConfig, evaluating, tokenizer_from_state

# the run
out_dir = "out/cifar"  # checkpoints, log and pictures
init_from = "scratch"  # or "resume": continue from out_dir/last.pt
eval_only = False  # evaluate out_dir/best.pt and stop
eval_split = "val"  # what eval_only evaluates: train, val or test
image = ""  # classify this file, folder or URL and stop
device = "auto"  # cuda, mps or cpu
dtype = "auto"  # float32 or bfloat16, whichever multiplies matrices faster here
compile = False  # torch.compile: a minute at the start, faster steps on a GPU
seed = 1337  # of everything random: weights, batches, dropout, samples
texts = "a dog, a child, people, a ball, a bicycle, water, snow, a street"  # among which CLIP chooses for the image
# data
task = "classify"  # learn the classes of CIFAR-10; or clip: match photos with their captions
dataset = "cifar10"  # for clip the folder under data/ that prepare_flickr8k.py wrote, such as flickr8k
n_val = 5000  # images held out from CIFAR-10's training set
batch_size = 256  # images per step, over all processes
accumulation = 1  # parts that a process cuts its share of the batch into: less memory
image_size = 64  # CIFAR's 32 pixels doubled: the stem's first convolution has stride 2, and stage 3 sees large photos
first_size = 32  # the images grow from this size, patch by patch: with a quarter of the tokens a step takes a third
train_size = 0  # clip: and grow to this size; smaller than image_size, since crops look larger; 0: image_size
growth = 0.7  # the part of the run in which they grow; 0: all images have image_size
mirror = True  # mirror half of the training images, but no photo whose caption says left or right
shift = 4  # CIFAR-10's images move by up to so many of their 32 pixels
crop = 0.5  # clip: smallest share of its area that is seen of a training photo
jitter = 0.3  # clip: brightness, contrast and saturation of a training photo change by up to this factor
max_tokens = 32  # clip: longest caption
# model
vit_ckpt = ""  # clip: checkpoint of a classifier, whose ViT it starts from, of the same size; empty: from nothing
patch_size = 8  # of the doubled pixels: 8x8 tokens per image
n_layer = 6  # blocks
n_head = 6  # attention heads per block
n_embd = 192  # channels
dropout = 0.0  # augmentation does more at this size
patch_dropout = 0.0  # share of the patches that are left out in training
activation = "gelu"  # relu, gelu or swiglu
norm = "layer"  # or rms
stem = "conv"  # or residual, with more convolutions; or patch, one linear layer as in the ViT paper, for more data
label_smoothing = 0.1  # share of CIFAR-10's target that is spread over all classes
words_weight = 0.0  # clip: in the loss, of predicting the words of a photo's captions; 0: matching alone
text_layer = 2  # clip: blocks of the text encoder
text_embd = 128  # clip: its channels, and those of the space that photos and captions share
# optimization
max_steps = 20000  # 0: max_minutes alone decides
max_minutes = 0.0  # 0: max_steps alone decides; else whichever comes first
muon_lr = 0.01  # peak rate of the weight matrices of linear layers; 0: AdamW for all
adam_lr = 4e-3  # peak rate of everything else
weight_decay = 0.05  # of matrices and embeddings, relative to the rate
warmup_steps = 100  # steps in which the rate rises to its peak
cooldown = 0.8  # the last part of the run, in which the rate falls to zero in a straight line
grad_clip = 1.0  # largest norm of the gradient; 0: none
eval_interval = 250  # steps between lines of the log


def resize(images, size):
    """(B, 3, H, W) -> (B, 3, size, size) float, still 0 to 255; channels last, which convolutions on CPUs prefer."""
    images = images.float().contiguous(memory_format=torch.channels_last)
    return images if images.size(-1) == size else F.interpolate(images, (size, size), mode="bilinear")


def size_at(progress):
    """Pixels a side of the images at this point of the run: from first_size on, a patch more after equal times (Tan and
    Le 2021, EfficientNetV2, without their stronger augmentation for larger images)."""
    last_size = train_size or image_size
    if progress >= growth or first_size == last_size:
        return last_size
    sizes = range(first_size, last_size, patch_size)
    return sizes[int(len(sizes) * progress / growth)]


# CIFAR-10: what is on the image? -------------------------------------------------------------------------------------

def load_cifar():
    """{images (60000, 3, 32, 32) uint8, labels (60000,), classes: their names, splits: {train, val, test: indices}}"""
    read = lambda name: load_data(f"data/cifar10/{name}", "python prepare_cifar.py")
    both = lambda kind: torch.from_numpy(np.concatenate([read(f"{split}_{kind}.npy") for split in ("train", "test")]))
    images, labels, n = both("images"), both("labels").long(), len(read("train_labels.npy"))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))  # the same split in every run
    return {"images": images, "labels": labels, "classes": read("classes.json"), "size": images.size(-1),
            "splits": {"train": order[n_val:], "val": order[:n_val], "test": torch.arange(n, len(images))}}


def new_classifier(data):
    pixels = data["images"][data["splits"]["train"]].float()
    mean, std = pixels.mean(dim=(0, 2, 3)).tolist(), pixels.std(dim=(0, 2, 3)).tolist()
    return ViT(ViTConfig(image_size, patch_size, n_layer, n_head, n_embd, len(data["classes"]), dropout, activation,
                         norm, stem, label_smoothing, tuple(mean), tuple(std), patch_dropout=patch_dropout))


def learn_classes(model, run_model, data, rows, size, step):
    """Add the gradient of this process's share of a batch, rows of the training images; returns its share of the loss.
    size: pixels a side that the model sees."""
    rows = config.my_share(data["splits"]["train"][rows]).to(data["images"].device)
    config.seed_step(seed, step)  # of augmentation and dropout
    x, y = data["images"][rows], data["labels"][rows]
    x = shift_and_mirror(x, shift, (torch.rand(len(rows), device=x.device) < 0.5) & mirror)
    loss = 0.0
    for x_part, y_part in zip(x.chunk(accumulation), y.chunk(accumulation)):
        with config.autocast(model):
            part = run_model(resize(x_part, size), y_part)[1] * len(x_part) / batch_size  # of the loss of the batch
        part.backward()
        loss += part.detach()
    return loss


@torch.no_grad()
def predict(model, images, batch_size=500):
    """(n, 3, H, W) -> (n, n_classes) float32 logits on the CPU, the mean of those of an image and its mirror image."""
    logits, dev = [], config.device_of(model)
    with evaluating(model), config.autocast(model):
        for batch in images.split(batch_size):
            x = resize(batch.to(dev), model.config.image_size)
            logits.append(((model(x)[0].float() + model(x.flip(3))[0].float()) / 2).cpu())
    return torch.cat(logits)


def evaluate_classes(model, data, split, report=False):
    """{"": loss, "_accuracy": per cent} of a split. report: print the accuracy of each class."""
    rows = data["splits"][split].to(data["images"].device)
    logits, labels = predict(model, data["images"][rows]), data["labels"][rows].cpu()
    right = (logits.argmax(dim=1) == labels).float()
    if report:
        print("per class: " + ", ".join(f"{name} {100 * right[labels == i].mean().item():.1f}%"
                                        for i, name in enumerate(data["classes"])))
    return {"": F.cross_entropy(logits, labels).item(), "_accuracy": 100 * right.mean().item()}


@torch.no_grad()
def draw_predictions(model, data, rows, path, size=128):
    """Draw images, each beside itself lit by the attention of the pooling, with the predicted class, and the right one
    where that is wrong. size: pixels a side of a picture."""
    images, labels, classes = data["images"][rows].cpu(), data["labels"][rows].tolist(), data["classes"]
    with evaluating(model), config.autocast(model):
        features = model.features(resize(images.to(config.device_of(model)), model.config.image_size))
        attention = model.pool.attn_weights(features).float().mean(dim=2)  # (n, N), the mean of the heads
        predicted = model.head(model.pool(features)).argmax(dim=1).tolist()
    grid = (attention / attention.amax(dim=1, keepdim=True)).view(len(images), 1, model.grid, model.grid)
    light = F.interpolate(grid, (size, size), mode="bilinear").cpu()  # (n, 1, size, size)
    photos = F.interpolate(images.float(), (size, size))
    pictures = torch.cat((photos, photos * (0.2 + 0.8 * light)), dim=3).byte()
    titles = [classes[i] + (f", wrong: {classes[j]}" if i != j else "") for i, j in zip(predicted, labels)]
    save_grid(path, list(pictures), titles, columns=5)
    print(f"wrote {path}")


# CLIP: which caption belongs to which photo? -------------------------------------------------------------------------

def load_captioned():
    """{images (n, 3, image_size, image_size) uint8, captions: n lists, splits: {split: indices}, tokenizer}"""
    images, _, table, tokenizer = load_photos(dataset, image_size)
    if images.ndim == 5:
        config.fail(f"data/{dataset} holds tiles; for CLIP, run prepare_flickr8k.py without max_tiles")
    if "captions" not in table:
        config.fail(f"data/{dataset} holds conversations; CLIP learns from captions")
    return {"images": torch.from_numpy(images), "captions": table["captions"], "tokenizer": tokenizer,
            "size": image_size, "splits": {split: torch.tensor(rows) for split, rows in table["splits"].items()}}


def word_shares(captions, tokenizer):
    """n lists of captions -> (n, vocab_size), rows of sum 1: in how many captions of a photo a token is, times the
    logarithm of one over the share of photos that have it; at most 5, or the rarest tokens would be most of it."""
    counts = torch.zeros(len(captions), tokenizer.vocab_size)
    for row, texts in zip(counts, captions):
        for text in texts:
            row[list(set(tokenizer.encode(text)))] += 1
    rarity = (len(captions) / (counts > 0).sum(dim=0).clamp(min=1)).log().clamp(max=5)
    return F.normalize(counts * rarity, p=1, dim=1)


def new_clip(data):
    vit = ViTConfig(image_size, patch_size, n_layer, n_head, n_embd, 0, dropout, activation, norm, stem,
                    patch_dropout=patch_dropout)
    if vit_ckpt:
        checkpoint = config.load(vit_ckpt, "vit")
        if "classes" not in checkpoint:
            config.fail(f"{vit_ckpt} is no classifier")
        vit = dataclasses.replace(ViTConfig(**checkpoint["config"]), n_classes=0, dropout=dropout,
                                  patch_dropout=patch_dropout)
        if vit.patch_size != patch_size:
            config.fail(f"{vit_ckpt} has patch_size={vit.patch_size}; give that, instead of {patch_size}")
    model = CLIP(CLIPConfig(vit, data["tokenizer"].vocab_size, max_tokens, text_layer, n_embd=text_embd,
                            n_shared=text_embd, dropout=dropout, words=words_weight > 0))
    if vit_ckpt:
        model.vit.load_state_dict({name: w for name, w in checkpoint["model"].items() if not name.startswith("head.")})
        print(f"ViT of {vit_ckpt}, step {checkpoint['step']}")
    return model


def learn_matching(model, run_model, data, rows, size, step):
    """Add the gradient of this process's share of a batch of photos, each with one of its captions; returns its share
    of the loss. Every photo is compared with all texts of the batch: where several processes or parts compute it, a
    first pass without gradients embeds what the others hold."""
    photos, draw = data["splits"]["train"][rows].tolist(), config.shared_generator(seed, step)
    captions = [data["captions"][p][torch.randint(len(data["captions"][p]), (), generator=draw).item()] for p in photos]
    photos, captions = config.my_share(photos), config.my_share(captions)
    config.seed_step(seed, step)  # of augmentation and dropout
    x = data["images"][photos].to(config.device_of(model))
    x = augment_photos(x, [[caption] for caption in captions], crop, jitter, mirror, size)
    ids = pad_texts(captions, data["tokenizer"], max_tokens).to(x.device)
    words = [None] * accumulation
    if words_weight:
        words = data["words"][config.my_share(rows)].to(x.device).chunk(accumulation)
    parts = list(zip(x.chunk(accumulation), ids.chunk(accumulation), words))
    loss, n_parts = 0.0, accumulation * config.n_processes()

    def embed_part(x, ids):
        with config.autocast(model):
            of_images, of_texts, logits = run_model(resize(x, size), ids)
            return torch.stack((of_images, of_texts)), logits  # (2, b, n_shared)

    if n_parts > 1:
        with torch.no_grad():
            mine = torch.cat([embed_part(x, ids)[0] for x, ids, _ in parts], dim=1)
        everyone = torch.cat(config.gather(mine), dim=1)  # (2, B, n_shared)
    for i, (x, ids, words) in enumerate(parts, config.rank() * accumulation):
        own, logits = embed_part(x, ids)
        batch, b = own, own.size(1)
        if n_parts > 1:  # the gradient goes to this part's vectors alone
            batch = torch.cat((everyone[:, :i * b], own, everyone[:, (i + 1) * b:]), dim=1)
        part_loss = model.loss(*batch)  # of the whole batch
        loss += part_loss.detach() / n_parts
        if words_weight:
            of_words = words_weight * F.cross_entropy(logits.float(), words) / n_parts  # of this part's photos
            loss += of_words.detach()
            part_loss = part_loss + of_words
        part_loss.backward()
    model.log_scale.grad /= n_parts  # each part gave all of it
    return loss


@torch.no_grad()
def embed(model, images, size, captions, tokenizer, batch_size=500):
    """(n, 3, H, W) images, resized to size, and m str -> (n, n_shared) and (m, n_shared) unit vectors, on the CPU"""
    dev, ids = config.device_of(model), pad_texts(captions, tokenizer, model.config.max_tokens)
    with evaluating(model), config.autocast(model):
        of_images = [model.embed_images(resize(some.to(dev), size)).cpu() for some in images.split(batch_size)]
        of_texts = [model.embed_texts(some.to(dev)).cpu() for some in ids.split(batch_size)]
    return torch.cat(of_images), torch.cat(of_texts)


def recalls(cosines, owner):
    """(n, m) cosines of photos and captions, (m,) the photo of each caption -> per cent. _text5: how many photos have
    an own caption among the five nearest captions; _photo5: how many captions have their photo among the five."""
    n, m = cosines.shape
    scores = {}
    for k in (1, 5, 10):
        own = owner[cosines.topk(min(k, m), dim=1).indices] == torch.arange(n)[:, None]
        scores[f"_text{k}"] = 100 * own.any(dim=1).float().mean().item()
        own = cosines.topk(min(k, n), dim=0).indices == owner
        scores[f"_photo{k}"] = 100 * own.any(dim=0).float().mean().item()
    return scores


def evaluate_matching(model, data, split, report=False):
    """{"": loss, "_recall": mean of _text10 and _photo10, and recalls()} of a split. report: print what they mean."""
    if report:
        print("text10, photo10: for how many photos one of the ten nearest captions is theirs, and for how many "
              "captions their photo is among the ten nearest; chance is ten over the number of photos")
    photos = data["splits"][split]
    captions = [data["captions"][p] for p in photos.tolist()]
    owner = torch.tensor([i for i, own in enumerate(captions) for _ in own])
    images, texts = embed(model, data["images"][photos], data["size"], sum(captions, []), data["tokenizer"])
    scores = recalls(images @ texts.T, owner)
    first = torch.searchsorted(owner, torch.arange(len(photos)))  # the first caption of each photo
    dev = config.device_of(model)
    losses = [model.loss(images[some].to(dev), texts[first[some]].to(dev)).item()
              for some in torch.arange(len(photos)).split(batch_size)]
    return {"": float(np.mean(losses)), "_recall": (scores["_text10"] + scores["_photo10"]) / 2} | scores


# the run -------------------------------------------------------------------------------------------------------------

def load_model(checkpoint):
    """The classifier or the CLIP that a run of this stage has saved."""
    c = checkpoint["config"]
    model = ViT(ViTConfig(**c)) if "classes" in checkpoint else CLIP(CLIPConfig.from_dict(c))
    model.load_state_dict(checkpoint["model"])
    return model


@torch.no_grad()
def classify(model, checkpoint, where, out):
    """Print the five likeliest classes, or with CLIP the nearest of texts, of the images at where, and draw them."""
    opened, broken = open_images(where)
    photos = [(name, images[0]) for name, images in opened]
    size = checkpoint["image_transform"]["size"]  # of the training images, which a photo is to look like
    inputs, titles = torch.stack([to_pixels(photo, size) for _, photo in photos]), []
    if "classes" in checkpoint:
        names, logits = checkpoint["classes"], predict(model, inputs)
    else:
        names = [text.lower().strip(" .") for text in texts.split(",") if text.strip(" .")]  # as in the training
        if not names:
            config.fail('texts is empty: which texts may describe the image? Such as --texts="a dog, a cat"')
        vectors = embed(model, inputs, size, names, tokenizer_from_state(checkpoint["tokenizer"]))
        logits = model.logits(*(v.to(config.device_of(model)) for v in vectors)).cpu()
    for (name, _), row in zip(photos, logits):
        top = row.softmax(dim=0).topk(min(5, len(names)))
        lines = [f"{names[i]} {100 * p:.1f}%" for p, i in zip(top.values.tolist(), top.indices.tolist())]
        print(f"{name}: " + ", ".join(lines))
        titles.append("\n".join([name, *lines]))
    save_grid(out / "classified.png", [to_pixels(photo, 256) for _, photo in photos], titles, min(4, len(photos)))
    print(f"wrote {out / 'classified.png'}")
    if broken:
        config.fail(f"not images that Pillow can read: {', '.join(broken)}")


@config.one_line_errors
def main(argv=None):
    settings = config.override(globals(), argv)
    dev, out, clip = config.pick_device(device), Path(out_dir), task == "clip"
    evaluate = evaluate_matching if clip else evaluate_classes
    if image or eval_only:
        checkpoint = config.load(out / "best.pt", "vit")
        model = config.place(load_model(checkpoint), dev, dtype)
        if image:
            return classify(model, checkpoint, image, out)
        if checkpoint["settings"]["task"] != task:
            config.fail(f"{out / 'best.pt'} has learnt task={checkpoint['settings']['task']}; give that")
        if not clip and n_val != checkpoint["settings"]["n_val"]:
            config.fail(f"n_val={n_val}: the run held {checkpoint['settings']['n_val']} images out; give that")
    elif vit_ckpt and not clip:
        config.fail(f"vit_ckpt={vit_ckpt} is for task=clip; a classifier of CIFAR-10 starts from nothing")
    if growth and (first_size % patch_size or not 0 < first_size <= image_size):
        config.fail(f"first_size={first_size}: a multiple of patch_size={patch_size}, up to image_size={image_size}")
    if clip and dataset == "cifar10":
        config.fail("task=clip learns from photos with captions: --dataset=flickr8k, or config/clip_cpu.py")
    data = load_captioned() if clip else load_cifar()
    if eval_only:
        if clip:
            data["tokenizer"] = tokenizer_from_state(checkpoint["tokenizer"])
        scores = evaluate(model, data, eval_split, report=True)
        print(f"{out / 'best.pt'}, step {checkpoint['step']}: "
              + " | ".join(f"{eval_split}{name} {value:.4g}" for name, value in scores.items()))
        return

    if train_size and (train_size % patch_size or train_size < first_size):
        config.fail(f"train_size={train_size}: a multiple of patch_size={patch_size}, at least first_size={first_size}")
    n_train = len(data["splits"]["train"])
    print(f"{dataset}: {n_train:,} images to train on, {len(data['splits']['val']):,} to validate")
    if n_train < batch_size:
        config.fail(f"batch_size={batch_size} is larger than the training set of {n_train} images")
    config.check_batch(batch_size, accumulation)
    about = {"image_transform": {"size": data["size"]}}  # for the checkpoints
    about |= {"tokenizer": data["tokenizer"].state()} if clip else {"classes": data["classes"]}
    resumed = config.resume("vit", settings, tokenizer=about.get("tokenizer"))
    torch.manual_seed(seed)
    model = load_model(resumed) if resumed else new_clip(data) if clip else new_classifier(data)
    model = config.place(model, dev, resumed["dtype"] if resumed else dtype)
    optimizers = config.optimizers(model, muon_lr, adam_lr, weight_decay)
    if clip and words_weight:
        data["words"] = word_shares([data["captions"][p] for p in data["splits"]["train"].tolist()], data["tokenizer"])
    if not clip:  # all of CIFAR-10 on the device
        data |= {"images": data["images"].to(dev), "labels": data["labels"].to(dev)}
    score = "val_recall" if clip else "val_accuracy"
    run = config.Run("vit", settings, dataset, model, optimizers, resumed, **about)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {dev}")
    run_model, learn = config.maybe_compile(model, compile), learn_matching if clip else learn_classes

    while True:
        progress = run.progress()  # from 0 to 1, by steps or by minutes
        factor = config.lr_factor(run.step, progress, warmup_steps, cooldown)
        if run.due():
            with run.paused():
                scores = {f"val{name}": value for name, value in evaluate(model, data, "val").items()}
                run.log({name: scores[name] for name in ("val", score)}, factor * adam_lr, batch_size, "img",
                        file_only=scores)
                run.save(scores[score])
        if progress == 1:
            break
        rows = config.epoch_rows(n_train, batch_size, run.step, seed)
        loss = learn(model, run_model, data, rows, size_at(progress), run.step)
        run.advance(config.update(model, optimizers, loss, factor, grad_clip))

    run.stop()
    if not config.is_main():
        return
    plot(out, right=(score,))
    model.load_state_dict(config.load(out / "best.pt", "vit")["model"])
    scores = {f"test{name}": value for name, value in evaluate(model, data, "test", report=True).items()}
    if not clip:
        draw_predictions(model, data, data["splits"]["test"][:25], out / "predictions.png")
    run.log({}, file_only=scores)
    print(" | ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in scores.items()))
    print(f"best validation {score.removeprefix('val_')} {run.best:.2f} "
          f"after {run.seconds() / 60:.1f} minutes of training; wrote {out}/loss.png")


if __name__ == "__main__":
    main()
