"""Tiny Shakespeare on two CPU cores: 4 minutes of training."""
out_dir = "out/shakespeare_cpu"
dtype = "bfloat16"  # with AVX512-BF16 or AMX; float32 elsewhere
max_minutes = 4.0
max_steps = 0
batch_size = 32
block_size = 128
n_layer = 4
n_head = 4
n_embd = 192
dropout = 0.0  # in four minutes the text is read six times, too few to know it by heart
eval_interval = 200
