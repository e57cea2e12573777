"""
CIFAR-10 -> data/cifar10/{train,test}_{images,labels}.npy: (50000 or 10000, 3, 32, 32) uint8 pixels and uint8 labels.
Reads the binary version of the archive, so that nothing needs to be unpickled.

    python prepare_cifar.py
"""

import tarfile
import zlib
from pathlib import Path

import numpy as np

import config
from config.tools.data import download, save_array, save_json

out_dir = "data/cifar10"  # where the download goes, and what vit.py reads

URLS = ["https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/cifar-10-binary.tar.gz"]
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
RECORD = 1 + 3 * 32 * 32  # bytes


def read_member(tar, name, most):
    """The bytes of a member of the open archive, a file of at most so many."""
    member = tar.getmember(f"cifar-10-batches-bin/{name}")
    if not member.isfile() or member.size > most:
        raise ValueError(f"{name} is no file of at most {most:,} bytes")
    return tar.extractfile(member).read()


def read_batch(tar, name):
    """(labels (10000,), images (10000, 3, 32, 32)) of one member of the open archive."""
    records = np.frombuffer(read_member(tar, name, 10_000 * RECORD), dtype=np.uint8).reshape(-1, RECORD)
    if len(records) != 10_000 or records[:, 0].max() > 9:
        raise ValueError(f"{name} is no batch of CIFAR-10")
    return records[:, 0], records[:, 1:].reshape(-1, 3, 32, 32)


@config.one_line_errors
def main(argv=None):
    config.override(globals(), argv)
    out = Path(out_dir)
    archive = download(out / "cifar-10-binary.tar.gz", URLS, MD5)
    try:
        with tarfile.open(archive) as tar:
            classes = read_member(tar, "batches.meta.txt", 1000).decode().split()
            train = [read_batch(tar, f"data_batch_{i}.bin") for i in range(1, 6)]
            test = [read_batch(tar, "test_batch.bin")]
    except (tarfile.TarError, KeyError, EOFError, ValueError, zlib.error) as e:
        config.fail(f"{archive} is broken ({e}); delete it and run this again")
    for split, batches in (("train", train), ("test", test)):
        labels, images = (np.concatenate(part) for part in zip(*batches))
        save_array(out / f"{split}_labels.npy", labels)
        save_array(out / f"{split}_images.npy", images)
        print(f"{out}: {len(images):,} {split} images, per class {np.bincount(labels).tolist()}")
    save_json(out / "classes.json", classes)


if __name__ == "__main__":
    main()
