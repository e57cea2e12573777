"""Drawn shapes with the parts of MiniMind-V, on two CPU cores."""

out_dir = "out/minimind_v_cpu"
fusion = "prefix"  # image tokens stand before the words
connector = "linear"  # one matrix, as MiniMind-V's projection
gpt_norm = "rms"
gpt_activation = "swiglu"
n_experts = 4  # mixture of experts
experts_per_token = 2
max_steps = 1000
eval_interval = 500
