"""
Read conversations from files: *.jsonl with one JSON object per line, or *.json with an array of
them. MiniMind-V's layout, LLaVA's and LLaMA-Factory's:

    {"conversations": [{"role": "user", "content": "<image>\\nwhat is it?"},
                       {"role": "assistant", "content": "A dog."}], "image": "a.jpg, b.jpg"}
    {"conversations": [{"from": "human", "value": "..."},
                       {"from": "gpt", "value": "..."}], "image": "a.jpg"}
    {"messages": [{"role": "system", "content": "..."}, ...], "images": ["a.jpg", "b.jpg"]}

"image" or "images" is a name, names with commas between them, a list, or absent. What a system turn
says becomes the beginning of the first user turn.
"""

import json
import posixpath
import random
import re
import unicodedata
from itertools import chain, repeat

from config import read_text
from config.tools.run import fail

ROLES = {"user": ("user", "human"), "assistant": ("assistant", "gpt")}  # ours: the files'
KEYS = {"conversations", "messages", "image", "images", "id"}
FILE = re.compile(r"\.\w{3,4}\b")  # a name with an ending, under a key that is not known


def numbered_lines(file):
    """Yield ("<file>, line <n>", text) for each line of a file that is not empty."""
    for number, text in enumerate(re.split(r"\r\n?|\n", read_text(file)), 1):
        if text.strip():
            yield f"{file}, line {number}", text


def find_image(folder, text, where):
    """Return the name by which a folder, a Path, has an image, however people wrote it.

    `./a.jpg`, `b\\..\\a.jpg` and, in the folder Images, `Images/a.jpg` are a.jpg, and an accented
    letter is one character or two.
    """
    name = posixpath.normpath(text.strip().replace("\\", "/")).removeprefix(f"{folder.name}/")
    for spelling in (*(unicodedata.normalize(form, name) for form in ("NFC", "NFD")), text):
        if (folder / spelling).is_file():
            return spelling
    fail(f"{where}: there is no image {text!r} in {folder}")


def clean(text):
    """Return the text of a turn without white space around it and around <image>."""
    return re.sub(r"\s*<image>\s*", "<image>", text.strip())


def parse(text, where):
    """Return the value of JSON, a str or bytes in UTF-8."""
    try:
        return json.loads(text)
    except ValueError as e:
        fail(f"{where}: not JSON ({e})")


def read_values(file):
    """Yield ("<file>, line <n>", value) for each line of *.jsonl; of *.json ("<file>, sample <n>",
    value)."""
    if file.suffix == ".jsonl":
        for where, line in numbered_lines(file):
            yield where, parse(line, where)
    else:
        values = parse(file.read_bytes(), file)
        assert isinstance(values, list), f"{file}: not an array of samples"
        for number, value in enumerate(values, 1):
            yield f"{file}, sample {number}", value


def read_messages(turns, where):
    """Return the turns of a conversation as [{"role": ..., "content": ...}, ...]."""
    messages = []
    system = ""
    for i, turn in enumerate(turns, 1):
        assert isinstance(turn, dict), f'{where}: turn {i} is not {{"role": ..., "content": ...}}'
        found = turn.get("role", turn.get("from"))
        text = turn.get("content", turn.get("value"))
        assert isinstance(text, str), f"{where}: turn {i} has no text"
        text = clean(text)
        if i == 1 and found == "system":
            system = f"{text}\n"
            continue
        role = "assistant" if len(messages) % 2 else "user"
        assert found in ROLES[role], (
            f"{where}: turn {i} has the role {found!r} instead of {' or '.join(ROLES[role])}: user "
            f"and assistant take turns, and the user begins"
        )
        if role == "assistant":
            assert text, f"{where}: turn {i} is an empty answer"
            assert "<image>" not in text, f"{where}: turn {i} is an answer with <image> in it"
        messages.append({"role": role, "content": text if messages else system + text})
    assert messages and len(messages) % 2 == 0, (
        f"{where}: the last turn is not an answer of the assistant"
    )
    return messages


def read_sample(value, where):
    """Return the sample {"images": [file names], "messages": [...]} of a JSON value."""
    turns = None
    if isinstance(value, dict):
        turns = value.get("conversations", value.get("messages"))
    assert isinstance(turns, list), (
        f'{where}: it has no "conversations", a list of turns {{"role": ..., "content": ...}}'
    )
    for key in value.keys() - KEYS:
        assert key != "system" and not FILE.search(str(value[key])), (
            f'{where}: the key "{key}" is unknown; files are named by "image" or "images", and a '
            f"system prompt is the first turn"
        )
    assert not {"image", "images"} <= value.keys(), f'{where}: it has both "image" and "images"'
    images = value.get("image") or value.get("images") or []
    if isinstance(images, str):
        images = images.split(",")
    assert isinstance(images, list), (
        f"{where}: the images are neither a file name, nor names with commas between them, nor a "
        f"list"
    )
    images = list(map(str, images))
    messages = read_messages(turns, where)
    n = str(messages).count("<image>")
    assert n == 0 or 0 < len(images) <= n, (
        f"{where}: <image> occurs {n} times in the text, and there are {len(images)} images"
    )
    if n == 0:
        messages[0]["content"] = "<image>" * len(images) + messages[0]["content"]
    return {"images": images, "messages": messages}


def drop_surplus(sample):
    """Remove the last <image> of a sample until there are as many as images. Return how many."""
    n_images = len(sample["images"])
    n_surplus = str(sample["messages"]).count("<image>") - n_images
    markers = chain(["<image>"] * n_images, repeat(" "))
    for message in sample["messages"]:
        text = re.sub("<image>", lambda _: next(markers), message["content"])
        message["content"] = text.strip()
    return n_surplus


def read_conversations(files, folder):
    """Return the samples of files about images in a folder. A bad line ends the program."""
    samples = []
    n_surplus = 0
    for file in files:
        for where, value in read_values(file):
            sample = read_sample(value, where)
            sample["images"] = [find_image(folder, name, where) for name in sample["images"]]
            n_surplus += drop_surplus(sample)
            samples.append(sample)
    if n_surplus:
        print(f"dropped {n_surplus} times <image>, the last of samples that name fewer images")
    return samples


def split_by_image(samples):
    """Return 80% of the samples as "train", 10% as "val" and 10% as "test", chosen with a fixed
    seed. Samples that share an image, directly or through other samples, are in the same split."""
    parent = {}  # trees of what belongs together: indices of samples, and names of images

    def root(node):
        while parent.setdefault(node, node) != node:
            node = parent[node]
        return node

    for i, sample in enumerate(samples):
        for name in sample["images"]:
            parent[root(i)] = root(name)
    groups = {}
    for i, sample in enumerate(samples):
        groups.setdefault(root(i), []).append(sample)
    groups = list(groups.values())
    random.Random(0).shuffle(groups)
    n = len(groups) // 10
    assert n >= 2, (
        f"{len(groups)} images, or groups of samples that share images, are too few to split; at "
        f"least 20 are needed"
    )
    splits = {"train": groups[2 * n :], "val": groups[:n], "test": groups[n : 2 * n]}
    return {split: [*chain(*groups)] for split, groups in splits.items()}
