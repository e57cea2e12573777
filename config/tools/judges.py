"""What captions are judged by without references: the GPT of stage 2 and the CLIP of stage 1 as they were before they
became parts of the captioner, both trained on training photos and their captions alone."""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import config
from config.tools.data import pad_texts
from model import CLIP, GPT, IGNORE_INDEX, CLIPConfig, GPTConfig, evaluating, tokenizer_from_state

SURPRISING = 6.0  # nats: a token less likely than 1 in 400, given those before it


class Judges:
    """Scores captions of the photos images (n, 3, H, W) uint8. gpt_ckpt, clip_ckpt: checkpoints of gpt.py and of vit.py
    with task=clip; what is not such a file judges nothing."""

    def __init__(self, gpt_ckpt, clip_ckpt, images, device):
        self.gpt, self.clip, self.images, self.vectors = None, None, images, {}
        if gpt_ckpt and Path(gpt_ckpt).is_file():
            saved = config.load(gpt_ckpt, "gpt")
            self.gpt, self.tokenizer = GPT(GPTConfig(**saved["config"])), tokenizer_from_state(saved["tokenizer"])
            self.gpt.load_state_dict(saved["model"])
            config.place(self.gpt, device, saved["dtype"])
        if clip_ckpt and Path(clip_ckpt).is_file() and images.dim() == 4:  # it reads no tiles
            saved = config.load(clip_ckpt, "vit")
            if "classes" not in saved:
                self.clip, self.clip_tokenizer = CLIP(CLIPConfig.from_dict(saved["config"])), \
                    tokenizer_from_state(saved["tokenizer"])
                self.clip.load_state_dict(saved["model"])
                config.place(self.clip, device, saved["dtype"])

    @torch.no_grad()
    def nats(self, captions, batch_size=250):
        """n str -> (n, T): minus the log-probability of each token, the end among them, given those before; 0 after
        the end. T: the context of the GPT, or less."""
        longest, nats = 2 + max(len(self.tokenizer.encode(caption)) for caption in captions), []
        width = min(8 * math.ceil(longest / 8), self.gpt.config.block_size)
        ids = pad_texts(captions, self.tokenizer, width).to(config.device_of(self.gpt))
        targets = ids.masked_fill(ids == self.tokenizer.pad_id, IGNORE_INDEX)[:, 1:]
        with evaluating(self.gpt), config.autocast(self.gpt):
            for some, their in zip(ids.split(batch_size), targets.split(batch_size)):
                x = self.gpt.hidden(self.gpt.embedding(some[:, :-1]))
                logits, where = self.gpt.logits_where(x, their)
                loss = F.cross_entropy(logits, their.flatten()[where], reduction="none")
                nats.append(loss.new_zeros(their.numel()).index_copy(0, where, loss).view_as(their))
        return torch.cat(nats).cpu()

    @torch.no_grad()
    def embed(self, photos, batch_size=250):
        """n indices of photos -> (n, d) unit vectors of CLIP"""
        dev, new = config.device_of(self.clip), sorted(set(photos) - set(self.vectors))
        with evaluating(self.clip), config.autocast(self.clip):
            for some in (new[i:i + batch_size] for i in range(0, len(new), batch_size)):
                self.vectors |= zip(some, self.clip.embed_images(self.images[some].to(dev)))
        return torch.stack([self.vectors[photo] for photo in photos]).float()

    @torch.no_grad()
    def cosines(self, captions, photos, batch_size=250):
        """n str, and the index of each one's photo -> (n,) cosines of CLIP between them"""
        dev, photos = config.device_of(self.clip), self.embed(photos)
        with evaluating(self.clip), config.autocast(self.clip):
            ids = pad_texts(captions, self.clip_tokenizer, self.clip.config.max_tokens).to(dev)
            texts = torch.cat([self.clip.embed_texts(some) for some in ids.split(batch_size)])  # (n, d)
        return (texts * photos).sum(dim=1).cpu()

    def scores(self, captions, photos):
        """{name: value} of captions of photos. nats: a token, under the GPT. surprising: per cent of the captions that
        hold a token of more than SURPRISING nats. clip: 100 times the mean cosine."""
        scores = {}
        if self.gpt:
            nats = self.nats(captions)
            scores["nats"] = (nats.sum() / (nats > 0).sum()).item()
            scores["surprising"] = 100 * (nats > SURPRISING).any(dim=1).float().mean().item()
        if self.clip:
            scores["clip"] = 100 * float(np.mean(self.cosines(captions, photos).tolist()))
        return scores
