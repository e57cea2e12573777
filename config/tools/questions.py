"""
Conversations about drawn images, about pairs of them, and about clips in which things move, grow, appear or vanish.

Every question has one right answer in one wording, so that an answer is checked by comparing strings. Where things are
counted, or something has changed, or one thing is found by another, the answer says first where, and then how many or
what: each word is easy once those before it stand there (a chain of thought, Wei et al. 2022).
"""

import numpy as np

from config.tools.shapes import COLOURS, PLACES, RADII, SHAPES, SIZES, Thing, between, background, draw, draw_scene, \
    look_of

VALUES = {"size": SIZES, "colour": list(COLOURS), "shape": SHAPES}
GRID = {divmod(i, 3): place for i, place in enumerate(PLACES)}  # (row, column) -> place
ONE_IMAGE = ("caption", "count", "count", "exists", "size", "colour", "shape", "place", "relation", "follow-up",
             "follow-up")  # the conversations about each; counting is the hardest
NUMBERS = ("none", "one", "two", "three", "four", "five")
WAYS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}  # rows and columns
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
ASKS = {  # by kind; {} stands for what is asked about
    "caption": ("what is there?", "what do you see?", "describe the image"),
    "count": ("how many {} are there?", "how many {} do you see?", "count the {}"),
    "exists": ("is there {}?", "do you see {}?"),
    "size": ("how large is {}?", "what size is {}?"),
    "colour": ("what colour is {}?", "which colour has {}?"),
    "shape": ("what shape is {}?", "which shape has {}?"),
    "place": ("where is {}?", "in which place is {}?"),
    "relation": ("what is {}?", "which shape is {}?"),
    "change": ("what has changed?", "what is different in the second image?", "what is the difference?"),
    "more": ("which image has more {}?", "in which image are more {}?"),
    "event": ("what happens?", "what happens in the clip?", "describe the clip"),
    "direction": ("which way does {} move?", "where does {} move to?"),
    "does": ("what does {} do?", "what happens to {}?"),
    "first": ("what happens first?", "what comes first?")}
LEANING = {"size": ("and how large is it?", "and its size?"), "colour": ("and what colour is it?", "and its colour?"),
           "shape": ("and what shape is it?", "and its shape?"), "place": ("and where is it?", "and its place?")}


def pick(rng, options):
    return options[rng.integers(len(options))]


def a(words):
    return f"an {words}" if words.startswith("orange") else f"a {words}"


def named(attributes):
    """{attribute: value} -> the words for what has them, such as "large circle" or "thing in the top left"."""
    words = [attributes.get("size"), attributes.get("colour"), attributes.get("shape", "thing")]
    return " ".join(filter(None, words)) + (f" in the {attributes['place']}" if "place" in attributes else "")


def places_of(things, attributes):
    return [thing.place for thing in things if all(getattr(thing, name) == value for name, value in attributes.items())]


def how_many(things, attributes):
    return len(places_of(things, attributes))


def phrase(thing, things, rng, *hidden):
    """Words that fit this one of the things alone, without its hidden attributes; None where there are none."""
    shown, options = [name for name in Thing._fields if name not in hidden], []
    for k in range(1, 2 ** len(shown)):
        attributes = {name: getattr(thing, name) for i, name in enumerate(shown) if k >> i & 1}
        if how_many(things, attributes) == 1 and ("place" not in attributes or len(attributes) == 1):
            options.append(named(attributes))
    return f"the {pick(rng, options)}" if options else None


def make_scene(n, rng):
    """n things in the order of their places, no two of the same size, colour and shape; of few colours and few shapes,
    so that most things share something with another."""
    colours, shapes = (rng.permutation(VALUES[name])[:rng.integers(2, 4)] for name in ("colour", "shape"))
    kinds = [(size, str(colour), str(shape)) for size in SIZES for colour in colours for shape in shapes]
    places = sorted(rng.permutation(len(PLACES))[:n])
    return [Thing(*kinds[k], PLACES[p]) for k, p in zip(rng.permutation(len(kinds)), places)]


def grid_place(thing):
    """(row, column), each from 0 to 2"""
    return np.array(divmod(PLACES.index(thing.place), 3))


def countable(things, rng):
    """What to count: words, and the attributes of what they mean."""
    name = pick(rng, ("all", "colour", "shape"))
    if name == "all":
        return "shapes", {}
    value = pick(rng, (getattr(pick(rng, things), name), pick(rng, VALUES[name])))
    return f"{value} shapes" if name == "colour" else f"{value}es" if value == "cross" else f"{value}s", {name: value}


def describe(things):
    return ", ".join(f"{a(thing.words())} in the {thing.place}" for thing in things)


def ask(kind, things, rng):
    """The turns of a conversation about one image, [(kind, question, answer)]; None where the things allow none.
    follow-up: two or three turns, of which the later lean on what was said."""
    thing, first = pick(rng, things), kind
    if kind == "follow-up":
        first = pick(rng, ("size", "colour", "shape", "place", "relation"))
    if first == "caption":
        about, answer = "", describe(things)
    elif first == "count":
        about, attributes = countable(things, rng)
        places = places_of(things, attributes)
        answer = f"{', '.join(places)}: {NUMBERS[len(places)]}" if places else "none"
    elif first == "exists":  # yes and no are equally likely; what is not there differs in one attribute from what is
        shown = [str(name) for name in rng.permutation(list(VALUES))[:rng.integers(1, 4)]]
        attributes, answer = {name: getattr(thing, name) for name in shown}, pick(rng, ("yes", "no"))
        if answer == "no":
            misses = [attributes | {name: value} for name in shown for value in VALUES[name]]
            attributes = pick(rng, [miss for miss in misses if not how_many(things, miss)] or [None])
        if attributes is None:
            return None
        about = a(named(attributes))
    elif first == "relation":
        way, who = pick(rng, list(WAYS)), phrase(thing, things, rng)
        there = [other for other in things if (grid_place(other) - grid_place(thing)) @ WAYS[way] > 0]
        if who is None or len(there) > 1 or not there and (kind == "follow-up" or rng.random() < 0.7):
            return None  # unclear; or "nothing", which would be the answer too often
        about, answer = f"{way} {who}", f"{way} the {thing.place}: {a(there[0].words()) if there else 'nothing'}"
        thing = there[0] if there else thing
    else:  # an attribute
        about, answer = phrase(thing, things, rng, first), getattr(thing, first)
        if about is None:
            return None
    turns = [(first, pick(rng, ASKS[first]).format(about), answer)]
    if kind == "follow-up":
        new = [name for name in rng.permutation(list(LEANING)) if getattr(thing, name) not in " ".join(turns[0][1:])]
        turns += [(kind, pick(rng, LEANING[name]), getattr(thing, name)) for name in new[:rng.integers(1, 3)]]
    return turns if kind == turns[-1][0] else None


def ask_until(kind, things, rng):
    """ask(), again until the things allow it."""
    while (turns := ask(kind, things, rng)) is None:
        pass
    return turns


def change(things, rng):
    """The things of a second image in which one thing differs, or none, and the answer that says what has changed."""
    what, i = pick(rng, ("colour", "place", "size", "more", "less", "nothing")), rng.integers(len(things))
    thing, others = things[i], [*things[:i], *things[i + 1:]]
    free = [place for place in PLACES if place not in [thing.place for thing in things]]
    if what == "nothing":
        return things, "nothing"
    if what == "less":
        return others, f"in the {thing.place}, the {thing.words()} is gone"
    if what == "more":
        new = Thing(pick(rng, SIZES), pick(rng, VALUES["colour"]), pick(rng, SHAPES), pick(rng, free))
        others, answer = things, f"in the {new.place}, there is a new {new.words()}"
    else:
        value = pick(rng, [v for v in (free if what == "place" else VALUES[what]) if v != getattr(thing, what)])
        new = thing._replace(**{what: value})
        answer = f"in the {thing.place}, the {thing.words()} is now {'in the ' * (what == 'place')}{value}"
    if how_many(things if what == "more" else others, dict(zip(VALUES, new))):
        return change(things, rng)  # two would look alike
    return sorted([*others, new], key=lambda thing: PLACES.index(thing.place)), answer


def ask_pair(rng):
    """Two scenes, and the conversations about both together."""
    before = make_scene(rng.integers(1, 5), rng)
    if changed := rng.random() < 0.8:
        after, answer = change(before, rng)
        talks = [[("change", pick(rng, ASKS["change"]), answer)]]
    if not changed or not after:
        after, talks = make_scene(rng.integers(1, 5), rng), []
    scenes = before, after
    for _ in range(2):
        equal = rng.random() < 0.3
        for _ in range(20):
            words, attributes = countable(pick(rng, scenes), rng)
            counts = [how_many(things, attributes) for things in scenes]
            if (counts[0] == counts[1]) == equal:
                break
        answer = "neither" if counts[0] == counts[1] else ("the first", "the second")[counts[1] > counts[0]]
        talks.append([("more", pick(rng, ASKS["more"]).format(words), answer)])
        which = rng.integers(2)  # a question about one of the two
        kind = pick(rng, ("caption", "count", "size", "colour", "shape", "place"))
        (_, question, answer), = ask_until(kind, scenes[which], rng)
        talks.append([("of two", f"in the {('first', 'second')[which]} image, {question}", answer)])
    return scenes, talks


def ask_clip(rng):
    """A clip of four to eight frames in which one or two things change: a list of looks each; and the conversations."""
    things, said = make_scene(rng.integers(2, 4), rng), []
    tracks = [(look, look, 0) for look in (look_of(thing, rng) for thing in things)]  # first and last look, and when
    goes, does, taken = ["nowhere"] * len(things), ["nothing"] * len(things), {thing.place for thing in things}
    for when, i in enumerate(rng.permutation(len(things))[:rng.integers(1, 3)]):
        thing, look = things[i], tracks[i][0]
        targets = {way: GRID.get(tuple(grid_place(thing) + step)) for way, step in DIRECTIONS.items()}
        ways = [way for way, place in targets.items() if place and place not in taken]
        grown = {"size": "large", "colour": thing.colour, "shape": thing.shape}
        grows = thing.size == "small" and not how_many(things, grown)
        event = pick(rng, ["moves"] * (2 * bool(ways)) + ["grows"] * (2 * grows) + ["appears", "vanishes"])
        first, last = look, look
        if event == "moves":
            goes[i] = pick(rng, ways)
            taken.add(targets[goes[i]])
            last = look._replace(middle=look.middle + np.array(DIRECTIONS[goes[i]][::-1]) / 3)
        elif event == "grows":
            last = look._replace(radius=look.radius * RADII["large"] / RADII["small"])
        elif event == "appears":
            first = None
        else:
            last = None
        tracks[i] = first, last, when
        who = a(thing.words()) if event == "appears" else f"the {thing.words()}"
        does[i] = event + (f" {goes[i]}" if event == "moves" else "")
        said.append(f"{who} {does[i]}")
    frames = []
    for now in np.linspace(0, len(said), rng.integers(4, 9)):
        shares = [min(max(now - when, 0), 1) for *_, when in tracks]  # how far the change of each is
        looks = [between(first, last, share) for (first, last, _), share in zip(tracks, shares)]
        frames.append([look for look in looks if look])
    talks = [[("event", pick(rng, ASKS["event"]), ", then ".join(said))]]
    if len(said) == 2:
        talks.append([("first", pick(rng, ASKS["first"]), said[0])])
    hidden = ("place", "size") if "grows" in " ".join(said) else ("place",)
    for i, (thing, way) in enumerate(zip(things, goes)):
        who = phrase(thing, things, rng, *hidden)
        if who and (way != "nowhere" or rng.random() < 0.15):
            talks.append([("direction", pick(rng, ASKS["direction"]).format(who), way)])
        if who and (does[i] != "nothing" or rng.random() < 0.5):
            talks.append([("does", pick(rng, ASKS["does"]).format(who), does[i])])
    return frames, talks


def draw_conversations(n, size, seed):
    """n groups of conversations, a quarter about one image, which is the easiest, and as many about two as about the
    frames of a clip: the images, (m, 3, size, size) uint8; and the groups, lists of samples (see mllm.py) about the
    same images. An answer says of which kind its question is."""
    rng, images, groups = np.random.default_rng(seed), [], []
    for i in range(n):
        begin = len(images)
        if i % 8 >= 5:
            frames, talks = ask_clip(rng)
            ground = background(rng)
            images += [draw(looks, ground, size) for looks in frames]
        else:
            if i % 8 >= 2:
                scenes, talks = ask_pair(rng)
            else:
                scenes = [make_scene(rng.integers(1, 5), rng)]
                talks = [[("caption", "", describe(scenes[0]))]]  # without a question
                talks += [ask_until(kind, scenes[0], rng) for kind in ONE_IMAGE]
            images += [draw_scene(things, size, rng) for things in scenes]
        numbers, group = list(range(begin, len(images))), []
        for turns in talks:
            messages = []
            for kind, question, answer in turns:
                messages += [{"role": "user", "content": question},
                             {"role": "assistant", "content": answer, "kind": kind}]
            messages[0]["content"] = "<image>" * len(numbers) + messages[0]["content"]
            group.append({"images": numbers, "messages": messages})
        groups.append(group)
    return np.stack(images), groups
