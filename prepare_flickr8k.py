"""
Pack Flickr8k, or a folder of your own, into data/<name>/ for vit.py, gpt.py and mllm.py.

    python prepare_flickr8k.py                                   # 6,000 / 1,000 / 1,000 photos
    python prepare_flickr8k.py --source=DIR --out_dir=data/mine  # your own

DIR holds images, or has them in DIR/Images, and either captions.txt with lines `image,caption`, or
conversations in *.jsonl or *.json, in the layouts of config/tools/conversations.py. They are split
80/10/10, so that no image is in two splits. Writes:

    images.npy               (n, 3, size, size) uint8, or (n, max_tiles, 3, size, size)
    layouts.npy              (n,) indices in model.LAYOUTS, with max_tiles above 1
    samples.json             the names of the images, and the samples of each split, see mllm.py
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
)
from config.tools.data import (
    UNREADABLE,
    caption_samples,
    download,
    save_array,
    save_json,
    save_parts,
    texts_of,
    to_images,
    to_rgb,
)
from config.tools.run import one_line_errors, show_progress
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
BEGINNING = re.compile(r'[^,]+\.\w{3,4}"? *,')  # how a line of captions.txt begins: with an image
OPEN = re.compile(r'[^,]+, *"(?:[^"]|"")*$')  # the caption begins with a quote, which is not closed


def clean(caption):
    """Return a caption in lower case, with single spaces and without a full stop at the end."""
    return " ".join(caption.lower().split()).rstrip(" .")


def open_archive(folder, name):
    path = download(folder / name, [mirror + name for mirror in MIRRORS])
    assert zipfile.is_zipfile(path), f"{path} is not a zip archive; delete it and run this again"
    return zipfile.Path(path)


def read_flickr8k(folder):
    """Return {split: samples}, and the folder of the photos inside their archive."""
    texts = open_archive(folder, "Flickr8k_text.zip")
    photos = open_archive(folder, "Flickr8k_Dataset.zip") / "Flicker8k_Dataset"
    captions = {}
    for line in (texts / CAPTIONS).read_text(encoding="utf-8").splitlines():
        name, caption = line.split("\t")
        captions.setdefault(name.split("#")[0], []).append(clean(caption))
    splits = {}
    for split, name in SPLITS.items():
        splits[split] = samples_of((texts / name).read_text().split(), captions)
    return splits, photos


def samples_of(names, captions):
    """Return the samples of images, of which captions is {name: captions}."""
    return [sample for name in names for sample in caption_samples(name, captions[name])]


def read_captions(file, images):
    """Return {name: captions} from the lines `image,caption` of a file about a folder of images."""
    records = []
    for where, line in numbered_lines(file):
        is_open = records and OPEN.match(records[-1][1])
        if is_open and not BEGINNING.match(line):  # a caption with a line break
            line = f"{records[-1][1]} {line}"
            where, _ = records.pop()
        records.append((where, line))
    captions = {}
    left_out = []
    for i, (where, record) in enumerate(records):
        record = re.sub(r'^([^,]+), +"', r'\1,"', record)  # a quote after a space
        name, *rest = next(csv.reader([record]))
        caption = ",".join(rest).strip()  # a caption with commas needs no quotes
        if i == 0 and "." not in name and not (images / name).is_file():
            assert len(rest) == 1, f"{where}: the columns are not `image,caption`"
            print(f"{where}, is taken for the header")
            continue
        if re.search(r"\w", caption):
            captions.setdefault(find_image(images, name, where), []).append(clean(caption))
        else:
            left_out.append(where)
    assert captions, f"{file} has no line of the form `image,caption`, with a comma between them"
    if left_out:
        print(f"left out {len(left_out)} lines without a caption; the first is {left_out[0]}")
    return captions


def read_folder(folder):
    """Return {split: samples}, and the folder of the images."""
    assert folder.is_dir(), f"--source={folder} is not a folder"
    images = next(filter(Path.is_dir, (folder / "Images", folder / "images", folder)))
    caption_file = folder / "captions.txt"
    conversation_files = sorted([*folder.glob("*.json"), *folder.glob("*.jsonl")])
    if conversation_files:
        assert not caption_file.is_file(), (
            f"{folder} holds both captions.txt and {conversation_files[0].name}; move one away"
        )
        return split_by_image(read_conversations(conversation_files, images)), images
    assert caption_file.is_file(), (
        f"{caption_file} is missing: a line `image,caption` for each caption of each image in "
        f"{folder}; or conversations in *.jsonl or *.json"
    )
    captions = read_captions(caption_file, images)
    return split_by_image(samples_of(sorted(captions), captions)), images


def open_photos(names, folder, broken):
    """Yield the images of a folder in RGB. In the place of one that cannot be read yield a black
    one, and add {name: what is wrong} to broken."""
    for i, name in enumerate(names):
        show_progress(f"packing photo {i}/{len(names)}")
        try:
            with (folder / name).open("rb") as file:
                yield to_rgb(Image.open(file))
        except UNREADABLE as e:
            broken[name] = f"{folder / name} cannot be read as an image ({e})"
            yield Image.new("RGB", (1, 1))
    show_progress("")


def encode(conversations, tokenizer):
    """Return conversations as one stream of ids: question, bos, answer, eos, question, ..."""
    ids = []
    for texts in conversations:
        for i, text in enumerate(texts):
            end = tokenizer.eos_id if i % 2 else tokenizer.bos_id  # bos: the assistant's turn
            ids += [*tokenizer.encode(text), end]
    return np.array(ids, dtype=np.uint32)


@one_line_errors
def main(argv=None):
    config.override(globals(), argv)
    out = Path(out_dir)
    assert 1 <= max_tiles <= 4, f"max_tiles={max_tiles}: 1 to 4"
    if source:
        assert out not in (Path("data/flickr8k"), Path(source)), (
            "your own images need a folder of their own, such as --out_dir=data/mine"
        )
        splits, folder = read_folder(Path(source).expanduser())
    else:
        splits, folder = read_flickr8k(out)
    samples = sum(splits.values(), [])
    names = list(dict.fromkeys(name for sample in samples for name in sample["images"]))
    tiles = [max_tiles] * (max_tiles > 1)
    shape = (len(names), *tiles, 3, size, size)
    layouts = []
    broken = {}

    def pack(photo):
        images = to_images([photo], size, max_tiles)
        if tiles:
            layouts.extend(images.layouts.tolist())
            images = images.pixels
        return images.numpy()

    save_parts(out / "images.npy", "|u1", shape, map(pack, open_photos(names, folder, broken)))
    if tiles:
        save_array(out / "layouts.npy", np.array(layouts, dtype=np.int64))
    for problem in broken.values():
        assert source, problem  # Flickr8k itself is whole
        print(f"left out: {problem}")
    index = {name: i for i, name in enumerate(names)}
    for split, samples in splits.items():
        splits[split] = [
            sample | {"images": [index[name] for name in sample["images"]]}
            for sample in samples
            if not broken.keys() & sample["images"]
        ]

    texts = [text for sample in splits["train"] for text in texts_of(sample)]
    tokenizer = BPETokenizer.train(texts, vocab_size)
    for split in SPLITS:
        conversations = [texts_of(sample) for sample in splits[split]]
        assert conversations, f"no image of {split} can be read"
        random.Random(0).shuffle(conversations)  # captions of a photo are apart in the stream
        ids = encode(conversations, tokenizer)
        save_array(out / f"{split}.npy", ids)
        n = len(conversations)
        print(f"{out}: {split}, {n:,} texts of {len(ids) / n:.1f} tokens on average")
    save_json(out / "tokenizer.json", tokenizer.state())
    save_json(out / "samples.json", {"names": names, "splits": splits})
    print(f"{out}: images.npy {shape}, {tokenizer.vocab_size} token ids")


if __name__ == "__main__":
    main()
