"""Tiny Shakespeare on two CPU cores."""

out_dir = "out/shakespeare_cpu"
max_steps = 6900
batch_size = 32
block_size = 64  # a step takes less time than with 128, and the first things are learnt sooner
n_layer = 4
n_head = 4
n_embd = 128  # wider models learn more in many minutes, and less in one
dropout = 0.0  # the text is read fourteen times, too few to memorise it
warmup_steps = 10  # short runs have no time for more
eval_interval = 500
