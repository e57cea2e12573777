"""
Draw the scenes of shapes.py once more, with other code: Pillow's own ellipses, polygons and lines,
named colours, larger canvases that are then resized. No model is trained on these sketches or
chosen by them. They show whether a model understands shapes or only knows one way of drawing them.
"""

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from config.tools.data import to_images
from config.tools.shapes import pick, position

COLOURS = {
    "red": ("red", "crimson", "firebrick", "#dc2828"),
    "green": ("green", "limegreen", "forestgreen", "#28aa3c"),
    "blue": ("blue", "royalblue", "mediumblue", "#3250dc"),
    "yellow": ("yellow", "gold", "#ebd732"),
    "purple": ("purple", "darkviolet", "mediumorchid", "#963cbe"),
    "orange": ("orange", "darkorange", "#f08c1e"),
}
PAPERS = (
    "white",
    "ivory",
    "lightblue",
    "beige",
    "gainsboro",
    "dimgray",
    "midnightblue",
    "black",
)
RADII = {"small": 0.085, "large": 0.14}  # as fractions of the image's shorter side


def difference(first, second):
    """Return how far apart two colours are in red, green and blue."""
    return np.linalg.norm(np.subtract(ImageColor.getrgb(first), ImageColor.getrgb(second)))


def sketch_thing(pen, thing, colour, middle, r, rng):
    """Draw a thing around a point (2,) with the radius r, in pixels."""
    turn = rng.uniform(-12, 12)
    if thing.shape == "circle":
        half = r * rng.uniform(0.93, 1.07, 2)
        box = [*(middle - half), *(middle + half)]
        pen.ellipse(box, colour)
    elif thing.shape == "square":
        pen.regular_polygon((*middle, 1.25 * r), 4, turn, colour)
    elif thing.shape == "triangle":
        pen.regular_polygon((*middle, 1.15 * r), 3, turn, colour)
    elif thing.shape == "cross":  # two thick strokes
        for degrees in (turn, turn + 90):
            angle = np.radians(degrees)
            half = r * np.array([np.cos(angle), np.sin(angle)])
            stroke = [*(middle - half), *(middle + half)]
            pen.line(stroke, colour, round(0.62 * r))
    else:  # a star: five spikes, each from the middle
        for degrees in np.arange(5) * 72 + turn:
            angles = np.radians([degrees - 36, degrees, degrees + 36])
            directions = np.stack((np.sin(angles), -np.cos(angles)))
            reach = r * np.array([0.46, 1.15, 0.46])
            corners = middle + (reach * directions).T
            spike = [tuple(middle), *map(tuple, corners)]
            pen.polygon(spike, colour)


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
        contrast = min(difference(paper, colour) for colour in colours)
        if contrast < 100:
            paper = None
    sides = rng.integers(100, 500) * rng.uniform(0.95, 1.05, 2)
    canvas = tuple(map(round, sides))
    image = Image.new("RGB", canvas, paper)
    pen = ImageDraw.Draw(image)
    for thing, colour in zip(things, colours):
        place = position(thing) + 0.5
        middle = sides * (place + rng.uniform(-shift, shift, 2)) / 3
        radius = RADII[thing.size] * rng.uniform(0.93, 1.07)
        sketch_thing(pen, thing, colour, middle, sides.min() * radius, rng)
    (pixels,) = to_images([image], size)
    return pixels.numpy()
