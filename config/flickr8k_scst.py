"""SCST of the captioner of config/flickr8k.py, on one GPU. On a GPU it has only been started."""

out_dir = "out/flickr8k_scst"
sft_dir = "out/flickr8k"  # python mllm.py config/flickr8k.py
max_steps = 1500
batch_size = 128  # photos
samples = 5  # captions each
max_sample_tokens = 20
baseline = "leave_one_out"
sample_temperature = 0.5  # this and max_surprise: see config/flickr8k_scst_cpu.py
max_surprise = 6.5
eval_interval = 100
