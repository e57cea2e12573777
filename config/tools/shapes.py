"""
Draw images of coloured shapes and write captions for them.

A scene is a list of things, which have a size, a colour, a shape and a place, in words. The look of
a thing says in numbers how it is drawn. It varies a little from image to image.
"""

import re
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 215, 50),
    "purple": (150, 60, 190),
    "orange": (240, 140, 30),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = ("small", "large")
RADII = {"small": 0.085, "large": 0.14}  # as a fraction of the image's side
PLACES = (  # row by row
    "top left",
    "top center",
    "top right",
    "middle left",
    "middle center",
    "middle right",
    "bottom left",
    "bottom center",
    "bottom right",
)
WORDINGS = {  # by the number of things
    1: (
        "a {0} in the {0.place}",
        "there is a {0} at the {0.place}",
        "the {0.place} holds a {0}",
        "one {0}, {0.place}",
        "i see a {0} in the {0.place}",
    ),
    2: (
        "a {0} in the {0.place} and a {1} in the {1.place}",
        "there is a {0} at the {0.place} and a {1} at the {1.place}",
        "the {0.place} holds a {0} and the {1.place} a {1}",
        "one {0}, {0.place}, and one {1}, {1.place}",
        "i see a {0} in the {0.place} and a {1} in the {1.place}",
    ),
}


class Thing(NamedTuple):
    """Describe a shape in a scene in words."""

    size: str
    colour: str
    shape: str
    place: str

    def __str__(self):
        return f"{self.size} {self.colour} {self.shape}"


class Look(NamedTuple):
    """Describe how a thing is drawn."""

    middle: np.ndarray  # x and y as fractions of the image's width and height, (2,)
    radius: float  # as a fraction of the side of a square image
    fill: tuple  # red, green and blue, 0 to 255
    shape: str


# random choices -----------------------------------------------------------------------------------


def pick(options, rng):
    """Return a random option, as it is (rng.choice would return a NumPy type)."""
    return options[rng.integers(len(options))]


def pick_several(options, low, high, rng):
    """Return a list of `low` to `high` different options, in random order.

    An integer n stands for the options 0 to n - 1.
    """
    return rng.permutation(options)[: rng.integers(low, high + 1)].tolist()


def random_thing(places, rng):
    """Return a thing of random size, colour and shape in one of the places."""
    return Thing(pick(SIZES, rng), pick(list(COLOURS), rng), pick(SHAPES, rng), pick(places, rng))


def random_things(low, high, rng):
    """Return `low` to `high` things, in the order of their places."""
    places = pick_several(PLACES, low, high, rng)
    return [random_thing([place], rng) for place in sorted(places, key=PLACES.index)]


def position(thing):
    """Return the column and the row of a thing's place, from 0 to 2, (2,)."""
    return np.array(divmod(PLACES.index(thing.place), 3)[::-1])


def look_of(thing, rng, enlarge=1):
    """Return a look for a thing: near the middle of its place, with about its size and colour.

    Multiply the radius by `enlarge`.
    """
    middle = (2 * position(thing) + 1) / 6 + rng.uniform(-0.02, 0.02, 2)
    radius = RADII[thing.size] * rng.uniform(0.92, 1.08) * enlarge
    fill = rng.integers(-15, 16, 3) + COLOURS[thing.colour]
    return Look(middle, radius, tuple(fill.clip(0, 255)), thing.shape)


def background(rng):
    """Return a dark colour, grey or slightly blue: three integers."""
    grey = rng.integers(80)
    return grey, grey, grey + rng.integers(20)


# drawing ------------------------------------------------------------------------------------------


def between(first, last, share):
    """Return the look a `share` of the way, 0 to 1, from `first` to `last`.

    A look is None while the thing is not visible. It appears or vanishes halfway.
    """
    if first is None or last is None:
        return last if share >= 0.5 else first
    return first._replace(
        middle=first.middle + share * (last.middle - first.middle),
        radius=first.radius + share * (last.radius - first.radius),
    )


def draw_look(pen, look, sides, scale):
    """Draw a look with an ImageDraw, `pen`, on an image of `sides` times `scale` pixels."""
    middle, radius, fill, shape = look
    x, y = middle * sides * scale
    r = radius * scale

    def rectangle(width, height):
        pen.rectangle((x - width, y - height, x + width, y + height), fill)

    if shape == "circle":
        pen.circle((x, y), r, fill)
    elif shape == "square":
        rectangle(0.9 * r, 0.9 * r)
    elif shape == "cross":
        rectangle(r, 0.32 * r)
        rectangle(0.32 * r, r)
    else:  # a polygon, clockwise from the top; inner and outer corners of a star alternate
        radii = r * np.array(3 * [1.1] if shape == "triangle" else 5 * [1.15, 0.48])
        angles = 2 * np.pi * np.arange(len(radii)) / len(radii)
        pen.polygon(list(zip(x + radii * np.sin(angles), y - radii * np.cos(angles))), fill)


def draw(looks, background_colour, size, sides=(1, 1)):
    """Return an image of a list of looks, (3, H, W) uint8.

    Args:
        background_colour: Red, green and blue, 0 to 255.
        size: The pixels per unit of length.
        sides: The width and the height in units of length.
    """
    width_height = size * np.array(sides)
    # Draw at four times the resolution, so that reducing the image smooths its edges.
    image = Image.new("RGB", tuple(4 * width_height), background_colour)
    pen = ImageDraw.Draw(image)
    for look in looks:
        draw_look(pen, look, sides, 4 * size)
    return np.asarray(image.resize(width_height, Image.BOX)).transpose(2, 0, 1)


def draw_scene(things, size, rng):
    """Return an image of a list of things, (3, size, size) uint8."""
    background_colour = background(rng)
    return draw([look_of(thing, rng) for thing in things], background_colour, size)


# data sets ----------------------------------------------------------------------------------------


def draw_shapes(n, size, seed):
    """Return n images of one or two things, (n, 3, size, size) uint8, and their captions.

    Every image has a list of five captions that say the same in different words.
    """
    rng = np.random.default_rng(seed)
    images = []
    captions = []
    for _ in range(n):
        things = random_things(1, 2, rng)
        images.append(draw_scene(things, size, rng))
        captions.append([wording.format(*things) for wording in WORDINGS[len(things)]])
    return np.array(images), captions


def draw_wide(n, seed):
    """Return n PIL images of two to four things, wide (3:1) to tall (1:3), and their captions.

    Every image has a list of one caption. A shape is 6 to 10 pixels wide, but only 2 to 3 when an
    image of 96 x 32 pixels is squeezed to 32 x 32.
    """
    rng = np.random.default_rng(seed)
    images = []
    captions = []
    for _ in range(n):
        things = random_things(2, 4, rng)
        sides = pick([(3, 1), (2, 1), (2, 2), (1, 2), (1, 3)], rng)  # in units of 32 pixels
        looks = [look_of(thing, rng, enlarge=1.15) for thing in things]
        pixels = draw(looks, background(rng), 32, sides)
        images.append(Image.fromarray(pixels.transpose(1, 2, 0)))
        captions.append([describe(things)])
    return images, captions


# captions -----------------------------------------------------------------------------------------


def describe(things):
    """Return a caption that lists the things."""
    return ", ".join(f"a {thing} in the {thing.place}" for thing in things)


def attributes(caption):
    """Return the sorted (size, colour, shape, place) of the things in a caption.

    Return an empty list if the numbers of things and places differ.
    """
    pattern = f"({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
    things = re.findall(pattern, caption)
    places = re.findall("|".join(PLACES), caption)
    if len(things) != len(places):
        return []
    return sorted((*thing, place) for thing, place in zip(things, places))
