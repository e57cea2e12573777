"""SCST of the Flickr8k captioner on two CPU cores: 22 minutes of training."""
out_dir = "out/flickr8k_scst_cpu"
sft_dir = "out/flickr8k_cpu"  # python mllm.py config/flickr8k_cpu.py
max_minutes = 22.0
batch_size = 48  # photos
samples = 4  # captions each
baseline = "leave_one_out"  # 0.8 of CIDEr above greedy after 300 steps, the mean of two seeds
eval_interval = 200
