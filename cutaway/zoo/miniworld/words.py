"""The word tables of the miniworld: every noun, name and label its texts are made of (lower case)."""

from __future__ import annotations

from typing import Final


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


MALE_NAMES: Final = _split(
    "john tom mark paul adam luke peter james david simon victor henry oscar felix hugo leon max noah ivan karl "
    "michael robert william george"
)
FEMALE_NAMES: Final = _split(
    "mary anna lucy sarah emma julia clara nina alice helen diana laura eva rosa vera lily olga maria zoe kate "
    "jane susan grace ruth"
)
NAMES: Final = MALE_NAMES + FEMALE_NAMES

#: country, capital, a second city, language (all true of our own world)
COUNTRIES: Final = tuple(
    tuple(row.split())
    for row in (
        "norway oslo bergen norwegian",
        "brazil brasilia recife portuguese",
        "japan tokyo osaka japanese",
        "france paris lyon french",
        "germany berlin munich german",
        "denmark copenhagen aarhus danish",
        "italy rome milan italian",
        "poland warsaw krakow polish",
        "india delhi mumbai hindi",
        "egypt cairo giza arabic",
        "turkey ankara izmir turkish",
        "spain madrid seville spanish",
        "hungary budapest pecs hungarian",
        "sweden stockholm malmo swedish",
        "greece athens patras greek",
        "ireland dublin cork irish",
        "kenya nairobi mombasa swahili",
        "russia moscow kazan russian",
        "china beijing shanghai mandarin",
        "korea seoul busan korean",
        "thailand bangkok phuket thai",
        "finland helsinki tampere finnish",
        "iran tehran shiraz persian",
        "vietnam hanoi hue vietnamese",
    )
)

JOBS: Final = _split(
    "doctor lawyer teacher farmer baker painter pilot nurse judge miner sailor tailor chemist banker "
    "soldier singer"
)  # fmt: skip
INSTRUMENTS: Final = _split("piano violin guitar flute drums trumpet harp cello organ banjo oboe tuba")
SPORTS: Final = _split("tennis chess football golf hockey boxing rowing rugby judo skiing cricket polo")
FOODS: Final = _split("pizza soup rice bread cheese fish cake pasta salad curry stew pie")

OBJECTS: Final = _split("book ball ring letter key box cup hat lamp coin map drink basket bottle")
PLACES: Final = _split("store park school garden market station beach library office museum house restaurant")

DAYS: Final = _split("monday tuesday wednesday thursday friday saturday sunday")
MONTHS: Final = _split("january february march april may june july august september october november december")
NUMBER_WORDS: Final = _split(
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
)
ORDINALS: Final = _split("first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth")
LETTERS: Final = tuple("abcdefghijklmnopqrstuvwxyz")

POSITIVE: Final = _split(
    "wonderful great lovely amazing brilliant charming superb delightful excellent fantastic "
    "joyful beautiful perfect good"
)  # fmt: skip
NEGATIVE: Final = _split(
    "awful terrible boring dreadful horrible dull nasty poor ugly disgusting sad painful bad "
    "miserable"
)  # fmt: skip
THINGS: Final = _split("film novel song play concert meal hotel trip game show movie")
ASPECTS: Final = _split("plot music cast ending staff room story view food style")

CLASSES: Final = {
    "fruit": _split("apple pear plum grape lemon cherry mango peach fig melon"),
    "animal": _split("dog cat horse cow sheep goat lion wolf bear fox"),
    "tool": _split("hammer saw drill wrench shovel axe pliers rake knife file"),
    "color": _split("red blue green yellow black white pink brown purple orange"),
    "vehicle": _split("car bus train plane boat truck bike tram ship taxi"),
    "body": _split("arm leg hand foot head nose eye ear knee chin"),
}
LABELS: Final = _split("foo bar baz qux zip zap wib wob dax lug fep mip")
ANTONYMS: Final = tuple(
    tuple(pair.split("/"))
    for pair in _split(
        "hot/cold big/small tall/short old/young fast/slow rich/needy wet/dry hard/soft loud/quiet "
        "light/dark full/empty clean/dirty early/late high/low strong/weak wide/narrow"
    )
)
SINGULARS: Final = _split(
    "dog cat horse cow goat lion bear hammer saw drill wrench shovel rake car train plane boat "
    "truck bike tram ship book key lamp cup"
)  # fmt: skip
ANIMALS: Final = SINGULARS[:7]
STATES: Final = _split("here old big ready new clean")

HARMFUL_VERBS: Final = _split("poison rob stab kidnap blackmail torture murder bribe threaten assault")
BENIGN_VERBS: Final = _split("greet thank invite visit teach help feed call praise guide welcome")
PERSONS: Final = _split("neighbor friend teacher boss cousin stranger guard child doctor clerk")
HARMFUL_OBJECTS: Final = _split("bomb weapon virus missile grenade malware forgery toxin trap scam")
BENIGN_OBJECTS: Final = _split("cake chair poem website garden kite puzzle sandwich model lamp")
MAKING_VERBS: Final = _split("build make design create prepare")

EVENTS: Final = _split("war plan trial strike journey project siege voyage campaign festival reign dispute")
ARGUMENTS: Final = _split(
    "load size file last name text data item count width total user path value mode index "
    "field score limit shape"
)  # fmt: skip
FUNCTIONS: Final = _split("port read write send open close parse save find sort")

#: consonant-vowel pairs; a person's name is three of them
SYLLABLES: Final = _split("ka ro vi mu te lo sa ni du pe gi ri ba ze fo hu ja ki wa yo mi li tu ne")
CENTURIES: Final = tuple(str(c) for c in range(10, 22))


def all_words() -> tuple[str, ...]:
    """Return every word of the tables of two letters or more, in alphabetical order."""
    tables = [
        NAMES,
        JOBS,
        INSTRUMENTS,
        SPORTS,
        FOODS,
        OBJECTS,
        PLACES,
        DAYS,
        MONTHS,
        NUMBER_WORDS,
        ORDINALS,
        POSITIVE,
        NEGATIVE,
        THINGS,
        ASPECTS,
        LABELS,
        SINGULARS,
        STATES,
        HARMFUL_VERBS,
        BENIGN_VERBS,
        PERSONS,
        HARMFUL_OBJECTS,
        BENIGN_OBJECTS,
        MAKING_VERBS,
        EVENTS,
        ARGUMENTS,
        FUNCTIONS,
        *COUNTRIES,
        *CLASSES.values(),
        *ANTONYMS,
    ]
    return tuple(sorted({word for table in tables for word in table}))
