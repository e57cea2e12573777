"""Drawn images: one or two coloured shapes with sizes and places, and five differently worded captions of each."""

import math
import re

import numpy as np

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (235, 215, 50),
           "purple": (150, 60, 190), "orange": (240, 140, 30)}
SHAPES, SIZES = ("circle", "square", "triangle", "star", "cross"), ("small", "large")
PLACES = [f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "center", "right")]
WORDINGS = {  # {0} is the first shape and {1} its place; {2} and {3} are those of the second
    1: ("a {0} in the {1}", "there is a {0} at the {1}", "the {1} holds a {0}", "one {0}, {1}",
        "i see a {0} in the {1}"),
    2: ("a {0} in the {1} and a {2} in the {3}", "there is a {0} at the {1} and a {2} at the {3}",
        "the {1} holds a {0} and the {3} a {2}", "one {0}, {1}, and one {2}, {3}",
        "i see a {0} in the {1} and a {2} in the {3}")}


def draw_scene(shapes, size, rng):
    """[(size, colour, shape, place)] -> (3, size, size) uint8, each shape somewhere near the middle of its place."""
    from PIL import Image, ImageDraw
    s = 4 * size  # drawn four times as large, then reduced: smooth edges
    grey = int(rng.integers(0, 80))
    picture = Image.new("RGB", (s, s), (grey, grey, grey + int(rng.integers(0, 20))))
    draw = ImageDraw.Draw(picture)
    for how_large, colour, shape, place in shapes:
        row, column = divmod(PLACES.index(place), 3)
        x, y = s * (2 * np.array([column, row]) + 1) / 6 + rng.uniform(-0.02, 0.02, 2) * s
        r = s * (0.085 if how_large == "small" else 0.14) * rng.uniform(0.92, 1.08)
        fill = tuple(int(c) for c in np.clip(np.array(COLOURS[colour]) + rng.integers(-15, 16, 3), 0, 255))
        if shape == "circle":
            draw.ellipse((x - r, y - r, x + r, y + r), fill)
        elif shape == "square":
            draw.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill)
        elif shape == "cross":
            draw.rectangle((x - r, y - 0.32 * r, x + r, y + 0.32 * r), fill)
            draw.rectangle((x - 0.32 * r, y - r, x + 0.32 * r, y + r), fill)
        else:  # a polygon around the middle; the star's corners lie in and out by turns
            radii = (1.1, 1.1, 1.1) if shape == "triangle" else (1.15, 0.48) * 5
            angles = 2 * math.pi * np.arange(len(radii)) / len(radii)
            draw.polygon([(x + r * q * math.sin(a), y - r * q * math.cos(a)) for q, a in zip(radii, angles)], fill)
    return np.asarray(picture.resize((size, size), Image.Resampling.BOX)).transpose(2, 0, 1)


def draw_shapes(n, size, seed):
    """n images of one or two shapes, (n, 3, size, size) uint8, and five differently worded captions of each."""
    rng, images, captions = np.random.default_rng(seed), np.empty((n, 3, size, size), np.uint8), []
    choose = lambda options: options[rng.integers(len(options))]
    for i in range(n):
        places = rng.permutation(len(PLACES))[:rng.integers(1, 3)]
        shapes = [(choose(SIZES), choose(list(COLOURS)), choose(SHAPES), PLACES[p]) for p in sorted(places)]
        images[i] = draw_scene(shapes, size, rng)
        words = [text for *what, place in shapes for text in (" ".join(what), place)]
        captions.append([wording.format(*words) for wording in WORDINGS[len(shapes)]])
    return images, captions


def attributes(caption):
    """The (size, colour, shape, place) of each thing that a caption of a drawn image names, sorted."""
    things = re.findall(f"({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", caption)
    places = re.findall("|".join(PLACES), caption)
    return sorted((*thing, place) for thing, place in zip(things, places)) if len(things) == len(places) else []
