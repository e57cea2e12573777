"""Tiny Shakespeare on one GPU: a model of the size of nanoGPT's recipe. Started on a CPU for a few steps, and never yet
run to its end on a GPU, so that README has no row for it."""
out_dir = "out/shakespeare"
max_steps = 2500  # half of nanoGPT's: Muon needs fewer
batch_size = 64
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.3  # 2,500 steps read the text forty times
eval_interval = 125
