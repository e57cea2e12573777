"""A GPT on the captions of Flickr8k's 6,000 training photos, on two CPU cores."""

out_dir = "out/captions_cpu"
dataset = "flickr8k"
max_steps = 350
block_size = 64  # about four captions
n_layer = 4
n_head = 4
n_embd = 192
dropout = 0.1
eval_interval = 100
