"""Pictures of a run: curves, grids of images with texts, where a model looks."""

import csv
import math
import textwrap

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib import font_manager

plt.switch_backend("Agg")  # draws into files and needs no screen
LABELS = {
    "loss": "training loss",
    "val": "validation loss",
    "val_accuracy": "validation accuracy (%)",
    "val_recall": "validation recall at 10 (%)",
    "val_cider": "validation CIDEr",
    "val_right": "validation, answers right (%)",
    "reward": "reward of samples",
}


def plot(out_dir, left=("loss", "val"), right=(), ylabel="loss (nats)"):
    """Draw columns of out_dir/log.csv over the training step into out_dir/loss.png.

    out_dir: a Path. The columns in right have an axis of their own. A column without values is left
    out.
    """
    with open(out_dir / "log.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.set(xlabel="training step", ylabel=ylabel, title=out_dir.name)
    curves = [(axis, column, "-") for column in left]
    if right:
        right_axis = axis.twinx()
        right_axis.set_ylabel(", ".join(LABELS[column] for column in right))
        curves += [(right_axis, column, "--") for column in right]
    for i, (axis, column, style) in enumerate(curves):
        points = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
        if points:
            axis.plot(*zip(*points), style, color=f"C{i}", label=LABELS[column])
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(out_dir / "loss.png", dpi=110)
    plt.close(figure)


def choose_fonts(text):
    """Return the names of fonts that together have the characters of a text, and a set of those
    characters that no font of the system has.

    DejaVu Sans, which comes with matplotlib, is the first; Chinese, for example, needs another.
    """
    names = []
    missing = {"?", *text} - {"\n"}
    fonts = [font for font in font_manager.fontManager.ttflist if font.weight == 400]
    for font in sorted(fonts, key=lambda font: font.name != "DejaVu Sans"):
        if missing and "Last Resort" not in font.name:  # that one has a box for every character
            found = missing & set(map(chr, font_manager.get_font(font.fname).get_charmap()))
            if found:
                names.append(font.name)
            missing -= found
    return names, missing


def side_by_side(images):
    """Join (3, H, W) uint8 images of any sizes into one, with white between and below them."""
    gap = max(1, images[0].size(2) // 24)
    height = max(image.size(1) for image in images)
    padded = [F.pad(image, (0, gap, 0, height - image.size(1)), value=255) for image in images]
    return torch.cat(padded, dim=2)[..., :-gap]


def save_grid(path, images, titles, columns=4):
    """Write a picture of (3, H, W) uint8 images in rows, each with its title below it.

    columns is the number of square images in a row; of wide images there are fewer.
    """
    aspect = max(image.size(2) / image.size(1) for image in images)
    wide = max(1.5, min(3 * aspect, 9))  # all lengths are in inches
    high = min(2.6, 0.87 * wide / aspect)
    columns = min(len(images), int(3 * columns / wide))
    rows = math.ceil(len(images) / columns)
    wrapper = textwrap.TextWrapper(int(11.34 * wide))  # characters per line
    texts = ["\n".join(map(wrapper.fill, title.splitlines())) for title in titles]
    fonts, missing = choose_fonts("".join(texts))
    to_question_marks = dict.fromkeys(map(ord, missing), "?")
    text_height = 0.19 * max(text.count("\n") + 1 for text in texts)
    height = rows * (high + text_height)
    figure = plt.figure(figsize=(wide * columns, height))
    for i, (image, text) in enumerate(zip(images, texts)):
        axis = figure.add_subplot(rows, columns, i + 1)
        axis.axis("off")
        axis.imshow(image.permute(1, 2, 0).cpu(), interpolation="nearest")  # (H, W, 3)
        axis.set_title(
            text.translate(to_question_marks),
            family=fonts,
            y=-0.03,  # below the image
            pad=0,
            va="top",
            fontsize=9,
            parse_math=False,  # a caption may contain a $
        )
    space = 1.16 * text_height / high
    figure.subplots_adjust(0.02, text_height / height, 0.98, 0.99, wspace=0.05, hspace=space)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def fade(photos, weights):
    """Return (n, k, 3, size, size) uint8: k photos (k, 3, size, size), n times, faded to white
    where the weights of their parts, (n, k, side * side), are small."""
    side = math.isqrt(weights.size(2))
    light = weights / weights.amax(dim=(1, 2), keepdim=True)
    light = light.unflatten(2, (side, side))  # (n, k, side, side)
    light = F.interpolate(light, photos.shape[-2:], mode="bicubic").clamp(0, 1)
    light = 0.2 + 0.8 * light.unsqueeze(2)  # (n, k, 1, size, size)
    return (255 - light * (255.0 - photos)).byte()


def draw_places(path, photos, words, places):
    """Draw photos, then once per word, faded where the model did not look as it wrote the word.

    photos: (k, 3, size, size) uint8. words: n str. places: (n, k * side * side), the attention to
    the side x side parts of each photo.
    """
    faded = fade(photos, places.unflatten(1, (len(photos), -1)))
    pictures = [side_by_side(panel) for panel in [photos, *faded]]
    save_grid(path, pictures, ["", *words], columns=7)
    print(f"wrote {path}")
