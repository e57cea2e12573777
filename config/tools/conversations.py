"""
Read conversations from files, *.jsonl, with one JSON object per line in either of two layouts:

    MiniMind-V  {"conversations": [{"role": "user", "content": "<image>what is it?"},
                                   {"role": "assistant", "content": "A dog."}],
                 "image": "a.jpg, b.jpg"}
    LLaVA       {"conversations": [{"from": "human", "value": "..."},
                                   {"from": "gpt", "value": "..."}],
                 "image": "a.jpg" or ["a.jpg", "b.jpg"] or absent}
"""

import json
import random
import re

from config.tools.run import fail

ROLES = {"user": ("user", "human"), "assistant": ("assistant", "gpt")}  # ours: the files'


def numbered_lines(file):
    """Yield ("<file>, line <n>", text) for each line of a file in UTF-8 that is not empty."""
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        where = f"{file}, line {number}"
        try:
            text = line.decode("utf-8-sig")
        except UnicodeDecodeError as e:
            fail(f"{where}: not UTF-8 ({e})")
        if text.strip():
            yield where, text


def read_message(turn, i, where):
    """Return turn i of a conversation, counted from 1, as {"role": ..., "content": ...}."""
    assert isinstance(turn, dict), f'{where}: turn {i} is not {{"role": ..., "content": ...}}'
    role = "user" if i % 2 else "assistant"
    found = turn.get("role", turn.get("from"))
    text = turn.get("content", turn.get("value"))
    assert found in ROLES[role], (
        f"{where}: turn {i} has the role {found!r} instead of {' or '.join(ROLES[role])}: user and "
        f"assistant take turns, and the user begins"
    )
    assert isinstance(text, str), f"{where}: turn {i} has no text"
    text = re.sub(r"\s*<image>\s*", "<image>", text.strip())
    if role == "assistant":
        assert text, f"{where}: turn {i} is an empty answer"
        assert "<image>" not in text, f"{where}: turn {i} is an answer with <image> in it"
    return {"role": role, "content": text}


def read_sample(line, where):
    """Return the sample {"images": [file names], "messages": [...]} of a line."""
    try:
        sample = json.loads(line)
    except ValueError as e:
        fail(f"{where}: not JSON ({e})")
    assert isinstance(sample, dict) and isinstance(sample.get("conversations"), list), (
        f'{where}: it has no "conversations", a list of turns {{"role": ..., "content": ...}}'
    )
    messages = [read_message(turn, i, where) for i, turn in enumerate(sample["conversations"], 1)]
    assert messages and len(messages) % 2 == 0, (
        f"{where}: the last turn is not an answer of the assistant"
    )
    images = sample.get("image") or []
    if isinstance(images, str):
        images = images.split(",")
    assert isinstance(images, list), (
        f'{where}: "image" is neither a file name, nor names with commas between them, nor a list'
    )
    images = [str(name).strip() for name in images]
    n = str(messages).count("<image>")
    assert n in (0, len(images)), (
        f"{where}: <image> occurs {n} times in the text, and there are {len(images)} images"
    )
    if n == 0:
        messages[0]["content"] = "<image>" * len(images) + messages[0]["content"]
    return {"images": images, "messages": messages}


def read_conversations(files, folder):
    """Return the samples of *.jsonl files about images in a folder, and where each image is named.

    The latter is {image: "<file>, line <n>"}, the first of its lines. A bad line ends the program.
    """
    samples = []
    named = {}
    for file in files:
        for where, text in numbered_lines(file):
            sample = read_sample(text, where)
            for name in sample["images"]:
                assert (folder / name).is_file(), f"{where}: there is no image {name} in {folder}"
                named.setdefault(name, where)
            samples.append(sample)
    return samples, named


def split_randomly(items, what):
    """Shuffle a list with a fixed seed; return {"train": 80%, "val": 10%, "test": 10%} of it."""
    random.Random(0).shuffle(items)
    n = len(items) // 10
    assert n >= 2, f"{len(items)} {what} are too few to split; at least 20 are needed"
    return {"train": items[2 * n :], "val": items[:n], "test": items[n : 2 * n]}


def split_by_image(samples):
    """Return {"train": [...], "val": [...], "test": [...]} of the samples, split at random.

    Samples that share an image, directly or through other samples, are in the same split.
    """
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
    splits = split_randomly(list(groups.values()), "groups of samples without a common image")
    return {
        split: [sample for group in groups for sample in group] for split, groups in splits.items()
    }
