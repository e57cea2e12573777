"""
Pack Flickr8k, or a folder of your own, into data/<name>/ for vit.py, gpt.py and mllm.py.

    python prepare_flickr8k.py                                   # 6,000 / 1,000 / 1,000 photos
    python prepare_flickr8k.py --source=DIR --out_dir=data/mine  # your own

DIR holds images, or has them in DIR/Images, and either captions.txt with lines `image,caption`, or
conversations in *.jsonl or *.json, in the layouts of config/tools/conversations.py. They are split
80/10/10, so that no image is in two splits. Writes:

    images.npy               (n, 3, size, size) uint8, or (n, max_tiles, 3, size, size)
    layouts.npy              (n,) indices in model.LAYOUTS, with max_tiles above 1
    captions.json            the names of the images, the captions of each image, and the indices of
                             the images in each split; or the conversations of each split
    tokenizer.json           a BPE tokenizer, trained on the training texts
    {train,val,test}.npy     the texts as one stream of token ids, for gpt.py

Captions become lower case, without a full stop at the end; conversations stay as they are.
"""

import csv
import random
import re
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

import config
from config.tools.conversations import (
    find_image,
    numbered_lines,
    read_conversations,
    split_by_image,
    split_randomly,
)
from config.tools.data import (
    UNREADABLE,
    download,
    groups_of,
    save_array,
    save_json,
    texts_of,
    to_images,
    to_rgb,
)
from config.tools.run import fail, new_file, one_line_errors, show_progress
from model import BPETokenizer

out_dir = "data/flickr8k"  # where the downloads go, and what --dataset=flickr8k reads
source = ""  # a folder with your own captions.txt, *.jsonl or *.json; empty: Flickr8k
size = 112  # pixels per side; photos are squeezed to squares, unless max_tiles is above 1
max_tiles = 1  # above 1, at most 4: photos keep their proportions, on up to so many square tiles
vocab_size = 4096  # of the tokenizer, including special ids and bytes

# No official checksum is known. The second address, the publisher's own, does not always answer.
MIRRORS = [
    "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/",
    "http://nlp.cs.illinois.edu/HockenmaierGroup/Framing_Image_Description/",
]
SPLITS = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
CAPTIONS = "Flickr8k.token.txt"
BEGINNING = re.compile(r"[^,]+\.\w{3,4} *,")  # how a line of captions.txt begins: with an image


def clean(caption):
    """Return a caption in lower case, with single spaces and without a full stop at the end."""
    return " ".join(caption.lower().split()).rstrip(" .")


def caption_table(captions, splits):
    """Return the table for captions.json, from {name: captions} and {split: names}."""
    names = sum(splits.values(), [])
    index = {name: i for i, name in enumerate(names)}
    return {
        "names": names,
        "captions": [captions[name] for name in names],
        "splits": {split: [index[name] for name in splits[split]] for split in splits},
    }


def conversation_table(samples, names):
    """Return the table for captions.json, from samples with images as names."""
    splits = split_by_image(samples)
    index = {name: i for i, name in enumerate(names)}
    for sample in samples:
        sample["images"] = [index[name] for name in sample["images"]]
    return {"names": names, "samples": splits}


def open_archive(folder, name):
    path = download(folder / name, [mirror + name for mirror in MIRRORS])
    assert zipfile.is_zipfile(path), f"{path} is not a zip archive; delete it and run this again"
    return zipfile.Path(path)


def read_flickr8k(folder):
    """Return the table for captions.json, and the folder of the photos inside their archive."""
    texts = open_archive(folder, "Flickr8k_text.zip")
    photos = open_archive(folder, "Flickr8k_Dataset.zip") / "Flicker8k_Dataset"
    for name in (*SPLITS.values(), CAPTIONS):
        assert (texts / name).exists(), f"{folder}/Flickr8k_text.zip lacks {name}; delete it"
    splits = {split: (texts / name).read_text().split() for split, name in SPLITS.items()}
    captions = {}
    for line in (texts / CAPTIONS).read_text(encoding="utf-8").splitlines():
        name, caption = line.split("\t")
        captions.setdefault(name.split("#")[0], []).append(clean(caption))
    return caption_table(captions, splits), photos


def read_captions(file, images):
    """Return {name: captions} from the lines `image,caption` of a file about a folder of images."""
    records = []
    for where, line in numbered_lines(file):
        in_quotes = records and records[-1][1].count('"') % 2
        if in_quotes and not BEGINNING.match(line):  # a caption with a line break
            line = f"{records[-1][1]} {line}"
            where, _ = records.pop()
        records.append((where, line))
    captions = {}
    left_out = []
    for i, (where, record) in enumerate(records):
        name, *rest = next(csv.reader([record]))
        caption = ",".join(rest).strip()  # a caption with commas needs no quotes
        if caption.startswith('"'):  # quoted after a space
            caption = caption.removeprefix('"').removesuffix('"')
        if i == 0 and "." not in name and not (images / name).is_file():
            continue  # the header
        if re.search(r"\w", caption):
            captions.setdefault(find_image(images, name, where), []).append(clean(caption))
        else:
            left_out.append(where)
    assert captions, f"{file} has no line of the form `image,caption`"
    if left_out:
        print(f"left out {len(left_out)} lines without a caption; the first is {left_out[0]}")
    return captions


def read_folder(folder):
    """Return the table for captions.json, the folder of the images, and {name: where it is named}.

    The latter holds file and line, and is empty for captions.
    """
    assert folder.is_dir(), f"--source={folder} is not a folder"
    images = next(filter(Path.is_dir, (folder / "Images", folder / "images", folder)))
    caption_file = folder / "captions.txt"
    conversation_files = sorted(folder.glob("*.json*"))
    if conversation_files:
        assert not caption_file.is_file(), (
            f"{folder} holds both captions.txt and {conversation_files[0].name}; move one away"
        )
        samples, named = read_conversations(conversation_files, images)
        return conversation_table(samples, list(named)), images, named
    assert caption_file.is_file(), (
        f"{caption_file} is missing: a line `image,caption` for each caption of each image in "
        f"{folder}; or conversations in *.jsonl or *.json"
    )
    captions = read_captions(caption_file, images)
    splits = split_randomly(sorted(captions), f"images in {caption_file}")
    return caption_table(captions, splits), images, {}


def open_photos(names, folder, named):
    """Yield the images of a folder in RGB. named: {name: where it is named}, for the message."""
    for i, name in enumerate(names):
        show_progress(f"packing photo {i}/{len(names)}")
        try:
            with (folder / name).open("rb") as file:
                yield to_rgb(Image.open(file))
        except UNREADABLE as e:
            fail(f"{named.get(name, folder)}: {name} cannot be read as an image ({e})")
    show_progress("")


def encode(conversations, tokenizer):
    """Return conversations as one stream of ids: question, bos, answer, eos, question, ..."""
    ids = []
    for texts in conversations:
        for i, text in enumerate(texts):
            end = tokenizer.eos_id if i % 2 else tokenizer.bos_id  # bos: the assistant's turn
            ids += [*tokenizer.encode(text), end]
    return np.array(ids, dtype=np.uint16)


@one_line_errors
def main(argv=None):
    config.override(globals(), argv)
    out = Path(out_dir)
    assert 1 <= max_tiles <= 4, f"max_tiles={max_tiles}: 1 to 4"
    if source:
        assert out != Path("data/flickr8k"), (
            "your own images need a folder of their own, such as --out_dir=data/mine"
        )
        table, folder, named = read_folder(Path(source))
    else:
        table, folder = read_flickr8k(out)
        named = {}
    names = table["names"]
    tiles = [max_tiles] * (max_tiles > 1)
    shape = (len(names), *tiles, 3, size, size)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    layouts = []
    with new_file(out / "images.npy") as partial, open(partial, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for photo in open_photos(names, folder, named):  # one by one: all may not fit into memory
            images = to_images([photo], size, max_tiles)
            if tiles:
                layouts += images.layouts.tolist()
                images = images.pixels
            file.write(images.numpy())
    if tiles:
        save_array(out / "layouts.npy", layouts)

    groups = groups_of(table)
    texts = [text for group in groups["train"] for sample in group for text in texts_of(sample)]
    tokenizer = BPETokenizer.train(texts, vocab_size)
    for split in SPLITS:
        conversations = [texts_of(sample) for group in groups[split] for sample in group]
        random.Random(0).shuffle(conversations)  # captions of a photo are apart in the stream
        ids = encode(conversations, tokenizer)
        save_array(out / f"{split}.npy", ids)
        n = len(conversations)
        print(f"{out}: {split}, {n:,} texts of {len(ids) / n:.1f} tokens on average")
    save_json(out / "tokenizer.json", tokenizer.state())
    save_json(out / "captions.json", table)
    print(f"{out}: images.npy {shape}, {tokenizer.vocab_size} token ids")


if __name__ == "__main__":
    main()
