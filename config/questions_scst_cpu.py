"""SCST of the answers to questions about drawn images, on two CPU cores: the reward is a right answer."""
out_dir = "out/questions_scst"
sft_dir = "out/questions"  # python mllm.py config/questions_cpu.py
cider_weight = 0.0
exact_weight = 1.0
max_minutes = 2.0
batch_size = 64  # questions
samples = 4  # answers to each
baseline = "leave_one_out"
eval_interval = 100
beams = 1
