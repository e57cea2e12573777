"""Tiny Shakespeare on one GPU: gpt.py's own sizes, those of nanoGPT's recipe. Not yet run on a GPU."""
out_dir = "out/shakespeare"
max_steps = 2500  # half of nanoGPT's: Muon needs fewer
dropout = 0.3  # 2,500 steps read the text forty times
eval_interval = 125
