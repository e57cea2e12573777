"""
Stage 4: self-critical sequence training (Rennie et al. 2017) raises the captioner's CIDEr itself, or its BLEU; or the
share of right answers to questions.

    python mllm.py && python scst.py --init_from=sft                      drawn shapes, five minutes on two CPU cores
    python scst.py config/flickr8k_scst_cpu.py --init_from=sft
    python scst.py config/flickr8k_scst_cpu.py --image=photo.jpg          caption a photo with the fine-tuned model

Expect the test CIDEr of config/flickr8k_cpu.py to go from 35 to 43 in 22 minutes on two CPU cores with AVX512-BF16.

Cross-entropy teaches the next word of somebody's caption; what is reported is CIDEr of whole captions that the model
writes by itself. Here the model samples captions, each is scored, and the log-probability of its tokens goes up in
proportion to its advantage over a baseline: the score of the model's own greedy caption (the self-critic), or the mean
score of the photo's other samples. Starts from an sft.pt of mllm.py. Writes log.csv, loss.png, before_after.png,
scst.pt (the best validation CIDEr) and last.pt to out_dir.

Departures from the paper:
- the model is a transformer that attends to image tokens, not an LSTM; the ViT stays frozen by default
- the loss is the mean over sampled tokens, not the sum over a caption's (a constant factor, and batches weigh alike)
- the reward sees the end token as a word, in captions and references alike: without it, SCST learns to stop in the
  middle of "in front of a", which costs CIDEr nothing
- any number of samples per photo; AdamW with a linear warm-up and cool-down
- the reward may hold sentence BLEU-4 (bleu_weight), smoothed by one from n = 2 on (Lin and Och 2004)
- samples are drawn at a temperature, and the same softmax(logits / temperature) is trained: after label smoothing,
  nearly all samples at temperature 1 are broken, and what they teach first is to write likely words
- n-grams do not ask for sense: with max_surprise, a sample earns nothing if one of its tokens, the end among them, has
  under the GPT of stage 2 a probability below exp(-max_surprise)
- baseline=leave_one_out: the mean score of a photo's other samples (Kool et al. 2019), which needs no greedy decoding
"""

import copy
import time
from pathlib import Path

import numpy as np
import torch

import config
import mllm
from config.tools.data import augment_photos
from config.tools.metrics import CiderD, bleu_of_words, ends_badly, words_of
from config.tools.pictures import plot

# the run
out_dir = "out/scst"  # checkpoints, log and pictures
init_from = "sft"  # or "resume": continue from out_dir/last.pt
sft_dir = ""  # the run of mllm.py whose sft.pt to start from; empty: the newest under out/
eval_only = False  # evaluate out_dir/scst.pt and stop
eval_split = "val"  # what eval_only evaluates: train, val or test
image = ""  # caption this file, folder or URL and stop, or answer about it; see mllm.py
prompt = ""  # ask this about image, instead
chat = False  # talk about image in the terminal, turn by turn
frames = 0  # images that a clip is read as; see mllm.py
device = "auto"  # cuda, mps or cpu
dtype = "auto"  # float32 or bfloat16, whichever multiplies matrices faster here
seed = 1337  # of everything random: batches, augmentation, samples
# decoding: at the end of a run and with eval_only, in addition to greedy; with image, instead of it
beams = 5  # width of the beam search; 1: greedy
length_penalty = 0.6  # beams are compared by log p / length ** length_penalty
temperature = 0.0  # above 0: sample at this temperature; not at the end of a run
num_captions = 1  # with image: captions of each
consensus = 0  # with eval_only: also caption by so many samples, of which the one most like the others is taken
# reward: the sum of these terms, each times its weight
cider_weight = 1.0  # CIDEr-D (0 to 10); alone, as in the paper
bleu_weight = 0.0  # BLEU-4 of a sentence (0 to 1), smoothed by one from n = 2 on
exact_weight = 0.0  # whether the answer is right, word for word (0 or 1)
max_surprise = 0.0  # nats: a sample with a token that surprises the GPT of stage 2 by more earns nothing; 0: any may
# sampling
baseline = "greedy"  # as in the paper; or leave_one_out
max_sample_tokens = 0  # longer samples end there, without an end token; 0: as long as fits the context
sample_temperature = 1.0  # below 1 samples are more like the greedy caption
samples = 2  # captions sampled for each photo, or answers to each question; leave_one_out needs at least 2
batch_size = 32  # photos, or questions, per step, over all processes
accumulation = 1  # parts that a process cuts its share of the batch into: less memory
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
TABLE = ("cider", "cider_others", "beam_cider", "bleu1", "bleu4", "length", "broken", "distinct", "nats", "surprising",
         "clip", "right")

# reward --------------------------------------------------------------------------------------------------------------

class Reward:
    """Scores captions against references, such as those of the training photos: a list of str for each. A caption with
    a token of more than max_surprise nats under the GPT of judges is worth 0; max_surprise 0: none is."""

    def __init__(self, references, cider_weight, bleu_weight, exact_weight=0.0, max_surprise=0.0, judges=None):
        self.texts, self.max_surprise, self.judges = references, max_surprise, judges
        self.references = [[words_of(ref) + [END] for ref in refs] for refs in references]
        self.cider_weight, self.bleu_weight, self.exact_weight = cider_weight, bleu_weight, exact_weight
        self.cider = CiderD(self.references)

    def __call__(self, texts, ended, rows):
        """n captions, whether the model ended each, and whose references are meant -> (n,)"""
        words = to_words(texts, ended)
        scores = self.cider_weight * self.cider.scores(words, rows)
        if self.bleu_weight:
            bleu4 = [bleu_of_words([each], [self.references[row]], smooth=1)[3]
                     for each, row in zip(words, rows, strict=True)]
            scores += self.bleu_weight * np.array(bleu4)
        if self.exact_weight:
            exact = [each in self.references[row] for each, row in zip(words, rows, strict=True)]
            scores += self.exact_weight * np.array(exact)
        if self.max_surprise:  # on a caption that does not end, the end surprises
            scores *= (self.judges.nats(texts) <= self.max_surprise).all(dim=1).numpy()
        return torch.from_numpy(scores).float()


def to_words(answers, ended):
    """n answers, and whether the model ended each -> word lists, END last where it did"""
    return [words_of(answer) + [END] * end for answer, end in zip(answers, ended)]


def advantages(rewards, greedy_rewards=None):
    """(B, K) rewards of K samples per photo -> their advantages over a baseline: the (B,) rewards of the photo's greedy
    caption (Rennie et al. 2017, equation 7), or the mean of its other K - 1 samples (Kool et al. 2019)."""
    if greedy_rewards is not None:
        return rewards - greedy_rewards[:, None]
    return rewards - (rewards.sum(dim=1, keepdim=True) - rewards) / (rewards.size(1) - 1)


def scst_loss(log_probs, advantage):
    """Minus the sum of advantage (n,) * log p over the sampled tokens; train() divides by their number. log_probs: (n,
    T), 0 after the end."""
    return -(advantage[:, None] * log_probs).sum()


def sample_statistics(captions, rewards):
    """What the log tells of the samples of a step, n word lists, and of their rewards."""
    return {"reward": rewards.mean().item(), "length": float(np.mean([len(c) - (END in c) for c in captions])),
            "broken": 100 * float(np.mean([ends_badly(c[:-1], END in c) for c in captions])),
            "distinct": 100 * len(set(map(tuple, captions))) / len(captions)}


def batch_of(lengths, batch_size, step, seed):
    """(batch_size,) rows of a step's batch, each row once per epoch: shuffled, then sorted by lengths (n,), so that
    most of what is written together has equally long prompts."""
    epoch, position = divmod(step, len(lengths) // batch_size)
    draw = config.shared_generator(seed, epoch)
    order = torch.randperm(len(lengths), generator=draw)
    batches = order[lengths[order].argsort(stable=True)].split(batch_size)
    return batches[torch.randperm(len(lengths) // batch_size, generator=draw)[position]]


def find_sft():
    """The sft.pt to start from."""
    found = sorted(Path(sft_dir or "out").glob("sft.pt" if sft_dir else "*/sft.pt"), key=lambda p: p.stat().st_mtime)
    if Path(sft_dir).is_file():
        config.fail(f"sft_dir={sft_dir} is a file; name its folder")
    if found and found[-1].parent == Path(out_dir):
        config.fail(f"out_dir={out_dir} is where {found[-1]} lies, which a new run would rename; choose another")
    if not found:
        config.fail(f"no {sft_dir or 'out/*'}/sft.pt yet; train one first: python mllm.py{config.recipe_of(sft_dir)}")
    return found[-1]


# training ------------------------------------------------------------------------------------------------------------

def train(run, model, optimizers, data, reward, prompts):
    """SCST until the run is over. prompts: what the model is asked, samples of mllm.py; reward knows their
    references."""
    sft, tokenizer = run.more["sft_settings"], data["tokenizer"]
    dev, per_step = config.device_of(model), min(batch_size, len(prompts))
    lengths = torch.tensor([[len(mllm.prompt_ids(model, data, prompt)), len(prompt["images"])] for prompt in prompts])
    lengths = lengths @ torch.tensor([1, 10 ** 6])  # (n,), the same for equally long prompts about equally many images
    fixed = range(0, len(prompts), max(1, len(prompts) // 200))  # training prompts whose greedy answers are scored

    def write(tokens, ids, **decoding):
        with config.autocast(model):
            ids = model.generate(tokens.detach(), ids, max_sample_tokens or model.config.gpt.block_size, **decoding)
        rows = ids.tolist()
        return ids, list(map(tokenizer.decode, rows)), [tokenizer.eos_id in row for row in rows]

    while True:
        progress = run.progress()  # from 0 to 1, by steps or by minutes
        factor = config.lr_factor(run.step, progress, warmup_steps, cooldown)
        if run.due():
            with run.paused():
                greedy = mllm.write_answers(model, data, [prompts[i] for i in fixed])
                numbers = {"greedy": reward(*greedy, fixed).mean().item()}
                scores = {f"val_{name}": value for name, value in mllm.evaluate(model, data, "val")[0].items()}
                brief = ("val_cider", "val_bleu4", "val_broken", "val_distinct", "val_surprising", "val_right")
                numbers |= {name: scores[name] for name in brief if name in scores}
                run.log(numbers, factor * lr, per_step * samples, "captions", file_only=scores)
                run.save(scores["val_right" if exact_weight else "val_cider"])
        if progress == 1:
            break
        batch = config.my_share(batch_of(lengths, per_step, run.step, seed))  # of the prompts
        config.seed_step(seed, run.step)  # of augmentation and samples
        began, in_reward, drafts, said, values = time.perf_counter(), 0.0, [], [], []
        for some in batch.chunk(accumulation):  # write answers, see what they are worth
            some = some.tolist()
            asked, draft = [prompts[i] for i in some], []
            numbers = list(dict.fromkeys(i for prompt in asked for i in prompt["images"]))
            texts = [[text for i in some if number in prompts[i]["images"]
                      for text in mllm.texts_of([prompts[i]]) + reward.texts[i]]
                     for number in numbers]
            images = augment_photos(data["images"][numbers].to(dev), texts, sft["crop"], sft["jitter"], sft["mirror"],
                                    sft.get("train_size", 0))
            with config.autocast(model):
                layouts = data["layouts"][numbers].to(dev)
                all_tokens = model.encode(images, layouts)  # (M, N, C), once for all K samples; as mllm.py trained it
            for rows, ids, its_images in mllm.prompts_by_length(model, data, asked):
                tokens, places = all_tokens[[numbers.index(i) for i in its_images]], [some[i] for i in rows]
                sampled, *captions = write(tokens, ids, temperature=sample_temperature, num_captions=samples)
                greedy = write(tokens, ids)[1:] if baseline == "greedy" else None
                in_reward -= time.perf_counter()
                rewards = reward(*captions, [i for i in places for _ in range(samples)]).view(-1, samples)  # (b, K)
                advantage = advantages(rewards, None if greedy is None else reward(*greedy, places))
                in_reward += time.perf_counter()
                draft.append((tokens, ids, sampled, advantage.flatten().to(dev)))
                said, values = said + to_words(*captions), values + [rewards]
            drafts.append(draft)
        n_tokens, = config.sum_numbers(sum(mllm.answer_mask(sampled, tokenizer.eos_id).sum().item()
                                           for draft in drafts for _, _, sampled, _ in draft), device=dev)
        loss = 0.0
        for draft in drafts:  # learn from them
            with config.autocast(model):
                part = sum(scst_loss(mllm.answer_log_probs(model, *some, sample_temperature), advantage)
                           for *some, advantage in draft) / n_tokens  # of the loss of the batch
            part.backward()
            loss += part.detach()
        loss = config.update(model, optimizers, loss, factor, grad_clip)
        row = sample_statistics(said, torch.cat(values))
        row = dict(zip(row, config.sum_numbers(*(v / config.n_processes() for v in row.values()), device=dev)))
        row["reward_share"] = 100 * in_reward / (time.perf_counter() - began)  # of the step's time, in per cent
        run.advance(loss, row)
    run.stop()


@config.one_line_errors
def main(argv=None):
    settings, out = config.override(globals(), argv), Path(out_dir)
    if image or prompt or chat or eval_only:
        return mllm.use(out / "scst.pt", "scst", settings)
    if baseline == "leave_one_out" and samples < 2:
        config.fail("baseline=leave_one_out needs samples of at least 2")
    resumed = config.resume("scst", settings, start="sft")
    start_from = Path(resumed["sft"]) if resumed else find_sft()
    model, checkpoint = mllm.load_captioner(start_from, "mllm", device, resumed["dtype"] if resumed else dtype)
    data, sft = mllm.data_of(model, checkpoint), checkpoint["settings"]  # of the run that trained the captioner
    print(f"starting from {start_from} ({sft['dataset']}), step {checkpoint['step']}")
    prompts, references = mllm.prompts_of(data["splits"]["train"])
    config.check_batch(min(batch_size, len(prompts)), accumulation)
    before = copy.deepcopy(model.state_dict())
    model.vit.requires_grad_(train_vit)
    optimizers = config.optimizers(model, 0.0, lr, weight_decay)
    model.eval()  # and so it stays: no dropout in the samples, nor in the pass that learns from them
    if max_surprise and not data["judges"].gpt:
        config.fail(f"max_surprise={max_surprise} takes the GPT that {start_from} started from, and there is no file "
                    f"gpt_ckpt={sft['gpt_ckpt']!r}; or --max_surprise=0")
    reward = Reward(references, cider_weight, bleu_weight, exact_weight, max_surprise, data["judges"])
    run = config.Run("scst", settings, sft["dataset"], model, optimizers, resumed, "scst.pt", sft=str(start_from),
                     sft_settings=sft, asks=data["asks"], tokenizer=checkpoint["tokenizer"],
                     image_transform=checkpoint["image_transform"])
    trained, all_of_them = (sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (0, 1))
    print(f"{trained:,} of {all_of_them:,} parameters train, on {config.device_of(model)}; baseline {baseline}")
    train(run, model, optimizers, data, reward, prompts)
    if not config.is_main():
        return
    plot(out, left=("reward", "greedy"), right=("val_cider",), ylabel="reward")
    best, captions = [], []
    print(f"{'':<13}" + "".join(f"{name:>13}" for name in TABLE))
    for when, weights in (("before", before), ("after", config.load(out / "scst.pt", "scst")["model"])):
        model.load_state_dict(weights)
        for split in ("val", "test"):
            scores, said = mllm.evaluate_decodings(model, data, split, beams, length_penalty)
            print(f"{when:<7}{split:<6}" + "".join(f"{scores.get(name, np.nan):>13.2f}" for name in TABLE))
            if split == "val":
                best.append(scores["right" if exact_weight else "cider"])
        if data["asks"]:
            scores |= mllm.print_kinds(model, data, "test", said)
        run.log({}, file_only={f"{when}_test_{name}": value for name, value in scores.items()})
        captions.append(said)
    if not data["asks"]:
        for photo, b, a in zip(mllm.prompts_of(data["splits"]["test"])[0][:12], *captions):
            print(f"{data['names'][photo['images'][0]]}: before: {b} | after: {a}")
    mllm.draw_answers(out / "before_after.png", data, "test", [f"before: {b}\nafter: {a}" for b, a in zip(*captions)])
    gain = 100 * (best[1] / max(best[0], 1e-9) - 1)
    name = "share right" if exact_weight else "CIDEr"
    print(f"validation {name} {best[0]:.2f} -> {best[1]:.2f} ({gain:+.1f}%) after "
          f"{run.seconds() / 60:.1f} minutes of training; wrote {out}/loss.png, before_after.png, scst.pt")


if __name__ == "__main__":
    main()
