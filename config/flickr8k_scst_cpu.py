"""SCST of the Flickr8k captioner on two CPU cores: 22 minutes of training."""
out_dir = "out/flickr8k_scst_cpu"
sft_dir = "out/flickr8k_cpu"  # python mllm.py config/flickr8k_cpu.py
max_minutes = 22.0
batch_size = 48  # photos
samples = 4  # captions each
max_sample_tokens = 20  # few captions are longer, and a step takes as long as the longest sample
baseline = "leave_one_out"  # 0.8 of CIDEr above greedy after 300 steps, the mean of two seeds
sample_temperature = 0.5
max_surprise = 6.0
eval_interval = 200
