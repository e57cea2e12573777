"""Questions about drawn images, pairs of images and clips, on two CPU cores: ten minutes, no download."""
out_dir = "out/questions"
dataset = "questions"
n_drawn = 10000  # groups of conversations about the same images
fusion = "cross"  # learns to look for things by their attributes faster than prefix
connector = "pixel_shuffle"  # 9 tokens an image, one for each place: a clip has up to eight images
align_share = 0.1  # captions first: after a minute the ViT knows what is there
train_vit = False  # then it is frozen: a step is a quarter shorter
captions_per_photo = 6  # conversations of a group in a step
batch_size = 64  # groups
accumulation = 2  # a part has about equally many images in each row
max_tokens = 64
max_minutes = 8.3
eval_interval = 500
beams = 1  # answers are short and certain
