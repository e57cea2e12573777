"""Questions about drawn images, pairs of images and clips, on two CPU cores."""
out_dir = "out/questions"
dataset = "questions"
n_drawn = 16000  # groups of conversations about the same images; 10,000 are memorised
fusion = "cross"
connector = "pixel_shuffle"  # 16 tokens per image instead of 64: a clip has up to 8 images
gpt_layer = 3
gpt_embd = 128
align_share = 0.37  # captions first, so that the ViT knows what is there
train_vit = False  # after that it is frozen, and sees each image once
captions_per_photo = 6  # conversations of each group in a step
batch_size = 64  # groups
accumulation = 2  # the rows of a part are about equally long
max_tokens = 64
max_steps = 1900
eval_interval = 700
beams = 1  # answers are short and certain
