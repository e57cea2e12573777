"""
Draw images of coloured shapes and write captions for them.

A scene is a list of things, which have a size, a colour, a shape and a place, in words. The look of
a thing says in numbers how it is drawn, and the paper what it is drawn on. Both vary as pictures do
that different people draw: paper of any colour, crooked shapes, pale and deep colours.
"""

import colorsys
import re
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {  # hue in degrees, from and to, least saturation, least value: pink is not called red
    "red": (-10, 8, 0.65, 0.55),
    "green": (90, 155, 0.4, 0.4),
    "blue": (205, 243, 0.55, 0.5),
    "yellow": (47, 62, 0.45, 0.85),
    "purple": (268, 302, 0.4, 0.4),
    "orange": (22, 39, 0.7, 0.85),
}
CORNERS = {  # clockwise from the top: angles in degrees, and distances from the middle in radii
    "circle": (range(0, 360, 9), [1] * 40),
    "square": ([45, 135, 225, 315], [1.27] * 4),
    "triangle": ([0, 120, 240], [1.1] * 3),
    "star": (range(0, 360, 36), [1.15, 0.48] * 5),
    "cross": ([-18, 18, 45, 72, 108, 135, 162, 198, 225, 252, 288, 315], [1.05, 1.05, 0.45] * 4),
}
SHAPES = tuple(CORNERS)
SIZES = ("small", "large")
RADII = {"small": (0.065, 0.095), "large": (0.125, 0.16)}  # as fractions of the image's side
CONTRAST = 110  # least distance of a thing's colour from the paper's; black and white are 442 apart
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
    corners: np.ndarray  # of a polygon around (0, 0) with radius 1, (n, 2)
    fill: tuple  # red, green and blue, 0 to 255
    outline: tuple | None  # its colour
    open_corners: int  # corners at which the outline does not close


class Paper(NamedTuple):
    """Describe what a scene is drawn on, and with what."""

    colours: np.ndarray  # at the two ends of a straight gradient, (2, 3)
    direction: float  # of the gradient, in radians
    grain: float  # standard deviation of the paper's lightness, in units of 0 to 255
    noise: float  # standard deviation of a camera's noise
    smooth: bool  # edges are smooth, else jagged


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


def random_colour(name, rng):
    """Return red, green and blue, 0 to 255, of a colour with this name, pale or deep."""
    low, high, saturation, value = COLOURS[name]
    hue = rng.uniform(low, high) / 360 % 1
    colour = colorsys.hsv_to_rgb(hue, rng.uniform(saturation, 1), rng.uniform(value, 1))
    return tuple(int(255 * x) for x in colour)


def random_corners(shape, rng):
    """Return the corners of a shape, a bit turned, stretched and crooked, (n, 2)."""
    degrees, distances = (np.array(values, dtype=float) for values in CORNERS[shape])
    angles = np.radians(degrees + rng.uniform(-15, 15))
    corners = np.stack((np.sin(angles), -np.cos(angles)), axis=1) * distances[:, None]
    corners += rng.normal(0, rng.uniform(0, 0.04), corners.shape)
    stretch = 1.15 ** rng.uniform(-0.5, 0.5)
    return corners * (stretch, 1 / stretch)  # up to 15% wider than high, or higher than wide


def look_of(thing, rng, enlarge=1):
    """Return a look for a thing: anywhere in its place, but not at its border.

    Multiply the radius by `enlarge`.
    """
    radius = rng.uniform(*RADII[thing.size]) * enlarge
    middle = (position(thing) + rng.uniform(0.1, 0.9, 2)) / 3
    middle = middle.clip(0.6 * radius, 1 - 0.6 * radius)  # the edge hides a small part at most
    outline = None
    if rng.random() < 0.25:
        outline = tuple(
            rng.integers(60, size=3) if rng.random() < 0.7 else rng.integers(256, size=3)
        )
    corners = random_corners(thing.shape, rng)
    return Look(
        middle,
        radius,
        corners,
        random_colour(thing.colour, rng),
        outline,
        rng.integers(len(corners) // 4 + 1),
    )


def looks_of(things, rng, enlarge=1):
    """Return looks for things that do not touch. Draw all of them anew until they do not."""
    while True:
        looks = [look_of(thing, rng, enlarge) for thing in things]
        middles = np.array([look.middle for look in looks])
        radii = np.array([look.radius for look in looks])
        distances = np.linalg.norm(middles[:, None] - middles, axis=2)
        np.fill_diagonal(distances, np.inf)
        if (distances >= 1.1 * np.add.outer(radii, radii)).all():
            return looks


def random_paper(looks, rng):
    """Return paper on which all looks are easy to see."""
    fills = np.array([look.fill for look in looks if look])
    while True:
        colour = pick(
            (
                rng.integers(235, 256) + rng.integers(-8, 1, 3),  # white
                rng.integers(256) + rng.integers(-10, 11, 3),  # grey
                rng.integers(256, size=3),  # any
                rng.integers(40) + rng.integers(16, size=3),  # black
            ),
            rng,
        )
        change = rng.integers(-70, 71, 3) if rng.random() < 0.4 else np.zeros(3)
        colours = np.clip([colour, colour + change], 0, 255)
        gradient = np.linspace(*colours, 5)
        if np.linalg.norm(fills[:, None] - gradient, axis=2).min() >= CONTRAST:
            break
    grain, noise = rng.uniform(0, 10, 2) * (rng.random(2) < 0.3)
    return Paper(colours, rng.uniform(0, 2 * np.pi), grain, noise, rng.random() < 0.8)


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
    corners = look.middle * sides * scale + look.radius * scale * look.corners
    corners = [tuple(corner) for corner in corners]
    pen.polygon(corners, look.fill)
    if look.outline:
        width = max(1, round(0.12 * look.radius * scale))
        closed = corners + corners[:1]
        pen.line(closed[look.open_corners :], look.outline, width, joint="curve")


def draw(looks, paper, size, rng, sides=(1, 1)):
    """Return an image of a list of looks, (3, H, W) uint8.

    Args:
        size: The pixels per unit of length.
        sides: The width and the height in units of length.
    """
    W, H = size * np.array(sides)
    x, y = np.meshgrid(np.linspace(-0.5, 0.5, W), np.linspace(-0.5, 0.5, H))
    share = 0.5 + x * np.cos(paper.direction) + y * np.sin(paper.direction)  # -0.2 to 1.2
    pixels = paper.colours[0] + share[..., None].clip(0, 1) * (paper.colours[1] - paper.colours[0])
    pixels = pixels + paper.grain * rng.standard_normal((H, W, 1))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    # Draw at four times the resolution, so that reducing the image smooths its edges.
    scale = 4 if paper.smooth else 1
    image = image.resize((scale * W, scale * H), Image.NEAREST)
    pen = ImageDraw.Draw(image)
    for look in looks:
        draw_look(pen, look, sides, scale * size)
    pixels = np.asarray(image.reduce(scale)).transpose(2, 0, 1)
    if paper.noise:
        pixels = pixels + paper.noise * rng.standard_normal(pixels.shape)
    return pixels.clip(0, 255).astype(np.uint8)


def draw_scene(things, size, rng):
    """Return an image of a list of things, (3, size, size) uint8."""
    looks = looks_of(things, rng)
    return draw(looks, random_paper(looks, rng), size, rng)


# data sets ----------------------------------------------------------------------------------------


def draw_shapes(n, size, seed, draw_scene=draw_scene):
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


def draw_wide(n, size, seed):
    """Return n PIL images of two to four things, wide (3:1) to tall (1:3), and their captions.

    Every image has a list of one caption. The sides are multiples of `size` pixels, of which a
    shape takes a sixth to a third.
    """
    rng = np.random.default_rng(seed)
    images = []
    captions = []
    for _ in range(n):
        things = random_things(2, 4, rng)
        sides = pick([(3, 1), (2, 1), (2, 2), (1, 2), (1, 3)], rng)
        looks = looks_of(things, rng, enlarge=1.15)
        pixels = draw(looks, random_paper(looks, rng), size, rng, sides)
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
