"""
Stage 4: self-critical sequence training (Rennie et al. 2017) raises the captioner's CIDEr itself, or its BLEU.

    python mllm.py && python scst.py --init_from=sft                      drawn shapes, five minutes on two CPU cores
    python scst.py config/flickr8k_scst_cpu.py --init_from=sft
    python scst.py config/flickr8k_scst_cpu.py --image=photo.jpg          caption a photo with the fine-tuned model

Expect the test CIDEr of config/flickr8k_cpu.py to go from 37 to 44, or from 34 to 42 with another seed: 22 minutes
on two CPU cores with AMX.

Cross-entropy teaches the next word of somebody's caption; what is reported is CIDEr of whole captions that the model
writes by itself. Here the model samples captions, each is scored, and the log-probability of its tokens goes up in
proportion to how far it beats a baseline: the score of the model's own greedy caption (the self-critic), or the mean
score of the photo's other samples. Starts from the sft.pt that mllm.py saved. Writes log.csv, loss.png,
before_after.png, scst.pt (the best validation CIDEr) and last.pt to out_dir.

Departures from the paper:
- the model is a transformer that attends to image tokens, where the paper has an LSTM; the ViT stays frozen by default
- the loss is the mean over sampled tokens, not the sum over a caption's (a constant factor, and batches weigh alike)
- the reward sees the end token as a word, in captions and references alike: without it, SCST learns to stop in the
  middle of "in front of a", which costs CIDEr nothing
- any number of samples a photo; AdamW with a linear warm-up and cool-down
- the reward may hold smoothed sentence BLEU-4 (bleu_weight): from the second order on, one is added to matches and
  totals (Lin and Och 2004)
- baseline=leave_one_out: the mean score of a photo's other samples (Kool et al. 2019), which needs no greedy decoding
"""

import math
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import config
import mllm

# the run
out_dir = "out/scst"  # checkpoints, log and pictures
init_from = "sft"  # or "resume": go on from out_dir/last.pt
sft_dir = ""  # the run of mllm.py whose sft.pt to start from; empty: the newest under out/
eval_only = False  # evaluate out_dir/scst.pt and stop
eval_split = "val"  # what eval_only evaluates: train, val or test
image = ""  # caption this file, folder or URL and stop
device = "auto"  # cuda, mps or cpu
dtype = "auto"  # bfloat16 on CUDA, else float32
seed = 1337  # of everything random: batches, augmentation, samples
# decoding: at the end of a run, with eval_only (both beside greedy) and image
beams = 5  # width of the beam search; 1: greedy
length_penalty = 0.6  # beams are compared by log p / length ** length_penalty
temperature = 0.0  # above 0: sample at this temperature, for image instead, with eval_only as well
num_captions = 1  # for image: captions of each
# reward: cider_weight * CIDEr-D (0 to 10) + bleu_weight * smoothed sentence BLEU-4 (0 to 1)
cider_weight = 1.0  # CIDEr-D alone, as in the paper
bleu_weight = 0.0  # BLEU-4 of a sentence, smoothed by one from n = 2 on
# sampling
baseline = "greedy"  # as in the paper; or leave_one_out
samples = 2  # captions sampled for each photo; leave_one_out needs at least 2
batch_size = 32  # photos a step, over all processes and parts
accumulation = 1  # parts that a process cuts its share of the batch into: less memory, the same training
# optimization
train_vit = False  # train the ViT too
max_steps = 0  # 0: max_minutes alone decides
max_minutes = 1.5  # 0: max_steps alone decides; else whichever comes first
lr = 2e-4  # peak rate, AdamW for all: far below that of the training before, since samples are noisy teachers
weight_decay = 0.0  # the weights stay near those of the training before
warmup_steps = 10  # steps in which the rate rises to its peak
cooldown = 1.0  # the last part of the run, in which the rate falls to zero in a straight line
grad_clip = 1.0  # largest norm of the gradient; 0: none
eval_interval = 50  # steps between lines of the log, each with validation scores

END = "<end>"  # the word that stands for the end token in the reward; words_of() never produces it
TABLE = ("cider", "beam_cider", "bleu1", "bleu2", "bleu3", "bleu4", "length", "broken", "distinct", "all_right")


# ---------------------------------------------------------------------------------------------------------------------
# reward


class Reward:
    """Scores word lists against the captions of training photos, whose n-gram statistics are computed once."""

    def __init__(self, references, cider_weight, bleu_weight):
        """references: for each photo a list of str; the document frequencies are counted over them."""
        words = [[mllm.words_of(ref) + [END] for ref in refs] for refs in references]
        self.cider_weight, self.bleu_weight, self.cider = cider_weight, bleu_weight, mllm.CiderD(words)
        self.lengths = [[len(ref) for ref in refs] for refs in words]
        self.allowed = []  # for each photo and n: the largest count of each ngram in one reference
        for refs in words if bleu_weight else []:
            counts = [Counter() for _ in range(4)]
            for n, ref in ((n, ref) for n in range(4) for ref in refs):
                counts[n] |= mllm.count_ngrams(ref, n + 1)
            self.allowed.append(counts)

    def smoothed_bleu4(self, words, photo):
        """Sentence BLEU-4, 0 to 1, with one added to matches and totals from n = 2 on (Lin and Och 2004)."""
        log_precision = 0.0
        for n, allowed in enumerate(self.allowed[photo]):
            counts, one = mllm.count_ngrams(words, n + 1), min(n, 1)
            matched, total = (counts & allowed).total() + one, counts.total() + one
            if matched == 0:
                return 0.0
            log_precision += math.log(matched / total) / 4
        closest = min((abs(length - len(words)), length) for length in self.lengths[photo])[1]
        return math.exp(log_precision + min(0.0, 1 - closest / len(words)))

    def __call__(self, captions, photos):
        """captions: n word lists, END last where the model ended it; photos: the index of each one's photo -> (n,)"""
        scores = self.cider_weight * self.cider.scores(captions, photos)
        if self.bleu_weight:
            bleus = [self.smoothed_bleu4(words, photo) for words, photo in zip(captions, photos, strict=True)]
            scores += self.bleu_weight * np.array(bleus)
        return torch.from_numpy(scores).float()


def to_words(ids, tokenizer):
    """(n, T) generated ids -> word lists, END last in those that hold the end token"""
    return [mllm.words_of(tokenizer.decode(row)) + [END] * (tokenizer.eos_id in row) for row in ids.tolist()]


def advantages(rewards, greedy_rewards=None):
    """(B, K) rewards of K samples a photo -> how far each beats its baseline: the (B,) rewards of the photo's greedy
    caption (Rennie et al. 2017, equation 7), or the mean of its other K - 1 samples (Kool et al. 2019)."""
    if greedy_rewards is not None:
        return rewards - greedy_rewards[:, None]
    return rewards - (rewards.sum(dim=1, keepdim=True) - rewards) / (rewards.size(1) - 1)


def scst_loss(log_probs, advantage):
    """Minus the sum of advantage (n,) * log p over the sampled tokens; main() divides by how many those are. log_probs:
    (n, T), 0 after the end."""
    return -(advantage[:, None] * log_probs).sum()


def describe(captions, rewards, greedy_rewards):
    """What the log tells of the samples of a step (n word lists) and their (B, K) rewards."""
    row = {"reward": rewards.mean().item(), "length": float(np.mean([len(c) - (END in c) for c in captions])),
           "broken": 100 * float(np.mean([mllm.ends_badly(c[:-1], END in c) for c in captions])),
           "distinct": 100 * len(set(map(tuple, captions))) / len(captions)}
    if greedy_rewards is not None:
        row |= {"greedy": greedy_rewards.mean().item(), "difference": (rewards - greedy_rewards[:, None]).mean().item()}
    return row


def step_flops(model, data, max_tokens, dev):
    """FLOPs of the pass that learns, a caption, for one of half the longest length; writing it comes on top."""
    images = data["images"][data["splits"]["train"][:1]].to(dev)
    encode = lambda: model.encode(images).repeat_interleave(samples, dim=0)
    words = torch.full((samples, max_tokens // 2), model.config.eos_id, device=dev)

    def example():
        tokens = encode()
        return model.log_probs(tokens, torch.cat((model.prompt(tokens), words), dim=1)).sum()

    return config.count_flops(model, example)["Global"] / samples


def lr_factor(step, progress):
    """The rate's share of its peak: a linear warm-up, a plateau, then a straight line to zero at progress 1."""
    return min(1.0, (step + 1) / max(1, warmup_steps), (1.0 - progress) / max(cooldown, 1e-8))


def find_sft():
    """The sft.pt to start from."""
    found = sorted(Path(sft_dir or "out").glob("sft.pt" if sft_dir else "*/sft.pt"), key=lambda p: p.stat().st_mtime)
    if found and found[-1].parent == Path(out_dir):
        config.fail(f"out_dir={out_dir} is where {found[-1]} lies, which a new run would rename; choose another")
    if not found:
        config.fail(f"no {sft_dir or 'out/*'}/sft.pt yet; train one first: python mllm.py{config.recipe_of(sft_dir)}")
    return found[-1]


@config.one_line_errors
def main(argv=None):
    settings = config.override(globals(), argv)
    if baseline not in ("greedy", "leave_one_out") or (baseline == "leave_one_out" and samples < 2):
        config.fail("baseline is greedy, or leave_one_out with samples of at least 2")
    dev, out, train_with = config.pick_device(device), Path(out_dir), "python scst.py (with the same config)"
    context = config.autocast(dev, dtype)
    config.at_least(1, beams=beams, num_captions=num_captions)
    config.at_least(0, temperature=temperature)
    config.one_of(("train", "val", "test"), eval_split=eval_split)
    if image:
        how = dict(temperature=temperature, beams=max(beams, num_captions), length_penalty=length_penalty,
                   generator=torch.Generator(dev).manual_seed(seed))
        mllm.caption_files(out / "scst.pt", train_with, image, out, dev, context, num_captions=num_captions, **how)
        return

    config.at_least(1, eval_interval=eval_interval, batch_size=batch_size, samples=samples)
    config.at_least(0, grad_clip=grad_clip)
    config.shares(cooldown=cooldown)
    resumed = None if eval_only else config.resume(out, init_from, settings, train_with, start="sft")
    start_from = out / "scst.pt" if eval_only else Path(resumed["sft"]) if resumed else find_sft()
    model, tokenizer, checkpoint = mllm.load_captioner(start_from, train_with if eval_only else "python mllm.py", dev)
    sft = checkpoint.get("sft_settings", checkpoint["settings"])  # those of the run of mllm.py
    data, max_tokens = mllm.data_of(checkpoint), sft["max_tokens"]
    splits = data["splits"]
    evaluate = lambda split: mllm.evaluate(model, data, split, max_tokens, dev, context)
    evaluate_each_way = lambda split, temperature=0.0: mllm.evaluate_each_way(
        model, data, split, max_tokens, dev, context, beams, length_penalty, temperature)
    if eval_only:
        scores, _ = evaluate_each_way(eval_split, temperature)
        print(f"{start_from}, step {checkpoint['step']}, {eval_split}: "
              + " | ".join(f"{name} {value:.2f}" for name, value in scores.items()))
        return

    print(f"starting from {start_from} ({sft['dataset']}), step {checkpoint['step']}")
    before = {name: w.clone() for name, w in model.state_dict().items()}
    model.vit.requires_grad_(train_vit)
    optimizers = config.optimizers(model, 0.0, lr, weight_decay)
    start, best = 0, -1.0
    if resumed:
        model.load_state_dict(resumed["model"])
        optimizers[0].load_state_dict(resumed["optimizers"][0])
        start, best = resumed["step"], resumed["best"]
    model.eval()  # and so it stays: no dropout in the samples, nor in the pass that learns from them
    reward = Reward([data["captions"][p] for p in splits["train"]], cider_weight, bleu_weight)
    # of the samples, over the interval: mean reward, that of the greedy captions, their difference, and so on
    of_samples = ["reward", "greedy", "difference", "length", "broken", "distinct", "loss", "reward_share"]
    columns = [*of_samples,
               *(f"{prefix}_{name}" for prefix in ("val", "before_test", "after_test") for name in mllm.SCORES)]
    per_step = min(batch_size, len(splits["train"]))  # photos
    config.n_parts(per_step, accumulation)  # fails where the photos cannot be cut so
    flops = step_flops(model, data, max_tokens, dev)
    peak = config.matmul_peak(dev, context)
    clock = config.Clock(max_steps, max_minutes, resumed["seconds"] if resumed else 0.0)
    log = config.Log(out, columns, clock, resumed, flops, peak)
    print(f"{flops / 1e6:.0f} MFLOP a caption, of the pass that learns")
    print(f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} of "
          f"{sum(p.numel() for p in model.parameters()):,} parameters train, on {dev}; baseline {baseline}")

    step, history = start, []
    steps_per_epoch = len(splits["train"]) // per_step
    while True:
        progress = clock.shared_progress(step, dev)
        factor = lr_factor(step, progress)
        due = step % eval_interval == 0 or progress == 1
        if due and not (resumed and step == start) and config.is_main():
            with clock.paused():
                scores, _ = evaluate("val")
                numbers = {name: [row[name] for row in history if name in row] for name in of_samples}
                numbers = {name: float(np.mean(values)) for name, values in numbers.items() if values}
                scores = {f"val_{name}": value for name, value in scores.items()}
                brief = {name: scores[name] for name in ("val_cider", "val_bleu4", "val_broken", "val_distinct")}
                log.write(step, numbers | brief, factor * lr, per_step * samples, "captions", file_only=scores)
                is_best, best = scores["val_cider"] > best, max(scores["val_cider"], best)
                saved = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                         "settings": settings | {"max_tokens": max_tokens}, "step": step, "best": best,
                         "seconds": clock.seconds(), "sft": str(start_from), "sft_settings": sft,
                         **{key: checkpoint[key] for key in ("config", "tokenizer", "image_transform")}}
                if is_best:
                    config.save(out / "scst.pt", saved)
                config.save(out / "last.pt", saved)  # last: a run killed in between does this evaluation again
        if due:
            history = []
        if progress == 1:
            break
        epoch, position = divmod(step, steps_per_epoch)
        order = torch.randperm(len(splits["train"]), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        rows = order[position * per_step:(position + 1) * per_step].tolist()  # of the training split, all processes'
        torch.manual_seed(seed * 1_000_003 + step)  # augmentation and samples hang on the step alone: resuming is exact
        photos = [splits["train"][i] for i in rows]
        said = [data["captions"][p] for p in photos]
        images = data["images"][photos].to(dev)
        images = config.augment_photos(images, said, sft["crop"], sft["jitter"], sft["mirror"])  # as it was trained
        drafts, began, in_reward = [], time.perf_counter(), 0.0
        for part in config.parts(model, per_step, accumulation, seed, step):  # write captions, see what they are worth
            with context:
                tokens = model.encode(images[part])  # (b, N, C), read once for all K samples
                write = lambda **how: model.generate(tokens.detach(), max_new_tokens=max_tokens, **how)
                sampled, greedy = write(temperature=1.0, num_captions=samples), None
                if baseline == "greedy" or (step + 1) % eval_interval == 0:  # without need of it, for the log
                    greedy = write()
            in_reward -= time.perf_counter()
            captions = to_words(sampled, tokenizer)
            rewards = reward(captions, [i for i in rows[part] for _ in range(samples)]).view(-1, samples)  # (b, K)
            greedy_rewards = None if greedy is None else reward(to_words(greedy, tokenizer), rows[part])  # (b,)
            in_reward += time.perf_counter()
            drafts.append((tokens, sampled, rewards, greedy_rewards))
            row = describe(captions, rewards, greedy_rewards)
            means = config.sum_numbers(*(value / config.n_processes() for value in row.values()), device=dev)
            history.append(dict(zip(row, means)))
        n_tokens, = config.sum_numbers(sum(mllm.counted(sampled, tokenizer.eos_id).sum() for _, sampled, *_ in drafts),
                                       device=dev)  # of the whole batch
        loss = 0.0
        for tokens, sampled, rewards, greedy_rewards in drafts:  # learn from them
            with context:
                log_probs = mllm.written_log_probs(model, tokens.repeat_interleave(samples, dim=0), sampled)
            advantage = advantages(rewards, greedy_rewards if baseline == "greedy" else None)
            share = scst_loss(log_probs, advantage.flatten().to(dev)) / n_tokens
            share.backward()
            loss += share.detach()
        loss = config.sum_gradients(model, loss)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        history[-1]["loss"] = config.check_finite(loss + 0 * grad_norm, step, out)
        config.set_lr(optimizers, factor)
        optimizers[0].step()
        optimizers[0].zero_grad(set_to_none=True)
        history[-1]["reward_share"] = 100 * in_reward / (time.perf_counter() - began)  # of the step's time, in per cent
        step += 1
        config.show_progress(f"step {step} | reward {history[-1]['reward']:.3f}")

    if not config.is_main():
        return
    config.plot(out, left=("reward", "greedy"), right=("val_cider",), ylabel="reward")
    shown, table, pictures = splits["test"][:12], [], []
    after = config.load(out / "scst.pt", train_with, dev)["model"]
    for when, weights in (("before", before), ("after", after)):
        model.load_state_dict(weights)
        for split in ("val", "test"):
            with clock.paused():
                scores, captions = evaluate_each_way(split)
            table.append((when, split, scores))
            if split == "test":
                pictures.append(captions[:len(shown)])
    log.write(step, {}, file_only={f"{when}_test_{name}": value for when, split, scores in table if split == "test"
                              for name, value in scores.items()})
    names = [name for name in TABLE if name in table[0][2]]
    print(f"{'':<7}{'':<6}" + "".join(f"{name:>11}" for name in names))
    for when, split, scores in table:
        print(f"{when:<7}{split:<6}" + "".join(f"{scores[name]:>11.2f}" for name in names))
    for p, b, a in zip(shown, *pictures):
        print(f"{data['names'][p]}: before: {b} | after: {a}")
    config.save_grid(out / "before_after.png", [data["images"][p] for p in shown],
                     [f"before: {b}\nafter: {a}" + mllm.by_a_person(data, p) for p, b, a in zip(shown, *pictures)])
    gain = table[2][2]["cider"] / max(1e-9, table[0][2]["cider"]) - 1
    print(f"validation CIDEr {table[0][2]['cider']:.2f} -> {table[2][2]['cider']:.2f} ({100 * gain:+.1f}%) after "
          f"{clock.seconds() / 60:.1f} minutes of training; wrote {out}/loss.png, before_after.png, scst.pt")


if __name__ == "__main__":
    main()
