"""
Tiny Shakespeare -> data/shakespeare/{train,val}.npy: 1,115,394 characters, a uint16 id each, cut 90/10 as nanoGPT does.

    python prepare_shakespeare.py
"""

from pathlib import Path

import numpy as np

import config
from config.tools.data import download, save_array, save_json
from model import CharTokenizer

out_dir = "data/shakespeare"  # where the download goes, and what gpt.py reads

URLS = ["https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt"]
MD5 = "6fb458f1232090904fb40fe944165e91"


@config.one_line_errors
def main(argv=None):
    config.override(globals(), argv)
    out = Path(out_dir)
    text = download(out / "input.txt", URLS, MD5).read_text(encoding="utf-8")
    tokenizer = CharTokenizer(text)
    ids = np.array(tokenizer.encode(text), dtype=np.uint16)
    cut = len(text) * 9 // 10  # the play's last tenth is for validation: contiguous, so that no scene stands in both
    save_array(out / "train.npy", ids[:cut])
    save_array(out / "val.npy", ids[cut:])
    save_json(out / "tokenizer.json", tokenizer.state())
    print(f"{out}: {cut:,} characters to train on, {len(ids) - cut:,} to validate, {tokenizer.vocab_size} different")


if __name__ == "__main__":
    main()
