"""Tiny Shakespeare on one GPU, with the sizes of nanoGPT's recipe. Run with 2,500 steps so far."""

out_dir = "out/shakespeare"
max_steps = 1200  # with 2,500 the validation loss was 1.49 after 1,500 and 1.60 at the end
dropout = 0.3  # 1,200 steps read the text 20 times
eval_interval = 125
