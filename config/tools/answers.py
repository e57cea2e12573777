"""
Use a trained captioner: caption a user's images, answer questions about them, chat, show where the
model looks; and report answers by kind of question. `encode` is mllm.encode(messages, tokenizer,
n_placeholders).
"""

import re
from pathlib import Path

import torch

from config.tools.conversations import clean
from config.tools.data import join_tiles, open_images, to_images
from config.tools.pictures import draw_places, save_grid, side_by_side
from config.tools.run import autocast, device_of
from config.tools.shapes import attributes
from model import IMAGE_ID, evaluating, tokenizer_from_state

UNLIKE = (
    "this picture seems to be unlike what the model has learnt: its answers to 99.9% of the "
    'validation images are likelier; for photos see "The chain on photos" in README'
)


# a user's images ----------------------------------------------------------------------------------


def user_message(text, n_images):
    """Return the messages of a prompt about n_images images, which come first unless text says
    where."""
    text = clean(text)  # as the training texts were
    n_named = text.count("<image>")
    assert n_named in (0, n_images), (
        f"the prompt has {n_named} times <image>, and there are {n_images} images"
    )
    if n_named == 0:
        text = "<image>" * n_images + text
    return [{"role": "user", "content": text}]


def read_images(checkpoint, model, settings):
    """Return [(name, [PIL image, ...]), ...] of settings["image"]."""
    max_images = model.config.max_images
    asks = settings["prompt"] or settings["chat"]
    assert checkpoint["asks"] or not asks, (
        "this model has learnt captions, not questions: no --prompt and no --chat; for questions "
        "see config/questions_cpu.py"
    )
    if not settings["image"]:
        return [("no image", [])]
    sources = open_images(settings["image"], max_images)
    for name, images in sources:
        assert len(images) <= max_images, (
            f"{name}: {len(images)} images; this model has learnt at most {max_images}"
        )
    return sources


def image_size_of(checkpoint):
    return checkpoint.get("sft_settings", checkpoint["settings"])["image_size"]


def encode_photos(model, checkpoint, photos):
    """Return k PIL images as the model takes them, and their image tokens (k, N, C)."""
    images = to_images(photos, image_size_of(checkpoint), model.config.vit.max_tiles)
    return images, model.encode(images.to(device_of(model)))


def encode_messages(model, checkpoint, messages, encode):
    """Return messages as a prompt, (1, T) ids, and the tokenizer."""
    tokenizer = tokenizer_from_state(checkpoint["tokenizer"])
    n_placeholders = model.config.n_placeholders(image_size_of(checkpoint))
    ids, _ = encode(messages, tokenizer, n_placeholders)
    return torch.tensor([ids + [tokenizer.bos_id]], device=device_of(model)), tokenizer


@torch.no_grad()
def answer_files(model, checkpoint, settings, encode):
    """Print what the model says about a user's images, with log-probabilities, and draw it; of the
    first images also where the model looked for each word."""
    sources = read_images(checkpoint, model, settings)
    generator = torch.Generator(device_of(model)).manual_seed(settings["seed"])
    n = max(1, settings["num_captions"])
    out = Path(settings["out_dir"])
    pictures, titles = [], []
    for i, (name, photos) in enumerate(sources):
        messages = user_message(settings["prompt"], len(photos))
        prompt, tokenizer = encode_messages(model, checkpoint, messages, encode)
        thumbnails = to_images(photos, 256)
        with evaluating(model), autocast(model):
            images, tokens = encode_photos(model, checkpoint, photos)
            answers = model.generate(
                tokens,
                prompt,
                model.config.gpt.block_size,
                settings["temperature"],
                max(settings["beams"], n),
                settings["length_penalty"],
                n,
                generator=generator,
            )
            log_p = log_p_of(model, tokens, prompt, answers)
            texts = [tokenizer.decode(row) for row in answers.tolist()]
            if photos and texts[0] and i < 4 and getattr(model.connector, "has_places", True):
                words, places = words_and_places(model, tokenizer, tokens, prompt, texts[0])
                stem = re.sub(r"[^\w.-]", "_", Path(name.split(",")[0]).stem)  # for Windows
                path = out / f"places_{i + 1}_{stem[:50]}.png"
                shown = thumbnails if torch.is_tensor(images) else images.pixels.flatten(0, 1)
                draw_places(path, shown, words, places.cpu())
        lines = [f"{text}  (log p {value:.1f})" for text, value in zip(texts, log_p.tolist())]
        for line in lines:
            print(f"{name}: {line}")
        if photos and log_p.max() < checkpoint["low_log_p"]:
            print(f"{name}: {UNLIKE}")
        if photos:
            pictures.append(side_by_side(thumbnails))
            titles.append("\n".join([settings["prompt"], *lines]).strip())
    if pictures:
        save_grid(out / "captioned.png", pictures, titles)
        print(f"wrote {out}/captioned.png")


def answer_mask(ids, eos_id):
    """Return the (n, T) mask of the answers in written ids (n, T): True up to the end token, which
    is included."""
    is_end = (ids == eos_id).long()
    return is_end.cumsum(dim=1) - is_end == 0


def log_p_of(model, tokens, prompts, answers):
    """Return the (n,) log-probabilities of answers (n, T) to prompts. For the other arguments see
    MLLM.log_probs()."""
    mask = answer_mask(answers, model.config.eos_id)
    return model.log_probs(tokens, prompts, answers, mask).sum(dim=1)


@torch.no_grad()
def chat(model, checkpoint, settings, encode):
    """Talk about a user's images in the terminal, until an empty line or the end of the input."""
    sources = read_images(checkpoint, model, settings)
    assert len(sources) == 1, (
        "a chat is about one image, several (--image=a.png,b.png) or a clip (--image=a.gif)"
    )
    _, photos = sources[0]
    generator = torch.Generator(device_of(model)).manual_seed(settings["seed"])
    block_size = model.config.gpt.block_size
    messages = []
    print("ask; an empty line ends the chat")
    with evaluating(model), autocast(model):
        _, tokens = encode_photos(model, checkpoint, photos)
        while text := read_line():
            messages.append({"role": "user", "content": text})
            first, *others = messages
            opening = user_message(first["content"], len(photos))
            prompt, tokenizer = encode_messages(model, checkpoint, opening + others, encode)
            if prompt.size(1) + 7 > block_size:  # a few tokens of the answer
                print("(the context is full: what was said until here is forgotten)")
                messages = []
                continue
            (written,) = model.generate(
                tokens, prompt, block_size, settings["temperature"], generator=generator
            )
            answer = tokenizer.decode(written.tolist())
            print(answer)
            messages.append({"role": "assistant", "content": answer})


def read_line():
    """Return what the user types, or "" at the end of the input."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""


# where the model looks ----------------------------------------------------------------------------


@torch.no_grad()
def attention_to_images(model, tokens, ids):
    """Return how much the model attends to each part of the images when it writes the token after
    each of ids (B, T): (B, T, k * N), the mean over layers and heads, with sum 1. tokens: (B * k,
    N, C) image tokens, k per row."""
    blocks = model.gpt.decoder.blocks
    is_cross = model.marker is not None
    layers = (
        [block.cross_attn for block in blocks if block.cross_attn is not None]
        if is_cross
        else [block.attn for block in blocks]
    )
    for layer in layers:
        layer.keep_weights = True
    with evaluating(model):
        model(tokens, ids)
    # (B, T, Tk)
    weights = torch.stack([layer.attn_weights.float().mean(dim=1) for layer in layers]).mean(dim=0)
    for layer in layers:
        layer.keep_weights = False
        layer.attn_weights = None
    if not is_cross:  # of all tokens, those in the places of placeholders
        B, T = ids.shape
        is_image = ids == IMAGE_ID
        weights = weights.transpose(1, 2)[is_image].view(B, -1, T).transpose(1, 2)
    return weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-9)


def words_and_places(model, tokenizer, tokens, prompt, answer):
    """Return the words of an answer, a list of str, and where the model looks as it writes each:
    (words, k * N) shares of the images. tokens: (k, N, C) of the images; prompt: (1, T) ids."""
    room = model.config.gpt.block_size + 1 - prompt.size(1)
    ids = torch.tensor([tokenizer.encode(answer)[:room]], device=prompt.device)
    weights = attention_to_images(model, tokens, torch.cat((prompt, ids[:, :-1]), dim=1))
    weights = weights[0, prompt.size(1) - 1 :]  # (T, k * N), one row per token of the answer
    words, places = [], []
    for token, row in zip(ids[0].tolist(), weights):
        text = tokenizer.decode([token])
        if not words or text.startswith(" "):
            words.append(text)
            places.append([row])
        else:
            words[-1] += text
            places[-1].append(row)
    return [word.strip() for word in words], torch.stack(
        [torch.stack(rows).mean(dim=0) for rows in places]
    )


# reports ------------------------------------------------------------------------------------------


def is_right(prompt, answer):
    """Return whether an answer is one of the references, or describes a drawn image with every
    attribute right."""
    if answer in prompt["references"]:
        return True
    wanted = attributes(prompt["references"][0])
    return prompt["kind"] == "caption" and wanted != [] and attributes(answer) == wanted


def with_other_images(prompts):
    """Return the same questions about the images of another prompt with as many, a control for
    guessing."""
    rows_by_count = {}
    for i, prompt in enumerate(prompts):
        rows_by_count.setdefault(len(prompt["images"]), []).append(i)
    swapped = list(prompts)
    for rows in rows_by_count.values():
        half = len(rows) // 2
        for i, j in zip(rows, rows[half:] + rows[:half]):
            swapped[i] = prompts[i] | {"images": prompts[j]["images"]}
    return swapped


def print_kinds(prompts, answers):
    """Print how many answers are right by kind of question and by number of images. Return the
    shares in per cent.

    answers: {column: list of str}, such as the model's, and those about other images.
    """
    rows = {}
    for i, prompt in enumerate(prompts):
        n_images = min(len(prompt["images"]), 3)
        about = ("no image", "one image", "two images", "more images")[n_images]
        for name in (prompt["kind"], about, "all"):
            rows.setdefault(name, []).append(i)
    print(f"{'':<14}{'answers':>9}" + "".join(f"{column:>14}" for column in answers))
    shares = {}
    for name in sorted(rows, key=lambda name: len(rows[name])):
        line = f"{name:<14}{len(rows[name]):>9}"
        for column, texts in answers.items():
            n_right = sum(is_right(prompts[i], texts[i]) for i in rows[name])
            share = 100 * n_right / len(rows[name])
            shares[f"{column}, {name}"] = share
            line += f"{share:>13.1f}%"
        print(line)
    return shares


def draw_answers(path, data, prompts, answers, n=12):
    """Draw the images of n prompts with the last question and the model's answer; if it is wrong,
    with the right one below."""
    shown = [i for i, prompt in enumerate(prompts) if prompt["images"]]
    if data["asks"]:  # some of each kind
        shown = shown[:: max(1, len(shown) // n)]
    pictures, titles = [], []
    for i in shown[:n]:
        lines = [prompts[i]["question"], answers[i]]
        if data["asks"] and not is_right(prompts[i], answers[i]):
            lines.append(f"(right: {prompts[i]['references'][0]})")
        titles.append("\n".join(lines).strip())
        pictures.append(side_by_side([join_tiles(data["images"], j) for j in prompts[i]["images"]]))
    if pictures:
        save_grid(path, pictures, titles)
