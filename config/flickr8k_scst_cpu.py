"""SCST of the Flickr8k captioner on two CPU cores."""

out_dir = "out/flickr8k_scst_cpu"
sft_dir = "out/flickr8k_cpu"  # python mllm.py config/flickr8k_cpu.py
max_steps = 1250
batch_size = 48  # photos
samples = 4  # captions each
sample_temperature = 0.5  # 2 points of CIDEr better than 1 after 300 steps
max_sample_tokens = 20  # few captions are longer; the longest sample decides the time of a step
baseline = "leave_one_out"  # 0.8 of CIDEr above greedy after 300 steps, the mean of two seeds
max_surprise = 6.5  # without it, captions make less sense
eval_interval = 200
