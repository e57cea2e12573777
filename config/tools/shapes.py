"""Drawn images of coloured shapes with sizes and places; of one or two of them, five differently worded captions."""

import math
import re
from typing import NamedTuple

import numpy as np

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (235, 215, 50),
           "purple": (150, 60, 190), "orange": (240, 140, 30)}
SHAPES, SIZES = ("circle", "square", "triangle", "star", "cross"), ("small", "large")
RADII = {"small": 0.085, "large": 0.14}  # of a side
PLACES = [f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "center", "right")]
WORDINGS = {  # {0} is the first shape and {1} its place; {2} and {3} are those of the second
    1: ("a {0} in the {1}", "there is a {0} at the {1}", "the {1} holds a {0}", "one {0}, {1}",
        "i see a {0} in the {1}"),
    2: ("a {0} in the {1} and a {2} in the {3}", "there is a {0} at the {1} and a {2} at the {3}",
        "the {1} holds a {0} and the {3} a {2}", "one {0}, {1}, and one {2}, {3}",
        "i see a {0} in the {1} and a {2} in the {3}")}


class Thing(NamedTuple):
    """A shape in a drawn image."""
    size: str
    colour: str
    shape: str
    place: str

    def words(self):
        return f"{self.size} {self.colour} {self.shape}"


class Look(NamedTuple):
    """How a thing is drawn: middle (2,) and radius, in shares of a square image's side; the colour (3,); the shape."""
    middle: np.ndarray
    radius: float
    fill: np.ndarray
    shape: str


# drawing -------------------------------------------------------------------------------------------------------------

def look_of(thing, rng):
    """The look of a thing, somewhere near the middle of its place."""
    row, column = divmod(PLACES.index(thing.place), 3)
    middle = (2 * np.array([column, row]) + 1) / 6 + rng.uniform(-0.02, 0.02, 2)
    radius = RADII[thing.size] * rng.uniform(0.92, 1.08)
    fill = np.clip(np.array(COLOURS[thing.colour]) + rng.integers(-15, 16, 3), 0, 255)
    return Look(middle, radius, fill, thing.shape)


def background(rng):
    grey = int(rng.integers(0, 80))
    return grey, grey, grey + int(rng.integers(0, 20))


def between(first, last, share):
    """The look between two, share of the way; one of them may be None: nothing is seen."""
    if first is None or last is None:
        return last if share >= 0.5 else first
    mix = lambda x, y: x + share * (y - x)
    return first._replace(middle=mix(first.middle, last.middle), radius=mix(first.radius, last.radius))


def draw(looks, ground, size, sides=(1, 1)):
    """[Look] on a ground of one colour -> (3, H, W) uint8; sides: the width and height, in units of size pixels."""
    from PIL import Image, ImageDraw
    s, (width, height) = 4 * size, (round(size * side) for side in sides)
    picture = Image.new("RGB", (4 * width, 4 * height), ground)  # four times as large, then reduced: smooth edges
    pen = ImageDraw.Draw(picture)
    for middle, radius, fill, shape in looks:
        (x, y), r, fill = s * middle, s * radius, tuple(int(c) for c in fill)
        if shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill)
        elif shape == "square":
            pen.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill)
        elif shape == "cross":
            pen.rectangle((x - r, y - 0.32 * r, x + r, y + 0.32 * r), fill)
            pen.rectangle((x - 0.32 * r, y - r, x + 0.32 * r, y + r), fill)
        else:  # a polygon around the middle; the star's corners lie in and out by turns
            radii = (1.1, 1.1, 1.1) if shape == "triangle" else (1.15, 0.48) * 5
            angles = 2 * math.pi * np.arange(len(radii)) / len(radii)
            pen.polygon([(x + r * q * math.sin(a), y - r * q * math.cos(a)) for q, a in zip(radii, angles)], fill)
    return np.asarray(picture.resize((width, height), Image.Resampling.BOX)).transpose(2, 0, 1)


def draw_scene(things, size, rng):
    """[Thing] -> (3, size, size) uint8"""
    ground = background(rng)
    return draw([look_of(thing, rng) for thing in things], ground, size)


def draw_shapes(n, size, seed):
    """n images of one or two shapes, (n, 3, size, size) uint8, and five differently worded captions of each."""
    rng, images, captions = np.random.default_rng(seed), np.empty((n, 3, size, size), np.uint8), []
    choose = lambda options: options[rng.integers(len(options))]
    for i in range(n):
        places = rng.permutation(len(PLACES))[:rng.integers(1, 3)]
        things = [Thing(choose(SIZES), choose(list(COLOURS)), choose(SHAPES), PLACES[p]) for p in sorted(places)]
        images[i] = draw_scene(things, size, rng)
        words = [text for thing in things for text in (thing.words(), thing.place)]
        captions.append([wording.format(*words) for wording in WORDINGS[len(things)]])
    return images, captions


def draw_wide(n, seed):
    """n PIL images of two to four shapes, wide, square or tall, 3:1 to 1:3, and a caption of each. A shape is 6 to 10
    pixels wide in a picture of, say, 96 x 32, and 2 to 3 when that is squeezed to 32 x 32."""
    from PIL import Image
    rng, pictures, captions = np.random.default_rng(seed), [], []
    choose = lambda options: options[rng.integers(len(options))]
    for _ in range(n):
        places = sorted(rng.permutation(len(PLACES))[:rng.integers(2, 5)])
        things = [Thing(choose(SIZES), choose(list(COLOURS)), choose(SHAPES), PLACES[p]) for p in places]
        sides = np.array(choose([(3, 1), (2, 1), (2, 2), (1, 2), (1, 3)]))  # in squares of 32 pixels
        looks = [look_of(thing, rng) for thing in things]
        looks = [look._replace(middle=look.middle * sides, radius=1.15 * look.radius) for look in looks]
        pictures.append(Image.fromarray(draw(looks, background(rng), 32, sides).transpose(1, 2, 0)))
        captions.append([", ".join(f"a {thing.words()} in the {thing.place}" for thing in things)])
    return pictures, captions


def attributes(caption):
    """The (size, colour, shape, place) of each thing that a caption of a drawn image names, sorted."""
    things = re.findall(f"({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", caption)
    places = re.findall("|".join(PLACES), caption)
    return sorted((*thing, place) for thing, place in zip(things, places)) if len(things) == len(places) else []
