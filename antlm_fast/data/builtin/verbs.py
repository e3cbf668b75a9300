"""The verbs of the built-in corpus: their forms, and what each may stand with."""

from __future__ import annotations

from typing import NamedTuple


class Verb(NamedTuple):
    """The five forms of a verb, and its aspect, which says where they may stand.

    event: everywhere. instant: no progressive ("is finding"). perception: no progressive, no passive and no adverbial
    of time. state: nor a perfect ("has wanted").
    """

    base: str
    third: str
    past: str
    participle: str
    ing: str
    aspect: str


def _words(table: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in table.split(","))


def _verbs(aspect: str, table: str) -> dict[str, Verb]:
    entries = [entry.split() for entry in table.split(",")]
    return {entry[0]: Verb(entry[0], entry[1], entry[2], entry[3], entry[4], aspect) for entry in entries}


# base, third person singular, past, participle, ing
VERBS = _verbs(
    "event",
    """
    help helps helped helped helping, thank thanks thanked thanked thanking, visit visits visited visited visiting,
    follow follows followed followed following, hug hugs hugged hugged hugging, call calls called called calling, meet
    meets met met meeting, watch watches watched watched watching, praise praises praised praised praising, wake wakes
    woke woken waking, teach teaches taught taught teaching, invite invites invited invited inviting, feed feeds fed
    fed feeding, catch catches caught caught catching, chase chases chased chased chasing, wash washes washed washed
    washing, draw draws drew drawn drawing, carry carries carried carried carrying, hold holds held held holding, hide
    hides hid hidden hiding, fix fixes fixed fixed fixing, paint paints painted painted painting, clean cleans cleaned
    cleaned cleaning, push pushes pushed pushed pushing, throw throws threw thrown throwing, buy buys bought bought
    buying, sell sells sold sold selling, take takes took taken taking, bring brings brought brought bringing, borrow
    borrows borrowed borrowed borrowing, lift lifts lifted lifted lifting, eat eats ate eaten eating, bake bakes baked
    baked baking, cut cuts cut cut cutting, make makes made made making, drink drinks drank drunk drinking, read reads
    read read reading, write writes wrote written writing, finish finishes finished finished finishing, leave leaves
    left left leaving, enter enters entered entered entering, explore explores explored explored exploring, move moves
    moved moved moving, open opens opened opened opening, close closes closed closed closing, steal steals stole
    stolen stealing, hurt hurts hurt hurt hurting, dry dries dried dried drying, warm warms warmed warmed warming,
    protect protects protected protected protecting, blame blames blamed blamed blaming, enjoy enjoys enjoyed enjoyed
    enjoying, sleep sleeps slept slept sleeping, wait waits waited waited waiting, run runs ran run running, walk
    walks walked walked walking, swim swims swam swum swimming, jump jumps jumped jumped jumping, dance dances danced
    danced dancing, play plays played played playing, work works worked worked working, sing sings sang sung singing,
    sneeze sneezes sneezed sneezed sneezing, yawn yawns yawned yawned yawning, snore snores snored snored snoring,
    shiver shivers shivered shivered shivering, fall falls fell fallen falling, arrive arrives arrived arrived
    arriving, disappear disappears disappeared disappeared disappearing, laugh laughs laughed laughed laughing, giggle
    giggles giggled giggled giggling, smile smiles smiled smiled smiling, cry cries cried cried crying, give gives
    gave given giving, show shows showed shown showing, send sends sent sent sending, lend lends lent lent lending,
    say says said said saying, try tries tried tried trying, decide decides decided decided deciding, begin begins
    began begun beginning, learn learns learned learned learning
    """,
)
VERBS |= _verbs(
    "instant",
    """
    find finds found found finding, lose loses lost lost losing, drop drops dropped dropped dropping, break breaks
    broke broken breaking, reach reaches reached reached reaching, surprise surprises surprised surprised surprising,
    discover discovers discovered discovered discovering, guess guesses guessed guessed guessing
    """,
)
VERBS |= _verbs(
    "perception",
    """
    see sees saw seen seeing, hear hears heard heard hearing, remember remembers remembered remembered remembering,
    forget forgets forgot forgotten forgetting, notice notices noticed noticed noticing
    """,
)
VERBS |= _verbs(
    "state",
    """
    love loves loved loved loving, like likes liked liked liking, know knows knew known knowing, trust trusts trusted
    trusted trusting, admire admires admired admired admiring, miss misses missed missed missing, want wants wanted
    wanted wanting, need needs needed needed needing, think thinks thought thought thinking, believe believes believed
    believed believing, hope hopes hoped hoped hoping
    """,
)


def _select(table: str) -> tuple[Verb, ...]:
    return tuple(VERBS[base] for base in table.split())


# Which verb takes which kind of object, by the kind of its subject.
TRANSITIVE = {
    "person": {
        "person": _select(
            "help thank visit follow hug call meet watch find praise wake surprise teach invite see hear "
            "love like know trust admire miss remember"
        ),
        "animal": _select("feed catch chase follow watch find wash draw hug see hear love like protect"),
        "thing": _select(
            "carry hold drop hide fix paint clean push throw buy sell take bring lose find borrow lift draw see "
            "want need like"
        ),
        "food": _select("eat cut buy sell take bring want need like"),
        "mass": _select("eat buy sell bring want need like make"),
        "drink": _select("drink buy sell bring want need like"),
        "text": _select("read write finish find lose bring borrow like love remember take"),
        "place": _select("visit leave reach enter explore find clean see like love remember"),
        "furniture": _select("clean paint fix move buy sell lift break need like"),
        "container": _select("open close carry lift find take hide move clean break"),
    },
    "animal": {
        "person": _select("follow watch find wake chase see hear like trust"),
        "animal": _select("follow watch find wake chase catch see hear like"),
        "thing": _select("find drop hide carry push take see want"),
        "food": _select("eat find steal take see want"),
        "place": _select("leave reach enter explore find"),
    },
}
# The same as pairs (verb, kind of object), by where the verb is to stand and the kind of its subject.
FRAMES = {
    use: {
        subject: tuple((verb, kind) for kind, verbs in frames.items() for verb in verbs if verb.aspect in aspects)
        for subject, frames in TRANSITIVE.items()
    }
    for use, aspects in {
        "any": ("event", "instant", "perception", "state"),
        "perfect": ("event", "instant", "perception"),
        "active": ("event", "instant"),
        "progressive": ("event",),
    }.items()
}
# Verbs that never stand without an object, and verbs that never take one: the minimal pairs rest on these.
STRICTLY_TRANSITIVE = frozenset(
    _select("thank praise surprise find carry fix bring like love trust admire want need take make invite")
)
STRICTLY_INTRANSITIVE = {
    "person": _select("sleep sneeze yawn snore arrive disappear laugh giggle smile shiver wait fall"),
    "animal": _select("sleep sneeze yawn snore arrive disappear shiver wait fall"),
}

# Intransitive verbs by subject, each with the adverbs that suit it.
_REST = _words("quietly, peacefully, for a long time, alone")
_MOVE = _words("quickly, slowly, happily, quietly, fast, away")
_SOUND = _words("loudly, quietly, softly, suddenly, again")
_FALL = _words("suddenly, again")
_PLAY = _words("happily, quietly, alone, again")
_COME = _words("early, late, suddenly, again")
_COMMON_FRAMES = (
    [(verb, _REST) for verb in _select("sleep wait")]
    + [(verb, _MOVE) for verb in _select("run walk swim jump")]
    + [(verb, _PLAY) for verb in _select("play")]
    + [(verb, _SOUND) for verb in _select("sneeze yawn snore shiver")]
    + [(verb, _COME) for verb in _select("arrive disappear")]
    + [(verb, _FALL) for verb in _select("fall")]
)
INTRANSITIVE_FRAMES = {
    "person": tuple(
        _COMMON_FRAMES
        + [(verb, _SOUND) for verb in _select("laugh giggle smile cry")]
        + [(verb, _PLAY) for verb in _select("dance work sing")]
    ),
    "animal": tuple(_COMMON_FRAMES),
    "thing": tuple((verb, _FALL) for verb in _select("fall disappear")),
}
REFLEXIVE = {
    "person": _select("wash dry hurt hide warm protect blame enjoy surprise praise draw paint see admire trust help"),
    "animal": _select("wash dry hurt hide warm protect see"),
}
DITRANSITIVE = _select("give show send lend bring sell")
THAT_CLAUSE = _select("think know say hope believe remember notice forget discover guess")
# Verbs of which an object pronoun is never read as the receiver ("find them a ball").
NOT_DATIVE = frozenset(
    _select(
        "help thank visit follow hug meet watch praise invite love like trust admire carry hold drop hide "
        "paint clean push lose borrow lift break eat drink finish leave reach enter explore chase catch"
    )
)
WH_CLAUSE = _select("know remember notice forget discover guess learn")
INFINITIVE = _select("want try hope decide begin learn need like")

# Contractions stand beside the full forms.
NEGATED = {
    "is": "isn't",
    "are": "aren't",
    "was": "wasn't",
    "were": "weren't",
    "has": "hasn't",
    "have": "haven't",
    "had": "hadn't",
    "does": "doesn't",
    "do": "don't",
    "did": "didn't",
    "can": "can't",
    "could": "couldn't",
    "will": "won't",
}
OTHER_NUMBER = {
    good: bad
    for one, many in (("is", "are"), ("was", "were"), ("has", "have"), ("does", "do"))
    for good, bad in ((one, many), (many, one), (NEGATED[one], NEGATED[many]), (NEGATED[many], NEGATED[one]))
}

# Adverbials that suit a form of the verb.
WHEN = {
    "past": _words("yesterday, last night, last week, in the morning, after lunch, before dinner, in the evening"),
    "past_progressive": _words("yesterday, all day, all night, in the morning, after lunch"),
    "present": _words("every day, every morning, in the evening, after lunch, at night"),
    "progressive": _words("now, right now, today, this morning"),
    "perfect": _words("again, today, this week, many times, twice"),
    "will": _words("tomorrow, soon, next week, after lunch, tonight"),
    "can": _words("now, today, again"),
}
