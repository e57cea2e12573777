"""Tiny Shakespeare on two CPU cores: 6 minutes of training."""
out_dir = "out/shakespeare_cpu"
max_steps = 6900
batch_size = 32
block_size = 64  # 128 take longer to learn the first things, and more of a step goes into attention
n_layer = 4
n_head = 4
n_embd = 128  # more learn more in many minutes, and less in one
dropout = 0.0  # the text is read fourteen times, too few to memorise it
warmup_steps = 10  # a run of seconds has no time for more
eval_interval = 500
