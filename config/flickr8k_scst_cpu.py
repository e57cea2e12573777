"""SCST of the Flickr8k captioner on two CPU cores: 12 minutes of training."""
out_dir = "out/flickr8k_scst_cpu"
sft_dir = "out/flickr8k_cpu"  # python mllm.py config/flickr8k_cpu.py
dtype = "bfloat16"  # with AVX512-BF16 or AMX; float32 elsewhere
max_minutes = 12.0
batch_size = 48  # photos
samples = 4  # captions each
baseline = "leave_one_out"  # a point of CIDEr above greedy in 300 steps
bleu_weight = 1.0  # about a third of what tells the samples of a photo apart; costs no CIDEr and gains BLEU-4
lr = 2e-4
eval_interval = 200
