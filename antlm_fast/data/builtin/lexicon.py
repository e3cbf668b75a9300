"""The words of the built-in corpus, with the features that its grammar reads.

The lists are small and hand-made: everyday English of a children's book, third person only. First names are ordinary
ones and mean nobody. Left out on purpose: nouns whose singular and plural look alike (sheep, fish), names given to
both girls and boys, and words whose first letter does not tell "a" from "an" (hour, uniform).
"""

from __future__ import annotations

from typing import NamedTuple


class Noun(NamedTuple):
    """A noun or a first name; plural is "" for names and mass nouns.

    kind: person, animal, thing, food, mass, drink, text, place, furniture, container or landmark.
    gender: m, f, c (person of either gender) or n.
    """

    singular: str
    plural: str
    kind: str
    gender: str


class Pronouns(NamedTuple):
    """The forms of one third-person pronoun."""

    subject: str
    object: str
    possessive: str
    reflexive: str


def _nouns(kind: str, gender: str, table: str) -> tuple[Noun, ...]:
    entries = [entry.split() for entry in table.split(",")]
    return tuple(Noun(words[0], words[1] if len(words) > 1 else "", kind, gender) for words in entries)


def _words(table: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in table.split(","))


NAMES = _nouns(
    "person",
    "m",
    "Tom, Ben, Peter, Paul, Jack, Max, Leo, David, Daniel, Henry, Oscar, James",
) + _nouns(
    "person",
    "f",
    "Anna, Mary, Lucy, Emma, Sara, Julia, Nina, Rosa, Clara, Alice, Helen, Eva",
)
GENDERED = _nouns(
    "person",
    "m",
    "boy boys, man men, king kings, prince princes, father fathers, brother brothers, uncle uncles, "
    "grandfather grandfathers",
) + _nouns(
    "person",
    "f",
    "girl girls, woman women, queen queens, princess princesses, mother mothers, sister sisters, aunt aunts, "
    "grandmother grandmothers",
)
COMMON = _nouns(
    "person",
    "c",
    "teacher teachers, farmer farmers, doctor doctors, baker bakers, child children, friend friends, "
    "neighbor neighbors, driver drivers, student students, singer singers, painter painters, sailor sailors, "
    "nurse nurses, guest guests, visitor visitors, hunter hunters, cousin cousins",
)
PEOPLE = GENDERED + COMMON
ANIMALS = _nouns(
    "animal",
    "n",
    "dog dogs, cat cats, horse horses, mouse mice, goose geese, wolf wolves, bear bears, rabbit rabbits, duck ducks, "
    "cow cows, fox foxes, bird birds, frog frogs, goat goats, hen hens, pig pigs, calf calves, "
    "owl owls, squirrel squirrels, pony ponies, puppy puppies",
)
THINGS = _nouns(
    "thing",
    "n",
    "ball balls, hat hats, lamp lamps, drum drums, toy toys, key keys, ring rings, coin coins, cup cups, plate plates, "
    "knife knives, umbrella umbrellas, kite kites, bottle bottles, shoe shoes, coat coats, "
    "scarf scarves, candle candles, clock clocks, blanket blankets, flower flowers, "
    "leaf leaves, bell bells, picture pictures, map maps",
)
FOOD = _nouns(
    "food",
    "n",
    "apple apples, egg eggs, cake cakes, pie pies, cookie cookies, pear pears, carrot carrots, potato potatoes, "
    "tomato tomatoes, cherry cherries, onion onions, orange oranges, sandwich sandwiches, berry berries",
)
MASS = _nouns("mass", "n", "bread, cheese, honey, rice, butter, soup")
DRINKS = _nouns("drink", "n", "milk, juice, water, tea")
TEXTS = _nouns("text", "n", "book books, letter letters, story stories, poem poems, note notes")
PLACES = _nouns(
    "place",
    "n",
    "garden gardens, forest forests, kitchen kitchens, park parks, village villages, house houses, barn barns, "
    "castle castles, school schools, market markets, farm farms, field fields, yard yards, library libraries, "
    "town towns, cave caves, island islands",
)
PLACE_PREPOSITION = {noun.singular: "in" for noun in PLACES} | {
    "school": "at",
    "market": "at",
    "farm": "on",
    "island": "on",
}
FURNITURE = _nouns(
    "furniture",
    "n",
    "table tables, chair chairs, bed beds, bench benches, shelf shelves, desk desks, cupboard cupboards",
)
CONTAINERS = _nouns("container", "n", "box boxes, basket baskets, bag bags, suitcase suitcases")
LANDMARKS = _nouns(
    "landmark",
    "n",
    "tree trees, fence fences, wall walls, door doors, window windows, bridge bridges, river rivers, "
    "lake lakes, hill hills, tower towers",
)
NOUNS = {
    "person": PEOPLE,
    "animal": ANIMALS,
    "thing": THINGS,
    "food": FOOD,
    "mass": MASS,
    "drink": DRINKS,
    "text": TEXTS,
    "place": PLACES,
    "furniture": FURNITURE,
    "container": CONTAINERS,
    "landmark": LANDMARKS,
}

PRONOUNS = {
    "m": Pronouns("he", "him", "his", "himself"),
    "f": Pronouns("she", "her", "her", "herself"),
    "n": Pronouns("it", "it", "its", "itself"),
    "p": Pronouns("they", "them", "their", "themselves"),
}

# Attributive adjectives of each kind of noun, and adjectives that follow "be".
_SIZES = "small, big, little, old, "
ADJECTIVES = {
    "person": _words(
        "kind, tall, young, old, clever, quiet, shy, brave, tired, hungry, happy, sad, busy, funny, proud, polite, "
        "cheerful, lazy"
    ),
    "animal": _words(_SIZES + "brown, black, white, gray, hungry, noisy, quick, gentle, sleepy, friendly, clever"),
    "thing": _words(_SIZES + "red, blue, green, yellow, new, heavy, shiny, pretty, dirty, lovely, expensive, cheap"),
    "food": _words("small, big, sweet, fresh, tasty, warm"),
    "mass": _words("fresh, warm, good, tasty"),
    "drink": _words("fresh, warm, cold, good"),
    "text": _words("short, long, old, new, funny, sad, interesting, beautiful"),
    "place": _words("quiet, big, old, dark, busy, beautiful, small, strange"),
    "furniture": _words(_SIZES + "wooden, green, white, new, dirty, heavy"),
    "container": _words(_SIZES + "empty, wooden, open, red, heavy"),
    "landmark": _words("old, high, big, beautiful, narrow"),
}
PREDICATES = {
    "person": _words(
        "tired, hungry, happy, sad, ready, late, afraid, awake, asleep, sick, safe, angry, glad, thirsty, alone, busy, "
        "surprised, kind, brave, quiet, polite, lonely, very tired, very happy, very proud, too late, very hungry"
    ),
    "animal": _words(
        "tired, hungry, asleep, awake, afraid, wet, thirsty, safe, quiet, very fast, very big, very small"
    ),
    "thing": _words("new, old, heavy, dirty, wet, clean, very old, very pretty, too small, too big, red, blue, green"),
    "food": _words("sweet, fresh, tasty, cold, very good"),
    "text": _words("short, long, funny, sad, very interesting, very beautiful"),
    "place": _words("quiet, dark, empty, beautiful, very old, very big, far away"),
}

SINGULAR_DETERMINERS = _words(
    "the, the, the, the, the, the, the, the, the, the, a, a, a, a, a, this, this, this, that, that, that, every, each, "
    "another, one"
)
PLURAL_DETERMINERS = _words(
    "the, the, the, the, the, the, the, the, these, these, those, those, many, some, some, two, three, all the, most"
)
