"""Pictures of a run: curves, grids of images with texts, where a model looks."""

import csv
import math
import textwrap
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F

matplotlib.use("Agg")  # files, never a window
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib import font_manager  # noqa: E402

LABELS = {"train": "training loss", "val": "validation loss", "val_accuracy": "validation accuracy (%)",
          "val_recall": "validation recall at 10 (%)", "val_cider": "validation CIDEr",
          "val_right": "validation, answers right (%)", "reward": "reward of samples",
          "greedy": "reward of greedy captions of 200 training photos"}


def plot(out_dir, left=("train", "val"), right=(), ylabel="loss (nats)"):
    """Draw columns of out_dir/log.csv over the step into out_dir/loss.png; the right ones have an axis of their own.
    What the log lacks is left out."""
    with open(Path(out_dir) / "log.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    left, right = ([column for column in columns if any(row.get(column) for row in rows)] for columns in (left, right))
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axes = [(axis, column, "-") for column in left]
    if right:
        axes += [(second, column, "--") for second in [axis.twinx()] for column in right]
        axes[-1][0].set_ylabel(", ".join(LABELS.get(column, column) for column in right))
    for i, (a, column, style) in enumerate(axes):
        points = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
        a.plot(*zip(*points), style, color=f"C{i}", label=LABELS.get(column, column))
    axis.set(xlabel="training step", ylabel=ylabel, title=Path(out_dir).name)
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(Path(out_dir) / "loss.png", dpi=110)
    plt.close(figure)


def printable(text):
    """The text with a question mark for each character that the font of the pictures lacks."""
    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    return "".join(c if c == "\n" or font.get_char_index(ord(c)) else "?" for c in text)


def side_by_side(images):
    """Some images, (3, H, W) uint8 each -> one picture with white between them, and below the shorter ones."""
    gap, H = max(1, images[0].size(2) // 24), max(image.size(1) for image in images)
    padded = [F.pad(image, (0, gap, 0, H - image.size(1)), value=255) for image in images]
    return torch.cat(padded, dim=2)[:, :, :-gap]


def save_grid(path, images, titles, columns=4, width=34):
    """Write a picture of images (a list of (3, H, W) uint8 tensors), each with its text under it, columns in a row;
    fewer where images are wide. width: characters in a line of text under a square one."""
    aspect = max(image.size(2) / image.size(1) for image in images)
    wide = max(1.5, min(3 * aspect, 9))  # inches
    high, columns = min(2.6, 0.87 * wide / aspect), min(len(images), max(1, int(3 * columns / wide)))
    rows, width = math.ceil(len(images) / columns), int(width * wide / 3)
    wrapped = ["\n".join(textwrap.fill(line, width) for line in printable(title).splitlines()) for title in titles]
    deepest = max(text.count("\n") + 1 for text in wrapped)
    height = rows * (high + 0.19 * deepest)  # inches
    figure, axes = plt.subplots(rows, columns, figsize=(wide * columns, height), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, text in zip(axes.flat, images, wrapped):
        axis.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")  # (H, W, 3)
        axis.text(0.5, -0.03, text, transform=axis.transAxes, ha="center", va="top", fontsize=9,
                  parse_math=False)  # a caption may hold a $
    figure.subplots_adjust(0.02, 0.19 * deepest / height, 0.98, 0.99, wspace=0.05, hspace=0.22 * deepest / high)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_places(path, photos, words, places):
    """Draw the k photos (k, 3, H, W), then a panel per word: the photos, faded where the model did not look as it wrote
    the word. places: (words, k * n) shares of the n parts of each photo."""
    k, size, n_words = len(photos), photos.size(-1), len(words)
    side = math.isqrt(places.size(1) // k)
    light = (places / places.amax(dim=1, keepdim=True)).view(n_words, k, side, side)
    light = F.interpolate(light, (size, size), mode="bicubic").clamp(0, 1)[:, :, None]  # (words, k, 1, size, size)
    panels = [photos, *(255 - (255.0 - photos) * (0.2 + 0.8 * light)).byte()]  # each (k, 3, size, size)
    save_grid(path, [side_by_side(panel) for panel in panels], ["", *words], columns=7)
    print(f"wrote {path}")
