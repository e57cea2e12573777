"""
Stage 1: a vision transformer learns CIFAR-10.

    python prepare_cifar.py && python vit.py config/cifar_cpu.py
    python vit.py config/cifar_cpu.py --image=cat.jpg

Expect 88% of the test images from config/cifar_cpu.py: 40 minutes on two CPU cores with AVX512-BF16 (one seed).
Settings are overridden from the left to the right by config files and --key=value; --help lists them. A run writes
log.csv, loss.png, predictions.png, confusion.png and the checkpoints best.pt and last.pt to out_dir. The best
checkpoint is chosen on 5,000 images held out from the 50,000; the 10,000 test images are read once, at the end.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import config
from model import ViT, ViTConfig

# the run
out_dir = "out/cifar"  # checkpoints, log and pictures
init_from = "scratch"  # or "resume": go on from out_dir/last.pt
eval_only = False  # evaluate out_dir/best.pt and stop
eval_split = "val"  # what eval_only evaluates: val or test
image = ""  # classify this file, folder or URL and stop
device = "auto"  # cuda, mps or cpu
dtype = "auto"  # bfloat16 on CUDA, else float32
compile = False  # torch.compile: a minute at the start, faster steps on a GPU
seed = 1337  # of everything random: weights, batches, dropout, samples
# data
n_val = 5000  # images held out from the training set
batch_size = 256  # images a step, over all processes and parts
accumulation = 1  # parts that a process cuts its share of the batch into: less memory, the same training
image_size = 64  # CIFAR's 32 pixels doubled: the stem's first convolution has stride 2, and stage 3 sees 64x64 photos
first_size = 32  # the images grow from this size, patch by patch: with a quarter of the tokens a step takes a third
growth = 0.7  # the share of the run in which they grow; 0: all images have image_size
shift = 4  # training images move by up to so many of their 32 pixels, and half of them are mirrored
cutmix = 0.0  # share of the batches in which each image gets a rectangle of another, and a share of its label
mirror_eval = True  # evaluate by the mean of the logits of an image and of its mirror image
# model
patch_size = 8  # of the doubled pixels: 8x8 tokens an image
n_layer = 6  # blocks
n_head = 6  # attention heads a block
n_embd = 192  # channels
dropout = 0.0  # augmentation does more at this size
activation = "gelu"  # relu, gelu or swiglu
norm = "layer"  # or rms
stem = "conv"  # or patch: one linear layer a patch, as in the ViT paper; needs far more data
label_smoothing = 0.1  # share of the target that is spread over all classes
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


def load_cifar():
    """{split: (images (n, 3, 32, 32) uint8, labels (n,) int64)} of train, val and test; the names of the classes."""
    read = lambda name: config.load_data(f"data/cifar10/{name}", "python prepare_cifar.py")
    array = lambda name: torch.from_numpy(np.array(read(name)))
    images, labels = array("train_images.npy"), array("train_labels.npy").long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # the same split in every run
    val, train = order[:n_val], order[n_val:]
    return {"train": (images[train], labels[train]), "val": (images[val], labels[val]),
            "test": (array("test_images.npy"), array("test_labels.npy").long())}, read("classes.json")


def resize(images, size):
    """(B, 3, H, W) -> (B, 3, size, size) float, still 0 to 255; channels last, which convolutions on CPUs prefer."""
    images = images.float().contiguous(memory_format=torch.channels_last)
    return images if images.size(-1) == size else F.interpolate(images, (size, size), mode="bilinear")


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
    model.eval()
    logits, size = [], model.config.image_size
    for batch in images.split(batch_size):
        with context:
            x = resize(batch.to(dev), size)
            both = [model(view)[0].float() for view in ((x, x.flip(3)) if mirrored else (x,))]
        logits.append(torch.stack(both).mean(dim=0).cpu())
    model.train()
    return torch.cat(logits)


def evaluate(model, images, labels, dev, context):
    """(loss, accuracy, confusion): confusion[i, j] counts the images of class i that were taken for class j."""
    logits = predict(model, images, dev, context, mirror_eval)
    confusion = torch.zeros(logits.size(1), logits.size(1), dtype=torch.long)
    confusion.index_put_((labels, logits.argmax(dim=1)), torch.ones_like(labels), accumulate=True)
    return F.cross_entropy(logits, labels).item(), confusion.trace().item() / len(labels), confusion


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
    model.eval()
    n, size = len(images), 128  # pixels a side of a picture
    with context:
        x = resize(images.to(dev), model.config.image_size)
        weights = model.pool.weights(model.features(x)).float().mean(dim=2)  # (n, N), the mean of the heads
        said = model(x)[0].argmax(dim=1).tolist()
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
    model.train()
    config.save_grid(path, list(pictures), titles, columns=5)


def classify(model, classes, size, where, out, dev, context):
    """Print the five likeliest classes of the images at where, and draw them beside each. size: of CIFAR's images, to
    which a photo is reduced before resize() doubles it, so that it looks like what the model has learnt from."""
    photos, titles = config.open_images(where), []
    inputs = torch.stack([config.to_pixels(photo, size) for _, photo in photos])
    for (name, _), logits in zip(photos, predict(model, inputs, dev, context, mirror_eval)):
        top = logits.softmax(dim=0).topk(min(5, len(classes)))
        lines = [f"{classes[i]} {100 * p:.1f}%" for p, i in zip(top.values.tolist(), top.indices.tolist())]
        print(f"{name}: " + ", ".join(lines))
        titles.append("\n".join([name, *lines]))
    pictures = [config.to_pixels(photo, 256) for _, photo in photos]
    config.save_grid(out / "classified.png", pictures, titles, min(4, len(photos)))


@config.one_line_errors
def main(argv=None):
    settings = config.override(globals(), argv)
    dev, out, train_with = config.pick_device(device), Path(out_dir), "python vit.py (with the same config)"
    context = config.autocast(dev, dtype)

    if image or eval_only:  # use what a run has learnt
        checkpoint = config.load(out / "best.pt", train_with, dev, has="n_classes")
        model = ViT(ViTConfig(**checkpoint["config"])).to(dev)
        model.load_state_dict(checkpoint["model"])
        if image:
            size = checkpoint["image_transform"]["size"]
            classify(model, checkpoint["classes"], size, image, out, dev, context)
            return
        data, classes = load_cifar()
        if eval_split not in data:
            config.fail(f"eval_split={eval_split}: {', '.join(data)}")
        loss, accuracy, confusion = evaluate(model, *data[eval_split], dev, context)
        print(f"{out / 'best.pt'}, step {checkpoint['step']}: "
              f"{eval_split} loss {loss:.4f}, accuracy {100 * accuracy:.2f}%")
        report(confusion, classes, out / "confusion.png")
        return

    config.at_least(1, eval_interval=eval_interval, batch_size=batch_size, n_val=n_val, n_layer=n_layer)
    data, classes = load_cifar()
    if len(data["train"][0]) < batch_size:
        config.fail(f"batch_size={batch_size} is larger than the training set of {len(data['train'][0])} images")
    if not (0 <= growth <= 1 and 0 <= cutmix <= 1):
        config.fail(f"growth={growth}, cutmix={cutmix}: shares, from 0 to 1")
    if growth and (first_size % patch_size or not 0 < first_size <= image_size):
        config.fail(f"first_size={first_size}: a multiple of patch_size={patch_size}, up to image_size={image_size}")
    n_parts = config.n_parts(batch_size, accumulation)
    images, labels = (t.to(dev) for t in data["train"])
    resumed = config.resume(out, init_from, settings, train_with)
    torch.manual_seed(seed)
    pixels = images.float()
    pixel_mean, pixel_std = pixels.mean(dim=(0, 2, 3)).tolist(), pixels.std(dim=(0, 2, 3)).tolist()
    model_config = ViTConfig(image_size, patch_size, n_layer, n_head, n_embd, len(classes), dropout, activation, norm,
                             stem, label_smoothing, tuple(pixel_mean), tuple(pixel_std))
    del pixels
    with config.one_line(ValueError):  # such as n_embd that is not a multiple of n_head
        model = ViT(ViTConfig(**resumed["config"]) if resumed else model_config)
    model = model.to(dev, memory_format=torch.channels_last)
    optimizers = config.optimizers(model, muon_lr, adam_lr, weight_decay)
    start, best = 0, -1.0
    if resumed:
        model.load_state_dict(resumed["model"])
        for optimizer, state in zip(optimizers, resumed["optimizers"]):
            optimizer.load_state_dict(state)
        start, best = resumed["step"], resumed["best"]
    flops = {size: config.count_flops(model, lambda: model(resize(images[:1], size), labels[:1])[1])
             for size in range(first_size if growth else image_size, image_size + 1, patch_size)}  # of an image
    print(f"{len(images):,} images to train on, {n_val:,} to validate; "
          f"{sum(p.numel() for p in model.parameters()):,} parameters on {dev}")
    for size, count in flops.items():
        print(f"{size} pixels: {count['Global'] / 1e6:.0f} MFLOP an image, forward and backward, "
              f"{100 * count['ViT.patches'] / count['Global']:.1f}% of them in the stem")
    peak = config.matmul_peak(dev, context)
    clock = config.Clock(max_steps, max_minutes, resumed["seconds"] if resumed else 0.0)
    log = config.Log(out, ["train", "val", "val_accuracy", "test_accuracy"], clock, resumed, peak=peak)
    run_model = config.maybe_compile(model, compile)

    step, losses, work = start, [], []  # work: FLOPs of an image in each step
    steps_per_epoch = len(images) // batch_size
    while True:
        progress = clock.shared_progress(step, dev)
        factor = lr_factor(step, progress)
        due = step % eval_interval == 0 or progress == 1
        if due and not (resumed and step == start) and config.is_main():
            with clock.paused():
                val, accuracy, _ = evaluate(model, *data["val"], dev, context)
                config.check_finite(val, step, out)
                numbers = {"train": torch.stack(losses).mean().item()} if losses else {}
                numbers |= {"val": val, "val_accuracy": 100 * accuracy}
                log.flops = float(np.mean(work or [0]))
                log.write(step, numbers, factor * adam_lr, batch_size, "img")
                is_best, best = accuracy > best, max(accuracy, best)
                checkpoint = {"model": model.state_dict(), "config": dataclasses.asdict(model.config),
                              "optimizers": [o.state_dict() for o in optimizers], "settings": settings, "step": step,
                              "classes": classes, "image_transform": {"size": images.size(-1)}, "best": best,
                              "seconds": clock.seconds()}
                if is_best:
                    config.save(out / "best.pt", checkpoint)
                config.save(out / "last.pt", checkpoint)  # last: a run killed in between does this evaluation again
        if due:
            losses, work = [], []
        if progress == 1:
            break
        epoch, position = divmod(step, steps_per_epoch)
        if position == 0 or step == start:  # each image once an epoch, in an order that depends on the epoch alone
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        torch.manual_seed(seed * 1_000_003 + step)  # augmentation and dropout hang on the step alone: resuming is exact
        batch = order[position * batch_size:(position + 1) * batch_size].to(dev)
        x = config.shift_and_mirror(images[batch], shift, torch.rand(batch_size, device=dev) < 0.5)
        y, loss = labels[batch], 0.0  # the whole batch in every process; each computes its parts
        if cutmix and torch.rand(()) < cutmix:
            x, y = mix(x, y, len(classes))
        size = size_at(progress)
        work.append(flops[size]["Global"])
        for part in config.parts(model, batch_size, accumulation, seed, step):
            with context:
                share = run_model(resize(x[part], size), y[part])[1] / n_parts  # of the batch's loss
            share.backward()
            loss += share.detach()
        loss = config.sum_gradients(model, loss)
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
    config.plot(out, right=("val_accuracy",))
    model.load_state_dict(config.load(out / "best.pt", train_with, dev)["model"])
    with clock.paused():
        _, accuracy, confusion = evaluate(model, *data["test"], dev, context)
    log.write(step, {"test_accuracy": 100 * accuracy})
    draw_predictions(model, *(t[:25] for t in data["test"]), classes, out / "predictions.png", dev, context)
    report(confusion, classes, out / "confusion.png")
    print(f"validation accuracy {100 * best:.2f}%, test accuracy {100 * accuracy:.2f}% "
          f"after {clock.seconds() / 60:.1f} minutes of training; wrote {out}/loss.png")


if __name__ == "__main__":
    main()
