"""Pretrained weights in the layout of the Hugging Face hub: GPT-2 and the vision tower of CLIP.

They are a folder, or a name on the hub, which is downloaded once into data/pretrained/. A folder
holds config.json; model.safetensors or pytorch_model.bin, in one file or in shards with an index;
and, of GPT-2, vocab.json and merges.txt.
"""

import json
import math
import re
import sys
import unicodedata
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from config import read_text
from config.tools.conversations import parse
from config.tools.data import download
from config.tools.run import fail, load, n_processes
from model import ACTIVATIONS, TOKENIZERS, VITS, BPETokenizer, LayerNorm, ViT

GPT2_FILES = ("config.json", "vocab.json", "merges.txt", "model.safetensors")
CLIP_FILES = ("config.json", "pytorch_model.bin")
HUB = {
    "gpt2": GPT2_FILES,
    "gpt2-medium": GPT2_FILES,
    "distilgpt2": GPT2_FILES,
    "openai/clip-vit-base-patch16": CLIP_FILES,
    "openai/clip-vit-base-patch32": CLIP_FILES,
    "openai/clip-vit-large-patch14": CLIP_FILES,
}
WEIGHTS = (  # an index names the shards in which the weights are
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
NOT_WEIGHTS = {  # what a file may be that is not read, by how it begins
    b"version https://git-lfs": "a Git LFS pointer, which git lfs pull replaces by the file",
    b"<": "a web page",
    b"PK": "damaged, or TorchScript or pickled objects, which could run code",
    b"": "damaged, or no weights at all",
}
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
GPT2_LAYERS = {  # in a block: our name, and the name in the file
    "norm1": "ln_1",
    "attn.qkv": "attn.c_attn",
    "attn.proj": "attn.c_proj",
    "norm2": "ln_2",
    "ff.up": "mlp.c_fc",
    "ff.proj": "mlp.c_proj",
}
CLIP_LAYERS = {
    "norm1": "layer_norm1",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "ff.up": "mlp.fc1",
    "ff.proj": "mlp.fc2",
}
GPT2_CONFIG = {  # what config.json must say if it says anything
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,
    "n_inner": None,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}
CLIP_CONFIG = {"model_type": "clip_vision_model", "layer_norm_eps": 1e-5}
CLIP_MEAN = (122.7709383, 116.7460125, 104.09373615)  # of pixels from 0 to 255
CLIP_STD = (68.5005327, 66.6321579, 70.32316305)


# GPT-2's tokenizer --------------------------------------------------------------------------------


def gpt2_pieces():
    r"""Return the pattern by which GPT-2 splits text into words, numbers, punctuation and spaces.

    GPT-2 uses \p{L} and \p{N}, the Unicode categories of letters and numbers, which re lacks. To re
    \w is L, N and the underscore, and \d is the category Nd; the other numbers, Nl and No, are
    listed here. White space is listed because re's \s has more characters than GPT-2's.
    """
    characters = map(chr, range(sys.maxunicode + 1))
    n = "".join(c for c in characters if unicodedata.category(c) in ("Nl", "No"))
    s = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
    return re.compile(
        rf"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_{n}]+| ?[\d{n}]+| ?(?:[^\w{s}]|_)+"
        rf"|[{s}]+(?![^{s}])|[{s}]+"
    )


class GPT2Tokenizer(BPETokenizer):
    """The tokenizer of GPT-2 (Radford et al. 2019) with its ids.

    First come the 256 bytes, printable ones before the others, then the merges, <|endoftext|>, and
    our pad, bos and eos.
    """

    # ! to ~, ¡ to ¬, ® to ÿ
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    ordered_bytes = printable + sorted(set(range(256)) - set(printable))
    byte_ids = list(map(ordered_bytes.index, range(256)))
    first_merge = 256

    def __init__(self, merges):
        super().__init__(merges)
        self.bytes += [b""] * 4  # <|endoftext|> and ours
        self.vocab_size += 4
        self.pad_id, self.bos_id, self.eos_id = range(self.vocab_size - 3, self.vocab_size)
        self.pieces = gpt2_pieces()

    def state(self):
        return super().state() | {"kind": "gpt2"}


TOKENIZERS["gpt2"] = GPT2Tokenizer


def gpt2_tokenizer(where):
    """Return the tokenizer in the folder of GPT-2's weights.

    In vocab.json and merges.txt one printable character stands for each of the 256 bytes, which
    have the first ids.
    """
    folder = weights_file(where).parent
    ids = read_json(folder / "vocab.json")
    lines = read_text(folder / "merges.txt").split("\n")
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    for i, (left, right) in enumerate(pairs):
        assert ids.get(left + right) == 256 + i, (
            f"{folder}: vocab.json and merges.txt do not number the merge {left} {right} alike"
        )
    return GPT2Tokenizer([(ids[left], ids[right]) for left, right in pairs])


# files --------------------------------------------------------------------------------------------


def weights_file(where):
    """Return the path of the weights, or of the index of their shards, after downloading them if
    where is a name on the hub."""
    path = Path(where)
    if where in HUB and not path.exists():
        path = Path("data/pretrained", where)
        for name in HUB[where]:
            assert (path / name).is_file() or n_processes() == 1, (
                f"{where} is not downloaded yet: start one process first, without torchrun"
            )
            download(path / name, [f"https://huggingface.co/{where}/resolve/main/{name}"])
    for name in WEIGHTS:
        if (path / name).is_file():
            return path / name
    assert path.is_file(), (
        f"no weights at {path}; name a checkpoint (*.pt), a folder with model.safetensors or "
        f"pytorch_model.bin, or one of {', '.join(HUB)}"
    )
    return path


def read_json(path):
    return parse(read_text(path), path)


def read_config(folder, supported):
    """Return what the config.json of GPT-2, or of the vision tower of CLIP, says.

    supported: {name: value} of what would change the model if it had another value.
    """
    path = folder / "config.json"
    config = read_json(path)
    config = config.get("vision_config", config)
    for name, value in supported.items():
        assert config.get(name) in (None, value), (
            f"{path}: {name}={config[name]!r} is not supported, only {value!r}"
        )
    return config


def read_safetensors(path):
    """Return {name: tensor} of a *.safetensors file, mapped into memory.

    Such a file is 8 bytes with the length of the header, the header, which is JSON with the type,
    shape and place of each tensor, and the bytes of the tensors.
    """
    data = np.memmap(path, dtype=np.uint8, mode="c")  # copy on write: torch wants it writable
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    body = data[start:]
    tensors = {}
    for name, entry in header.items():
        shape = entry["shape"]
        begin, end = entry["data_offsets"]
        tensors[name] = torch.from_numpy(body[begin:end]).view(DTYPES[entry["dtype"]]).view(shape)
    return tensors


def read_weights(path):
    """Return {name: tensor} of a *.safetensors file, a torch state dict, or the index of several.

    Nothing but tensors is unpickled, so a file cannot run code.
    """
    if path.suffix == ".json":
        weights = {}
        for shard in set(read_json(path).get("weight_map", {}).values()):
            weights |= read_weights(path.parent / shard)
        return weights
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
        assert all(map(torch.is_tensor, weights.values()))
        return weights
    except Exception:  # of many types; torch's message advises to run the code in the file
        with open(path, "rb") as file:
            head = file.read(30)
        kind = next(kind for beginning, kind in NOT_WEIGHTS.items() if head.startswith(beginning))
        fail(f"{path} cannot be read as weights: it is {kind}")


# weights ------------------------------------------------------------------------------------------


def gelu_tanh(x):
    """GPT-2's approximation of GELU."""
    return nn.functional.gelu(x, approximate="tanh")


def quick_gelu(x):
    """OpenAI CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS |= {  # by the hub's names
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
}


def weight_and_bias(new, old):
    """Return {our name: name in the file} of the weight and the bias of a layer."""
    return {f"{new}.{kind}": f"{old}.{kind}" for kind in ("weight", "bias")}


def take(path, prefix, names, layers, blocks, old_blocks):
    """Return the weights of a file under our names, in float32, and the number of blocks.

    prefix: removed from the names in the file that begin with it. names: {our name: name in the
    file} of the weights outside the blocks; layers: the same of the layers in a block, without
    weight and bias. blocks, old_blocks: where the blocks are, in our names and in the file's.
    """
    weights = {name.removeprefix(prefix): w for name, w in read_weights(path).items()}
    n_layer = 0
    while f"{old_blocks}.{n_layer}.{layers['norm1']}.weight" in weights:
        for new, old in layers.items():
            names |= weight_and_bias(f"{blocks}.{n_layer}.{new}", f"{old_blocks}.{n_layer}.{old}")
        n_layer += 1
    for old in names.values():
        assert old in weights, f"{path} lacks {old}; is it of another architecture?"
    return {new: weights[old].float() for new, old in names.items()}, n_layer


def load_gpt2(where):
    """Return GPT-2 as a checkpoint of gpt.py: config, model, tokenizer.

    The embeddings of our three special ids are new: the mean of all others, and noise.
    """
    path = weights_file(where)
    hub_config = read_config(path.parent, GPT2_CONFIG)
    tokenizer = gpt2_tokenizer(where)
    names = {"embedding.weight": "wte.weight", "position.positions": "wpe.weight"}
    names |= weight_and_bias("decoder.norm", "ln_f")
    model, n_layer = take(path, "transformer.", names, GPT2_LAYERS, "decoder.blocks", "h")
    for name, w in model.items():
        if "blocks" in name and w.dim() == 2:
            model[name] = w.T  # GPT-2's linear layers multiply from the other side
    embedding = model["embedding.weight"]
    n_vocab, n_embd = embedding.shape
    assert n_vocab == tokenizer.vocab_size - 3, (
        f"{path} has {n_vocab} embeddings, and its tokenizer {tokenizer.vocab_size - 3} ids"
    )
    new_rows = embedding.mean(dim=0) + 0.02 * torch.randn(3, n_embd)
    model["embedding.weight"] = model["head.weight"] = torch.cat((embedding, new_rows))
    config = {
        "vocab_size": tokenizer.vocab_size,
        "block_size": len(model["position.positions"]),
        "n_layer": n_layer,
        "n_head": hub_config.get("n_head", 12),
        "n_embd": n_embd,
        "activation": hub_config.get("activation_function", "gelu_new"),
        "norm": "layer",
        "positions": "learned",
        "bias": True,
    }
    return {"config": config, "model": model, "tokenizer": tokenizer.state()}


def load_clip_vit(where):
    """Return the vision tower of OpenAI's CLIP as a checkpoint of vit.py: config, model.

    Its features are the patches after the last block; CLIP's norm after it is for the class token
    alone.
    """
    path = weights_file(where)
    hub_config = read_config(path.parent, CLIP_CONFIG)
    names = {
        "patches.linear.weight": "embeddings.patch_embedding.weight",
        "class_token": "embeddings.class_embedding",
        "position.positions": "embeddings.position_embedding.weight",
    }
    names |= weight_and_bias("pre_norm", "pre_layrnorm")
    model, n_layer = take(
        path, "vision_model.", names, CLIP_LAYERS, "encoder.blocks", "encoder.layers"
    )
    n_embd, _, patch_size, _ = model["patches.linear.weight"].shape
    for i in range(n_layer):
        for kind in ("weight", "bias"):
            qkv = [model.pop(f"encoder.blocks.{i}.attn.{part}.{kind}") for part in "qkv"]
            model[f"encoder.blocks.{i}.attn.qkv.{kind}"] = torch.cat(qkv)
    positions = model["position.positions"]  # the class token has the first
    model["class_token"] = (model["class_token"] + positions[0]).view(1, 1, -1)
    model["position.positions"] = positions[1:]
    model["patches.linear.bias"] = torch.zeros(n_embd)
    config = {
        "image_size": patch_size * math.isqrt(len(positions) - 1),
        "patch_size": patch_size,
        "n_layer": n_layer,
        "n_head": hub_config.get("num_attention_heads", 12),
        "n_embd": n_embd,
        "activation": hub_config.get("hidden_act", "quick_gelu"),
        "stem": "patch",
        "kind": "clip",
        "pixel_mean": CLIP_MEAN,
        "pixel_std": CLIP_STD,
    }
    return {"config": config, "model": model}


class CLIPViT(ViT):
    """The vision tower of OpenAI's CLIP: a class token before the patches, which features() omits,
    a norm before the first block and none after the last."""

    def __init__(self, config):
        super().__init__(config)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.n_embd))
        self.pre_norm = LayerNorm(config.n_embd)
        self.encoder.norm = nn.Identity()

    def features(self, images):
        x = self.embed_patches(images)
        x = torch.cat((self.class_token.expand(len(x), 1, -1), x), dim=1)
        return self.encoder(self.drop(self.pre_norm(x)))[:, 1:]


VITS["clip"] = CLIPViT


def load_part(where, stage):
    """Return the checkpoint from which a part starts, our own or in the hub's layout.

    stage: "vit" or "gpt". A part of CLIP or of a captioner is taken out of it.
    """
    if not where.endswith(".pt"):
        return load_clip_vit(where) if stage == "vit" else load_gpt2(where)
    checkpoint = load(where, stage, "mllm")
    if stage in checkpoint["config"]:
        prefix = f"{stage}."
        weights = {
            name.removeprefix(prefix): w
            for name, w in checkpoint["model"].items()
            if name.startswith(prefix)
        }
        checkpoint |= {"config": checkpoint["config"][stage], "model": weights}
    return checkpoint


def load_weights(part, checkpoint, new=r"$^"):
    """Load the weights of a part of a model from a checkpoint. Parameters whose names match the
    pattern new keep their values; by default none."""
    weights = checkpoint["model"]
    state = part.state_dict()
    for name in state:
        if re.search(new, name):
            continue
        assert name in weights, f"the checkpoint has no {name}"
        state[name] = weights[name]
        if name.endswith("position.positions"):  # a GPT may need fewer
            state[name] = state[name][: len(part.state_dict()[name])]
    part.load_state_dict(state)
