"""
Pretrained weights, in the layout of the Hugging Face hub: GPT-2 and the vision tower of CLIP.

A file, or a folder with model.safetensors or pytorch_model.bin, for GPT-2 with vocab.json and merges.txt beside it; or
the name of one on the hub, which is downloaded once into data/pretrained/.
"""

import json
import math
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import torch

from config import fail
from config.tools.data import download
from model import GPT2Tokenizer

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}
GPT2_FILES, CLIP_FILES = ("vocab.json", "merges.txt", "model.safetensors"), ("pytorch_model.bin",)
HUB = {"gpt2": GPT2_FILES, "gpt2-medium": GPT2_FILES, "gpt2-large": GPT2_FILES, "gpt2-xl": GPT2_FILES,
       "openai/clip-vit-base-patch16": CLIP_FILES, "openai/clip-vit-base-patch32": CLIP_FILES}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of values 0 to 1


def read_safetensors(path):
    """{name: tensor} of a *.safetensors, mapped into memory: 8 bytes hold the length of a JSON header, in which each
    tensor has its type, shape and place in the bytes that follow. ValueError where the header is inconsistent."""
    data = np.memmap(path, dtype=np.uint8, mode="c")  # copied where written to, so that torch does not warn
    n = int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < 8 or n > len(data) - 8:
        raise ValueError(f"the header should have {n} bytes, and the file has {len(data)}")
    try:
        header = json.loads(data[8:8 + n].tobytes())
        header.pop("__metadata__", None)
        entries = [(*entry["data_offsets"], name, DTYPES[entry["dtype"]], entry["shape"])
                   for name, entry in header.items()]
        whole = all(type(i) is int and i >= 0 for begin, end, _, _, shape in entries for i in (begin, end, *shape))
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as e:
        raise ValueError(f"the header is not that of safetensors ({type(e).__name__}: {e})")
    if not whole:
        raise ValueError("an offset or a size in the header is not a whole number from 0 on")
    tensors, place = {}, 0
    for begin, end, name, dtype, shape in sorted(entries, key=lambda entry: entry[:2]):
        if begin != place or end - begin != math.prod(shape) * dtype.itemsize or end > len(data) - 8 - n:
            raise ValueError(f"{name} of shape {shape} does not fit bytes {begin} to {end}, or they are not next")
        raw, place = data[8 + n + begin:8 + n + end], end
        tensors[name] = torch.from_numpy(raw).view(dtype).view(shape)
    if place != len(data) - 8 - n:
        raise ValueError(f"the header speaks of {place} bytes, and {len(data) - 8 - n} follow it")
    return tensors


def is_pretrained(where):
    """Whether this is a name on the hub, a folder, or a file of weights that is no checkpoint of this project."""
    path = Path(where)
    return where in HUB or where != "" and path.is_dir() or path.suffix in (".safetensors", ".bin")


def files_of(where):
    """The file of the weights and the folder it lies in, downloaded if where is a name on the hub."""
    path = Path(where)
    if where in HUB and not path.exists():
        path = Path("data/pretrained", where)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not all((path / name).exists() for name in HUB[where]):
            fail(f"{where} is not downloaded yet: start one process first, without torchrun")
        for name in HUB[where]:
            download(path / name, [f"https://huggingface.co/{where}/resolve/main/{name}"])
    if path.is_dir():
        found = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()]
        if not found:
            fail(f"{path} holds neither model.safetensors nor pytorch_model.bin; or name a file, such as best.pt")
        return found[0], path
    if not path.is_file():
        fail(f"no weights at {path}; a file, a folder, or one of {', '.join(HUB)}")
    return path, path.parent


def read_weights(path):
    """{name: tensor} of a *.safetensors or a torch state dict; nothing is unpickled but tensors."""
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        if not isinstance(weights, dict) or not all(map(torch.is_tensor, weights.values())):
            raise ValueError("it is no state dict, names with tensors")
        return weights
    except Exception as e:  # torch raises a dozen types on a file that is none of its own
        fail(f"{path} cannot be read as weights: {str(e).splitlines()[0] if str(e) else type(e).__name__}")


def take(weights, names, path):
    """{new name: weights[old name]} for {new name: old name}; an error if one is missing."""
    missing = [old for old in names.values() if old not in weights]
    if missing:
        fail(f"{path} lacks {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
             + "; is it of another architecture?")
    return {new: weights[old].float() for new, old in names.items()}


def n_layers(weights, pattern):
    return 1 + max((int(found[1]) for name in weights if (found := re.match(pattern, name))), default=-1)


def read_gpt2_tokenizer(folder):
    """The tokenizer of vocab.json and merges.txt, in which a character stands for each byte (the first 256 ids)."""
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file():
            fail(f"{folder / name} is missing; GPT-2's tokenizer is vocab.json and merges.txt")
    try:
        ids = json.loads((folder / "vocab.json").read_text("utf-8"))
        lines = (folder / "merges.txt").read_text("utf-8").split("\n")
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        merges = [(ids[left], ids[right]) for left, right in pairs]
        in_order = all(ids[left + right] == 256 + i for i, (left, right) in enumerate(pairs))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        fail(f"{folder}: vocab.json and merges.txt are not GPT-2's ({type(e).__name__}: {e})")
    if not in_order or any(not 0 <= i < 256 + k for k, pair in enumerate(merges) for i in pair):
        fail(f"{folder}: vocab.json and merges.txt do not number the merges alike")
    return GPT2Tokenizer(merges)


def gpt2_tokenizer(where):
    """The tokenizer of GPT-2, of its name on the hub, its folder, or its file of weights."""
    return read_gpt2_tokenizer(files_of(where)[1])


def load_gpt2(where):
    """GPT-2's weights as a checkpoint of gpt.py: config, model, tokenizer, step. Our three special ids come last. Heads
    have 64 channels, as in all of OpenAI's models."""
    path, folder = files_of(where)
    weights, tokenizer = read_weights(path), read_gpt2_tokenizer(folder)
    weights = {name.removeprefix("transformer."): w for name, w in weights.items()}
    names = {"embedding.weight": "wte.weight", "position.positions": "wpe.weight", "decoder.norm.weight": "ln_f.weight",
             "decoder.norm.bias": "ln_f.bias"}
    n_layer = n_layers(weights, r"h\.(\d+)\.")
    parts = {"norm1": "ln_1", "attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj", "norm2": "ln_2",
             "ff.up": "mlp.c_fc", "ff.proj": "mlp.c_proj"}
    names |= {f"decoder.blocks.{i}.{new}.{kind}": f"h.{i}.{old}.{kind}" for i in range(n_layer)
              for new, old in parts.items() for kind in ("weight", "bias")}
    model = take(weights, names, path)
    for name, w in model.items():
        if re.search(r"(qkv|proj|up)\.weight", name):
            model[name] = w.T.contiguous()  # GPT-2's layers multiply from the other side
    (n_vocab, n_embd), block_size = model["embedding.weight"].shape, len(model["position.positions"])
    if n_embd % 64:
        fail(f"{path} has {n_embd} channels, not heads of 64: it is none of OpenAI's GPT-2")
    if n_vocab != tokenizer.vocab_size - 3:
        fail(f"{path} has {n_vocab} embeddings, and the tokenizer beside it {tokenizer.vocab_size - 3} ids")
    new = model["embedding.weight"].mean(dim=0, keepdim=True) + 0.02 * torch.randn(3, n_embd)
    model["embedding.weight"] = model["head.weight"] = torch.cat((model["embedding.weight"], new))
    config = {"vocab_size": tokenizer.vocab_size, "block_size": block_size, "n_layer": n_layer,
              "n_head": n_embd // 64, "n_embd": n_embd, "activation": "gelu_tanh", "norm": "layer",
              "positions": "learned", "bias": True}
    return {"config": config, "model": model, "tokenizer": tokenizer.state(), "step": 0}


def load_clip_vit(where):
    """The vision tower of OpenAI's CLIP ViT-B or L as a checkpoint of vit.py: config, model, step. Its features are the
    patch tokens of the last block, without the norm that CLIP has for the class token alone."""
    path, _ = files_of(where)
    weights = read_weights(path)
    weights = {name.removeprefix("vision_model."): w for name, w in weights.items() if "text_model." not in name}
    names = {"patches.stem.weight": "embeddings.patch_embedding.weight", "class_token": "embeddings.class_embedding",
             "position.positions": "embeddings.position_embedding.weight", "pre_norm.weight": "pre_layrnorm.weight",
             "pre_norm.bias": "pre_layrnorm.bias"}
    n_layer = n_layers(weights, r"encoder\.layers\.(\d+)\.")
    parts = {"norm1": "layer_norm1", "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj",
             "attn.v": "self_attn.v_proj", "attn.proj": "self_attn.out_proj", "norm2": "layer_norm2",
             "ff.up": "mlp.fc1", "ff.proj": "mlp.fc2"}
    names |= {f"encoder.blocks.{i}.{new}.{kind}": f"encoder.layers.{i}.{old}.{kind}" for i in range(n_layer)
              for new, old in parts.items() for kind in ("weight", "bias")}
    model = take(weights, names, path)
    for i, kind in ((i, kind) for i in range(n_layer) for kind in ("weight", "bias")):  # one product for the three
        qkv = [model.pop(f"encoder.blocks.{i}.attn.{name}.{kind}") for name in "qkv"]
        model[f"encoder.blocks.{i}.attn.qkv.{kind}"] = torch.cat(qkv)
    positions = model["position.positions"]  # of the class token first
    model["class_token"] = (model["class_token"] + positions[0]).view(1, 1, -1)
    model["position.positions"] = positions[1:]
    n_embd, _, patch_size, _ = model["patches.stem.weight"].shape
    if n_embd % 64 or n_embd > 1024:  # such as OpenCLIP's ViT-H, which has other heads and plain GELU
        fail(f"{path} has {n_embd} channels: it is neither OpenAI's CLIP ViT-B nor L")
    mean, std = ([255 * value for value in values] for values in (CLIP_MEAN, CLIP_STD))
    model |= {"patches.stem.bias": torch.zeros(n_embd), "pixel_mean": torch.tensor(mean).view(1, 3, 1, 1),
              "pixel_std": torch.tensor(std).view(1, 3, 1, 1)}
    config = {"image_size": patch_size * math.isqrt(len(positions) - 1), "patch_size": patch_size, "n_layer": n_layer,
              "n_head": n_embd // 64, "n_embd": n_embd, "activation": "quick_gelu", "stem": "patch",
              "class_token": True, "pre_norm": True, "last_norm": False, "pixel_mean": mean, "pixel_std": std}
    return {"config": config, "model": model, "step": 0}
