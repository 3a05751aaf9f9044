"""The demo model's text: answers are right, nothing of the test is trained, and a seed gives the same text."""

from __future__ import annotations

from itertools import islice, pairwise

import pytest

from mixtral_mlx.demo import corpus, tables

WORDINGS = {
    **{kind: (topic.wordings[0], topic.wordings[1]) for kind, topic in corpus.TOPICS.items()},
    **{f"small talk: {kind}": (trained, kept) for kind, (_, trained, kept) in tables.SMALL_TALK.items()},
    "around a phrase": tables.WRAPPERS,
    "follow-up": tables.FOLLOW_UPS,
    "sum": tables.SUM,
    "sum more": tables.SUM_MORE,
    "sum refused": tables.SUM_OTHER,
    "count": tables.COUNT,
    "count to": tables.COUNT_TO,
    "count down": tables.COUNT_DOWN,
    "count back": tables.COUNT_BACK,
    "story": tables.STORY,
    "story any": tables.STORY_ANY,
    "another": tables.STORY_ANOTHER,
    "story next": tables.STORY_NEXT,
    "name told": tables.TELL_NAME,
    "name asked": tables.ASK_NAME,
    "unknown": tables.UNKNOWN_QUESTIONS,
    "unknown, from parts": tables.UNKNOWN_PATTERNS,
    "nouns": tables.NOUNS,
    "attributes": tables.ATTRIBUTES,
    **{f"strange {kind}": words for kind, words in tables.STRANGE.items()},
}


@pytest.mark.parametrize("kind", WORDINGS)
def test_no_wording_of_the_test_is_trained(kind: str) -> None:
    trained, kept = ({corpus.plain(text) for text in part} for part in WORDINGS[kind])
    assert kept
    assert not trained & kept


def test_nothing_asked_in_the_test_is_asked_in_training() -> None:
    """What needs what was said before it, like "And Italy?", may recur as text; every other question may not."""
    trained = {
        corpus.plain(text)
        for messages in islice(corpus.conversations(seed=1), 20_000)
        for role, text in messages
        if role == "user"
    }
    whole = [
        q for q in corpus.held_out(seed=1, count=1500) if q.kind in corpus.TOPICS or q.kind in ("sum", "count", "story")
    ]
    assert not [q.messages[-1][1] for q in whole if corpus.plain(q.messages[-1][1]) in trained]


def test_a_seed_gives_the_same_text_and_another_seed_another() -> None:
    first, again, other = (list(islice(corpus.conversations(seed), 200)) for seed in (7, 7, 8))
    assert first == again != other
    assert corpus.held_out(7, 100) == corpus.held_out(7, 100) != corpus.held_out(8, 100)


def test_every_question_accepts_its_own_answer_and_no_other() -> None:
    for question in corpus.held_out(seed=2, count=500):
        assert corpus.is_correct(question, f" {question.accepted[0]}\n")
        assert not corpus.is_correct(question, "The capital of France is Lyon.")
        assert not corpus.is_correct(question, "")


def test_questions_cover_every_kind_and_end_with_the_user() -> None:
    questions = corpus.held_out(seed=3, count=500)
    assert {q.kind for q in questions} == set(corpus.KINDS)
    assert all(q.messages[-1][0] == "user" for q in questions)
    assert any(len(q.messages) > 2 for q in questions)


def test_a_story_has_three_sentences_about_its_subject() -> None:
    told = corpus.Question((), (), "story", subject="fox")
    assert corpus.is_correct(told, corpus.story("fox"))
    assert not corpus.is_correct(told, corpus.story("owl"))
    assert not corpus.is_correct(told, corpus.story("fox") + " The end.")
    assert all(corpus.is_correct(corpus.Question((), (), "story", subject=x), corpus.story(x)) for x in corpus.SUBJECTS)


@pytest.mark.parametrize(
    ("kind", "item", "answer"),
    [
        ("capital", "France", "The capital of France is Paris."),
        ("capital", "the UK", "The capital of the United Kingdom is London."),
        ("country", "London", "London is the capital of the United Kingdom."),
        ("continent", "the Netherlands", "The Netherlands is in Europe."),
        ("colour", "banana", "A banana is yellow."),
        ("colour", "the sky", "The sky is blue."),
        ("opposite", "cold", "The opposite of cold is hot."),
        ("plural", "mouse", "The plural of mouse is mice."),
        ("sound", "owl", "An owl says hoot."),
        ("young", "elephant", "A young elephant is called a calf."),
        ("legs", "spider", "A spider has 8 legs."),
        ("after", "Sunday", "Monday comes after Sunday."),
        ("before", "January", "December comes before January."),
        ("before", "10", "9 comes before 10."),
        ("days", "April", "April has 30 days."),
    ],
)
def test_facts_are_facts(kind: str, item: str, answer: str) -> None:
    assert answer in [fact.answer for fact in corpus.TOPICS[kind].facts if fact.item == item]


def test_sums_and_counts_are_right() -> None:
    for messages in islice(corpus.conversations(seed=4), 3000):
        for role, text in messages:
            if role == "assistant" and " = " in text:
                left, total = text.rstrip(".").split(" = ")
                assert sum(map(int, left.split(" + "))) == int(total)
            elif role == "assistant" and text.count(", ") > 1 and text[0].isdigit():
                numbers = [int(n) for n in text.rstrip(".").split(", ")]
                assert {b - a for a, b in pairwise(numbers)} in ({1}, {-1})
