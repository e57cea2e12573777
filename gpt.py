"""
Stage 2: a GPT learns Tiny Shakespeare character by character, or the language of photo captions token by token.

    python prepare_shakespeare.py && python gpt.py config/shakespeare_cpu.py
    python gpt.py config/shakespeare_cpu.py --prompt="ROMEO:"
    python prepare_flickr8k.py && python gpt.py config/captions_cpu.py      the language model that mllm.py starts from

Expect a validation loss of 1.48 from config/shakespeare_cpu.py: 6 minutes on two CPU cores with AVX512-BF16 (one seed).
Settings are overridden from the left to the right by config files and --key=value; --help lists them. A run writes
log.csv, loss.png, sample.txt and the checkpoints best.pt and last.pt to out_dir.
"""

import dataclasses
import math
import time
from pathlib import Path

import numpy as np
import torch

import config
from model import GPT, GPTConfig, evaluating, tokenizer_from_state

# the run
out_dir = "out/shakespeare"  # checkpoints, log and pictures
init_from = "scratch"  # or "resume": go on from out_dir/last.pt
eval_only = False  # evaluate out_dir/best.pt and stop
eval_split = "val"  # what eval_only evaluates; captions have a "test" split too
device = "auto"  # cuda, mps or cpu
dtype = "auto"  # bfloat16 on CUDA, else float32
compile = False  # torch.compile: a minute at the start, faster steps on a GPU
seed = 1337  # of everything random: weights, batches, dropout, samples
# data
dataset = "shakespeare"  # the folder under data/: shakespeare (characters) or flickr8k (captions, BPE tokens)
batch_size = 64  # windows a step, over all processes and parts
accumulation = 1  # parts that a process cuts its share of the batch into: less memory, the same training
block_size = 256  # tokens a window: the longest context
# model
n_layer = 6  # blocks
n_head = 6  # attention heads a block
n_embd = 384  # channels; 6, 6 and 384 are the size of nanoGPT's recipe for one GPU
dropout = 0.2  # a million characters are soon known by heart
activation = "gelu"  # relu, gelu or swiglu
norm = "layer"  # or rms
positions = "rotary"  # or learned, sinusoidal
tie_weights = True  # one matrix embeds the tokens and scores them
# optimization
max_steps = 5000  # 0: max_minutes alone decides
max_minutes = 0.0  # 0: max_steps alone decides; else whichever comes first
muon_lr = 0.01  # peak rate of the weight matrices of linear layers; 0: AdamW for all
adam_lr = 2e-3  # peak rate of everything else
weight_decay = 0.1  # of matrices and embeddings, in shares of the rate
warmup_steps = 50  # steps in which the rate rises to its peak
cooldown = 0.6  # the last part of the run, in which the rate falls to zero in a straight line
grad_clip = 1.0  # largest norm of the gradient; 0: none
eval_interval = 250  # steps between lines of the log, each with the loss over the whole validation split
# sampling
prompt = ""  # continue this text and stop; \n in it is a line break
max_new_tokens = 500  # length of a sample
num_samples = 1  # continuations to write at once
temperature = 0.8  # 0: always the likeliest token
top_k = 0  # sample among the k likeliest tokens alone; 0: among all
top_p = 1.0  # sample among the fewest tokens that together have this probability; 0 and 1: among all

MILESTONES = (0, 0.25, 0.5, 1.0)  # shares of the run after which a sample is written: one sees it learn


def load_split(split):
    """(n,) int64: the token ids of a split; and the state of the tokenizer that they are of."""
    folder = f"data/{dataset}"
    prepare = "python prepare_shakespeare.py" if dataset == "shakespeare" else config.prepare_captions(dataset)
    state = config.load_data(f"{folder}/tokenizer.json", prepare)
    splits = [name for name in ("train", "val", "test") if Path(folder, f"{name}.npy").is_file()]
    if splits and split not in splits:
        config.fail(f"no split {split} in {folder}; there are {', '.join(splits)}")
    return torch.from_numpy(config.load_data(f"{folder}/{split}.npy", prepare).astype(np.int64)), state


def get_batch(ids):
    """Random windows of ids: inputs and targets (batch_size, block_size), the targets one token further."""
    starts = torch.randint(len(ids) - block_size, (batch_size, 1), device=ids.device)
    windows = ids[starts + torch.arange(block_size + 1, device=ids.device)]  # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]


@torch.no_grad()
def evaluate(model, ids, block_size, batch_size, dev, context):
    """Mean loss in nats a token over all of ids, in consecutive windows of block_size."""
    n = (len(ids) - 1) // block_size * block_size
    inputs, targets = ids[:n].view(-1, block_size), ids[1:n + 1].view(-1, block_size)
    batches = list(zip(inputs.split(batch_size), targets.split(batch_size))) if n else []
    if n < len(ids) - 1:  # the rest, as one shorter window
        batches.append((ids[None, n:-1], ids[None, n + 1:]))
    total = 0.0
    with evaluating(model), context:
        for x, y in batches:
            total += model(x.to(dev), y.to(dev))[1].item() * y.numel()
    return total / (len(ids) - 1)


def lr_factor(step, progress):
    """The rates' share of their peaks: a linear warm-up, a plateau, then a straight line to zero at progress 1."""
    return min(1.0, (step + 1) / max(1, warmup_steps), (1.0 - progress) / max(cooldown, 1e-8))


def write_texts(model, tokenizer, text, n, dev, context, echo=False):
    """n continuations of text, written side by side: a list of str, each with its beginning, and the tokens a second.
    echo: print the first while it is written."""
    with config.one_line(ValueError):  # a character that the model does not know
        ids = ([tokenizer.bos_id] if hasattr(tokenizer, "bos_id") else []) + tokenizer.encode(text)
    columns, pending, start = [], [], time.perf_counter()
    with context:
        for column in model.stream(torch.tensor([ids] * n, device=dev), max_new_tokens, temperature, top_k, top_p,
                                   getattr(tokenizer, "eos_id", None), torch.Generator(dev).manual_seed(seed)):
            columns.append(column)  # (n,)
            if echo:
                pending.append(column[0].item())
                new = tokenizer.decode(pending)
                if not new.endswith("\ufffd"):  # else a character whose last bytes are still to come
                    print(new, end="", flush=True)
                    pending = []
    rows = torch.stack(columns, dim=1).tolist() if columns else [[]] * n
    return [text + tokenizer.decode(row) for row in rows], n * len(columns) / (time.perf_counter() - start)


@config.one_line_errors
def main(argv=None):
    settings = config.override(globals(), argv)
    dev, out, train_with = config.pick_device(device), Path(out_dir), "python gpt.py (with the same config)"
    context = config.autocast(dev, dtype)
    config.at_least(0, temperature=temperature, top_k=top_k)
    config.shares(top_p=top_p, dropout=dropout, cooldown=cooldown)

    if prompt or eval_only:  # use what a run has learnt
        checkpoint = config.load(out / "best.pt", train_with, dev, has=("block_size",))
        model, tokenizer = GPT(GPTConfig(**checkpoint["config"])).to(dev), tokenizer_from_state(checkpoint["tokenizer"])
        model.load_state_dict(checkpoint["model"])
        if eval_only:
            ids, state = load_split(eval_split)
            if state != checkpoint["tokenizer"]:
                config.fail(f"{out / 'best.pt'} was trained with another tokenizer than data/{dataset} has")
            loss = evaluate(model, ids, model.config.block_size, batch_size, dev, context)
            print(f"{out / 'best.pt'}, step {checkpoint['step']}: {eval_split} loss {loss:.4f}")
            return
        config.at_least(1, num_samples=num_samples, max_new_tokens=max_new_tokens)
        text = prompt.replace("\\n", "\n")
        print(text if num_samples == 1 else "", end="", flush=True)
        texts, pace = write_texts(model, tokenizer, text, num_samples, dev, context, echo=num_samples == 1)
        print("" if num_samples == 1 else f"\n{'-' * 40}\n".join(texts))
        print(f"{'-' * 40}\n{pace:,.0f} tokens a second")
        return

    config.at_least(1, eval_interval=eval_interval, batch_size=batch_size, block_size=block_size, n_layer=n_layer,
                    n_head=n_head)
    config.at_least(0, grad_clip=grad_clip)
    (train_ids, state), (val_ids, _) = load_split("train"), load_split("val")
    train_ids, tokenizer = train_ids.to(dev), tokenizer_from_state(state)
    if len(train_ids) <= block_size or len(val_ids) < 2:
        config.fail(f"data/{dataset} is too small for windows of block_size={block_size} tokens")
    n_parts = config.n_parts(batch_size, accumulation)
    resumed = config.resume(out, init_from, settings, train_with, tokenizer=state)
    torch.manual_seed(seed)
    model_config = GPTConfig(tokenizer.vocab_size, block_size, n_layer, n_head, n_embd, dropout, activation, norm,
                             positions, tie_weights=tie_weights)
    with config.one_line(ValueError):  # such as n_embd that is not a multiple of n_head
        model = GPT(GPTConfig(**resumed["config"]) if resumed else model_config).to(dev)
    optimizers = config.optimizers(model, muon_lr, adam_lr, weight_decay)
    start, best, samples = 0, math.inf, {}
    if resumed:
        model.load_state_dict(resumed["model"])
        for optimizer, state in zip(optimizers, resumed["optimizers"]):
            optimizer.load_state_dict(state)
        start, best, samples = resumed["step"], resumed["best"], resumed["samples"]
    beginning = "" if hasattr(tokenizer, "bos_id") else "\n"  # of the samples; an empty one needs a first token
    x, y = get_batch(train_ids)
    flops = config.count_flops(model, lambda: model(x[:1], y[:1])[1])["Global"] / block_size  # of a token
    print(f"{dataset}: {len(train_ids):,} tokens, {tokenizer.vocab_size} different; "
          f"{sum(p.numel() for p in model.parameters()):,} parameters on {dev}\n"
          f"{flops / 1e6:.1f} MFLOP a token, forward and backward")
    peak = config.matmul_peak(dev, context)
    clock = config.Clock(max_steps, max_minutes, resumed["seconds"] if resumed else 0.0)
    log = config.Log(out, ["train", "val"], clock, resumed, flops, peak)
    samples = {share: text for share, text in samples.items() if float(share[:-1]) <= 100 * clock.progress(start)}
    run_model = config.maybe_compile(model, compile)

    step, losses = start, []
    while True:
        progress = clock.shared_progress(step, dev)
        factor = lr_factor(step, progress)
        milestone = f"{100 * max(share for share in MILESTONES if share <= progress):.0f}%"
        if milestone not in samples and config.is_main():
            with clock.paused():
                samples[milestone] = write_texts(model, tokenizer, beginning, 1, dev, context)[0][0]
        due = step % eval_interval == 0 or progress == 1
        if due and not (resumed and step == start) and config.is_main():
            with clock.paused():
                val = evaluate(model, val_ids, model.config.block_size, batch_size, dev, context)
                config.check_finite(val, step, out)
                numbers = {"train": torch.stack(losses).mean().item(), "val": val} if losses else {"val": val}
                log.write(step, numbers, factor * adam_lr, batch_size * block_size, "tok")
                is_best, best = val < best, min(val, best)
                checkpoint = {"model": model.state_dict(), "config": dataclasses.asdict(model.config),
                              "optimizers": [o.state_dict() for o in optimizers], "settings": settings, "step": step,
                              "tokenizer": tokenizer.state(), "best": best, "seconds": clock.seconds(),
                              "samples": samples}
                if is_best:
                    config.save(out / "best.pt", checkpoint)
                config.save(out / "last.pt", checkpoint)  # last: a run killed in between does this evaluation again
        if due:
            losses = []
        if progress == 1:
            break
        torch.manual_seed(seed * 1_000_003 + step)  # batch and dropout depend on the step alone: resuming is exact
        x, y = get_batch(train_ids)  # the whole batch in every process; each computes its parts
        loss = 0.0
        for part in config.parts(model, batch_size, accumulation, seed, step):
            with context:
                share = run_model(x[part], y[part])[1] / n_parts  # of the loss of the batch
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
        if len(losses) > 1:  # read one step late, so that a GPU goes on working meanwhile
            config.show_progress(f"step {step} | loss {config.check_finite(losses[-2], step - 2, out):.3f}")

    if not config.is_main():
        return
    config.plot(out)
    print(samples[milestone])
    text = "\n\n".join(f"--- after {share} of the run\n{text}" for share, text in samples.items())
    (out / "sample.txt").write_text(text + "\n", encoding="utf-8")
    print(f"best validation loss {best:.4f} after {clock.seconds() / 60:.1f} minutes of training; "
          f"wrote {out}/loss.png, sample.txt")


if __name__ == "__main__":
    main()
