"""
Draw images, pairs of images and clips, and write conversations about them.

Every question has one right answer in one wording, so an answer is checked by comparing strings.
Some answers reason before they conclude (chain of thought, Wei et al. 2022): if things are counted,
have changed or are found by their position, the answer says first where, then how many or what.
"""

from itertools import product

import numpy as np
import torch

from config.tools.data import caption_samples, to_images
from config.tools.shapes import (
    COLOURS,
    PLACES,
    RADII,
    SHAPES,
    SIZES,
    Thing,
    between,
    describe,
    draw,
    draw_scene,
    draw_shapes,
    draw_wide,
    looks_of,
    pick,
    pick_several,
    position,
    random_paper,
    random_thing,
)
from config.tools.sketches import sketch

VALUES = {"size": SIZES, "colour": list(COLOURS), "shape": SHAPES}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # columns and rows
RELATIONS = ("left of", "right of", "above", "below")  # in the order of DIRECTIONS
NUMBERS = ("none", "one", "two", "three", "four", "five")
ONE_IMAGE = (  # the conversations about a single image; the hardest kinds are listed twice
    "caption",
    "count",
    "count",
    "exists",
    "size",
    "colour",
    "shape",
    "place",
    "relation",
    "follow-up",
    "follow-up",
)
QUESTIONS = {  # by kind; {} is replaced by what the question is about
    "caption": ("what is there?", "what do you see?", "describe the image"),
    "count": ("how many {} are there?", "how many {} do you see?", "count the {}"),
    "exists": ("is there {}?", "do you see {}?"),
    "size": ("how large is {}?", "what size is {}?"),
    "colour": ("what colour is {}?", "which colour has {}?"),
    "shape": ("what shape is {}?", "which shape has {}?"),
    "place": ("where is {}?", "in which place is {}?"),
    "relation": ("what is {}?", "which shape is {}?"),
    "change": (
        "what has changed?",
        "what is different in the second image?",
        "what is the difference?",
    ),
    "more": ("which image has more {}?", "in which image are more {}?"),
    "event": ("what happens?", "what happens in the clip?", "describe the clip"),
    "direction": ("which way does {} move?", "where does {} move to?"),
    "does": ("what does {} do?", "what happens to {}?"),
    "first": ("what happens first?", "what comes first?"),
}
FOLLOW_UPS = {
    "size": ("and how large is it?", "and its size?"),
    "colour": ("and what colour is it?", "and its colour?"),
    "shape": ("and what shape is it?", "and its shape?"),
    "place": ("and where is it?", "and its place?"),
}


# things and words for them ------------------------------------------------------------------------


def make_scene(n, rng):
    """Return n things in the order of their places. No two have the same size, colour and shape.

    Only two or three colours and shapes occur, so that most things have something in common.
    """
    colours = pick_several(VALUES["colour"], 2, 3, rng)
    shapes = pick_several(SHAPES, 2, 3, rng)
    places = sorted(rng.permutation(len(PLACES))[:n])
    kinds = rng.permutation(list(product(SIZES, colours, shapes))).tolist()
    return [Thing(*kind, PLACES[i]) for kind, i in zip(kinds, places)]


def how_many(things, attributes):
    """Return how many things have these attributes, a dictionary such as {"colour": "red"}."""
    return sum(attributes.items() <= thing._asdict().items() for thing in things)


def words_for(attributes):
    """Return words for a size, colour and shape, such as "large circle" or "red thing"."""
    attributes = {"shape": "thing"} | attributes
    return " ".join(attributes[name] for name in VALUES if name in attributes)


def refer_to(thing, things, hidden, rng):
    """Return words that fit only this thing, such as "the red circle", or None if there are none.

    Attributes whose names are in `hidden` are not used.
    """
    subsets = [{}]  # of the thing's attributes
    for name in VALUES:
        if name not in hidden:
            subsets += [subset | {name: getattr(thing, name)} for subset in subsets]
    options = [words_for(subset) for subset in subsets[1:] if how_many(things, subset) == 1]
    if "place" not in hidden:
        options.append(f"thing in the {thing.place}")
    return f"the {pick(options, rng)}" if options else None


def countable(things, rng):
    """Return words for things to count, such as "red shapes", and their attributes."""
    name = pick(("all", "colour", "shape"), rng)
    if name == "all":
        return "shapes", {}
    present = getattr(pick(things, rng), name)
    value = pick((present, pick(VALUES[name], rng)), rng)
    if name == "colour":
        return f"{value} shapes", {name: value}
    return f"{value}s".replace("crosss", "crosses"), {name: value}


# one image ----------------------------------------------------------------------------------------
# A conversation is a list of turns, (kind, question, answer). The functions return an empty list if
# their random choices do not lead to a question with one right answer.


def one_turn(kind, answer, rng, about=""):
    """Return a conversation of one turn with a question of this kind about `about`."""
    return [(kind, pick(QUESTIONS[kind], rng).format(about), answer)]


def ask_exists(thing, things, rng):
    """Ask whether there is such a thing. The answers "yes" and "no" are equally likely.

    If the answer is "no", the question is about something that differs in one attribute.
    """
    names = pick_several(list(VALUES), 1, 3, rng)
    attributes = {name: getattr(thing, name) for name in names}
    answer = pick(("yes", "no"), rng)
    if answer == "no":
        variants = [attributes | {name: value} for name in names for value in VALUES[name]]
        absent = [variant for variant in variants if not how_many(things, variant)]
        if not absent:
            return []
        attributes = pick(absent, rng)
    words = f"a {words_for(attributes)}".replace("a orange", "an orange")
    return one_turn("exists", answer, rng, words)


def ask_thing(kind, thing, things, rng):
    """Ask about a thing.

    Args:
        kind: The name of an attribute to ask for; "relation" to ask what is left of the thing,
            right of it, above or below it; or "follow-up" for one of these and further questions.
    """
    first_kind = kind
    if kind == "follow-up":
        first_kind = pick((*FOLLOW_UPS, "relation"), rng)
    if first_kind == "relation":
        relation, step = pick(list(zip(RELATIONS, DIRECTIONS.values())), rng)
        words = f"{relation} {refer_to(thing, things, (), rng)}"
        found = [other for other in things if (position(other) - position(thing)) @ step > 0]
        # Without the random number, "nothing" would be the answer too often.
        if len(found) > 1 or (not found and (kind == "follow-up" or rng.random() < 0.7)):
            return []
        answer = f"{relation} the {thing.place}: nothing"
        if found:
            answer = f"{relation} the {thing.place}: a {found[0]}"
            thing = found[0]  # for the follow-ups
    else:
        words = refer_to(thing, things, [first_kind], rng)
        answer = getattr(thing, first_kind)
    turns = one_turn(first_kind, answer, rng, words)
    return follow_up(turns, thing, rng) if kind == "follow-up" else turns


def follow_up(turns, thing, rng):
    """Add one or two turns about the attributes of a thing that the first turn does not name."""
    known = " ".join(turns[0])
    names = rng.permutation(list(FOLLOW_UPS))
    unknown = [name for name in names if getattr(thing, name) not in known]
    for name in unknown[: rng.integers(1, 3)]:
        turns.append(("follow-up", pick(FOLLOW_UPS[name], rng), getattr(thing, name)))
    return turns if unknown else []


def ask_until(kind, things, rng):
    """Return a conversation of this kind about one image. Try until it is not empty."""
    turns = []
    while not turns:
        thing = pick(things, rng)
        if kind == "caption":
            turns = one_turn(kind, describe(things), rng)
        elif kind == "count":
            words, attributes = countable(things, rng)
            places = [thing.place for thing in things if how_many([thing], attributes)]
            answer = f"{', '.join(places)}: {NUMBERS[len(places)]}" if places else "none"
            turns = one_turn(kind, answer, rng, words)
        elif kind == "exists":
            turns = ask_exists(thing, things, rng)
        else:
            turns = ask_thing(kind, thing, things, rng)
    return turns


def ask_image(rng):
    """Return a list of one scene, and conversations of all kinds about it."""
    things = make_scene(rng.integers(1, 5), rng)
    conversations = [[("caption", "", describe(things))]]  # without a question
    conversations += [ask_until(kind, things, rng) for kind in ONE_IMAGE]
    return [things], conversations


# two images ---------------------------------------------------------------------------------------


def change(things, rng):
    """Return a scene in which one thing differs, or none, and the answer to what has changed."""
    what = pick(("colour", "place", "size", "more", "less", "nothing"), rng)
    thing = pick(things, rng)
    others = [other for other in things if other != thing]
    free = [place for place in PLACES if not how_many(things, {"place": place})]
    if what == "nothing":
        return things, "nothing"
    if what == "less":
        return others, f"in the {thing.place}, the {thing} is gone"
    if what == "more":
        others = things
        new = random_thing(free, rng)
        answer = f"in the {new.place}, there is a new {new}"
    else:
        values = free if what == "place" else VALUES[what]
        value = pick([value for value in values if value != getattr(thing, what)], rng)
        new = thing._replace(**{what: value})
        now = f"in the {value}" if what == "place" else value
        answer = f"in the {thing.place}, the {thing} is now {now}"
    if str(new) in map(str, others):
        return change(things, rng)  # two things would look alike
    return sorted([*others, new], key=lambda thing: PLACES.index(thing.place)), answer


def ask_more(scenes, rng):
    """Ask which of two images has more of something."""
    want_equal = rng.random() < 0.3
    for _ in range(20):  # tries; after the last one, any answer will do
        words, attributes = countable(pick(scenes, rng), rng)
        first, second = (how_many(things, attributes) for things in scenes)
        if (first == second) == want_equal:
            break
    if first == second:
        answer = "neither"
    else:
        answer = "the first" if first > second else "the second"
    return one_turn("more", answer, rng, words)


def ask_pair(rng):
    """Return two scenes, the second often a changed copy of the first, and conversations."""
    before = make_scene(rng.integers(1, 5), rng)
    after = []
    if rng.random() < 0.8:
        after, answer = change(before, rng)
        conversations = [one_turn("change", answer, rng)]
    if not after:  # unrelated scenes, or the only thing is gone
        after = make_scene(rng.integers(1, 5), rng)
        conversations = []
    scenes = (before, after)
    for _ in range(2):
        conversations.append(ask_more(scenes, rng))
        ordinal, things = pick((("first", before), ("second", after)), rng)
        kind = pick(("caption", "count", *FOLLOW_UPS), rng)
        [(_, question, answer)] = ask_until(kind, things, rng)
        conversations.append([("of two", f"in the {ordinal} image, {question}", answer)])
    return scenes, conversations


# clips --------------------------------------------------------------------------------------------


def pick_event(thing, look, things, free, rng):
    """Let a thing move to a free place, grow, appear or vanish.

    Return what it does, such as "moves left", and its looks before and after, None if it is not
    visible. Update `free`, the set of the (column, row) of all free places.
    """
    directions = [
        direction for direction, step in DIRECTIONS.items() if tuple(position(thing) + step) in free
    ]
    events = ["appears", "vanishes"]
    if str(thing._replace(size="large")) not in map(str, things):  # nor is the thing large already
        events = ["grows", "grows", *events]  # twice as likely
    if directions:
        events = ["moves", "moves", *events]
    event = pick(events, rng)
    if event == "appears":
        return event, None, look
    if event == "vanishes":
        return event, look, None
    if event == "grows":
        return event, look, look._replace(radius=rng.uniform(*RADII["large"]))
    direction = pick(directions, rng)
    step = np.array(DIRECTIONS[direction])
    free.remove(tuple(position(thing) + step))
    return f"moves {direction}", look, look._replace(middle=look.middle + step / 3)


def ask_about_events(things, events, rng):
    """Return conversations about what the things in a clip do. `events` has one item per thing."""
    conversations = []
    hidden = ("place", "size") if "grows" in events else ("place",)  # because these change
    for thing, event in zip(things, events):
        words = refer_to(thing, things, hidden, rng)
        if words is None:
            continue
        _, _, direction = event.partition("moves ")
        if direction or rng.random() < 0.15:
            conversations.append(one_turn("direction", direction or "nowhere", rng, words))
        if event != "nothing" or rng.random() < 0.5:
            conversations.append(one_turn("does", event, rng, words))
    return conversations


def ask_clip(rng):
    """Return a clip in which one or two things change, and conversations about it.

    The clip is a list of four to eight frames, which are lists of looks.
    """
    things = make_scene(rng.integers(2, 4), rng)
    looks = looks_of(things, rng)
    tracks = [(look, look, 0) for look in looks]  # looks before and after an event, and its time
    events = ["nothing" for thing in things]
    free = set(product(range(3), range(3))) - {tuple(position(thing)) for thing in things}
    sentences = []
    for time, i in enumerate(pick_several(len(things), 1, 2, rng)):
        events[i], *ends = pick_event(things[i], looks[i], things, free, rng)
        tracks[i] = (*ends, time)
        article = "a" if events[i] == "appears" else "the"
        sentences.append(f"{article} {things[i]} {events[i]}")
    frames = []
    for now in np.linspace(0, len(sentences), rng.integers(4, 9)):
        looks = [between(*ends, np.clip(now - time, 0, 1)) for *ends, time in tracks]
        frames.append([look for look in looks if look])
    conversations = [one_turn("event", ", then ".join(sentences), rng)]
    if len(sentences) == 2:
        conversations.append(one_turn("first", sentences[0], rng))
    return frames, conversations + ask_about_events(things, events, rng)


# the data set -------------------------------------------------------------------------------------


def make_sample(turns, image_ids):
    """Return a conversation about images in the form that mllm.py reads."""
    messages = []
    placeholders = "<image>" * len(image_ids)
    for kind, question, answer in turns:
        messages += [
            {"role": "user", "content": placeholders + question},
            {"role": "assistant", "content": answer, "kind": kind},
        ]
        placeholders = ""  # only in front of the first question
    return {"images": image_ids, "messages": messages}


def draw_conversations(n, n_sketched, size, seed):
    """Return drawn images, (m, 3, size, size) uint8, and n + n_sketched groups of conversations
    about them; the images of the last ones are sketched.

    A group is a list of samples about the same images, {"images": [indices], "messages":
    [{"role", "content"}]}. An answer also has the "kind" of its question. Of eight groups, two are
    about one image, which is easiest, three about a pair of images and three about a clip. Clips
    are not sketched.
    """
    rng = np.random.default_rng(seed)
    images = []
    groups = []
    for i in range(n + n_sketched):
        begin = len(images)
        slot = i % (8 if i < n else 5)
        if slot >= 5:
            frames, conversations = ask_clip(rng)
            images += draw_on_same_paper(frames, size, rng)
        else:
            scenes, conversations = ask_pair(rng) if slot >= 2 else ask_image(rng)
            if i >= n:
                images += [sketch(things, size, rng) for things in scenes]
            elif rng.random() < 0.5:
                images += [draw_scene(things, size, rng) for things in scenes]
            else:
                images += draw_on_same_paper(
                    [looks_of(things, rng) for things in scenes], size, rng
                )
        image_ids = list(range(begin, len(images)))
        groups.append([make_sample(turns, image_ids) for turns in conversations])
    return np.stack(images), groups


def draw_on_same_paper(scenes, size, rng):
    """Return the images of scenes, which are lists of looks."""
    paper = random_paper([look for looks in scenes for look in looks], rng)
    return [draw(looks, paper, size, rng) for looks in scenes]


def draw_dataset(dataset, n, size, max_tiles):
    """Return the images of shapes, wide or questions, n of them or n groups, and {split: groups of
    samples} as mllm.load_samples() does. The images of the split "sketches" are drawn by other
    code, see sketches.py."""
    n_test = min(n // 20, 1000)
    if dataset == "questions":
        images, groups = draw_conversations(n, n_test, size, seed=0)
    elif dataset == "shapes":
        images, captions = draw_shapes(n, size, seed=0)
        sketches, more_captions = draw_shapes(n_test, size, 1, sketch)
        images, captions = np.concatenate((images, sketches)), captions + more_captions
    else:
        images, captions = draw_wide(n, size, seed=0)
    if dataset != "questions":
        groups = [caption_samples(i, texts) for i, texts in enumerate(captions)]
    splits = {"train": groups[2 * n_test : n], "val": groups[:n_test]}
    splits["test"] = groups[n_test : 2 * n_test]
    if len(groups) > n:
        splits["sketches"] = groups[n:]
    is_wide = dataset == "wide"
    return to_images(images, size, max_tiles) if is_wide else torch.from_numpy(images), splits
