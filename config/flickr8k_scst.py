"""SCST of the captioner of config/flickr8k.py, on one GPU. Started on a CPU for a few steps, and never yet run to its
end on a GPU, so that README has no row for it."""
out_dir = "out/flickr8k_scst"
sft_dir = "out/flickr8k"  # python mllm.py config/flickr8k.py
max_minutes = 6.0
batch_size = 128  # photos
samples = 5  # captions each
baseline = "leave_one_out"
lr = 2e-4
eval_interval = 100
