"""SCST of answers to questions about drawn images, on two CPU cores: right answers are rewarded."""

out_dir = "out/questions_scst"
sft_dir = "out/questions"  # python mllm.py config/questions_cpu.py
cider_weight = 0.0
exact_weight = 1.0
max_steps = 80
batch_size = 192  # questions; most teach nothing, since all four answers are right
samples = 4  # answers to each
baseline = "leave_one_out"
lr = 3e-5  # at 2e-4 right answers are lost: 94.6% to 92.1% after 100 steps
eval_interval = 40
beams = 1
