"""Data in files: images read and augmented, downloads, packed arrays."""

import hashlib
import io
import json
import os
import re
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from config import fail, new_file, show_progress
from model import LAYOUTS, best_layout, tokenizer_from_state


def to_rgb(image):
    """A PIL image turned upright, as RGB, as a person sees it: 16 bits scaled to 8, what is transparent on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # 16 or 32 bits a pixel, integers or floats
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        most = 65535 if image.mode[0] == "I" else max(values.max(initial=0), 1e-8)
        image = Image.fromarray((255 * (values / most).clip(0, 1)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_pixels(image, size):
    """A PIL image as a (3, size, size) uint8 tensor, resized without keeping the proportions (the whole photo is seen,
    and training and inference see it alike)."""
    image = to_rgb(image).resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # (H, W, 3) -> (3, H, W)


def to_tiles(image, size, max_tiles):
    """A PIL image as (max_tiles, 3, size, size) uint8 and the index of its layout (see model.best_layout()): it keeps
    its proportions, is resized to fit the grid of tiles, and padded with black on the right or below."""
    image = to_rgb(image)
    layout = best_layout(image.width / size, image.height / size, max_tiles)
    rows, columns = LAYOUTS[layout]
    scale = min(columns * size / image.width, rows * size / image.height)
    sides = [max(1, round(scale * side)) for side in image.size]
    resized = torch.from_numpy(np.array(image.resize(sides, Image.Resampling.BICUBIC, reducing_gap=3)))  # (H, W, 3)
    tiles = torch.zeros(max_tiles, 3, size, size, dtype=torch.uint8)
    grid = torch.zeros(3, rows * size, columns * size, dtype=torch.uint8)
    grid[:, :sides[1], :sides[0]] = resized.permute(2, 0, 1)
    tiles[:rows * columns] = grid.view(3, rows, size, columns, size).permute(1, 3, 0, 2, 4).flatten(0, 1)
    return tiles, layout


def join_tiles(tiles, layout):
    """(T, 3, H, W) tiles of one image -> the image, (3, rows * H, columns * W); an image without tiles as it is."""
    if tiles.dim() == 3:
        return tiles
    rows, columns = LAYOUTS[layout]
    return torch.cat([torch.cat(tuple(row), dim=2) for row in tiles[:rows * columns].split(columns)], dim=1)


def to_images(pictures, size, max_tiles=1):
    """PIL images -> (n, 3, size, size) uint8, squeezed to squares, or with max_tiles > 1 (n, max_tiles, 3, size, size)
    tiles; and their layouts, (n,)."""
    n, layouts = len(pictures), torch.zeros(len(pictures), dtype=torch.long)
    images = torch.empty(n, *[max_tiles] * (max_tiles > 1), 3, size, size, dtype=torch.uint8)
    for i, picture in enumerate(pictures):
        if max_tiles > 1:
            images[i], layouts[i] = to_tiles(picture, size, max_tiles)
        else:
            images[i] = to_pixels(picture, size)
    return images, layouts


def middle_frames(frames, n):
    """The middle one of each of n equal parts of a sequence; all of a shorter one."""
    n = min(n, len(frames))
    return [frames[(2 * i + 1) * len(frames) // (2 * n)] for i in range(n)]


def open_file(source, n_frames):
    """The images of a file, a list: one; of an animated GIF, WebP or PNG n_frames of them, evenly spaced. Large ones
    are reduced to 1024 pixels, so that a folder of photos fits into memory."""
    file, images = Image.open(source), []
    for i in middle_frames(range(getattr(file, "n_frames", 1)), n_frames):
        file.seek(i)
        image = file.copy() if i else file
        image.thumbnail((1024, 1024))
        images.append(to_rgb(image))
    return images


def open_images(where, n_frames=1, clip=False):
    """What a user shows: a list of (name, [PIL image, ...]); and the names of the files that Pillow cannot read. where:
    a file or a URL; several files, with commas between them, which are seen together; or a folder, of images to be seen
    one by one, or, with clip, of the frames of a clip. Of a clip, n_frames frames are seen."""
    if "," in where and not Path(where).exists() and not where.lower().startswith("http"):  # a URL may hold commas
        parts = [open_images(os.path.expanduser(part.strip()), n_frames) for part in where.split(",") if part.strip()]
        files = [file for opened, _ in parts for file in opened]
        return [(", ".join(name for name, _ in files), [image for _, images in files for image in images])], []
    if where.lower().startswith(("http://", "https://")):
        import requests
        try:
            reply = requests.get(where, timeout=30)
            reply.raise_for_status()
        except requests.RequestException as e:
            fail(f"could not fetch {where} (no network?): {type(e).__name__}")
        sources = [(where.rsplit("/", 1)[-1] or where, io.BytesIO(reply.content))]
    elif Path(where).is_dir():
        endings = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")
        sources = [(p.name, p) for p in sorted(Path(where).iterdir()) if p.suffix.lower() in endings]
        if not sources:
            fail(f"{where}: a folder without images ({', '.join(endings)})")
        sources = middle_frames(sources, n_frames) if clip else sources
    elif Path(where).suffix.lower() in (".mp4", ".mov", ".avi", ".mkv", ".webm"):
        fail(f"{where}: make a folder of its frames first: mkdir clip; ffmpeg -i {where} -vf fps=4 clip/%04d.png; then "
             "--image=clip --frames=8")
    elif Path(where).is_file():
        sources = [(Path(where).name, Path(where))]
    else:
        fail(f"{where}: no such image file or folder")
    opened, broken = [], []
    for name, source in sources:
        try:
            opened.append((name, open_file(source, 1 if clip else n_frames)))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # all that Pillow raises
            broken.append(name)
    if not opened:
        fail(f"{', '.join(broken)}: not an image that Pillow can read")
    if clip and Path(where).is_dir():
        opened = [(Path(where).name, [image for _, images in opened for image in images])]
    return opened, broken


def shift_and_mirror(images, shift, mirrored):
    """(B, 3, H, W) images, each moved by up to shift pixels in both directions (what comes in is black) and, where the
    (B,) booleans say so, mirrored. Draws from torch's global generator."""
    (B, _, H, W), dev = images.shape, images.device
    padded = F.pad(images, (shift,) * 4)
    top, left = torch.randint(2 * shift + 1, (2, B, 1), device=dev)
    rows, columns = top + torch.arange(H, device=dev), left + torch.arange(W, device=dev)  # (B, H), (B, W)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    each = torch.arange(B, device=dev)[:, None, None]
    return padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # (B, H, W, 3) -> (B, 3, H, W)


def augment_photos(images, captions, crop, jitter, mirror, size=0):
    """(B, 3, H, W) photos -> (B, 3, size, size) float, or as large as they are where size is 0, augmented with draws
    from torch's global generator: of each a part is seen, of crop to 1 times its area, its sides stretched by up to
    4 / 3. With mirror half of them are mirrored, but none with a caption (captions: a list for each) that says left or
    right. Brightness, contrast and saturation change by factors from 1 - jitter to 1 + jitter."""
    B, dev, images = len(images), images.device, images.float()
    sided = [any(re.search(r"\b(left|right)\b", caption) for caption in each) for each in captions]
    sided = torch.tensor(sided, dtype=torch.bool)
    mirrored = (torch.rand(B) < 0.5) & ~sided & mirror
    area, stretch = 1 - (1 - crop) * torch.rand(B), (4 / 3) ** (2 * torch.rand(B) - 1)
    stretch = stretch.clamp(area, 1 / area)  # a part is nowhere larger than the photo
    sides = torch.stack((area * stretch, area / stretch)).sqrt()  # (2, B), shares of width and height
    middle = (2 * torch.rand(2, B) - 1) * (1 - sides)  # of the part; a photo's borders are at -1 and 1
    gain = 1 + jitter * (2 * torch.rand(3, B, 1, 1, 1, device=dev) - 1)  # brightness, contrast, saturation
    H, W = (size, size) if size else images.shape[-2:]
    if B and (crop < 1 or mirrored.any() or (H, W) != images.shape[-2:]):
        theta = torch.zeros(B, 2, 3)
        theta[:, 0, 0], theta[:, 1, 1] = torch.where(mirrored, -sides[0], sides[0]), sides[1]
        theta[:, :, 2] = middle.T
        where = F.affine_grid(theta.to(dev), (B, 3, H, W), align_corners=False)
        images = F.grid_sample(images, where, padding_mode="border", align_corners=False)
    if jitter:
        images = images * gain[0]
        images = images.mean(dim=(1, 2, 3), keepdim=True).lerp(images, gain[1])
        images = images.mean(dim=1, keepdim=True).lerp(images, gain[2]).clamp(0, 255)
    return images


def pad_texts(texts, tokenizer, max_tokens):
    """n str -> (n, max_tokens) ids: bos, the text, eos, padding; one width for all, since a new shape is slow."""
    ids = torch.full((len(texts), max_tokens), tokenizer.pad_id)
    for row, text in zip(ids, texts):
        tokens = [tokenizer.bos_id, *tokenizer.encode(text)[:max_tokens - 2], tokenizer.eos_id]
        row[:len(tokens)] = torch.tensor(tokens)
    return ids


def download(path, urls, md5=None, check=lambda path: ""):
    """Fetch path from the first of urls that has it whole, and go on where a connection broke off. A file that is there
    already is used as it is. md5: the official checksum, if one is known; check: a function of the path, which says
    what is wrong with the file, "" for nothing. A download gets its name after both; a file that was there already and
    has another md5 is used, with one printed line."""
    path = Path(path)
    if path.is_file():
        if md5 and md5_of(path) != md5:
            print(f"note: {path} lay here already and is not the official file (its md5 differs); using it as it is")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, problems = Path(f"{path}.partial"), []
    for url in urls:
        problem = _fetch_whole(url, partial, lambda: "its md5 differs" if md5 and md5_of(partial) != md5
                               else check(partial))
        if not problem:
            os.replace(partial, path)
            return path
        problems.append(f"{url} ({problem})")
    fail(f"could not download {path.name}; fetch it by hand and put it at {path}. Tried " + ", ".join(problems))


def _fetch_whole(url, partial, problem_of):
    """Fetch what is missing of url into the file partial until problem_of() finds nothing wrong with it; returns what
    is wrong after three attempts in a row that brought no bytes, a hundred in all, or with a file that came whole."""
    import requests
    idle, size = 0, lambda: partial.stat().st_size if partial.is_file() else 0
    for _ in range(100):
        had = size()
        try:
            _fetch(url, partial, had)
            problem = problem_of()
            if not problem:
                return ""
            partial.unlink()
            if not had:
                return problem
            continue  # what was there before was the beginning of something else
        except requests.RequestException as e:
            status = e.response.status_code if e.response is not None else 0
            problem = f"status {status}" if status else type(e).__name__
            if 400 <= status < 500 and status not in (408, 429):  # these two pass
                break
        idle = 0 if size() > had else idle + 1
        if idle == 3:
            break
        show_progress(f"{partial.stem}: {problem}; trying again")
        time.sleep(2 ** idle)
    return problem


def _fetch(url, partial, have):
    """Append what is missing of url to the file partial, which has so many bytes."""
    import requests
    headers, began = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {}), time.monotonic()
    with requests.get(url, stream=True, timeout=(10, 30), headers=headers) as reply:  # to connect; between two chunks
        part = re.match(r"bytes (?:(\d+)-\d+|\*)/(\d+)", reply.headers.get("Content-Range", ""))
        if reply.status_code == 416 and have:  # nothing is missing, or the file is longer than it may be
            if not part or int(part[2]) != have:
                partial.unlink()
                raise requests.ConnectionError
            return
        reply.raise_for_status()
        if reply.status_code != 206:
            have = 0  # the server sends all of it
        elif not part or part[1] != str(have):  # another part than the one asked for
            partial.unlink(missing_ok=True)
            raise requests.ConnectionError
        total, before = have + int(reply.headers.get("Content-Length", 0)), have
        with open(partial, "ab" if have else "wb") as f:
            for chunk in reply.iter_content(1 << 16):
                f.write(chunk)
                have += len(chunk)
                pace = (have - before) / (time.monotonic() - began)
                show_progress(f"{partial.stem}: {have / 1e6:.0f} of {total / 1e6:.0f} MB, {pace / 1e6:.1f} MB/s")
        show_progress("")
        if have < total:
            raise requests.ConnectionError


def zip_problem(path):
    """What is wrong with a zip; "" if it is whole and the CRC of each member is right."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        return f"{broken} in it is broken" if broken else ""
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError):  # the last: nonsense in it
        return "no whole zip"


def save_array(path, array):
    """np.save, so that no half of a file is left."""
    with new_file(path) as partial, open(partial, "wb") as f:
        np.save(f, array)


def save_json(path, value):
    """json.dump, so that no half of a file is left."""
    with new_file(path) as partial:
        partial.write_text(json.dumps(value), encoding="utf-8")


def load_data(path, prepare_with):
    """The memory-mapped array (*.npy) or the value (*.json) at path; prepare_with: the command that makes it."""
    if not Path(path).is_file():
        fail(f"no data at {path} yet; make it first: {prepare_with}")
    return np.load(path, mmap_mode="r") if str(path).endswith(".npy") else json.loads(Path(path).read_text("utf-8"))


def prepare_command(dataset):
    """The command that makes the folder data/<dataset> of photos and captions."""
    return "python prepare_flickr8k.py" + (f" --source=DIR --out_dir=data/{dataset}" if dataset != "flickr8k" else "")


def load_photos(dataset, image_size):
    """The folder data/<dataset> of prepare_flickr8k.py: images, an (n, 3, image_size, image_size) uint8 array, or one
    of tiles, (n, T, 3, image_size, image_size); their layouts (n,); the table of names, captions and splits; and the
    tokenizer."""
    prepare = prepare_command(dataset)
    images, table, state = (load_data(f"data/{dataset}/{name}", prepare)
                            for name in ("images.npy", "captions.json", "tokenizer.json"))
    if len(images) != len(table["names"]):
        fail(f"data/{dataset} is half of one preparation and half of another; run {prepare} again")
    if images.shape[-1] != image_size:
        fail(f"data/{dataset} holds images of {images.shape[-1]} pixels, and image_size is {image_size}; "
             f"run {prepare} --size={image_size}" + f" --max_tiles={images.shape[1]}" * (images.ndim == 5))
    layouts = load_data(f"data/{dataset}/layouts.npy", prepare) if images.ndim == 5 else np.zeros(len(images), np.int64)
    return np.array(images), np.array(layouts), table, tokenizer_from_state(state)


def md5_of(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "md5").hexdigest()
