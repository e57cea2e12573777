"""
Stage 3: a ViT, a connector and a GPT become one model that looks at a photo and writes a caption.

    python mllm.py                                      drawn shapes: no download, three minutes on two CPU cores
    python mllm.py --image=photo.png                    caption a picture with what that run has learnt
    python mllm.py config/flickr8k_cpu.py               photos, after the commands of README's "The chain on real data"
    python mllm.py config/flickr8k_cpu.py --image=photo.jpg --num_captions=5
    python mllm.py config/flickr8k_cpu.py --baselines=True                          what people score, and lookalikes
    python mllm.py --judgements=data/flickr8k/Flickr8k_text.zip                     what the metrics are worth

Expect every attribute right in 99% of held-out drawn images, and a test CIDEr of 34 to 37 (two seeds) from
config/flickr8k_cpu.py: 26 minutes on two CPU cores with AMX.
Two phases in one run: `align` trains what is new, the connector and any cross-attention, between a ViT and a GPT that
are frozen as stages 1 and 2 left them; `sft` then trains them together on the captions. Settings are overridden from
the left to the right by config files and --key=value; --help lists them. A run writes log.csv, loss.png, captions.png
and the checkpoints align.pt, sft.pt (the best on validation, by CIDEr or, of drawn images, by captions all right; for
scst.py) and last.pt.
"""

import dataclasses
import hashlib
import math
import re
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import config
from model import MLLM, BPETokenizer, GPTConfig, MLLMConfig, ViTConfig, evaluating, tokenizer_from_state

# the run
out_dir = "out/shapes"  # checkpoints, log and pictures
init_from = "scratch"  # or "resume": go on from out_dir/last.pt
eval_only = False  # evaluate out_dir/sft.pt and stop
eval_split = "val"  # what eval_only and baselines evaluate: train, val or test
image = ""  # caption this file, folder or URL and stop
judgements = ""  # Flickr8k_text.zip: print how CIDEr and BLEU agree with its human judgements and stop
baselines = False  # print what people, the nearest photos' captions and out_dir/sft.pt score on eval_split and stop
device = "auto"  # cuda, mps or cpu
dtype = "auto"  # bfloat16 on CUDA, else float32
compile = False  # torch.compile: a minute at the start, faster steps on a GPU
seed = 1337  # of everything random: weights, batches, dropout, samples
# data
dataset = "shapes"  # drawn here; or the folder under data/ that prepare_flickr8k.py wrote, such as flickr8k
n_drawn = 10000  # images to draw: a twentieth to validate, as many to test, the rest to train on
image_size = 48  # pixels a side that the model sees
crop = 1.0  # smallest share of its area that is seen of a training photo; 1 where a caption says what lies where
jitter = 0.0  # brightness, contrast and saturation of a training photo change by up to this factor
mirror = False  # mirror half of the training photos, but none with a caption in the batch that says left or right
word_dropout = 0.0  # share of the tokens that the GPT is not shown while it learns to write the ones after them
batch_size = 64  # photos a step, over all processes and parts
accumulation = 1  # parts that a process cuts its share of the batch into: less memory, the same training
captions_per_photo = 1  # captions a photo in a step: its image tokens are computed once
max_tokens = 40  # longest caption
# model: a checkpoint brings its own architecture
vit_ckpt = ""  # checkpoint of stage 1 to start from, a classifier or CLIP; empty: from nothing
gpt_ckpt = ""  # checkpoint of stage 2, trained on the same captions; empty: from nothing
fusion = "prefix"  # image tokens stand before the words; or cross: the words attend to them through gates
cross_every = 1  # with fusion=cross: every so many-th block of the GPT has cross-attention
connector = "mlp"  # or linear; pixel_shuffle: a quarter of the image tokens; abstractor: 16 of them
patch_size = 8  # pixels a side of a patch
vit_layer = 3  # blocks of the ViT
vit_head = 4  # its attention heads
vit_embd = 128  # its channels
stem = "conv"  # or patch: one linear layer a patch
gpt_layer = 3  # blocks of the GPT
gpt_head = 4  # its attention heads
gpt_embd = 128  # its channels
dropout = 0.0  # in the ViT and the GPT
label_smoothing = 0.0  # share of the target that is spread over all words; the log's train holds it, its val does not
# optimization
align_share = 0.0  # of the run is for the phase align; 0 where ViT and GPT start from nothing: nothing to align
train_vit = True  # the phase sft trains the ViT too
keep_features = False  # while the ViT is frozen: it sees each training photo once, as it is, and its features are kept
max_steps = 0  # 0: max_minutes alone decides
max_minutes = 2.0  # 0: max_steps alone decides; else whichever comes first
muon_lr = 0.02  # peak rate of the weight matrices of linear layers; 0: AdamW for all
adam_lr = 2e-3  # peak rate of everything else
weight_decay = 0.05  # of matrices and embeddings, in shares of the rate
warmup_steps = 50  # steps in which the rate rises to its peak, in each phase
cooldown = 0.8  # the last part of a phase, in which the rate falls to zero in a straight line
grad_clip = 1.0  # largest norm of the gradient; 0: none
eval_interval = 200  # steps between lines of the log, each with validation loss and CIDEr

# decoding: at the end of a run, with eval_only (both beside greedy) and image
beams = 5  # width of the beam search; 1: greedy
length_penalty = 0.6  # beams are compared by log p / length ** length_penalty
temperature = 0.0  # above 0: sample at this temperature, for image instead, with eval_only as well
num_captions = 1  # for image: captions of each

# ---------------------------------------------------------------------------------------------------------------------
# drawn shapes

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (235, 215, 50),
           "purple": (150, 60, 190), "orange": (240, 140, 30)}
SHAPES, SIZES = ("circle", "square", "triangle", "star", "cross"), ("small", "large")
PLACES = [f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "center", "right")]
WORDINGS = {  # {0} is the first shape and {1} its place; {2} and {3} are those of the second
    1: ("a {0} in the {1}", "there is a {0} at the {1}", "the {1} holds a {0}", "one {0}, {1}",
        "i see a {0} in the {1}"),
    2: ("a {0} in the {1} and a {2} in the {3}", "there is a {0} at the {1} and a {2} at the {3}",
        "the {1} holds a {0} and the {3} a {2}", "one {0}, {1}, and one {2}, {3}",
        "i see a {0} in the {1} and a {2} in the {3}")}


def draw_scene(shapes, size, rng):
    """[(size, colour, shape, place)] -> (3, size, size) uint8, each shape somewhere near the middle of its place."""
    from PIL import Image, ImageDraw
    s = 4 * size  # drawn four times as large, then reduced: smooth edges
    grey = int(rng.integers(0, 80))
    picture = Image.new("RGB", (s, s), (grey, grey, grey + int(rng.integers(0, 20))))
    draw = ImageDraw.Draw(picture)
    for how_large, colour, shape, place in shapes:
        row, column = divmod(PLACES.index(place), 3)
        x, y = s * (2 * np.array([column, row]) + 1) / 6 + rng.uniform(-0.02, 0.02, 2) * s
        r = s * (0.085 if how_large == "small" else 0.14) * rng.uniform(0.92, 1.08)
        fill = tuple(int(c) for c in np.clip(np.array(COLOURS[colour]) + rng.integers(-15, 16, 3), 0, 255))
        if shape == "circle":
            draw.ellipse((x - r, y - r, x + r, y + r), fill)
        elif shape == "square":
            draw.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill)
        elif shape == "cross":
            draw.rectangle((x - r, y - 0.32 * r, x + r, y + 0.32 * r), fill)
            draw.rectangle((x - 0.32 * r, y - r, x + 0.32 * r, y + r), fill)
        else:  # a polygon around the middle; the star's corners lie in and out by turns
            radii = (1.1, 1.1, 1.1) if shape == "triangle" else (1.15, 0.48) * 5
            angles = 2 * math.pi * np.arange(len(radii)) / len(radii)
            draw.polygon([(x + r * q * math.sin(a), y - r * q * math.cos(a)) for q, a in zip(radii, angles)], fill)
    return np.asarray(picture.resize((size, size), Image.Resampling.BOX)).transpose(2, 0, 1)


def draw_shapes(n, size, seed):
    """n images of one or two shapes, (n, 3, size, size) uint8, and five differently worded captions of each."""
    rng, images, captions = np.random.default_rng(seed), np.empty((n, 3, size, size), np.uint8), []
    choose = lambda options: options[rng.integers(len(options))]
    for i in range(n):
        places = rng.permutation(len(PLACES))[:rng.integers(1, 3)]
        shapes = [(choose(SIZES), choose(list(COLOURS)), choose(SHAPES), PLACES[p]) for p in sorted(places)]
        images[i] = draw_scene(shapes, size, rng)
        words = [text for *what, place in shapes for text in (" ".join(what), place)]
        captions.append([wording.format(*words) for wording in WORDINGS[len(shapes)]])
    return images, captions


def attributes(caption):
    """The (size, colour, shape, place) of each thing that a caption of a drawn image speaks of, sorted."""
    things = re.findall(f"({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", caption)
    places = re.findall("|".join(PLACES), caption)
    return sorted((*thing, place) for thing, place in zip(things, places)) if len(things) == len(places) else []


# ---------------------------------------------------------------------------------------------------------------------
# data


def load_captioned(dataset, image_size, n_drawn):
    """Images with captions, as a dict: images (n, 3, image_size, image_size) uint8, names and captions (lists of n),
    drawn (whether they are drawn here), splits {train, val, test: indices}, tokenizer."""
    if dataset == "shapes":
        config.at_least(40, n_drawn=n_drawn)
        images, captions = draw_shapes(n_drawn, image_size, seed=0)
        order, some = range(n_drawn), n_drawn // 20
        splits = {"train": order[2 * some:], "val": order[:some], "test": order[some:2 * some]}
        tokenizer = BPETokenizer.train((c for i in splits["train"] for c in captions[i]), 400)
        names = [f"drawn image {i}" for i in order]
    else:
        images, table, state = config.load_captioned(dataset, image_size)
        images, tokenizer = np.array(images), tokenizer_from_state(state)
        names, captions, splits = table["names"], table["captions"], table["splits"]
    return {"images": torch.from_numpy(images), "names": names, "captions": captions, "drawn": dataset == "shapes",
            "splits": {split: list(indices) for split, indices in splits.items()}, "tokenizer": tokenizer}


def make_sequences(captions, n_placeholders, tokenizer, max_tokens):
    """Captions -> inputs, targets (B, T): <image> placeholders, bos, the caption, eos; -1 where there is no target.

    T is rounded up, so that few different shapes occur: matrix products on CPUs are prepared anew for each.
    """
    ids = [tokenizer.encode(caption)[:max_tokens - 1] + [tokenizer.eos_id] for caption in captions]
    T = n_placeholders + min(max_tokens, 8 * math.ceil(max(map(len, ids)) / 8))
    inputs, targets = torch.full((len(ids), T), tokenizer.pad_id), torch.full((len(ids), T), -1)
    inputs[:, :n_placeholders], inputs[:, n_placeholders] = tokenizer.image_id, tokenizer.bos_id
    for i, row in enumerate(ids):
        inputs[i, n_placeholders + 1:n_placeholders + len(row)] = torch.tensor(row[:-1], dtype=torch.long)
        targets[i, n_placeholders:n_placeholders + len(row)] = torch.tensor(row)
    return inputs, targets


def get_batch(data, photos, n_placeholders, dev):
    """images (B, 3, H, W), and inputs, targets (B * captions_per_photo, T): random captions of each, photo by photo."""
    tokenizer, picked = data["tokenizer"], []
    for captions in (data["captions"][p] for p in photos):
        order = torch.randperm(len(captions)).tolist()  # a photo with fewer captions repeats them
        picked.append([captions[order[i % len(order)]] for i in range(captions_per_photo)])
    inputs, targets = make_sequences([c for each in picked for c in each], n_placeholders, tokenizer, max_tokens)
    if word_dropout:
        hidden = (torch.rand(inputs.shape) < word_dropout) & (inputs >= tokenizer.n_special)
        inputs = inputs.masked_fill(hidden, tokenizer.pad_id)
    images = config.augment_photos(data["images"][photos].to(dev), picked, crop, jitter, mirror)
    return images, inputs.to(dev), targets.to(dev)


# ---------------------------------------------------------------------------------------------------------------------
# metrics


def words_of(text):
    """The words of a caption as the PTB tokenizer of the COCO caption evaluation cuts them: lower case, contractions
    split (do n't, dog 's), hyphenated words whole, punctuation dropped. It differs in what hardly occurs in captions:
    abbreviations lose their last full stop, and brackets are dropped where COCO's leaves -lrb- and -rrb-."""
    text = re.sub(r"\bcannot\b", "can not", text.lower().replace("’", "'"))
    text = re.sub(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))\b", r" \1", text)
    return re.findall(r"(?<!\S)(?:n't|'(?:s|m|d|re|ve|ll))\b|[^\W_]+(?:[-./,'][^\W_]+)*|[&$%#@+=*/]", text)


def count_ngrams(words, n):
    return Counter(zip(*(words[i:] for i in range(n))))


def bleu(candidates, references, tiny=0.0):
    """[BLEU-1, ..., BLEU-4] of the corpus, 0 to 1 (Papineni et al. 2002); the closest reference length, no smoothing.

    candidates: list of str; references: a list of str for each candidate. tiny: is added to the number of matches and a
    million times as much to their totals, for single sentences, most of which match no four words; COCO's has 1e-15.
    """
    matched, total, length, reference_length = [0] * 4, [0] * 4, 0, 0
    for candidate, refs in zip(candidates, references, strict=True):
        words, refs = words_of(candidate), [words_of(ref) for ref in refs]
        length += len(words)
        reference_length += min((abs(len(ref) - len(words)), len(ref)) for ref in refs)[1]
        for n in range(1, 5):
            allowed = Counter()
            for ref in refs:
                allowed |= count_ngrams(ref, n)  # the largest count in any one reference
            counts = count_ngrams(words, n)
            matched[n - 1] += (counts & allowed).total()
            total[n - 1] += counts.total()
    brevity = min(1.0, math.exp(1 - reference_length / length)) if length else 0.0
    precisions = [(m + tiny) / (t + 1e6 * tiny) if t or tiny else 0.0 for m, t in zip(matched, total)]
    return [brevity * math.prod(precisions[:n]) ** (1 / n) for n in range(1, 5)]


WORD_KEYS = {}  # word -> a 64-bit hash, the same in every run


def word_key(word):
    if word not in WORD_KEYS:
        WORD_KEYS[word] = int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest())
    return WORD_KEYS[word]


def hash_pair(keys, groups):
    """One 64-bit number for each pair of a key and the number of a group."""
    spread = (groups.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    return (keys ^ spread) * np.uint64(0xD6E8FEB86659FD93)  # odd: what differs goes on differing


def ngrams(texts):
    """n word lists -> arrays text, order, key, count: one entry for each different n-gram of each text, of order 0 to 3
    for n = 1 to 4. A key is a 64-bit hash: that any two n-grams of a data set share one has odds of one in millions."""
    words = np.array([word_key(word) for text in texts for word in text], np.uint64)
    owner = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    keys, parts = words, []
    for order in range(4):
        if order:
            keys = keys[:-1] * np.uint64(0x2545F4914F6CDD1D) + words[order:]
        inside = owner[order:] == owner[:len(keys)]  # an n-gram ends in the text that it begins in
        parts.append((owner[order:][inside], np.full(inside.sum(), order), keys[inside]))
    text, order, key = (np.concatenate(columns) for columns in zip(*parts))
    _, first, count = np.unique(hash_pair(key, 4 * text + order), return_index=True, return_counts=True)
    return text[first], order[first], key[first], count


def document_frequencies(references):
    """references: for each image a list of word lists -> (keys of their n-grams, sorted; in how many images' references
    each occurs; how many images there are)"""
    image = np.repeat(np.arange(len(references)), [len(refs) for refs in references])
    text, _, key, _ = ngrams([ref for refs in references for ref in refs])
    _, first = np.unique(hash_pair(key, image[text]), return_index=True)
    return *np.unique(key[first], return_counts=True), len(references)


def look_up(sorted_keys, keys):
    """(where each key stands in sorted_keys, whether it does)"""
    at = np.searchsorted(sorted_keys, keys).clip(max=max(0, len(sorted_keys) - 1))
    return at, sorted_keys[at] == keys if len(sorted_keys) else np.zeros(len(keys), bool)


class CiderD:
    """CIDEr-D (Vedantam et al. 2015) against references of which everything is computed once, for thousands of captions
    at a time: SCST asks for as many scores as it samples captions.

    references: for each image a list of word lists. df: what document_frequencies() gives; None counts these
    references.
    """

    sigma = 6.0

    def __init__(self, references, df=None):
        self.keys, frequency, n_images = df or document_frequencies(references)
        self.max_idf = math.log(max(1, n_images))  # of what occurs nowhere
        self.idf = self.max_idf - np.log(frequency)
        max_refs, flat = max(map(len, references)), [ref for refs in references for ref in refs]
        image = np.repeat(np.arange(len(references)), [len(refs) for refs in references])
        column = np.concatenate([np.arange(len(refs)) for refs in references])  # of each reference among its image's
        self.n_references = np.bincount(image, minlength=len(references))
        self.lengths = np.zeros((len(references), max_refs), int)
        self.lengths[image, column] = [len(ref) for ref in flat]
        text, order, key, count = ngrams(flat)
        vector, norm = self._vectors(text, order, key, count)
        of_image = hash_pair(key, image[text])
        by = np.argsort(of_image, kind="stable")
        # the n-grams of each image, sorted; what is found at start[i] to start[i + 1] belongs to the i-th
        self.grams, start = np.unique(of_image[by], return_index=True)
        self.start = np.append(start, len(by))
        # the reference that holds it, how often, and what a match adds to the cosine: idf * its vector / its norm
        idf = vector / count
        self.column, self.count, self.weight = column[text][by], count[by], (idf * vector / norm)[by]

    def _vectors(self, text, order, key, count):
        """tf-idf of each n-gram of ngrams(), and the norm of the vector that it belongs to, at least a tiny number"""
        at, known = look_up(self.keys, key)
        vector = count * np.where(known, self.idf[at] if len(self.idf) else 0.0, self.max_idf)
        squares = np.bincount(4 * text + order, vector ** 2)
        return vector, np.sqrt(squares[4 * text + order]).clip(min=1e-300)

    def scores(self, captions, images):
        """n word lists, and the index of each one's image -> (n,) scores, 0 to 10."""
        images, n = np.asarray(images), len(captions)
        text, order, key, count = ngrams(captions)
        _, norm = self._vectors(text, order, key, count)
        at, found = look_up(self.grams, hash_pair(key, images[text]))
        at, text, count, norm = at[found], text[found], count[found], norm[found]
        copies = self.start[at + 1] - self.start[at]  # in how many references it was found
        hit = np.repeat(np.arange(len(at)), copies)
        entry = np.arange(len(hit)) + np.repeat(self.start[at] - np.cumsum(copies) + copies, copies)
        overlap = np.minimum(count[hit], self.count[entry]) * self.weight[entry] / norm[hit]
        max_refs = self.lengths.shape[1]
        cosines = np.bincount(max_refs * text[hit] + self.column[entry], overlap, minlength=n * max_refs)
        cosines = cosines.reshape(n, max_refs)
        bigrams = lambda lengths: np.maximum(0, lengths - 1)  # which stand for the length
        difference = bigrams(np.array([len(words) for words in captions]))[:, None] - bigrams(self.lengths[images])
        penalty = np.exp(-difference ** 2 / (2 * self.sigma ** 2))
        return 10.0 * (cosines * penalty).sum(axis=1) / (4 * self.n_references[images])


def cider(candidates, references, df=None):
    """CIDEr-D as the field reports it, over 100: (mean, (n,) array of each image's).

    candidates: list of str; references: a list of str for each candidate. A caption of four words or more that is its
    only reference scores 10 (unless all images share its words). df: document_frequencies() of other references than
    these.
    """
    assert len(candidates) == len(references), "one list of references for each candidate"
    scorer = CiderD([[words_of(ref) for ref in refs] for refs in references], df)
    scores = scorer.scores([words_of(c) for c in candidates], range(len(candidates)))
    return float(scores.mean()), scores


# ---------------------------------------------------------------------------------------------------------------------
# evaluation and schedule

SCORES = ("cider", "beam_cider", "beam_bleu4", "bleu1", "bleu2", "bleu3", "bleu4", "shuffled", "length", "broken",
          "distinct", "all_right")
UNFINISHED = set("a an the in on of with and or at by for from to into onto over under near through while as is are "
                 "its his her their another two".split())  # a caption that ends so was cut off


@torch.no_grad()
def write_captions(model, images, tokenizer, max_tokens, dev, context, batch_size=250, **decoding):
    """Captions of images (n, 3, H, W), greedy unless decoding says otherwise (what MLLM.generate() takes): a list of n
    * num_captions str, image by image; for each whether the model ended it; and (n * num_captions, max_tokens) ids."""
    captions, ended, written = [], [], []
    for batch in images.split(batch_size):
        with context:
            ids = model.generate(batch.to(dev), max_new_tokens=max_tokens, **decoding)
        written.append(torch.nn.functional.pad(ids, (0, max_tokens - ids.size(1)), value=tokenizer.eos_id))
        captions += [tokenizer.decode(row) for row in ids.tolist()]
        ended += [tokenizer.eos_id in row for row in ids.tolist()]
        config.show_progress(f"captioning: {len(captions)} written")
    config.show_progress("")
    return captions, ended, torch.cat(written)


def counted(ids, eos_id):
    """(n, T) written ids -> (n, T) mask of the tokens that count: the end token among them and nothing after it."""
    return (ids == eos_id).cumsum(dim=1) - (ids == eos_id).long() == 0


def written_log_probs(model, tokens, ids):
    """(n, N, C) image tokens, (n, T) ids that were written of them -> (n, T) log-probabilities; 0 after the end."""
    prompts = model.prompt(tokens)
    mask = torch.cat((torch.zeros_like(prompts, dtype=torch.bool), counted(ids, model.config.eos_id)), dim=1)
    return model.log_probs(tokens, torch.cat((prompts, ids), dim=1), mask)[:, prompts.size(1):]


def by_a_person(data, photo):
    """The line that tells in pictures what a person wrote of a photo; nothing where the image is drawn."""
    return "" if data["drawn"] else f"\nhuman: {data['captions'][photo][0]}"


def ends_badly(words, ended):
    """Whether a caption lacks a proper ending: no end token, or a last word after which something must follow."""
    return not ended or not words or words[-1] in UNFINISHED


def caption_scores(captions, ended, references):
    """{name: value} of what is reported about captions of photos; CIDEr and BLEU times 100, as papers print them.

    shuffled: CIDEr against other photos' references, the mean of five fixed derangements; as high as cider where a
    model does not look. broken: the share without a proper ending. distinct: different captions over all captions.
    """
    scorer = CiderD([[words_of(ref) for ref in refs] for refs in references])
    words, n = [words_of(caption) for caption in captions], len(captions)
    mean_cider = lambda k: 100 * float(scorer.scores(words, (np.arange(n) + k) % n).mean())
    return {"cider": mean_cider(0),
            **{f"bleu{order}": 100 * score for order, score in enumerate(bleu(captions, references), 1)},
            "shuffled": float(np.mean([mean_cider(k) for k in range(1, min(6, n))] or [0.0])),
            "length": float(np.mean([len(each) for each in words])),
            "broken": 100 * float(np.mean([ends_badly(each, end) for each, end in zip(words, ended)])),
            "distinct": 100 * len(set(captions)) / len(captions)}


@torch.no_grad()
def caption_loss(model, data, split, max_tokens, dev, context, batch_size=250):
    """Mean loss in nats a token, of one caption a photo: the first of the first photo, the second of the second, ..."""
    total, count, photos = 0.0, 0, data["splits"][split]
    n = model.config.n_placeholders(data["images"].size(-1))
    with evaluating(model), context:
        for first in range(0, len(photos), batch_size):
            some = photos[first:first + batch_size]
            captions = [data["captions"][p][(first + i) % len(data["captions"][p])] for i, p in enumerate(some)]
            inputs, targets = make_sequences(captions, n, data["tokenizer"], max_tokens)
            loss = model(data["images"][some].to(dev), inputs.to(dev), targets.to(dev))[1]
            total, count = total + loss.item() * (targets >= 0).sum().item(), count + (targets >= 0).sum().item()
    return total / count


def evaluate(model, data, split, max_tokens, dev, context, **decoding):
    """(scores, captions) of a split: those of caption_scores(), and for drawn shapes the share of captions in which
    every attribute is right."""
    photos = data["splits"][split]
    captions, ended, _ = write_captions(model, data["images"][photos], data["tokenizer"], max_tokens, dev, context,
                                        **decoding)
    references = [data["captions"][p] for p in photos]
    scores = caption_scores(captions, ended, references)
    if data["drawn"]:
        right = [attributes(c) == attributes(refs[0]) for c, refs in zip(captions, references)]
        scores["all_right"] = 100 * float(np.mean(right))
    return scores, captions


def evaluate_each_way(model, data, split, max_tokens, dev, context, beams, length_penalty, temperature=0.0):
    """(scores, captions) of evaluate(), greedy; among the scores beam_cider and beam_bleu4, those of a beam search, and
    sampled_cider where a temperature is given."""
    scores, captions = evaluate(model, data, split, max_tokens, dev, context)
    if beams > 1:
        by_beams, _ = evaluate(model, data, split, max_tokens, dev, context, beams=beams, length_penalty=length_penalty)
        scores |= {f"beam_{name}": by_beams[name] for name in ("cider", "bleu4")}
    if temperature:
        how = dict(temperature=temperature, generator=torch.Generator(dev).manual_seed(0))
        scores["sampled_cider"] = evaluate(model, data, split, max_tokens, dev, context, **how)[0]["cider"]
    return scores, captions


def lr_factor(phase_step, phase_progress):
    """The rates' share of their peaks: a linear warm-up, a plateau, then a straight line to zero at progress 1."""
    return min(1.0, (phase_step + 1) / max(1, warmup_steps), (1.0 - phase_progress) / max(cooldown, 1e-8))


# ---------------------------------------------------------------------------------------------------------------------
# the model


def build_model(tokenizer):
    """A new MLLM, its ViT and GPT from vit_ckpt and gpt_ckpt where those are named; {part: where it came from}."""
    vit_config = ViTConfig(image_size, patch_size, vit_layer, vit_head, vit_embd, dropout=dropout, stem=stem)
    gpt_config = GPTConfig(tokenizer.vocab_size, 0, gpt_layer, gpt_head, gpt_embd, dropout, norm="layer")
    origin, loaded = {"vit": "new", "connector": "new", "gpt": "new"}, {}  # part -> checkpoint
    if vit_ckpt:
        loaded["vit"] = config.load(vit_ckpt, "python vit.py config/cifar_cpu.py", has=("n_classes", "vit"))
        of_vit = loaded["vit"]["config"].get("vit", loaded["vit"]["config"])  # of CLIP's, or a classifier
        vit_config = dataclasses.replace(ViTConfig(**of_vit), dropout=dropout)
    if gpt_ckpt:
        loaded["gpt"] = config.load(gpt_ckpt, "python gpt.py config/captions_cpu.py", has=("block_size",))
        if loaded["gpt"]["tokenizer"] != tokenizer.state():
            config.fail(f"{gpt_ckpt} was trained with another tokenizer than data/{dataset} has; train it on that data")
        gpt_config = dataclasses.replace(GPTConfig(**loaded["gpt"]["config"]), dropout=dropout)
        if gpt_config.positions == "learned":
            config.fail(f"{gpt_ckpt} has learnt positions, which end at {gpt_config.block_size}; rotary ones do not")
    if fusion == "cross":
        config.at_least(1, cross_every=cross_every)
        gpt_config = dataclasses.replace(gpt_config, cross_every=cross_every)
    with config.one_line(ValueError):  # such as n_embd that is not a multiple of n_head
        sizes = MLLMConfig(vit_config, gpt_config, connector)
        room = dataclasses.replace(gpt_config, block_size=sizes.n_placeholders(image_size) + max_tokens)
        model = MLLM(dataclasses.replace(sizes, gpt=room))
    if vit_ckpt:
        weights = {name.removeprefix("vit."): w for name, w in loaded["vit"]["model"].items()
                   if name.startswith("vit.") or of_vit is loaded["vit"]["config"]}
        model.vit.load_state_dict({name: w for name, w in weights.items() if not name.startswith(("pool.", "head."))})
        origin["vit"] = f"{vit_ckpt}, step {loaded['vit']['step']}"
    if gpt_ckpt:
        new = {name: w for name, w in model.gpt.state_dict().items() if ".cross_" in name}  # a text-only GPT has none
        model.gpt.load_state_dict(new | loaded["gpt"]["model"])
        origin["gpt"] = f"{gpt_ckpt}, step {loaded['gpt']['step']}" + (", cross-attention new" if new else "")
    return model, origin


def start_phase(model, phase):
    """Freeze what the phase does not train, say so, and return its optimizers."""
    trains = {"vit": phase == "sft" and train_vit, "connector": True, "gpt": phase == "sft"}
    for part, train in trains.items():
        getattr(model, part).requires_grad_(train)
    for name, p in model.gpt.named_parameters():  # new as the connector is
        if ".cross_" in name:
            p.requires_grad_(True)
    frozen = [part for part, train in trains.items() if not train]
    n = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"phase {phase}: {n:,} parameters train; frozen: {', '.join(frozen) or 'none'}")
    return config.optimizers(model, muon_lr, adam_lr, weight_decay)


@torch.no_grad()
def vit_features(model, images, dev, context, batch_size=250):
    """(n, 3, H, W) images -> (n, N, C) features of the ViT, which a frozen one need not compute again"""
    features = []
    with evaluating(model), context:
        for batch in images.split(batch_size):
            features.append(model.vit.features(batch.to(dev)))
            config.show_progress(f"features of {sum(map(len, features))}/{len(images)} photos")
    return torch.cat(features)


def step_flops(model, data, dev):
    """FLOPs that a training step spends on a caption, the mean over a few photos."""
    photos = data["splits"]["train"][:8]
    images, inputs, targets = get_batch(data, photos, model.config.n_placeholders(image_size), dev)
    encode = lambda: model.encode(images).repeat_interleave(captions_per_photo, dim=0)
    flops = config.count_flops(model, lambda: model(encode(), inputs, targets)[1])
    return flops["Global"] / len(inputs)


def load_captioner(path, train_with, dev):
    """(model, tokenizer, checkpoint) of a file that this stage or scst.py saved."""
    checkpoint = config.load(path, train_with, dev, has=("connector",))
    model = MLLM(MLLMConfig.from_dict(checkpoint["config"])).to(dev)
    model.load_state_dict(checkpoint["model"])
    return model, tokenizer_from_state(checkpoint["tokenizer"]), checkpoint


def data_of(checkpoint):
    """The data that a captioner was trained on, as of load_captioned(), with the tokenizer of its checkpoint."""
    sft = checkpoint.get("sft_settings", checkpoint["settings"])  # those of the run of this stage
    data = load_captioned(sft["dataset"], sft["image_size"], sft["n_drawn"])
    return data | {"tokenizer": tokenizer_from_state(checkpoint["tokenizer"])}


@torch.no_grad()
def words_and_places(model, tokenizer, pixels, caption, max_tokens):
    """What a caption's words are, and where the model looks as it writes each: a list of str, and (words, n) shares of
    the image. pixels: (1, 3, H, W)."""
    prompt = model.prompt(model.encode(pixels))
    ids = torch.tensor(tokenizer.encode(caption)[:max_tokens], dtype=torch.long, device=prompt.device)
    seen = model.attention_to_images(pixels, torch.cat((prompt, ids[None, :-1]), dim=1))
    seen = seen[0, prompt.size(1) - 1:]  # (T, n)
    words, places = [], []
    for token, place in zip(ids.tolist(), seen):
        if not words or tokenizer.decode([token]).startswith(" "):
            words.append([])
            places.append([])
        words[-1].append(token)
        places[-1].append(place)
    texts = [tokenizer.decode(word).strip() for word in words]
    return texts, torch.stack([torch.stack(each).mean(dim=0) for each in places])


def draw_places(path, photo, words, places):
    """Draw the photo (3, H, W), then a panel a word: the photo lit where the model looked when it wrote the word."""
    size, side = photo.size(-1), math.isqrt(places.size(1))
    light = (places / places.amax(dim=1, keepdim=True)).view(-1, 1, side, side)
    light = torch.nn.functional.interpolate(light, (size, size), mode="bicubic").clamp(0, 1)  # (words, 1, size, size)
    panels = [photo, *(photo * (0.15 + 0.85 * light)).byte()]
    config.save_grid(path, panels, ["", *words], columns=min(7, len(panels)))
    print(f"wrote {path}")


def caption_files(path, train_with, where, out, dev, context, **decoding):
    """Print the captions of the images at where with their log-probabilities, and draw them; of the first images also
    where the model looked for each word."""
    model, tokenizer, checkpoint = load_captioner(path, train_with, dev)
    photos, size = config.open_images(where), checkpoint["image_transform"]["size"]
    inputs = torch.stack([config.to_pixels(photo, size) for _, photo in photos])
    longest, each = checkpoint["settings"]["max_tokens"], decoding["num_captions"]
    captions, _, ids = write_captions(model, inputs, tokenizer, longest, dev, context, **decoding)
    log_probs = []
    with torch.no_grad(), evaluating(model), context:
        for some, written in zip(inputs.split(50), ids.split(50 * each)):
            tokens = model.encode(some.to(dev)).repeat_interleave(each, dim=0)
            log_probs += written_log_probs(model, tokens, written).sum(dim=1).tolist()
    lines = [f"{caption}  (log p {log_p:.1f})" for caption, log_p in zip(captions, log_probs)]
    for i, line in enumerate(lines):
        print(f"{photos[i // each][0]}: {line}")
    pictures = [config.to_pixels(photo, 256) for _, photo in photos]
    titles = ["\n".join(lines[i:i + each]) for i in range(0, len(lines), each)]
    config.save_grid(out / "captioned.png", pictures, titles, min(4, len(photos)))
    print(f"wrote {out / 'captioned.png'}")
    for i, picture in enumerate(pictures[:4]):
        if captions[i * each]:
            words, places = words_and_places(model, tokenizer, inputs[i:i + 1].to(dev), captions[i * each], longest)
            draw_places(out / f"places_{i + 1}_{Path(photos[i][0]).stem}.png", picture, words, places.cpu())


# ---------------------------------------------------------------------------------------------------------------------
# what the figures mean: people, photos that look alike, and human judgements


def describe_pixels(images, side=8, cells=4, directions=8):
    """(n, 3, H, W) -> (n, d) unit vectors of colours (the image reduced to side x side pixels) and edges (in each of
    cells x cells parts, how much contrast runs in each direction), which weigh alike."""
    reduce, colours, edges = torch.nn.functional.adaptive_avg_pool2d, [], []
    for x in images.split(500):
        x = x.float()
        colours.append(reduce(x, side).flatten(1))
        grey = x.mean(dim=1)
        dy, dx = grey[:, 2:, 1:-1] - grey[:, :-2, 1:-1], grey[:, 1:-1, 2:] - grey[:, 1:-1, :-2]
        angle = ((torch.atan2(dy, dx) / math.pi % 1.0) * directions).long() % directions  # a line points both ways
        strength = torch.nn.functional.one_hot(angle, directions) * torch.hypot(dx, dy)[..., None]
        edges.append(reduce(strength.permute(0, 3, 1, 2), cells).flatten(1).sqrt())  # (b, directions * cells * cells)
    colours, edges = torch.cat(colours), torch.cat(edges)
    unit = lambda v: torch.nn.functional.normalize(v - v.mean(dim=0), dim=1)
    return torch.nn.functional.normalize(torch.cat((unit(colours), unit(edges)), dim=1), dim=1)


def nearest_captions(data, split, k=20):
    """For each photo of the split the consensus caption of the k training photos that look most like it (Devlin et al.
    2015): of their captions the one that is on average most similar, by CIDEr-D, to the others. Nothing is learnt."""
    features = describe_pixels(data["images"])
    train, photos = torch.tensor(data["splits"]["train"]), data["splits"][split]
    near = train[(features[photos] @ features[train].T).topk(min(k, len(train)), dim=1).indices]  # (n, k)
    df = document_frequencies([[words_of(c) for c in data["captions"][p]] for p in train.tolist()])
    chosen = []
    for row in near.tolist():
        captions = [c for p in row for c in data["captions"][p]]
        words = [words_of(c) for c in captions]
        scores = CiderD([words], df).scores(words, [0] * len(words))  # each against all; itself counts alike for each
        chosen.append(captions[int(scores.argmax())])
    return chosen


def print_baselines(path, split, dev, context):
    """A table of what people and nearest photos score on a split of the data of the captioner at path, and it too;
    where there is none, of the data that the settings name."""
    model, tokenizer, checkpoint = load_captioner(path, "", dev) if path.is_file() else (None, None, None)
    data = data_of(checkpoint) if model else load_captioned(dataset, image_size, n_drawn)
    photos = data["splits"][split]
    five = [data["captions"][p] for p in photos]
    if min(map(len, five)) < 2:
        config.fail("to compare people with each other takes two captions of each photo")
    four, alike = [refs[1:] for refs in five], nearest_captions(data, split)
    rows = {"people: the first caption against the others": ([refs[0] for refs in five], four),
            "nearest training photos against the same others": (alike, four),
            "nearest training photos, all references": (alike, five)}
    if model:
        longest = checkpoint["settings"]["max_tokens"]
        captions, *_ = write_captions(model, data["images"][photos], tokenizer, longest, dev, context)
        rows |= {f"{path} against the same others": (captions, four), f"{path}, all references": (captions, five)}
    print(f"{split:<60}{'CIDEr':>8}" + "".join(f"{f'BLEU-{n}':>8}" for n in range(1, 5)))
    for name, (captions, references) in rows.items():
        values = [cider(captions, references)[0] * 100, *(100 * score for score in bleu(captions, references))]
        print(f"{name:<60}" + "".join(f"{value:>8.1f}" for value in values))


def kendall_tau_c(scores, grades):
    """Kendall's rank correlation tau-c (Stuart 1953) of (n,) scores and (n,) grades of few different values: 2 m (pairs
    in the same order less pairs in the other) / (n^2 (m - 1)), m the smaller number of different values."""
    order, levels = 0, np.unique(grades)
    for level in levels:
        lower, same = np.sort(scores[grades < level]), scores[grades == level]
        below, not_above = np.searchsorted(lower, same, "left"), np.searchsorted(lower, same, "right")
        order += below.sum() - (len(lower) - not_above).sum()
    m = min(len(levels), len(np.unique(scores)))
    return 2 * m * order / (len(scores) ** 2 * (m - 1))


def print_judgements(archive):
    """How our metrics rank photo-caption pairs beside the three experts who judged each (Hodosh et al. 2013): Kendall's
    tau-c as the field reports it, each rating a row of its own, captions of the photo itself left out."""
    try:
        with zipfile.ZipFile(archive) as texts:
            lines = lambda name: [line.split("\t") for line in texts.read(name).decode("utf-8").splitlines()]
            captions = {name: caption for name, caption in lines("Flickr8k.token.txt")}
            rows = [row for row in lines("ExpertAnnotations.txt") if row[0] != row[1].split("#")[0]]
    except (zipfile.BadZipFile, KeyError):
        config.fail(f"{archive} is not Flickr8k_text.zip, which holds ExpertAnnotations.txt")
    candidates = [captions[row[1]] for row in rows]
    references = [[captions[f"{row[0]}#{i}"] for i in range(5)] for row in rows]
    bleus = np.array([bleu([c], [refs], tiny=1e-15) for c, refs in zip(candidates, references)])  # (pairs, 4)
    columns = {"CIDEr": cider(candidates, references)[1], "BLEU-1": bleus[:, 0], "BLEU-4": bleus[:, 3]}
    grades = np.array([[int(grade) for grade in row[2:]] for row in rows])  # (pairs, 3)
    print(f"{len(rows):,} pairs, {grades.size:,} ratings; Kendall's tau-c times 100:")
    for name, scores in columns.items():
        print(f"{name:<8}{100 * kendall_tau_c(scores.repeat(3), grades.flatten()):6.1f}")


@config.one_line_errors
def main(argv=None):
    settings = config.override(globals(), argv)
    dev, out, train_with = config.pick_device(device), Path(out_dir), "python mllm.py (with the same config)"
    context = config.autocast(dev, dtype)
    config.at_least(1, beams=beams, num_captions=num_captions, eval_interval=eval_interval, batch_size=batch_size,
                    captions_per_photo=captions_per_photo, vit_layer=vit_layer, vit_head=vit_head, gpt_layer=gpt_layer,
                    gpt_head=gpt_head, max_tokens=max_tokens)
    config.at_least(0, grad_clip=grad_clip, temperature=temperature)
    config.one_of(("train", "val", "test"), eval_split=eval_split)
    config.one_of(("prefix", "cross"), fusion=fusion)
    config.shares(crop=crop, jitter=jitter, word_dropout=word_dropout, label_smoothing=label_smoothing, dropout=dropout,
                  cooldown=cooldown)
    if not 0 <= align_share < 1:
        config.fail(f"align_share={align_share}: at least 0 and below 1, since the run ends with the phase sft")
    if image:
        how = dict(temperature=temperature, beams=max(beams, num_captions), length_penalty=length_penalty,
                   generator=torch.Generator(dev).manual_seed(seed))
        caption_files(out / "sft.pt", train_with, image, out, dev, context, num_captions=num_captions, **how)
        return
    if judgements:
        print_judgements(judgements)
        return

    if eval_only:
        model, _, checkpoint = load_captioner(out / "sft.pt", train_with, dev)
        longest = checkpoint["settings"]["max_tokens"]
        scores, _ = evaluate_each_way(model, data_of(checkpoint), eval_split, longest, dev, context, beams,
                                      length_penalty, temperature)
        print(f"{out / 'sft.pt'}, step {checkpoint['step']}, {eval_split}: "
              + " | ".join(f"{name} {value:.2f}" for name, value in scores.items()))
        return

    if baselines:
        print_baselines(out / "sft.pt", eval_split, dev, context)
        return

    data = load_captioned(dataset, image_size, n_drawn)
    tokenizer, splits = data["tokenizer"], data["splits"]
    resumed = config.resume(out, init_from, settings, train_with, tokenizer=tokenizer.state())
    torch.manual_seed(seed)
    if resumed:
        model = MLLM(MLLMConfig.from_dict(resumed["config"]))
        model.load_state_dict(resumed["model"])
        origin = dict.fromkeys(("vit", "connector", "gpt"), out / "last.pt")
    else:
        model, origin = build_model(tokenizer)
    model = model.to(dev, memory_format=torch.channels_last)
    with config.one_line(ValueError):  # an image_size that does not divide into the patches of vit_ckpt
        n_image_tokens = model.config.n_image_tokens(image_size)
    n_placeholders = model.config.n_placeholders(image_size)
    print(f"{dataset}: " + ", ".join(f"{len(photos):,} photos to {split}" for split, photos in splits.items())
          + f"; {n_image_tokens} image tokens each; on {dev}")
    for part, where in origin.items():
        print(f"{part:<9} {sum(p.numel() for p in getattr(model, part).parameters()):>10,} parameters, {where}")

    start, best, factor = 0, {"align": -math.inf, "sft": -1.0}, 0.0
    phase, phase_start, phase_from = "align" if align_share > 0 else "sft", 0, 0.0  # since which step and progress
    if resumed:
        start, best = resumed["step"], resumed["best"]
        phase, phase_start, phase_from = resumed["phase"]
    optimizers, kept = start_phase(model, phase), None  # kept: the features of the training photos
    if resumed:
        for optimizer, state in zip(optimizers, resumed["optimizers"]):
            optimizer.load_state_dict(state)
    columns = ["phase", "train", "val", *(f"{split}_{name}" for split in ("val", "test") for name in SCORES)]
    per_step = min(batch_size, len(splits["train"]))  # photos
    config.n_parts(per_step, accumulation)  # fails where the photos cannot be cut so
    flops, peak = step_flops(model, data, dev), config.matmul_peak(dev, context)
    print(f"{flops / 1e6:.0f} MFLOP a caption, forward and backward")
    clock = config.Clock(max_steps, max_minutes, resumed["seconds"] if resumed else 0.0)
    log = config.Log(out, columns, clock, resumed, flops, peak)
    run_model = config.maybe_compile(model, compile)
    shown = splits["val"][:12]  # the photos of captions.png, the same at every evaluation

    step, losses = start, []
    steps_per_epoch = len(splits["train"]) // per_step
    while True:
        progress = clock.shared_progress(step, dev)
        switch = phase == "align" and progress >= align_share
        due = step % eval_interval == 0 or progress == 1 or switch
        if due and not (resumed and step == start) and config.is_main():
            with clock.paused():
                scores, numbers = {}, {"phase": phase}
                numbers |= {"train": torch.stack(losses).mean().item()} if losses else {}
                numbers["val"] = caption_loss(model, data, "val", max_tokens, dev, context)
                config.check_finite(numbers["val"], step, out)
                if phase == "sft":
                    scores, captions = evaluate(model, data, "val", max_tokens, dev, context)
                    brief = ("cider", "bleu4", "shuffled", "all_right")
                    numbers |= {f"val_{name}": scores[name] for name in brief if name in scores}
                    titles = [said + by_a_person(data, p) for said, p in zip(captions, shown)]
                    config.save_grid(out / "captions.png", [data["images"][p] for p in shown], titles)
                log.write(step, numbers, factor * adam_lr, per_step * captions_per_photo, "captions",
                          file_only={f"val_{name}": value for name, value in scores.items()})
                # of drawn images CIDEr tells which of the five wordings it chose, more than whether it is right
                score = scores.get("all_right", scores["cider"]) if phase == "sft" else -numbers["val"]
                is_best, best[phase] = score > best[phase], max(score, best[phase])
                checkpoint = {"model": model.state_dict(), "config": dataclasses.asdict(model.config),
                              "optimizers": [o.state_dict() for o in optimizers], "settings": settings, "step": step,
                              "tokenizer": tokenizer.state(), "best": best, "seconds": clock.seconds(),
                              "phase": (phase, phase_start, phase_from), "image_transform": {"size": image_size}}
                if is_best:
                    config.save(out / f"{phase}.pt", checkpoint)
                config.save(out / "last.pt", checkpoint)  # last: a run killed in between does this evaluation again
        if due:
            losses = []
        if progress == 1:
            break
        if switch:
            phase, phase_start, phase_from = "sft", step, progress
            kept = None if train_vit else kept
            optimizers, log.flops = start_phase(model, phase), step_flops(model, data, dev)
        phase_end = align_share if phase == "align" else 1.0
        factor = lr_factor(step - phase_start, (progress - phase_from) / (phase_end - phase_from))

        if keep_features and kept is None and (phase == "align" or not train_vit):
            kept = vit_features(model, data["images"][splits["train"]], dev, context)

        epoch, position = divmod(step, steps_per_epoch)
        order = torch.randperm(len(splits["train"]), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        torch.manual_seed(seed * 1_000_003 + step)  # captions, augmentation and dropout depend on the step alone
        chosen = order[position * per_step:(position + 1) * per_step]
        photos = [splits["train"][i] for i in chosen]
        images, inputs, targets = get_batch(data, photos, n_placeholders, dev)  # the whole batch in every process
        loss = 0.0
        for part in config.parts(model, per_step, accumulation, seed, step):
            rows = slice(part.start * captions_per_photo, part.stop * captions_per_photo)
            with context:
                tokens = model.encode(images[part]) if kept is None else model.connector(kept[chosen[part]])
                tokens = tokens.repeat_interleave(captions_per_photo, dim=0)  # (b * captions_per_photo, N, C)
                _, mean = run_model(tokens, inputs[rows], targets[rows], label_smoothing)
            share = mean * ((targets[rows] >= 0).sum() / (targets >= 0).sum()).item()  # of the loss of the batch
            share.backward()
            loss += share.detach()
        loss = config.sum_gradients(model, loss)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        losses.append(loss + 0 * grad_norm)  # not finite where the gradient is not
        config.set_lr(optimizers, factor)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        config.show_progress(f"step {step} | loss {config.check_finite(losses[-1], step - 1, out):.3f}")

    if not config.is_main():
        return
    config.plot(out, right=("val_cider",))
    if not (out / "sft.pt").is_file():
        config.fail("the run was over before the phase sft began; give it more steps or minutes")
    model.load_state_dict(config.load(out / "sft.pt", train_with, dev)["model"])
    with clock.paused():
        scores, _ = evaluate_each_way(model, data, "test", max_tokens, dev, context, beams, length_penalty)
    log.write(step, {}, file_only={f"test_{name}": value for name, value in scores.items()})
    print("test: " + " | ".join(f"{name} {value:.2f}" for name, value in scores.items()))
    print(f"shuffled images: CIDEr {scores['shuffled']:.2f} against other photos' references, "
          f"{scores['cider']:.2f} against their own")
    if "all_right" in scores:
        print(f"held-out drawn images whose caption has every attribute right: {scores['all_right']:.1f}%")
    print(f"best validation {'share all right' if data['drawn'] else 'CIDEr'} {best['sft']:.2f} after "
          f"{clock.seconds() / 60:.1f} minutes of training; "
          f"wrote {out}/captions.png, loss.png, sft.pt")


if __name__ == "__main__":
    main()
