"""Images and arrays in files: read and augment images, download files, load what is packed."""

import hashlib
import io
import json
import os
import re
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import requests
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from config.tools.run import (
    autocast,
    device_of,
    fail,
    is_main,
    new_file,
    show_progress,
    sum_over_processes,
)
from model import IMAGE_ID, LAYOUTS, evaluating, tokenizer_from_state

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # raised by Pillow


@dataclass
class TiledImages:
    """M images on up to T tiles each, the form in which model.TiledMLLM takes images."""

    pixels: torch.Tensor  # (M, T, 3, H, W) uint8, zeros in the tiles that a layout lacks
    layouts: torch.Tensor  # (M,), indices in LAYOUTS

    def __len__(self):
        return len(self.layouts)

    def __getitem__(self, rows):
        return TiledImages(self.pixels[rows], self.layouts[rows])

    def to(self, device):
        return TiledImages(self.pixels.to(device), self.layouts.to(device))


def best_layout(width, height, max_tiles):
    """Return the index in LAYOUTS of the grid of square tiles for an image.

    width, height: of the image, in tiles. Of the grids of at most max_tiles, as in Llama 3.2
    Vision, the one on which the image is enlarged least, or, if it fits none, reduced least; of
    several the smallest.
    """

    def cost(i):
        rows, columns = LAYOUTS[i]
        scale = round(min(columns / width, rows / height), 6)  # the image then fits
        return scale < 1, abs(scale - 1), rows * columns

    allowed = [i for i, (rows, columns) in enumerate(LAYOUTS) if rows * columns <= max_tiles]
    return min(allowed, key=cost)


# from PIL images to tensors -----------------------------------------------------------------------


def to_rgb(image):
    """Return a PIL image upright and in RGB, as a person sees it.

    Pixels of 16 bits are scaled to 8 bits; transparent parts become white.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        values = np.array(image).clip(0, 65535) / 257
        image = Image.fromarray(values.round().astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def to_pixels(image, size):
    """Return a PIL image as a uint8 tensor (3, size, size).

    It is squeezed to a square, so the whole photo is seen, in training as in use.
    """
    image = to_rgb(image).resize((size, size), Image.BICUBIC, reducing_gap=3)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)


def to_tiles(image, size, max_tiles):
    """Return a PIL image as n tiles, (n, 3, size, size) uint8, and the index of its layout.

    The image keeps its proportions: it is resized to fit the grid of tiles that best_layout()
    chooses, and padded with black on the right or at the bottom.
    """
    image = to_rgb(image)
    layout = best_layout(image.width / size, image.height / size, max_tiles)
    rows, columns = LAYOUTS[layout]
    canvas = Image.new("RGB", (columns * size, rows * size))
    scale = min(canvas.width / image.width, canvas.height / image.height)
    sides = [max(1, round(scale * side)) for side in image.size]
    canvas.paste(image.resize(sides, Image.BICUBIC, reducing_gap=3))
    grid = torch.from_numpy(np.array(canvas)).view(rows, size, columns, size, 3)
    return grid.permute(0, 2, 4, 1, 3).flatten(0, 1), layout  # (n, 3, size, size)


def to_images(pictures, size, max_tiles=1):
    """Return a list of n PIL images as a uint8 tensor (n, 3, size, size), squeezed to squares.

    With max_tiles above 1 return TiledImages, in which the images keep their proportions.
    """
    n = len(pictures)
    pixels = torch.zeros(n, max_tiles, 3, size, size, dtype=torch.uint8)
    layouts = torch.zeros(n).long()
    for i, picture in enumerate(pictures):
        if max_tiles > 1:
            tiles, layouts[i] = to_tiles(picture, size, max_tiles)
            pixels[i, : len(tiles)] = tiles
        else:
            pixels[i, 0] = to_pixels(picture, size)
    return TiledImages(pixels, layouts) if max_tiles > 1 else pixels[:, 0]


def join_tiles(images, i):
    """Return the whole picture of image i, (3, rows * H, columns * W); images[i] if not tiled."""
    if torch.is_tensor(images):
        return images[i]
    rows, columns = LAYOUTS[images.layouts[i]]
    tiles = images.pixels[i, : rows * columns].split(columns)  # (columns, 3, H, W) for each row
    return torch.cat([torch.cat(tuple(row), dim=2) for row in tiles], dim=1)


# images that a user points to ---------------------------------------------------------------------


def open_file(source, n_frames):
    """Return the images of a file: one, or n_frames evenly spaced frames of an animation.

    Large images are reduced to 1024 pixels, so that a folder of photos fits into memory.
    """
    images = []
    with Image.open(source) as file:
        n = getattr(file, "n_frames", 1)
        n_frames = min(n_frames, n)
        for i in range(n_frames):
            file.seek((2 * i + 1) * n // (2 * n_frames))  # the middle of each of n_frames parts
            image = file.copy() if n_frames > 1 else file  # a frame builds on the one before
            image.thumbnail((1024, 1024))
            images.append(to_rgb(image))
    return images


def find_files(where):
    """Return the image files that open_images() opens, each with a name, as a list."""
    path = Path(where).expanduser()
    if "://" in where:
        reply = requests.get(where, timeout=30)
        reply.raise_for_status()
        file = io.BytesIO(reply.content)
        file.name = path.name
        return [file]
    if "," in where and not path.exists():
        return [file for part in where.split(",") for file in find_files(part.strip())]
    if where and path.is_dir():
        return [file for file in sorted(path.iterdir()) if not file.is_dir()]
    assert path.is_file(), f"{where}: no such image file or folder"
    return [path]


def open_images(where, n_frames=1):
    """Open the images that a user points to.

    where: a file or a URL; files with commas between them, which are seen together; or a folder,
        whose images are seen one by one.
    n_frames: how many frames of an animation are seen.
    Returns a list of (name, [PIL image, ...]). Files in a folder that are no images are skipped.
    """
    is_folder = os.path.isdir(where)
    files = find_files(where)
    opened, broken = [], []
    for file in files:
        try:
            opened.append((file.name, open_file(file, n_frames)))
        except UNREADABLE:
            broken.append(file.name)
    message = f"no image that Pillow can read: {', '.join(broken) or where}"
    assert opened and (is_folder or not broken), (
        f"{message} (HEIC: make JPEG of it; video: ffmpeg -i a.mp4 -vf fps=4,scale=256:-1 a.gif)"
    )
    if broken:
        print(f"skipped: {message}")
    if is_folder:
        return opened
    name = ", ".join(name for name, _ in opened)
    return [(name, [image for _, images in opened for image in images])]


# augmentation -------------------------------------------------------------------------------------


def shift_and_mirror(images, shift, mirrored):
    """Return (B, 3, H, W) images, moved by up to shift pixels in both directions, black beyond.

    mirrored: (B,) booleans, which images to mirror. Draws from torch's global generator.
    """
    B, _, H, W = images.shape
    padded = F.pad(images, [shift] * 4)
    windows = padded.unfold(2, H, 1).unfold(3, W, 1)  # (B, 3, 2 shift + 1, 2 shift + 1, H, W)
    top, left = torch.randint(2 * shift + 1, (2, B), device=images.device)
    shifted = windows[torch.arange(B, device=images.device), :, top, left]  # (B, 3, H, W)
    return torch.where(mirrored[:, None, None, None], shifted.flip(3), shifted)


def draw_parts(n, crop):
    """Return (n, 2, 3) affine maps, from the output to random parts of photos, for F.affine_grid().

    A part has crop to 1 times the area of the photo, its sides stretched by up to 4/3.
    """
    area = 1 - (1 - crop) * torch.rand(n)
    stretch = (4 / 3) ** (2 * torch.rand(n) - 1)
    stretch = stretch.clamp(area, 1 / area)  # no side is longer than the photo's
    sides = torch.stack((area * stretch, area / stretch)).sqrt()  # (2, n), relative to the photo's
    middle = (2 * torch.rand(2, n) - 1) * (1 - sides)  # the photo's borders are at -1 and 1
    return torch.cat((torch.diag_embed(sides.T), middle.T[..., None]), dim=2)


def augment_photos(images, captions, crop, jitter, mirror, size=0):
    """Return square (B, 3, W, W) photos, augmented, as floats (B, 3, size, size).

    captions: a list of captions per photo. Draws from torch's global generator.
    crop: a random part with crop to 1 times the area is seen.
    jitter: brightness, contrast and saturation change by factors from 1 - jitter to 1 + jitter.
    mirror: half of the photos are mirrored, but none with a caption that says left or right.
    size: of the results, in pixels; 0 keeps W.
    """
    B, _, _, W = images.shape
    size = size or W
    images = images.float()
    may_mirror = [
        mirror and not re.search(r"\b(left|right)\b", " ".join(texts)) for texts in captions
    ]
    mirrored = (torch.rand(B) < 0.5) & torch.tensor(may_mirror).bool()
    maps = draw_parts(B, crop)
    maps[mirrored, 0, 0] *= -1
    brightness, contrast, saturation = 1 + jitter * (
        2 * torch.rand(3, B, 1, 1, 1, device=images.device) - 1
    )
    if B and (crop < 1 or mirrored.any() or size != W):
        where = F.affine_grid(maps.to(images.device), (B, 3, size, size), align_corners=False)
        images = F.grid_sample(images, where, padding_mode="border", align_corners=False)
    if jitter:
        images = images * brightness
        images = images.mean(dim=(1, 2, 3), keepdim=True).lerp(images, contrast)
        images = images.mean(dim=1, keepdim=True).lerp(images, saturation).clamp(0, 255)
    return images


def pad_texts(texts, tokenizer, max_tokens):
    """Return n texts as ids (n, max_tokens): bos, the text, eos, padding.

    All batches have one width, since a compiled model is slow at its first batch of a new shape.
    """
    ids = torch.full((len(texts), max_tokens), tokenizer.pad_id)
    for row, text in zip(ids, texts):
        tokens = [tokenizer.bos_id, *tokenizer.encode(text)[: max_tokens - 2], tokenizer.eos_id]
        row[: len(tokens)] = torch.tensor(tokens)
    return ids


def hide_words(ids, tokenizer, share):
    """Replace a share of the tokens by padding, but not images nor the beginnings and ends of
    answers."""
    special = torch.tensor([IMAGE_ID, tokenizer.bos_id, tokenizer.eos_id], device=ids.device)
    is_hidden = torch.rand(ids.shape, device=ids.device) < share
    return ids.masked_fill(is_hidden & ~torch.isin(ids, special), tokenizer.pad_id)


# downloads ----------------------------------------------------------------------------------------


def checksum(path, algorithm):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def fetch(url, partial):
    """Append to the file partial what it lacks of url. Return the checksum of the whole that the
    Hugging Face hub sends when it redirects, of large files a SHA-256; or ""."""
    size = partial.stat().st_size if partial.is_file() else 0
    headers = {"Range": f"bytes={size}-", "Accept-Encoding": "identity"}
    with requests.get(url, headers=headers, stream=True, timeout=20) as reply:
        etag = "".join(r.headers.get("X-Linked-Etag", "") for r in reply.history).strip('"')
        if reply.status_code == 416:  # range not satisfiable: nothing is missing
            return etag
        reply.raise_for_status()
        if reply.status_code != 206:  # the server sends the whole file, not the part asked for
            size = 0
        total = size + int(reply.headers.get("Content-Length", 0))
        with open(partial, "ab" if size else "wb") as file:
            for chunk in reply.iter_content(1 << 16):  # raises an error if it breaks off
                file.write(chunk)
                show_progress(f"{partial.stem}: {file.tell() / 1e6:.0f} of {total / 1e6:.0f} MB")
    show_progress("")
    return etag


def download(path, urls, md5=None):
    """Return path, after downloading it from one of urls if there is no such file yet.

    The urls are tried in turn, four times; a new attempt continues where the last one ended.
    md5: the official checksum. A download must match it, or that of the hub; a file that is already
        there need not.
    """
    path = Path(path)
    if path.is_file():
        if md5 and checksum(path, "md5") != md5:
            print(f"note: {path} is not the official file (its md5 differs); using it as it is")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(f"{path}.partial")
    for url in urls * 4:
        try:
            etag = fetch(url, partial)
        except requests.RequestException as e:
            problem = e
            time.sleep(1)
            continue
        if md5 or len(etag) == 64:
            is_whole = checksum(partial, "md5" if md5 else "sha256") == (md5 or etag)
        else:
            is_whole = path.suffix != ".zip" or zipfile.is_zipfile(partial)
        if is_whole:
            partial.replace(path)
            return path
        partial.unlink()
        problem = f"{url} has a different file"
    fail(
        f"could not download {path.name}; fetch it by hand from {' or '.join(urls)} and put it at "
        f"{path} ({problem})"
    )


# packed data --------------------------------------------------------------------------------------


def save_array(path, array):
    with new_file(path) as partial, open(partial, "wb") as file:
        np.save(file, array)


def save_parts(path, dtype, shape, parts):
    """Write the array that consists of parts, an iterable of arrays, which may not fit into memory
    together. dtype: such as "|u1" or "<f2"."""
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    with new_file(path) as partial, open(partial, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.writelines(parts)


def save_json(path, value):
    with new_file(path) as partial:
        partial.write_text(json.dumps(value))


def load_data(path, prepare_with):
    """Return the array (*.npy), mapped into memory, or the value (*.json) at path.

    prepare_with: the command that makes the file.
    """
    path = Path(path)
    assert path.is_file(), f"no data at {path} yet; make it first: {prepare_with}"
    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="c")  # copy on write: torch.from_numpy() needs no copy
        return json.loads(path.read_bytes())
    except (ValueError, EOFError) as e:
        fail(f"{path} is damaged ({e}); make it again: {prepare_with}")


def prepare_command(dataset):
    """Return the command that makes the folder data/<dataset>."""
    if dataset in ("shakespeare", "flickr8k"):
        return f"python prepare_{dataset}.py"
    return f"python prepare_flickr8k.py --source=DIR --out_dir=data/{dataset}"


def load_photos(dataset, image_size):
    """Return what prepare_flickr8k.py has packed into data/<dataset>.

    images: a uint8 tensor (n, 3, image_size, image_size), or TiledImages
    groups: {split: groups of samples about the same images}. A sample is {"images": [indices],
        "messages": [...]}, see mllm.py.
    tokenizer
    """
    folder = f"data/{dataset}"
    prepare = prepare_command(dataset)
    images = pixels = torch.from_numpy(load_data(f"{folder}/images.npy", prepare))
    if pixels.dim() == 5:
        prepare += f" --max_tiles={pixels.size(1)}"
        layouts = torch.from_numpy(load_data(f"{folder}/layouts.npy", prepare))
        images = TiledImages(pixels, layouts)
    splits = load_data(f"{folder}/samples.json", prepare)["splits"]
    tokenizer = tokenizer_from_state(load_data(f"{folder}/tokenizer.json", prepare))
    assert pixels.size(-1) == image_size, (
        f"{folder} holds images of {pixels.size(-1)} pixels, and image_size is {image_size}; "
        f"run {prepare} --size={image_size}"
    )
    groups = {split: group_by_images(samples) for split, samples in splits.items()}
    return images, groups, tokenizer


@torch.no_grad()
def keep_features(model, images, dataset):
    """Return the (n, N, C) float16 features of all images, (n, 3, H, W) uint8, by the ViT of an
    MLLM.

    They are computed once, without dropout, and mapped into memory from a file in data/<dataset>/.
    A checksum of the weights and the images is part of its name.
    """
    digest = hashlib.sha256(images.numpy())
    for weight in model.vit.state_dict().values():
        digest.update(weight.cpu().numpy())
    path = Path("data", dataset, f"features_{digest.hexdigest()[:8]}.npy")
    side = images.size(-1) // model.config.vit.patch_size
    shape = (len(images), side**2, model.vit.n_features)

    def compute(start):
        show_progress(f"features of image {start}/{len(images)}, for {path}")
        batch = images[start : start + 50].to(device_of(model))
        return model.vit.features(batch).half().cpu().numpy()

    if is_main() and not path.is_file():
        with evaluating(model), autocast(model):
            save_parts(path, "<f2", shape, map(compute, range(0, len(images), 50)))
        show_progress("")
    sum_over_processes(0, device_of(model))  # the others wait until the file is there
    return np.load(path, mmap_mode="c")


def texts_of(sample):
    """Return what user and assistant say in turn, without images."""
    return [message["content"].replace("<image>", "") for message in sample["messages"]]


def caption_samples(i, captions):
    """Return the samples in which the assistant describes image i, an index or a name, without a
    question."""
    ask = {"role": "user", "content": "<image>"}
    return [
        {"images": [i], "messages": [ask, {"role": "assistant", "content": caption}]}
        for caption in captions
    ]


def group_by_images(samples):
    """Return groups of samples about the same images. A sample without images is a group of its
    own."""
    groups = {}
    for i, sample in enumerate(samples):
        groups.setdefault(tuple(sample["images"]) or i, []).append(sample)
    return list(groups.values())


def word_shares(captions, tokenizer):
    """Return (n, vocab_size) shares of the words in the captions (n lists) of each photo, which sum
    to 1.

    A word counts by the number of captions that have it, times the logarithm of one over the share
    of photos that have it; at most 5, or the rarest words would dominate.
    """
    counts = torch.zeros(len(captions), tokenizer.vocab_size)
    for i, photo_captions in enumerate(captions):
        for caption in photo_captions:
            counts[i, list(set(tokenizer.encode(caption)))] += 1
    n_photos = (counts > 0).sum(dim=0)  # 0 of a word in no photo, whose rarity does not matter
    rarity = (len(captions) / n_photos).log().clamp(max=5)
    return F.normalize(counts * rarity, p=1, dim=1)
