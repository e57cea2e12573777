"""Questions about drawn images, pairs of images and clips, on two CPU cores."""

out_dir = "out/questions"
dataset = "questions"
n_drawn = 16000  # groups of conversations about the same images
vit_ckpt = "out/shapes/sft.pt"  # python mllm.py: a ViT that knows shapes from captions
train = "connector,gpt"  # the frozen ViT sees each image once
connector = "abstractor"  # 9 tokens per image instead of 64: a clip has up to 8 images
gpt_layer = 3
gpt_embd = 128
captions_per_photo = 6  # conversations of each group in a step
batch_size = 64  # groups
accumulation = 2  # the rows of a part are about equally long
max_tokens = 64
conv_lr = 0.03  # of the connector; at 0.1 it learns less in as many steps
max_steps = 1600
eval_interval = 800
beams = 1  # answers are short and certain
