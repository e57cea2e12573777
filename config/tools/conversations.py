"""
Conversations in files, *.jsonl, one JSON object a line, in either of two layouts:

    MiniMind-V  {"conversations": [{"role": "user", "content": "<image>what is it?"},
                                   {"role": "assistant", "content": "A dog."}], "image": "a.jpg, b.jpg"}
    LLaVA       {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}],
                 "image": "a.jpg" or ["a.jpg", "b.jpg"] or absent}
"""

import json
import random
import re

from config import fail

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


def parse(line):
    """A line -> a sample {"images": [file names], "messages": [...]}, see mllm.py; ValueError with what is wrong."""
    try:
        sample = json.loads(line)
    except ValueError as e:
        raise ValueError(f"no JSON: {e}")
    turns = sample.get("conversations") if isinstance(sample, dict) else None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError('it has no "conversations", a list of turns {"role": ..., "content": ...}')
    messages, images = [], sample.get("image") or []
    for i, turn in enumerate(turns, start=1):
        role, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"turn {i} has the unknown role {role!r}; {', '.join(ROLES)} are known")
        if not isinstance(text, str):
            raise ValueError(f"turn {i} has no text")
        role, text = ROLES[role], re.sub(r"\s*<image>\s*", "<image>", text.strip())
        if role != ("assistant" if i % 2 == 0 else "user"):
            raise ValueError(f"turn {i} is out of order: user and assistant take turns, and the user begins")
        if role == "assistant" and (not text or "<image>" in text):
            raise ValueError(f"turn {i} is " + ("an answer with <image> in it" if text else "an empty answer"))
        messages.append({"role": role, "content": text})
    if not messages or len(messages) % 2:
        raise ValueError("the last turn is not an answer of the assistant")
    if isinstance(images, str):
        images = [name.strip() for name in images.split(",")]
    if not isinstance(images, list) or not all(isinstance(name, str) and name for name in images):
        raise ValueError('"image" is neither a file name, nor names with commas between them, nor a list of names')
    n = sum(message["content"].count("<image>") for message in messages)
    if n not in (0, len(images)):
        raise ValueError(f"<image> stands {n} times in the text, and there are {len(images)} images")
    if n == 0:
        messages[0]["content"] = "<image>" * len(images) + messages[0]["content"]
    return {"images": images, "messages": messages}


def read_conversations(files, folder):
    """The samples of some *.jsonl; and {image: "file, line n"}, where each is first named. folder: of the images. A bad
    line ends the run."""
    samples, named = [], {}
    for file in files:
        for number, line in enumerate(file.read_bytes().splitlines(), start=1):
            where = f"{file}, line {number}"
            try:
                if not line.strip():
                    continue
                samples.append(parse(line.decode("utf-8-sig")))
                for name in samples[-1]["images"]:
                    if not (folder / name).is_file():
                        raise ValueError(f"there is no image {name} in {folder}")
                    named.setdefault(name, where)
            except ValueError as e:  # of which UnicodeDecodeError is one
                fail(f"{where}: {e}")
    return samples, named


def split_by_image(samples):
    """{"train": 80%, "val": 10%, "test": 10%} of the samples, drawn with a fixed seed. Samples that share an image,
    directly or through others, are in the same split."""
    parent = {}

    def root(x):
        while parent.setdefault(x, x) != x:
            parent[x] = x = parent[parent[x]]
        return x

    for i, sample in enumerate(samples):
        for name in sample["images"]:
            parent[root(name)] = root(i)
    together = {}
    for i, sample in enumerate(samples):
        together.setdefault(root(i), []).append(sample)
    groups = list(together.values())
    random.Random(0).shuffle(groups)
    tenth = len(groups) // 10
    if tenth < 2:
        fail(f"{len(groups)} sets of samples without a common image are too few to split; at least 20")
    parts = {"train": groups[2 * tenth:], "val": groups[:tenth], "test": groups[tenth:2 * tenth]}
    return {split: [sample for group in groups for sample in group] for split, groups in parts.items()}
