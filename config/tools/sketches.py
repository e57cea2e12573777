"""
Draw the scenes of shapes.py once more, with other code: Pillow's own ellipses, rectangles, polygons
and lines, named colours, larger canvases that are then resized. No model is trained on these
sketches or chosen by them. They show whether a model understands shapes or only knows one way of
drawing them.
"""

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from config.tools.data import to_images
from config.tools.shapes import PLACES, pick

COLOURS = {
    "red": ("red", "crimson", "firebrick", "#dc2828"),
    "green": ("green", "limegreen", "forestgreen", "#28aa3c"),
    "blue": ("blue", "royalblue", "mediumblue", "#3250dc"),
    "yellow": ("yellow", "gold", "#ebd732"),
    "purple": ("purple", "darkviolet", "mediumorchid", "#963cbe"),
    "orange": ("orange", "darkorange", "#f08c1e"),
}
PAPERS = ("white", "ivory", "lightblue", "beige", "gainsboro", "dimgray", "midnightblue", "black")
RADII = {"small": 0.085, "large": 0.14}


def difference(first, second):
    """Return how far apart two colours are in red, green and blue."""
    first, second = (np.array(ImageColor.getrgb(colour)[:3]) for colour in (first, second))
    return np.linalg.norm(first - second)


def sketch_thing(pen, thing, colour, x, y, r, rng):
    """Draw a thing around (x, y) with the radius r, in pixels."""
    turn = rng.uniform(-12, 12)
    if thing.shape == "circle":
        a, b = r * rng.uniform(0.93, 1.07, 2)
        pen.ellipse((x - a, y - b, x + a, y + b), colour)
    elif thing.shape == "square":
        pen.regular_polygon((x, y, 1.25 * r), 4, turn, colour)
    elif thing.shape == "triangle":
        pen.regular_polygon((x, y, 1.15 * r), 3, turn, colour)
    elif thing.shape == "cross":  # two thick strokes
        for degrees in (turn, turn + 90):
            dx, dy = r * np.cos(np.radians(degrees)), r * np.sin(np.radians(degrees))
            pen.line((x - dx, y - dy, x + dx, y + dy), colour, round(0.62 * r))
    else:  # a star: five triangles, whose bases are the sides of a pentagon
        for degrees in np.arange(5) * 72 + turn:
            spikes = np.radians([degrees - 36, degrees, degrees + 36])
            reach = r * np.array([0.46, 1.15, 0.46])
            outer = zip(x + reach * np.sin(spikes), y - reach * np.cos(spikes))
            pen.polygon([*outer, (x, y)], colour)


def sketch(things, size, rng, paper=None, shift=0.3):
    """Return a sketch of a list of things, (3, size, size) uint8.

    Args:
        paper: The name of a colour; None takes one on which all things can be seen.
        shift: How far the middle of a thing is moved, horizontally and vertically, at most: a
            fraction of the side of its place.
    """
    colours = [pick(COLOURS[thing.colour], rng) for thing in things]
    while paper is None:
        paper = pick(PAPERS, rng)
        if any(difference(paper, colour) < 100 for colour in colours):
            paper = None
    W, H = rng.integers(100, 500) * rng.uniform(0.95, 1.05, 2)
    image = Image.new("RGB", (round(W), round(H)), paper)
    pen = ImageDraw.Draw(image)
    for thing, colour in zip(things, colours):
        row, column = divmod(PLACES.index(thing.place), 3)
        dx, dy = rng.uniform(-shift, shift, 2)
        x, y = W * (column + 0.5 + dx) / 3, H * (row + 0.5 + dy) / 3
        r = min(W, H) * RADII[thing.size] * rng.uniform(0.93, 1.07)
        sketch_thing(pen, thing, colour, x, y, r, rng)
    return to_images([image], size)[0].numpy()
