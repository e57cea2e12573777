r"""Drawn scenes, wide, square and tall, on tiles as in Llama 3.2 Vision, on two CPU cores.

The GPT learns the captions first, as text. Then it stays frozen, so what it makes of text alone
does not change:

    python mllm.py config/llama_vision_cpu.py --gpt_ckpt= --train=gpt --max_steps=300 \
        --out_dir=out/llama_gpt
"""

out_dir = "out/llama_vision_cpu"
dataset = "wide"
n_drawn = 10000
gpt_ckpt = "out/llama_gpt/last.pt"
train = "vit,connector"  # cross-attention and all gates belong to the connector
max_tiles = 4
across_layer = 1
vit_layer = 2
keep_blocks = (0,)  # intermediate features: those of the first block
fusion = "cross"
image_size = 48  # of a tile: 6 x 6 patches
max_tokens = 80
max_steps = 800
eval_interval = 400
