"""Drawn scenes of any proportions, on tiles as in Llama 3.2 Vision, on two CPU cores: five minutes of training.
@LL@"""
out_dir = "out/llama_vision_cpu"
dataset = "wide"
max_tiles = 4
across_layer = 1
keep_blocks = (1,)  # intermediate features
fusion = "cross"
connector = "pixel_shuffle"
max_tokens = 80
max_minutes = 5.0
eval_interval = 400
