"""
Stage 2: a GPT learns Tiny Shakespeare character by character, or the language of photo captions token by token.

    python prepare_shakespeare.py && python gpt.py config/shakespeare_cpu.py
    python gpt.py config/shakespeare_cpu.py --prompt="ROMEO:"
    python gpt.py config/shakespeare_cpu.py --eval_only=True --context=256 --yarn=4    four times the context, untrained
    python prepare_flickr8k.py && python gpt.py config/captions_cpu.py      the language model that mllm.py starts from

Expect a validation loss of 1.48 from config/shakespeare_cpu.py: 6 minutes on two CPU cores with AVX512-BF16 (one seed).
A run writes log.csv, loss.png, sample.txt and the checkpoints best.pt and last.pt to out_dir.
"""

import dataclasses
import time
from pathlib import Path

import numpy as np
import torch

import config
from config.tools.data import load_data, prepare_command
from config.tools.pictures import plot
from model import GPT, GPTConfig, evaluating, tokenizer_from_state

# the run
out_dir = "out/shakespeare"  # checkpoints, log and pictures
init_from = "scratch"  # or "resume": continue from out_dir/last.pt
eval_only = False  # evaluate out_dir/best.pt and stop
eval_split = "val"  # what eval_only evaluates; captions have a "test" split too
context = 0  # with eval_only and prompt: tokens that the model reads at once; 0: as many as in training
yarn = 1.0  # with context: context over block_size of the training, so that rotary positions reach as far (YaRN)
device = "auto"  # cuda, mps or cpu
dtype = "auto"  # float32 or bfloat16, whichever multiplies matrices faster here
compile = False  # torch.compile: a minute at the start, faster steps on a GPU
seed = 1337  # of everything random: weights, batches, dropout, samples
# data
dataset = "shakespeare"  # the folder under data/: shakespeare (characters) or flickr8k (captions, BPE tokens)
batch_size = 64  # windows per step, over all processes
accumulation = 1  # parts that a process cuts its share of the batch into: less memory
block_size = 256  # tokens per window: the longest context
# model
n_layer = 6  # blocks
n_head = 6  # attention heads per block
n_embd = 384  # channels; 6, 6 and 384 are the size of nanoGPT's recipe for one GPU
dropout = 0.2  # a million characters are soon memorised
activation = "gelu"  # relu, gelu or swiglu
norm = "layer"  # or rms
positions = "rotary"  # or learned, sinusoidal
tie_weights = True  # one matrix embeds the tokens and scores them
n_experts = 0  # feed-forward layers in each block, a mixture of experts; 0: one dense layer
experts_per_token = 2  # how many of them a token passes through, as a router chooses
balance_weight = 0.01  # of the loss that spreads the tokens over the experts (Switch Transformer)
# optimization
max_steps = 5000  # 0: max_minutes alone decides
max_minutes = 0.0  # 0: max_steps alone decides; else whichever comes first
muon_lr = 0.01  # peak rate of the weight matrices of linear layers; 0: AdamW for all
adam_lr = 2e-3  # peak rate of everything else
weight_decay = 0.1  # of matrices and embeddings, relative to the rate
warmup_steps = 50  # steps in which the rate rises to its peak
cooldown = 0.6  # the last part of the run, in which the rate falls to zero in a straight line
grad_clip = 1.0  # largest norm of the gradient; 0: none
eval_interval = 250  # steps between lines of the log, each with the loss over the whole validation split
# sampling
prompt = ""  # continue this text and stop; \n in it is a line break
max_new_tokens = 500  # length of a sample
num_samples = 1  # continuations to write in parallel
temperature = 0.8  # 0: always the likeliest token
top_k = 0  # sample only among the k likeliest tokens; 0: among all
top_p = 1.0  # sample only among the fewest tokens that together have this probability; 0 and 1: among all

MILESTONES = (0, 0.25, 0.5, 1.0)  # parts of the run after which a sample is written, to see the model learn


def load_split(split):
    """(n,) int64: the token ids of a split; and the state of their tokenizer."""
    folder = f"data/{dataset}"
    prepare = "python prepare_shakespeare.py" if dataset == "shakespeare" else prepare_command(dataset)
    state = load_data(f"{folder}/tokenizer.json", prepare)
    splits = [name for name in ("train", "val", "test") if Path(folder, f"{name}.npy").is_file()]
    if splits and split not in splits:
        config.fail(f"no split {split} in {folder}; there are {', '.join(splits)}")
    return torch.from_numpy(load_data(f"{folder}/{split}.npy", prepare).astype(np.int64)), state


def get_batch(ids, step):
    """This process's share of a step's random windows: inputs and targets (B, T), the targets one token later."""
    draw = config.shared_generator(seed, step)
    starts = config.my_share(torch.randint(len(ids) - block_size, (batch_size, 1), generator=draw)).to(ids.device)
    windows = ids[starts + torch.arange(block_size + 1, device=ids.device)]  # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]


@torch.no_grad()
def evaluate(model, ids, batch_size):
    """Mean loss in nats per token over all of ids, in consecutive windows of the model's block_size."""
    T, total = model.config.block_size, 0.0
    n = (len(ids) - 1) // T * T
    inputs, targets = ids[:n].view(-1, T), ids[1:n + 1].view(-1, T)
    batches = list(zip(inputs.split(batch_size), targets.split(batch_size))) if n else []
    if n < len(ids) - 1:  # the rest, as one shorter window
        batches.append((ids[None, n:-1], ids[None, n + 1:]))
    dev = config.device_of(model)
    with evaluating(model), config.autocast(model):
        for x, y in batches:
            total += model(x.to(dev), y.to(dev))[1].item() * y.numel()
    return total / (len(ids) - 1)


def write_texts(model, tokenizer, text, n, echo=False):
    """n continuations of text, written in parallel: a list of str, each with its beginning, and the tokens per second.
    echo: print the first while it is written."""
    ids = ([tokenizer.bos_id] if hasattr(tokenizer, "bos_id") else []) + tokenizer.encode(text)
    columns, pending, start, dev = [], [], time.perf_counter(), config.device_of(model)
    with config.autocast(model):
        for column in model.stream(torch.tensor([ids] * n, device=dev), max_new_tokens, temperature, top_k, top_p,
                                   getattr(tokenizer, "eos_id", None), torch.Generator(dev).manual_seed(seed)):
            columns.append(column)  # (n,)
            if echo:
                pending.append(column[0].item())
                new = tokenizer.decode(pending)
                if not new.endswith("\ufffd"):  # else a character whose last bytes are still to come
                    print(new, end="", flush=True)
                    pending = []
    rows = torch.stack(columns, dim=1).tolist()
    return [text + tokenizer.decode(row) for row in rows], n * len(columns) / (time.perf_counter() - start)


@config.one_line_errors
def main(argv=None):
    settings = config.override(globals(), argv)
    dev, out = config.pick_device(device), Path(out_dir)

    if prompt or eval_only:  # use a trained model
        checkpoint = config.load(out / "best.pt", "gpt")
        model_config, tokenizer = GPTConfig(**checkpoint["config"]), tokenizer_from_state(checkpoint["tokenizer"])
        if yarn > 1 and not context or context and model_config.positions == "learned":
            config.fail("context is for positions that are not learned, and yarn for a longer context: give both")
        model = GPT(dataclasses.replace(model_config, block_size=context or model_config.block_size, yarn=yarn,
                                        trained_len=model_config.block_size))
        model.load_state_dict(checkpoint["model"])
        model = config.place(model, dev, dtype)
        if eval_only:
            ids, state = load_split(eval_split)
            if state != checkpoint["tokenizer"]:
                config.fail(f"{out / 'best.pt'} was trained with another tokenizer than data/{dataset} has")
            loss = evaluate(model, ids, batch_size)
            print(f"{out / 'best.pt'}, step {checkpoint['step']}: {eval_split} loss {loss:.4f}")
            return
        text = prompt.replace("\\n", "\n")
        print(text if num_samples == 1 else "", end="", flush=True)
        texts, pace = write_texts(model, tokenizer, text, num_samples, echo=num_samples == 1)
        print("" if num_samples == 1 else f"\n{'-' * 40}\n".join(texts))
        print(f"{'-' * 40}\n{pace:,.0f} tokens per second")
        return

    (train_ids, state), (val_ids, _) = load_split("train"), load_split("val")
    train_ids, tokenizer = train_ids.to(dev), tokenizer_from_state(state)
    if len(train_ids) <= block_size or len(val_ids) < 2:
        config.fail(f"data/{dataset} is too small for windows of block_size={block_size} tokens")
    config.check_batch(batch_size, accumulation)
    resumed = config.resume("gpt", settings, tokenizer=state)
    torch.manual_seed(seed)
    model_config = GPTConfig(tokenizer.vocab_size, block_size, n_layer, n_head, n_embd, dropout, activation, norm,
                             positions, tie_weights=tie_weights, n_experts=n_experts,
                             experts_per_token=experts_per_token, balance_weight=balance_weight)
    model = GPT(GPTConfig(**resumed["config"]) if resumed else model_config)
    model = config.place(model, dev, resumed["dtype"] if resumed else dtype)
    optimizers = config.optimizers(model, muon_lr, adam_lr, weight_decay)
    samples = resumed["samples"] if resumed else {}  # {per cent of the run: text}
    run = config.Run("gpt", settings, dataset, model, optimizers, resumed, tokenizer=state, samples=samples)
    print(f"{dataset}: {len(train_ids):,} tokens, {tokenizer.vocab_size} different; "
          f"{sum(p.numel() for p in model.parameters()):,} parameters on {dev}")
    run_model = config.maybe_compile(model, compile)
    beginning = "" if hasattr(tokenizer, "bos_id") else "\n"  # of the samples; an empty one needs a first token

    while True:
        progress = run.progress()  # from 0 to 1, by steps or by minutes
        factor = config.lr_factor(run.step, progress, warmup_steps, cooldown)
        milestone = f"{100 * max(part for part in MILESTONES if part <= progress):.0f}%"
        if milestone not in samples and config.is_main():
            with run.paused():
                samples[milestone] = write_texts(model, tokenizer, beginning, 1)[0][0]
        if run.due():
            with run.paused():
                val = evaluate(model, val_ids, batch_size)
                loads = model.expert_loads()
                brief = {"load": f"{min(loads.values()):.2f} to {max(loads.values()):.2f}"} if loads else {}
                run.log({"val": val} | brief, factor * adam_lr, batch_size * block_size, "tok", file_only=loads)
                run.save(-val)
        if progress == 1:
            break
        x, y = get_batch(train_ids, run.step)
        config.seed_step(seed, run.step)  # of dropout
        loss, parts = 0.0, accumulation * config.n_processes()
        for x_part, y_part in zip(x.chunk(accumulation), y.chunk(accumulation)):
            with config.autocast(model):
                part = run_model(x_part, y_part)[1] / parts  # of the loss of the batch
            part.backward()
            loss += part.detach()
        run.advance(config.update(model, optimizers, loss, factor, grad_clip))

    run.stop()
    if not config.is_main():
        return
    plot(out)
    print(samples[milestone])
    text = "\n\n".join(f"--- after {part} of the run\n{text}" for part, text in samples.items())
    (out / "sample.txt").write_text(text + "\n", encoding="utf-8")
    print(f"best validation loss {-run.best:.4f} after {run.seconds() / 60:.1f} minutes of training; "
          f"wrote {out}/loss.png, sample.txt")


if __name__ == "__main__":
    main()
