"""
Stage 4: self-critical sequence training (Rennie et al. 2017) raises the captioner's CIDEr itself,
or its BLEU; or the share of right answers to questions.

    python mllm.py && python scst.py --init_from=sft                      drawn shapes
    python scst.py config/flickr8k_scst_cpu.py --init_from=sft
    python scst.py config/flickr8k_scst_cpu.py --image=photo.jpg          caption a photo

Cross-entropy teaches the next word of somebody's caption; what is reported is CIDEr of whole
captions that the model writes by itself. Here the model samples captions, each is scored, and the
log-probability of its tokens goes up in proportion to its advantage over a baseline: the score of
the model's own greedy caption (the self-critic), or the mean score of the photo's other samples.
Starts from an sft.pt of mllm.py. Writes log.csv, loss.png, before_after.png, scst.pt (the best on
validation) and last.pt to out_dir.

Departures from the paper:
- the model is a transformer that attends to image tokens, not an LSTM; the ViT stays frozen
- the loss is the mean over sampled tokens, not the sum over a caption's (a constant factor, and
  batches weigh alike)
- the reward sees the end token as a word, in captions and references alike: without it, SCST learns
  to stop in the middle of "in front of a", which costs CIDEr nothing
- any number of samples per photo; AdamW with a linear warm-up and cool-down
- the reward may hold sentence BLEU-4 (bleu_weight), smoothed by one from n = 2 on (Lin and Och
  2004)
- samples are drawn at a temperature, and the same softmax(logits / temperature) is trained: after
  label smoothing, nearly all samples at temperature 1 are broken, and they first teach the model to
  write likely words
- n-grams do not ask for sense: with max_surprise, a sample earns nothing if one of its tokens, the
  end among them, has a probability below exp(-max_surprise) under the GPT of stage 2
- baseline=leave_one_out: the mean score of a photo's other samples (Kool et al. 2019), which needs
  no greedy decoding
"""

import copy
import time
from pathlib import Path
from typing import NamedTuple

import torch

import config
import mllm
from config.tools import run
from config.tools.answers import answer_mask, draw_answers
from config.tools.metrics import CiderD, LanguageJudge, bleu_of_words, words_of
from config.tools.optim import lr_factor, make_optimizers, update
from config.tools.pictures import plot
from config.tools.pretrained import load_part

# the run
out_dir = "out/scst"  # checkpoints, log and pictures
init_from = "sft"  # or "resume": continue from out_dir/last.pt
sft_dir = ""  # the run of mllm.py whose sft.pt to start from; empty: the newest under out/
eval_only = False  # evaluate out_dir/scst.pt and stop
eval_split = "val"  # what eval_only evaluates: train, val or test
image = ""  # caption this file, folder or URL and stop, or answer about it; see mllm.py
prompt = ""  # ask this about image, instead
chat = False  # talk about image in the terminal, turn by turn
device = "auto"  # cuda, mps or cpu
dtype = "auto"  # bfloat16 where the hardware has instructions for it, else float32
seed = 1337  # of everything random: batches, augmentation, samples
# decoding: at the end of a run and with eval_only, in addition to greedy; with image, instead of it
beams = 5  # width of the beam search; 1: greedy
length_penalty = 0.6  # beams are compared by log p / length ** length_penalty
temperature = 0.0  # with image, above 0: sample at this temperature
num_captions = 1  # with image: captions of each
# reward: the sum of these terms, each times its weight
cider_weight = 1.0  # CIDEr-D (0 to 10); alone, as in the paper
bleu_weight = 0.0  # BLEU-4 of a sentence (0 to 1), smoothed by one from n = 2 on
exact_weight = 0.0  # whether the answer is right, word for word (0 or 1)
max_surprise = 0.0  # a token of more nats for the GPT of stage 2 makes a sample worth 0; 0: off
# sampling
baseline = "greedy"  # as in the paper; or leave_one_out
max_sample_tokens = 0  # longer samples end there, without an end token; 0: no limit
sample_temperature = 1.0  # below 1 samples are more like the greedy caption
samples = 2  # captions sampled per photo, or answers per question; leave_one_out needs 2
batch_size = 32  # photos, or questions, per step, over all processes
accumulation = 1  # parts that a process splits its share of the batch into, to need less memory
# optimization
max_steps = 300  # length of the run
lr = 2e-4  # peak rate, AdamW for all: far below that of stage 3, since rewards are noisy
warmup_steps = 10  # steps in which the rate rises to its peak
cooldown = 1.0  # the last part of the run, in which the rate falls to zero in a straight line
grad_clip = 1.0  # largest norm of the gradient; 0: none
eval_interval = 50  # steps between evaluations

BRIEF = ("mean_reward", "val_cider", "val_right", "lr", "ms_per_step", "minutes")
END = "<end>"  # the word for the end token in the reward; words_of() never produces it


# reward -------------------------------------------------------------------------------------------


class Reward:
    """Scores captions, by the weights in the settings above, against references, such as those of
    the training photos: a list of str for each photo.

    judge: a LanguageJudge; a caption with a token of more than max_surprise nats is worth 0. None:
    no such limit.
    """

    def __init__(self, references, judge=None):
        self.references = [[words_of(ref) + [END] for ref in refs] for refs in references]
        self.judge = judge
        self.cider = CiderD(self.references)

    def __call__(self, texts, ended, rows):
        """Return the (n,) scores of n captions. ended: whether the model ended each; rows: whose
        references apply."""
        words = [words_of(text) + [END] * end for text, end in zip(texts, ended, strict=True)]
        rewards = cider_weight * torch.tensor(self.cider.scores(words, rows))
        for i, row in enumerate(rows):
            references = self.references[row]
            if bleu_weight:
                rewards[i] += bleu_weight * bleu_of_words([words[i]], [references], smooth=1)[3]
            if exact_weight and words[i] in references:
                rewards[i] += exact_weight
        if self.judge:  # a caption that does not end is surprising where it should go on
            rewards[(self.judge.nats(texts) > max_surprise).any(dim=1)] = 0.0
        return rewards.float()


def advantages(rewards, greedy_rewards=None):
    """Return the advantages of (B, K) rewards of K samples per photo over a baseline: the (B,)
    rewards of the photo's greedy caption (Rennie et al. 2017, equation 7), or the mean of its other
    K - 1 samples (Kool et al. 2019)."""
    if greedy_rewards is not None:
        return rewards - greedy_rewards[:, None]
    K = rewards.size(1)
    mean_of_others = (rewards.sum(dim=1, keepdim=True) - rewards) / (K - 1)
    return rewards - mean_of_others


def scst_loss(log_probs, advantage):
    """Return the policy gradient loss: minus the sum, over all samples and tokens, of a sample's
    advantage (n,) times the token's log-probability (n, T), which is 0 after the end."""
    return -(advantage[:, None] * log_probs).sum()


# sampling -----------------------------------------------------------------------------------------


class Rollout(NamedTuple):
    """K samples for each of b prompts of equal length."""

    features: torch.Tensor  # (b * k, N, C) of the ViT, which is frozen, for the k images of each
    prompts: torch.Tensor  # (b, Tp) ids
    samples: torch.Tensor  # (b * K, T) ids
    mask: torch.Tensor  # (b * K, T), True where a sampled token counts
    rewards: torch.Tensor  # (b, K)
    advantages: torch.Tensor  # (b * K,)


@torch.no_grad()
def rollout(model, data, prompts, rows, reward, augmentation):
    """Sample answers to the prompts in rows, and score them. Return a list of Rollout."""
    device = run.device_of(model)
    tokenizer = data["tokenizer"]
    images = list(dict.fromkeys(i for row in rows for i in prompts[row]["images"]))
    features = mllm.features_of(model, data, images, **augmentation)
    with run.autocast(model):
        tokens = model.connect(features)  # (M, N, C), for all samples

    def write(own_tokens, ids, **decoding):
        with run.autocast(model):
            written = model.generate(
                own_tokens, ids, max_sample_tokens or model.config.gpt.block_size, **decoding
            )
        texts = [tokenizer.decode(row) for row in written.tolist()]
        return written, texts, (written == tokenizer.eos_id).any(dim=1).tolist()

    rollouts = []
    for group in mllm.alike([prompts[row] for row in rows]):
        group_rows = [rows[i] for i in group]
        ids = torch.tensor([prompts[row]["ids"] for row in group_rows], device=device)
        places = [images.index(i) for row in group_rows for i in prompts[row]["images"]]
        sampled, texts, ended = write(
            tokens[places], ids, temperature=sample_temperature, num_captions=samples
        )
        # (b, K)
        rewards = reward(texts, ended, [row for row in group_rows for _ in range(samples)]).view(
            -1, samples
        )
        greedy_rewards = None
        if baseline == "greedy":
            _, texts, ended = write(tokens[places], ids)
            greedy_rewards = reward(texts, ended, group_rows)
        advantage = advantages(rewards, greedy_rewards).flatten().to(device)
        mask = answer_mask(sampled, tokenizer.eos_id)
        rollouts.append(Rollout(features[places], ids, sampled, mask, rewards, advantage))
    return rollouts


# the run ------------------------------------------------------------------------------------------


def find_sft():
    """Return the path of the sft.pt to start from."""
    found = [Path(sft_dir, "sft.pt")] if sft_dir else list(Path("out").glob("*/sft.pt"))
    found = [path for path in found if path.is_file()]
    recipe = run.recipe_of(sft_dir)
    assert found, f"no {sft_dir or 'out/*'}/sft.pt yet; train one first: python mllm.py{recipe}"
    newest = max(found, key=lambda path: path.stat().st_mtime)
    assert newest.parent != Path(out_dir), (
        f"a new run would rename {newest}; choose another out_dir"
    )
    return newest


@run.one_line_errors
def main(argv=None):
    settings = config.override(globals(), argv)
    out = Path(out_dir)
    if image or prompt or chat or eval_only:
        return mllm.use("scst", out / "scst.pt", settings)
    assert baseline in ("greedy", "leave_one_out"), f"baseline={baseline}: greedy or leave_one_out"
    assert baseline == "greedy" or samples > 1, "baseline=leave_one_out needs samples of at least 2"
    sft_path = find_sft() if init_from == "sft" else None  # before a new run renames checkpoints
    resumed = run.start("scst", settings)
    sft_path = sft_path or Path(resumed["sft"])
    model, sft = mllm.load_captioner(sft_path, "mllm", device, dtype)
    data = mllm.load_data(model, sft)
    dev = run.device_of(model)
    print(f"starting from {sft_path} ({sft['settings']['dataset']}), step {sft['step']}")
    prompts = mllm.prompts_of(data, "train")
    n_rows = min(batch_size, len(prompts))  # of a batch
    run.check_batch(n_rows, accumulation)
    judge = None
    if max_surprise:
        gpt_ckpt = sft["settings"]["gpt_ckpt"]
        assert gpt_ckpt, "max_surprise needs a captioner that started from a GPT of stage 2"
        judge = LanguageJudge(load_part(gpt_ckpt, "gpt"), dev, dtype)
    reward = Reward([prompt["references"] for prompt in prompts], judge)
    augmentation = {"size": sft["settings"]["train_size"]}
    augmentation |= {name: sft["settings"][name] for name in ("crop", "jitter", "mirror")}
    metric = data["metric"] if exact_weight else "cider"  # chooses the best checkpoint

    before = copy.deepcopy(model.state_dict())
    model.vit.requires_grad_(False)
    model.eval()  # throughout: no dropout in the samples, nor in the pass that learns from them
    optimizers = make_optimizers(model, 0.0, lr, weight_decay=0.0)
    step, seconds, best = 0, 0.0, -1.0
    if resumed:
        step, seconds, best = (resumed[name] for name in ("step", "seconds", "best"))
        run.restore(resumed, model, optimizers)
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{n_trained:,} parameters train, on {dev}; baseline {baseline}")

    about = {"sft": str(sft_path), "sft_settings": sft["settings"]}  # for checkpoints
    about |= {"asks": sft["asks"], "tokenizer": sft["tokenizer"]}
    losses, mean_rewards = [], []  # since the last evaluation
    start = time.perf_counter()
    while True:
        factor = lr_factor(step, max_steps, warmup_steps, cooldown)

        if step % eval_interval == 0 or step == max_steps:
            row = {"step": step, "lr": factor * lr} | run.pace(losses, time.perf_counter() - start)
            if mean_rewards:
                row["mean_reward"] = sum(mean_rewards) / len(mean_rewards)
            seconds += time.perf_counter() - start  # of training, without evaluations
            if run.is_main():
                scores, _ = mllm.evaluate(model, data, "val")
                row |= {f"val_{name}": value for name, value in scores.items()}
                run.log(out, row | {"minutes": seconds / 60}, BRIEF)
                is_best, best = scores[metric] >= best, max(scores[metric], best)
                about |= {"step": step, "seconds": seconds, "best": best}
                about["low_log_p"] = scores["low_log_p"]  # for a hint, see answers.answer_files()
                checkpoint = run.checkpoint("scst", settings, model, optimizers, **about)
                if is_best:
                    run.save(out / "scst.pt", checkpoint)
                run.save(out / "last.pt", checkpoint)
            losses, mean_rewards = [], []
            start = time.perf_counter()
        if step == max_steps:
            break

        rows = run.my_share(run.epoch_rows(len(prompts), n_rows, step, seed))
        run.seed_step(seed, step)  # of augmentation and samples
        rollouts = []
        for part in rows.chunk(accumulation):
            rollouts += rollout(model, data, prompts, part.tolist(), reward, augmentation)
        rewards = torch.cat([r.rewards for r in rollouts])
        n_tokens = run.sum_over_processes(sum(r.mask.sum().item() for r in rollouts), dev)
        loss = 0.0
        for r in rollouts:
            with run.autocast(model):
                tokens = model.connect(r.features)
                log_probs = model.log_probs(
                    tokens, r.prompts, r.samples, r.mask, sample_temperature
                )
                part_loss = scst_loss(log_probs, r.advantages) / n_tokens
            part_loss.backward()
            loss += part_loss.detach()
        losses.append(update(model, optimizers, loss, factor, grad_clip))
        mean_rewards.append(run.sum_over_processes(rewards.mean().item(), dev) / run.n_processes())
        step += 1
        if step == 20 and not any(mean_rewards):
            print(
                "no sample has earned a reward so far, and nothing is learnt: is sft.pt too little "
                "trained, or is the reward out of reach (exact_weight, max_surprise)?"
            )
        run.show_step(out, step, max_steps, loss=losses, reward=mean_rewards)

    if not run.is_main():
        return
    plot(out, left=("reward",), right=(f"val_{metric}",), ylabel="reward")
    test_prompts = mllm.prompts_of(data, "test")
    captions = []
    after = run.load(out / "scst.pt", "scst")
    for when, weights in (("before", before), ("after", after["model"])):
        model.load_state_dict(weights)
        scores, texts = mllm.evaluate_all(model, data, "test", beams, length_penalty)
        captions.append(texts)
        row = {"step": max_steps} | {f"{when}_test_{name}": value for name, value in scores.items()}
        run.log(out, row, [name for name in row if "," not in name and name != "step"])
    titles = [f"before: {b}\nafter: {a}" for b, a in zip(*captions)]
    draw_answers(out / "before_after.png", data, test_prompts, titles)
    if after["step"] == 0:
        print("no evaluation was as good as the first: scst.pt holds the weights of sft.pt")
    print(
        f"best validation {metric} {best:.2f} after {seconds / 60:.1f} minutes of training; "
        f"wrote {out}/loss.png, before_after.png, scst.pt"
    )


if __name__ == "__main__":
    main()
