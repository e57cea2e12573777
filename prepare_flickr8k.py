"""
Flickr8k -> data/flickr8k/: photos packed to small squares, five captions each, the official splits, and a tokenizer.

    python prepare_flickr8k.py                                   6,000 / 1,000 / 1,000 photos of 96x96 pixels
    python prepare_flickr8k.py --source=DIR --out_dir=data/mine  your own: DIR/*.jpg (or DIR/Images), DIR/captions.txt
                                                                 with lines `image,caption`; split 80/10/10 by photo
                                                                 or conversations, DIR/*.jsonl, in the layouts of
                                                                 config/tools/conversations.py

Writes images.npy (n, 3, size, size) uint8, or (n, max_tiles, 3, size, size) and layouts.npy; captions.json with the
names, the captions of each photo and the indices of each split, or with the conversations of each split;
tokenizer.json, a BPE trained on the training texts; and {train,val,test}.npy, the texts as one stream of token ids for
gpt.py. Captions are stored as the model is to write them, lower case and without a full stop at the end; conversations
as they are.
"""

import csv
import random
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

import config
from config.tools.conversations import read_conversations, split_by_image
from config.tools.data import download, save_array, save_json, to_images, zip_problem
from model import BPETokenizer

out_dir = "data/flickr8k"  # where the downloads go, and what gpt.py and mllm.py read with --dataset=flickr8k
source = ""  # a folder of your own photos with a captions.txt or *.jsonl; empty: Flickr8k
size = 112  # pixels a side; photos are squeezed to squares, unless max_tiles is above 1
max_tiles = 1  # above 1, at most 4: photos keep their proportions, on a grid of up to so many squares of that size
vocab_size = 4096  # of the tokenizer, special ids and bytes included

# The publisher's own address, the second, does not always answer; no official checksum is known, so the CRCs inside the
# zips and the counts stand in for one.
MIRRORS = ["https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/",
           "http://nlp.cs.illinois.edu/HockenmaierGroup/Framing_Image_Description/"]
SPLITS = {"train": ("Flickr_8k.trainImages.txt", 6000), "val": ("Flickr_8k.devImages.txt", 1000),
          "test": ("Flickr_8k.testImages.txt", 1000)}


def clean(caption):
    """The caption as the model is to write it: lower case, single spaces, no full stop at the end."""
    return " ".join(caption.lower().split()).rstrip(" .")


def read_flickr8k(out):
    """{photo: captions}, {split: photos}, and a function that opens a photo by its name."""
    texts, photos = (zipfile.ZipFile(download(out / name, [mirror + name for mirror in MIRRORS], check=zip_problem))
                     for name in ("Flickr8k_text.zip", "Flickr8k_Dataset.zip"))
    for member in (*texts.infolist(), *photos.infolist()):
        if member.file_size > 100e6:
            config.fail(f"{member.filename} in {out} would be {member.file_size / 1e6:,.0f} MB; delete the archive")
    paths = {path.rsplit("/", 1)[-1]: path for path in photos.namelist()
             if path.endswith(".jpg") and not path.startswith("__MACOSX")}
    captions = {}
    for line in texts.read("Flickr8k.token.txt").decode("utf-8").splitlines():
        name, caption = line.split("\t")
        captions.setdefault(name.split("#")[0], []).append(clean(caption))  # one name, ...jpg.1, has no photo
    splits = {split: texts.read(name).decode().split() for split, (name, _) in SPLITS.items()}
    if len(paths) != 8091 or any(len(splits[split]) != n for split, (_, n) in SPLITS.items()):
        config.fail(f"the archives in {out} are not Flickr8k (8,091 photos, splits 6,000/1,000/1,000); delete them")
    return captions, splits, lambda name: Image.open(photos.open(paths[name]))  # which checks the CRC at the end


def images_of(folder):
    return folder / "Images" if (folder / "Images").is_dir() else folder


def read_folder(folder):
    """The same for a folder of one's own; the splits are drawn by photo, with a fixed seed."""
    file = folder / "captions.txt"
    if not file.is_file():
        config.fail(f"{file} is missing: a line `image,caption` for each caption of each image in {folder}; or "
                    "conversations in *.jsonl")
    captions = {}
    with open(file, newline="", encoding="utf-8-sig") as f:
        for number, line in enumerate(f, 1):  # a quote that is not closed ends with its line
            if len(line) > 10_000:
                config.fail(f"{file}, line {number}: {len(line):,} characters are no caption")
            row = next(csv.reader([line]))
            text = ",".join(row[1:]).strip()  # a caption with commas and without quotes stays whole
            if text and (row[0], text) != ("image", "caption"):
                if not row[0].strip():
                    config.fail(f"{file}, line {number} names no image")
                text = text.removeprefix('"').removesuffix('"') if text[0] == '"' else text  # quoted behind a space
                captions.setdefault(row[0], []).append(clean(text))
    if not captions:
        config.fail(f"{file} has no line of the form `image,caption`")
    images = images_of(folder)
    for name in captions:
        if not (images / name).is_file():
            config.fail(f"{file} speaks of {name}, which is not in {images}")
    names = sorted(captions)
    random.Random(0).shuffle(names)
    tenth = len(names) // 10
    if tenth < 2:  # CIDEr of one photo is 0, whatever is said
        config.fail(f"{file}: {len(names)} images are too few to split; at least 20")
    splits = {"train": names[2 * tenth:], "val": names[:tenth], "test": names[tenth:2 * tenth]}
    return captions, splits, lambda name: Image.open(images / name)


def caption_table(captions, splits):
    """The names of the photos, and the table for captions.json."""
    names = [name for photos in splits.values() for name in photos]
    index = {name: i for i, name in enumerate(names)}
    return names, {"captions": [captions[name] for name in names],
                   "splits": {split: [index[name] for name in photos] for split, photos in splits.items()}}


def conversation_table(samples):
    """The same of conversations; the names stand for the images of the samples."""
    names = list(dict.fromkeys(name for sample in samples for name in sample["images"]))
    index = {name: i for i, name in enumerate(names)}
    splits = split_by_image(samples)
    return names, {"samples": {split: [sample | {"images": [index[name] for name in sample["images"]]}
                                       for sample in some] for split, some in splits.items()}}


def texts_of(table, split):
    """The conversations of a split, each a list of texts by turns of user and assistant."""
    if "samples" in table:
        return [[message["content"].replace("<image>", "") for message in sample["messages"]]
                for sample in table["samples"][split]]
    return [["", caption] for i in table["splits"][split] for caption in table["captions"][i]]


@config.one_line_errors
def main(argv=None):
    config.override(globals(), argv)
    out, folder, named = Path(out_dir), Path(source), {}
    if source and out == Path("data/flickr8k"):
        config.fail("your own photos need a folder of their own beside Flickr8k's, such as --out_dir=data/mine")
    if source and not folder.is_dir():
        config.fail(f"--source={source} is no folder")
    files = sorted(folder.glob("*.jsonl")) if source else []
    if files and (folder / "captions.txt").is_file():
        config.fail(f"{folder} holds both captions.txt and {files[0].name}; move one of them away")
    try:
        if files:
            samples, named = read_conversations(files, images_of(folder))
            (names, table), open_photo = conversation_table(samples), lambda name: Image.open(images_of(folder) / name)
        else:
            captions, splits, open_photo = read_folder(folder) if source else read_flickr8k(out)
            names, table = caption_table(captions, splits)
    except UnicodeDecodeError as e:
        config.fail(f"the captions are not UTF-8 ({e})")
    except (zipfile.BadZipFile, KeyError, EOFError, ValueError, RuntimeError, zlib.error) as e:
        config.fail(f"{source} is broken ({e})" if source else f"an archive in {out} is broken ({e}); delete it")
    out.mkdir(parents=True, exist_ok=True)
    images = np.zeros((len(names), *([max_tiles] * (max_tiles > 1)), 3, size, size), dtype=np.uint8)
    layouts = np.zeros(len(names), dtype=np.int64)
    for i, name in enumerate(names):
        try:
            image, layout = to_images([open_photo(name)], size, max_tiles)
            images[i], layouts[i] = image[0].numpy(), layout.item()
        except (OSError, KeyError, SyntaxError, ValueError, zipfile.BadZipFile, zlib.error,
                Image.DecompressionBombError) as e:
            where = f"{named[name]}: " if name in named else ""
            config.fail(f"{where}{name} cannot be read as an image ({e})")
        if i % 100 == 0:
            config.show_progress(f"packing photo {i}/{len(names)}")
    config.show_progress("")
    save_array(out / "images.npy", images)
    if max_tiles > 1:
        save_array(out / "layouts.npy", layouts)

    tokenizer = BPETokenizer.train((text for texts in texts_of(table, "train") for text in texts), vocab_size)
    for split in ("train", "val", "test"):  # shuffled: in the stream no caption stands beside another of its photo
        conversations, ids = texts_of(table, split), []
        random.Random(0).shuffle(conversations)
        for text in (text for texts in conversations for text in zip(texts[::2], texts[1::2])):
            question, answer = map(tokenizer.encode, text)
            ids += [*question, tokenizer.bos_id, *answer, tokenizer.eos_id]
        save_array(out / f"{split}.npy", np.array(ids, dtype=np.uint16))
        kind = "conversations" if files else "captions"
        print(f"{out}: {split}, {len(conversations):,} {kind} of {len(ids) / len(conversations):.1f} tokens")
    save_json(out / "tokenizer.json", tokenizer.state())
    save_json(out / "captions.json", {"names": names, **table})
    print(f"{out}: images.npy {images.shape}, {tokenizer.vocab_size} token ids")


if __name__ == "__main__":
    main()
