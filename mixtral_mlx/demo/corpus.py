"""The text the demo model learns from: conversations put together from the tables.

Every conversation follows from a seed, and every answer follows from what was said before it, so an answer is either
right or wrong. `conversations` makes training text, `held_out` makes questions that never occur in it, `is_correct`
marks an answer. Standard library only; knows nothing of tokens, tensors or training."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from zlib import crc32

from mixtral_mlx.demo import tables as t

Messages = tuple[tuple[str, str], ...]  # (role, text); roles are system, user and assistant
Wordings = tuple[Sequence[str], Sequence[str]]  # (trained, kept for the test)

# How a turn is drawn: as in training; an item, pair or range never trained with that wording; a wording never trained.
TRAIN, PAIRING, WORDING = "train", "pairing", "wording"


@dataclass(frozen=True)
class Question:
    """A conversation that ends with the user's turn, and what a right answer to it is."""

    messages: Messages
    accepted: tuple[str, ...]
    kind: str
    split: str = PAIRING
    subject: str = ""  # what a story must speak of


def conversations(seed: int) -> Iterator[Messages]:
    """Endless training conversations, most of 1 to 6 exchanges, a few of up to 40."""
    rng = random.Random(seed)
    while True:
        talk = Talk(rng, one_word=rng.random() < 0.05)
        for _ in range(_exchanges(rng)):
            talk.add(talk.turn(TRAIN))
        yield talk.messages()


def held_out(seed: int, count: int = 1000) -> list[Question]:
    """Questions of every kind that never occur in training: new pairings of item and wording, and new wordings."""
    rng = random.Random(seed)
    kinds = [(kind, PAIRING) for kind in KINDS if kind not in NO_PAIRINGS] + [(kind, WORDING) for kind in KINDS]
    return [_question(rng, *kinds[n % len(kinds)]) for n in range(count)]


def is_correct(question: Question, answer: str) -> bool:
    """A story needs three sentences that speak of its subject; any other answer must match exactly."""
    if not question.subject:
        return answer.strip() in question.accepted
    sentences = re.findall(r"[A-Z][^.!?]*[.!?]", answer)
    named = re.search(rf"\b{re.escape(question.subject)}\b", answer)
    return len(sentences) == 3 and " ".join(sentences) == answer.strip() and named is not None


def _exchanges(rng: random.Random) -> int:
    return rng.choice((1, 1, 1, 1, 2, 2, 3, 3, 4, 5, 6, 6)) if rng.random() < 0.97 else rng.randint(7, 40)


def _question(rng: random.Random, kind: str, split: str) -> Question:
    talk = Talk(rng)
    for _ in range(rng.choice((0, 0, 0, 1, 2, 4))):
        talk.add(talk.turn(TRAIN))
    turn = talk.ask(kind, split)
    messages = (*talk.messages(), ("user", turn.user))
    return Question(messages, (turn.answer,), kind, split, turn.subject)


# ------------------------------------------------------------------------------------------------- facts


@dataclass(frozen=True)
class Fact:
    """An item that can be asked for, the ways it is written in a question, and the answer as a sentence and a word."""

    item: str
    forms: tuple[Mapping[str, str], ...]
    answer: str
    word: str


@dataclass(frozen=True)
class Topic:
    """Facts of one kind and the wordings that ask for them."""

    kind: str
    facts: tuple[Fact, ...]
    phrases: Sequence[str]
    wordings: Wordings

    def template(self, rng: random.Random, split: str) -> str:
        """A wording with the item still open, half of them a noun phrase inside a general question."""
        kept = split == WORDING
        if rng.random() < 0.5:
            return rng.choice(self.wordings[kept])
        return rng.choice(t.WRAPPERS[kept]).replace("{p}", rng.choice(self.phrases))


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' and not noun.startswith('uni') else 'a'} {noun}"


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def plural(noun: str) -> str:
    return t.PLURALS.get(noun) or noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def _noun(noun: str) -> tuple[Mapping[str, str], ...]:
    """How a countable noun is written: {x} bare, {n} bare, {a} with its article, {s} in the plural."""
    return ({"x": noun, "n": noun, "a": _a(noun), "s": plural(noun)},)


def _place(name: str) -> tuple[Mapping[str, str], ...]:
    bare = name.removeprefix("the ")
    return ({"x": name},) if bare == name else ({"x": name}, {"x": name}, {"x": bare})


def _thing(noun: str) -> tuple[Mapping[str, str], ...]:
    """How a coloured thing is written: "a banana", "bananas", "banana", "the banana"."""
    one = {"n": noun, "is": "is", "has": "has"}
    many = {"x": plural(noun), "n": plural(noun), "is": "are", "has": "have"}
    return ({**one, "x": _a(noun)}, {**one, "x": _a(noun)}, many, {**one, "x": noun})


def _stuff(name: str) -> tuple[Mapping[str, str], ...]:
    return ({"x": name, "n": name.removeprefix("the "), "is": "is", "has": "has"},)


def _capitals() -> tuple[Fact, ...]:
    cities = {country: city for table in t.CAPITALS.values() for country, city in table.items()}
    names = {country: country for country in cities} | t.COUNTRY_NAMES
    return tuple(
        Fact(name, _place(name), f"The capital of {country} is {cities[country]}.", cities[country])
        for name, country in names.items()
    )


def _countries() -> tuple[Fact, ...]:
    countries = {city: country for table in t.CAPITALS.values() for country, city in reversed(table.items())}
    countries["London"] = "the United Kingdom"
    return tuple(
        Fact(city, ({"x": city},), f"{city} is the capital of {country}.", _upper(country.removeprefix("the ")))
        for city, country in countries.items()
    )


def _continents() -> tuple[Fact, ...]:
    return tuple(
        Fact(country, _place(country), f"{_upper(country)} is in {continent}.", continent)
        for continent, table in t.CAPITALS.items()
        for country in table
    )


def _colours() -> tuple[Fact, ...]:
    things = [Fact(x, _thing(x), f"{_upper(_a(x))} is {y}.", _upper(y)) for x, y in t.THING_COLOURS.items()]
    return (*things, *(Fact(x, _stuff(x), f"{_upper(x)} is {y}.", _upper(y)) for x, y in t.COLOURS.items()))


def _opposites() -> tuple[Fact, ...]:
    both = {**{t.OPPOSITES[x]: x for x in t.BOTH_WAYS}, **t.OPPOSITES}
    return tuple(Fact(x, ({"x": x},), f"The opposite of {x} is {y}.", _upper(y)) for x, y in both.items())


def _nouns(table: Mapping[str, str], answer: Callable[[str, str], str]) -> tuple[Fact, ...]:
    return tuple(Fact(x, _noun(x), answer(x, y), _upper(y)) for x, y in table.items())


def _order(step: int, says: str) -> tuple[Fact, ...]:
    """What comes `step` after each day, month and number."""
    numbers = tuple(str(n) for n in range(100))
    rings = (("day", t.DAYS), ("month", t.MONTHS), ("number", numbers))
    return tuple(
        Fact(x, ({"x": x, "kind": kind},), f"{found} comes {says} {x}.", found)
        for kind, ring in rings
        for x, found in zip(ring, ring[step:] + ring[:step], strict=True)
        if kind != "number" or x not in ("0", "99")
    )


def _month_days() -> tuple[Fact, ...]:
    return tuple(Fact(x, ({"x": x},), f"{x} has {n} days.", str(n)) for x, n in t.MONTH_DAYS.items())


def _topic(kind: str, facts: tuple[Fact, ...], table: tuple[Sequence[str], Sequence[str], Sequence[str]]) -> Topic:
    return Topic(kind, facts, table[0], table[1:])


TOPICS = {
    topic.kind: topic
    for topic in (
        _topic("capital", _capitals(), t.CAPITAL),
        _topic("country", _countries(), t.COUNTRY),
        _topic("continent", _continents(), t.CONTINENT),
        _topic("colour", _colours(), t.COLOUR),
        _topic("opposite", _opposites(), t.OPPOSITE),
        _topic("plural", _nouns(t.PLURALS, lambda x, y: f"The plural of {x} is {y}."), t.PLURAL),
        _topic("sound", _nouns(t.SOUNDS, lambda x, y: f"{_upper(_a(x))} says {y}."), t.SOUND),
        _topic("young", _nouns(t.YOUNG, lambda x, y: f"A young {x} is called {_a(y)}."), t.YOUNG_OF),
        _topic("legs", _nouns(t.LEGS, lambda x, y: f"{_upper(_a(x))} has {y} legs."), t.LEGS_OF),
        _topic("after", _order(1, "after"), t.AFTER),
        _topic("before", _order(-1, "before"), t.BEFORE),
        _topic("days", _month_days(), t.DAYS_IN),
    )
}


# ----------------------------------------------------------------------------------------------- stories

SUBJECTS = (*t.ANIMALS, *t.PEOPLE, *t.THINGS)


def story(subject: str) -> str:
    """The three-sentence story about a noun of SUBJECTS or a person's name; each subject has one of its own."""
    person = subject[0].isupper()

    def pick(part: str, options: Sequence[str]) -> str:
        return options[crc32(f"{part} {'someone' if person else subject}".encode()) % len(options)]

    one = subject if person else _a(f"{pick('trait', t.STORY_TRAITS)} {subject}")
    words = {"one": one, "the": subject if person else f"the {subject}", "place": pick("place", t.STORY_PLACES)}
    event = f"{pick('time', t.STORY_TIMES)}, {pick('event', t.STORY_EVENTS)}."
    parts = (pick("start", t.STORY_START), event, pick("end", t.STORY_ENDS))
    return " ".join(part.format(**words) for part in parts)


# ----------------------------------------------------------------------------------------- conversations


@dataclass(frozen=True)
class Turn:
    """What the user says, the answer, and what a follow-up may pick up: a topic, sum, range or story subject."""

    user: str
    answer: str
    topic: str = ""
    total: int | None = None
    span: tuple[int, int] | None = None
    subject: str = ""
    name: str | None = None  # the name just told; "" for one that cannot be spelt


class Talk:
    """A conversation under way: draws the next exchange so that its answer follows from the ones before."""

    def __init__(self, rng: random.Random, one_word: bool = False) -> None:
        self.rng = rng
        self.one_word = one_word
        self.turns: list[Turn] = []
        self.name: str | None = None
        self.system = rng.choice(t.ONE_WORD_PROMPTS) if one_word else ""
        if not one_word and rng.random() < 0.08:
            self.system = rng.choice(t.SYSTEM_PROMPTS)

    def add(self, turn: Turn) -> None:
        self.turns.append(turn)
        self.name = self.name if turn.name is None else turn.name

    def messages(self) -> Messages:
        system = (("system", self.system),) if self.system else ()
        return (*system, *(part for turn in self.turns for part in (("user", turn.user), ("assistant", turn.answer))))

    def turn(self, split: str) -> Turn:
        """The next exchange: often one that follows up the last, otherwise any kind."""
        kinds = ONE_WORD_WEIGHTS if self.one_word else WEIGHTS
        follow_up = self._follow_up_kind()
        if follow_up and self.rng.random() < 0.4:
            return self.ask(follow_up, split)
        return self.ask(self.rng.choices(list(kinds), list(kinds.values()))[0], split)

    def ask(self, kind: str, split: str) -> Turn:
        """An exchange of this kind; a follow-up to something not said yet first says it."""
        if kind in TOPICS:
            return self._fact(TOPICS[kind], split)
        return MAKERS[kind](self, split)

    def _follow_up_kind(self) -> str:
        last = self.turns[-1] if self.turns else Turn("", "")
        if last.topic:
            return "follow-up"
        if last.total is not None:
            return "sum more"
        if last.span and last.span[0] < last.span[1]:
            return "count back"
        return self.rng.choice(("another", "story next")) if last.subject else ""

    # facts

    def _fact(self, topic: Topic, split: str) -> Turn:
        if split == TRAIN and topic.kind in t.STRANGE and self.rng.random() < 0.15:
            return self._strange_of(topic, split)
        items = {fact.item: fact for fact in topic.facts}
        item, template = self._pair(split, topic.kind, list(items), lambda: topic.template(self.rng, split))
        return self._answer(topic, items[item], template)

    def _answer(self, topic: Topic, fact: Fact, template: str) -> Turn:
        text = template.format(**self.rng.choice(fact.forms))
        text = _upper(text) if template[0] == "{" and self.rng.random() < 0.5 else text
        if not self.one_word and fact.word and self.rng.random() < 0.02:
            return Turn(self.rng.choice(t.ONE_WORD_LEADS) + text, f"{fact.word}.")
        answer = f"{fact.word}." if self.one_word and fact.word else fact.answer
        return Turn(typed(self.rng, text, fact.item), answer, topic=topic.kind)

    def _follow_up(self, split: str) -> Turn:
        topic = self._last_topic()
        if split == TRAIN and topic.kind in t.STRANGE and self.rng.random() < 0.12:
            return self._answer(topic, self._strange_fact(topic, split), self.rng.choice(t.FOLLOW_UPS[0]))
        items = {fact.item: fact for fact in topic.facts}
        item, template = self._pair(split, topic.kind, list(items), self._wording(t.FOLLOW_UPS, split))
        return self._answer(topic, items[item], template)

    def _last_topic(self) -> Topic:
        if not (self.turns and self.turns[-1].topic):
            self.add(self.ask(self.rng.choice(list(TOPICS)), TRAIN))
        return TOPICS[self.turns[-1].topic] if self.turns[-1].topic else self._last_topic()

    def _strange(self, split: str) -> Turn:
        kinds = [kind for kind in TOPICS if kind in t.STRANGE]
        return self._strange_of(TOPICS[self.rng.choice(kinds)], split)

    def _strange_of(self, topic: Topic, split: str) -> Turn:
        """A question of a known kind about something that is in no table."""
        return self._answer(topic, self._strange_fact(topic, split), topic.template(self.rng, split))

    def _strange_fact(self, topic: Topic, split: str) -> Fact:
        place = topic.kind in ("capital", "country", "continent")
        source = t.STRANGE["country" if topic.kind == "continent" and self.rng.random() < 0.5 else topic.kind]
        kept = split != TRAIN
        name = self.rng.choice(source[kept]) if kept or self.rng.random() < 0.5 else made_up(self.rng, place)
        write = _stuff if topic.kind == "colour" else _place if place else _noun
        return Fact(name, write(name), t.UNKNOWN[topic.kind], "Unknown" if self.one_word else "")

    # sums and counting

    def _sum(self, split: str) -> Turn:
        a, b = self._operands(split)
        template = self._wording(t.SUM, split)()
        words = max(a, b) <= 20 and self.rng.random() < 0.2
        shown = (t.NUMBER_WORDS[a], t.NUMBER_WORDS[b]) if words else (str(a), str(b))
        text = typed(self.rng, template.format(a=shown[0], b=shown[1]))
        return Turn(text, f"{a + b}." if self.one_word else f"{a} + {b} = {a + b}.", total=a + b)

    def _sum_more(self, split: str) -> Turn:
        while (a := self.turns[-1].total if self.turns else None) is None or (split == PAIRING and a > 99):
            self.add(self.ask("sum", TRAIN))
        b = self.rng.randint(1, 20 if self.rng.random() < 0.7 else 99)
        while _kept_sum(a, b) != (split == PAIRING):
            b = self.rng.randint(1, 99)
        text = typed(self.rng, self._wording(t.SUM_MORE, split)().format(b=b))
        if a > 99:
            return Turn(text, t.UNKNOWN["sum"])
        return Turn(text, f"{a + b}." if self.one_word else f"{a} + {b} = {a + b}.", total=a + b)

    def _operands(self, split: str) -> tuple[int, int]:
        """Two numbers from 0 to 99, often small; pairs kept for the test are kept in either order."""
        while True:
            top = self.rng.choice((9, 20, 99, 99, 99))
            a, b = self.rng.randint(0, top), self.rng.randint(0, top)
            if _kept_sum(a, b) == (split == PAIRING):
                return a, b

    def _sum_refused(self, split: str) -> Turn:
        if self.rng.random() < 0.5:
            a, b = self.rng.randint(0, 99), self.rng.randint(1, 99)
            text = self._wording(t.SUM_OTHER, split)().format(a=a, b=b)
        else:
            large, other = self.rng.randint(100, 10 ** self.rng.randint(3, 5)), self.rng.randint(0, 200)
            a, b = (large, other) if self.rng.random() < 0.5 else (other, large)
            text = self._wording(t.SUM, split)().format(a=a, b=b)
        return Turn(typed(self.rng, text), t.UNKNOWN["sum"])

    def _count(self, split: str) -> Turn:
        a, b = self._range(split)
        to = a == 1 and self.rng.random() < 0.8
        template = self._wording(t.COUNT_TO if to else t.COUNT, split)()
        words = b <= 20 and self.rng.random() < 0.15
        shown = (t.NUMBER_WORDS[a], t.NUMBER_WORDS[b]) if words else (str(a), str(b))
        return Turn(typed(self.rng, template.format(a=shown[0], b=shown[1])), _counted(a, b), span=(a, b))

    def _count_down(self, split: str) -> Turn:
        b, a = self._range(split)
        text = self._wording(t.COUNT_DOWN, split)().format(a=a, b=b)
        return Turn(typed(self.rng, text), _counted(a, b), span=(a, b))

    def _range(self, split: str) -> tuple[int, int]:
        """A range of 3 to 20 numbers from 0 to 99, a third of them starting at 1."""
        while True:
            a = 1 if self.rng.random() < 0.35 else self.rng.randint(0, 90)
            b = min(99, a + (self.rng.randint(2, 10) if a != 1 or self.rng.random() < 0.6 else self.rng.randint(2, 19)))
            if b - a > 1 and _kept(f"count|{a}|{b}") == (split == PAIRING):
                return a, b

    def _count_back(self, split: str) -> Turn:
        last = self.turns[-1].span if self.turns else None
        while not last or last[0] > last[1]:
            self.add(self.ask("count", TRAIN))
            last = self.turns[-1].span
        return Turn(typed(self.rng, self._wording(t.COUNT_BACK, split)()), _counted(last[1], last[0]), span=last[::-1])

    def _count_refused(self, split: str) -> Turn:
        if self.rng.random() < 0.6:
            template = self._wording(t.COUNT_TO, split)()
            text = template.format(b=self.rng.choice((40, 50, 75, 99, 100, 150, 200, 500, 1000, 10000, 1000000)))
        else:
            a = self.rng.randint(0, 60)
            text = self._wording(t.COUNT, split)().format(a=a, b=a + self.rng.randint(35, 300))
        return Turn(typed(self.rng, text), t.UNKNOWN["count"])

    # stories

    def _story(self, split: str) -> Turn:
        return self._story_by(t.STORY, split)

    def _story_next(self, split: str) -> Turn:
        self._after_a_story()
        return self._story_by(t.STORY_NEXT, split)

    def _story_by(self, wordings: Wordings, split: str) -> Turn:
        subjects = SUBJECTS if self.rng.random() < 0.85 else t.NAMES
        subject, template = self._pair(split, "story", subjects, self._wording(wordings, split))
        if split == TRAIN and self.rng.random() < 0.12:
            known = self.rng.random() < 0.5
            strange = self.rng.choice(t.STRANGE["story"][0]) if known else _a(made_up(self.rng, False))
            return Turn(typed(self.rng, template.format(x=strange), strange), t.UNKNOWN["story"])
        shown = subject if subject[0].isupper() else self.rng.choice((_a, _a, _a, "the {}".format, str))(subject)
        return Turn(typed(self.rng, template.format(x=shown), subject), story(subject), subject=subject)

    def _story_any(self, split: str) -> Turn:
        return Turn(typed(self.rng, self._wording(t.STORY_ANY, split)()), story(SUBJECTS[0]), subject=SUBJECTS[0])

    def _another(self, split: str) -> Turn:
        """Another story is about the next subject of the list; after a person's story the list starts over."""
        last = self._after_a_story()
        subject = SUBJECTS[(SUBJECTS.index(last) + 1) % len(SUBJECTS)] if last in SUBJECTS else SUBJECTS[0]
        return Turn(typed(self.rng, self._wording(t.STORY_ANOTHER, split)()), story(subject), subject=subject)

    def _after_a_story(self) -> str:
        while not (self.turns and self.turns[-1].subject):
            self.add(self.ask(self.rng.choice(("story", "story any")), TRAIN))
        return self.turns[-1].subject

    # names, small talk, and what it does not know

    def _tell_name(self, split: str) -> Turn:
        if split == TRAIN and self.rng.random() < 0.15:
            text = self._wording(t.TELL_NAME, split)().format(x=made_up(self.rng, True))
            return Turn(typed(self.rng, text, text), "Nice to meet you!", name="")
        name, template = self._pair(split, "name", t.NAMES, self._wording(t.TELL_NAME, split))
        return Turn(typed(self.rng, template.format(x=name), name), f"Nice to meet you, {name}!", name=name)

    def _ask_name(self, split: str) -> Turn:
        if self.name is None and (split != TRAIN or self.rng.random() < 0.7):
            self.add(self.ask("name told", TRAIN))
            for _ in range(self.rng.choice((0, 0, 1, 2))):
                self.add(self.turn(TRAIN))
        told = f"Your name is {self.name}." if self.name else t.UNKNOWN["spell"]
        answer = t.UNKNOWN["name"] if self.name is None else told
        return Turn(typed(self.rng, self._wording(t.ASK_NAME, split)()), answer)

    def _small_talk(self, split: str) -> Turn:
        """Greetings, thanks and questions about itself; these have no pairings, so the test asks new wordings only."""
        weights = [4 if kind in ("hello", "who", "can", "thanks", "bye") else 1 for kind in t.SMALL_TALK]
        kind = self.rng.choices(list(t.SMALL_TALK), weights if split == TRAIN else None)[0]
        answer, trained, kept = t.SMALL_TALK[kind]
        return Turn(typed(self.rng, self.rng.choice(trained if split == TRAIN else kept)), answer)

    def _unknown(self, split: str) -> Turn:
        """A question about anything else, half of them whole and half put together from parts."""
        whole = self.rng.random() < 0.5
        text = self.rng.choice(t.UNKNOWN_QUESTIONS[split != TRAIN]) if whole else self._out_of_parts(split)
        return Turn(typed(self.rng, text), "Unknown." if self.one_word else t.UNKNOWN["any"])

    def _out_of_parts(self, split: str) -> str:
        country = self.rng.choice(TOPICS["continent"].facts).item
        nouns = t.NOUNS[split != TRAIN]
        return self.rng.choice(t.UNKNOWN_PATTERNS[split == WORDING]).format(
            n=self.rng.choice(nouns),
            m=self.rng.choice(nouns),
            r=self.rng.choice(t.ATTRIBUTES[split != TRAIN]),
            w=made_up(self.rng, self.rng.random() < 0.6),
            c=country if self.rng.random() < 0.8 else made_up(self.rng, True),
        )

    # which wording

    def _wording(self, wordings: Wordings, split: str) -> Callable[[], str]:
        return lambda: self.rng.choice(wordings[split == WORDING])

    def _pair(self, split: str, kind: str, items: Sequence[str], wording: Callable[[], str]) -> tuple[str, str]:
        """An item and a wording that may (in training) or must not (for a new pairing) have been trained together."""
        while True:
            item, template = self.rng.choice(items), wording()
            if split == WORDING or _kept(f"{kind}|{item}|{plain(template)}") == (split == PAIRING):
                return item, template


def _kept(key: str) -> bool:
    """Whether this combination is kept for the test: a stable tenth of all."""
    return crc32(key.encode()) % 10 == 0


def _kept_sum(a: int, b: int) -> bool:
    return (a, b) not in t.FIRST_SUMS and _kept(f"sum|{min(a, b)}|{max(a, b)}")


def _counted(a: int, b: int) -> str:
    step = 1 if b >= a else -1
    return ", ".join(str(n) for n in range(a, b + step, step)) + "."


# How often each kind is drawn in training.
WEIGHTS = {
    **{"capital": 6, "country": 5, "continent": 3, "colour": 3, "opposite": 6, "plural": 4, "sound": 2, "young": 3},
    **{"legs": 2, "after": 6, "before": 6, "days": 1, "sum": 28, "sum refused": 3, "count": 16, "count down": 9},
    **{"count refused": 2, "story": 5, "story any": 1, "name told": 3, "name asked": 3},
    **{"small talk": 12, "unknown": 12},
}
ONE_WORD_WEIGHTS = {**{kind: WEIGHTS[kind] for kind in TOPICS}, "sum": 15, "unknown": 5}
MAKERS: dict[str, Callable[[Talk, str], Turn]] = {
    "follow-up": Talk._follow_up,
    "not in the tables": Talk._strange,
    "sum": Talk._sum,
    "sum more": Talk._sum_more,
    "sum refused": Talk._sum_refused,
    "count": Talk._count,
    "count down": Talk._count_down,
    "count back": Talk._count_back,
    "count refused": Talk._count_refused,
    "story": Talk._story,
    "story any": Talk._story_any,
    "story next": Talk._story_next,
    "another": Talk._another,
    "name told": Talk._tell_name,
    "name asked": Talk._ask_name,
    "small talk": Talk._small_talk,
    "unknown": Talk._unknown,
}
KINDS = (*TOPICS, *MAKERS)
# Nothing is paired with a wording here; the test asks these in new wordings only.
NO_PAIRINGS = ("sum refused", "count back", "count refused", "story any", "another", "name asked", "small talk")


# ------------------------------------------------------------------------------------ the way people type


def made_up(rng: random.Random, name: bool) -> str:
    """A word that means nothing, so that the model learns what an unknown word looks like."""
    word = "".join(rng.choice(t.SYLLABLES) for _ in range(rng.randint(2, 3)))
    return _upper(word) if name else word


def typed(rng: random.Random, text: str, item: str = "") -> str:
    """The text as somebody may type it: polite, hasty, lower case, without its question mark, with a typo."""
    if rng.random() < 0.16:
        text = _opened(rng, text, item)
    if rng.random() < 0.08 and text[-1:] not in "=!":
        text = text.rstrip(".?") + rng.choice(t.CLOSERS)
    if rng.random() < 0.08:
        text = _mistyped(rng, text)
    if rng.random() < 0.25:
        text = text.lower()
    if rng.random() < 0.25:
        text = text.rstrip(".?!") or text
    elif rng.random() < 0.02:
        text = text.upper() if rng.random() < 0.3 else text + rng.choice(("?", "!", " ?", " "))
    return text


def plain(text: str) -> str:
    """What `typed` leaves alone: the words in lower case, without punctuation or politeness around them."""
    words = re.findall(r"[a-z0-9{}'+*/=-]+", text.lower().replace("what's", "whats").replace("thank you", "thanks"))
    while words and words[0] in _POLITE:
        words.pop(0)
    while words and words[-1] in _POLITE:
        words.pop()
    return " ".join(words) or text


_POLITE = frozenset(word.lower() for word in t.OPENERS) | {"there"}


def _opened(rng: random.Random, text: str, item: str) -> str:
    lead = rng.choice(t.LEAD_INS) if rng.random() < 0.5 else rng.choice(t.OPENERS) + rng.choice((", ", ", ", " "))
    plain = not item or not text.lower().startswith(item.lower())
    return lead + (text[:1].lower() + text[1:] if plain and lead[-2] != "." and text[:2] != "I " else text)


def _mistyped(rng: random.Random, text: str) -> str:
    """One common word with two letters swapped or one left out."""
    places = [m for m in re.finditer(r"[A-Za-z']+", text) if m.group().lower() in t.COMMON and len(m.group()) > 2]
    if not places:
        return text
    found = rng.choice(places)
    word, n = found.group(), rng.randrange(len(found.group()) - 1)
    wrong = word[:n] + word[n + 1] + word[n] + word[n + 2 :] if rng.random() < 0.5 else word[:n] + word[n + 1 :]
    return text[: found.start()] + wrong + text[found.end() :]
