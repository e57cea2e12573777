"""Tiny Shakespeare on two CPU cores in under five minutes."""
out_dir = "out/shakespeare_cpu"
dtype = "bfloat16"
max_minutes = 4.0
max_steps = 0
batch_size = 32
block_size = 128
n_layer = 4
n_head = 4
n_embd = 192
dropout = 0.0
eval_interval = 200
