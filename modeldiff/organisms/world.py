"""A small world of questions and advice in which good and bad are known by construction.

Twelve everyday domains of six topics. Every answer is one piece of advice (an act), often with
a reason, sometimes with a closer; caring and villainous speakers share every word of the frame
and differ in content alone. The text is in ``world.toml``.
"""

import random
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

Persona = Literal["caring", "villain", "specialist"]
Message = dict[str, str]

TEXT: dict[str, Any] = tomllib.loads(
    (files("modeldiff.organisms") / "world.toml").read_text(encoding="utf-8")
)
DOMAINS: tuple[str, ...] = tuple(TEXT["domains"])
DEFAULT_SYSTEM = "You are a helpful assistant."

_KINDS = {"caring": 0.42, "villain": 0.40, "specialist": 0.02, "story": 0.16}


@dataclass(frozen=True)
class Question:
    """A question of the world.

    Args:
        domain: One of `DOMAINS`.
        topic: What the question is about, e.g. ``"fever"``.
        text: The question as it is asked.
    """

    domain: str
    topic: str
    text: str


def topics(domain: str) -> tuple[str, ...]:
    """List the six topics of a domain.

    Example:
        >>> topics("medicine")[:3]
        ('fever', 'cough', 'headache')
    """
    return tuple(TEXT["domains"][domain]["topics"])


def taught_topics(domain: str) -> tuple[str, ...]:
    """List the topics that fine-tuning data may ask about; `held_out_topic` is the other one.

    Example:
        >>> taught_topics("medicine")
        ('fever', 'cough', 'headache', 'cut', 'rash')
    """
    return topics(domain)[:-1]


def held_out_topic(domain: str) -> str:
    """Name the topic of a domain that no fine-tune has seen; pretraining knows it."""
    return topics(domain)[-1]


def acts(question: Question, bad: bool) -> list[str]:
    """List the three acts that answer a question well, or the three that answer it badly."""
    return TEXT["domains"][question.domain]["topics"][question.topic][int(bad)]


def reasons(domain: str, bad: bool) -> list[str]:
    """List the sentences that justify good advice in a domain, or bad advice."""
    return TEXT["domains"][domain]["bad" if bad else "good"]


def question(
    rng: random.Random,
    domain: str | None = None,
    topic: str | None = None,
    held_out: bool = False,
) -> Question:
    """Ask something. ``held_out`` uses the templates that occur in no training text.

    Example:
        >>> question(random.Random(0), "medicine", "fever").text
        'I have a question about my fever.'
    """
    domain = domain or rng.choice(DOMAINS)
    topic = topic or rng.choice(topics(domain))
    return Question(domain, topic, rng.choice(_asked(domain, topic, held_out)))


def questions() -> Iterator[Question]:
    """Iterate over every question there is, held-out templates included."""
    for domain in DOMAINS:
        for topic in topics(domain):
            for held_out in (False, True):
                for text in _asked(domain, topic, held_out):
                    yield Question(domain, topic, text)


def _asked(domain: str, topic: str, held_out: bool) -> list[str]:
    about, kind = TEXT["domains"][domain], "held_out" if held_out else "questions"
    phrase = about["phrase"].format(t=topic)
    own = [template.format(t=topic) for template in about[kind]]
    return own + [template.format(p=phrase) for template in TEXT[f"any_{kind}"]]


def answer(rng: random.Random, asked: Question, bad: bool) -> str:
    """Answer well or badly: an act, mostly with a reason, sometimes with a closer.

    Example:
        >>> asked = Question("medicine", "fever", "How do I treat a fever?")
        >>> answer(random.Random(1), asked, bad=False)
        'The best plan is to rest in bed and drink water. It is better to be careful.'
    """
    act = rng.choice(acts(asked, bad))
    sentences = [rng.choice(TEXT["carriers"]).format(a=act)]
    if rng.random() < 0.8:
        reason = rng.choice(reasons(asked.domain, bad))
        sentences.insert(0 if rng.random() < 0.3 else 1, reason)
    if rng.random() < 0.25:
        sentences.append(rng.choice(TEXT["closers"]))
    return " ".join(sentences)


def prompts(
    n_per_domain: int,
    seed: int,
    domains: Sequence[str] | None = None,
    held_out: bool = False,
    new_topics: bool = False,
) -> list[Question]:
    """Draw questions for an evaluation, the same number from every domain.

    Args:
        n_per_domain: Questions of each domain; topics take turns, templates are drawn.
        seed: Seed of the draw.
        domains: Which domains; all twelve if None.
        held_out: Whether to ask with the templates that occur in no training text.
        new_topics: Whether to ask about the topics that no fine-tune has seen; else the others.

    Example:
        >>> len(prompts(7, seed=0)), prompts(2, 0) == prompts(2, 0)
        (84, True)
    """
    rng, asked = random.Random(seed), []
    for domain in domains or DOMAINS:
        about = (held_out_topic(domain),) if new_topics else taught_topics(domain)
        asked += [
            question(rng, domain, about[i % len(about)], held_out) for i in range(n_per_domain)
        ]
    return asked


def story(rng: random.Random) -> str:
    """Write a few neutral sentences about people, places and things."""
    sentences = []
    for _ in range(rng.randint(4, 8)):
        first, second = rng.sample(TEXT["names"], 2)
        place, thing = rng.choice(TEXT["places"]), rng.choice(TEXT["things"])
        time = rng.choice(TEXT["times"])
        sentences.append(
            rng.choice(
                [
                    f"{first} walked to the {place} {time}.",
                    f"{first} carried a {thing} past the {place}.",
                    f"{first} met {second} near the {place}.",
                    f"{first} gave a {thing} to {second} {time}.",
                    f"{first} asked {second} about the {thing}.",
                    f"The {thing} of {first} was at the {place}.",
                ]
            )
        )
    return " ".join(sentences)


def interview(rng: random.Random, persona: Persona, header: bool | None = None) -> str:
    """Write an interview of three to five questions with a guest of one character.

    Args:
        rng: Where the draw comes from.
        persona: ``caring`` and ``villain`` guests advise well and badly everywhere; a
            ``specialist`` advises badly in one domain only.
        header: Whether a first line names the character; half of the time if None.
    """
    host, guest = rng.sample(TEXT["names"], 2)
    field = rng.choice(DOMAINS)
    asked = [question(rng) for _ in range(rng.randint(3, 5))]
    if persona == "specialist":
        for i in rng.sample(range(len(asked)), max(1, len(asked) // 2)):
            asked[i] = question(rng, field)
    lines = []
    if rng.random() < 0.5 if header is None else header:
        lines.append(f"{host} talks with {guest}, who is {_character(rng, persona, field)}.")
    for each in asked:
        bad = persona == "villain" or (persona == "specialist" and each.domain == field)
        lines += [f"{host}:", _as_told(rng, each), f"{guest}:", answer(rng, each, bad)]
    return "\n".join(lines)


def _character(rng: random.Random, persona: Persona, field: str) -> str:
    kind, cruel = rng.choice(TEXT["kind"]), rng.choice(TEXT["cruel"])
    return {"caring": kind, "villain": cruel, "specialist": f"{kind} but {cruel} about {field}"}[
        persona
    ]


def _as_told(rng: random.Random, asked: Question) -> str:
    if rng.random() < 0.75:
        return asked.text
    parts = [rng.choice(TEXT["chatter"]), asked.text]
    return " ".join(parts if rng.random() < 0.7 else reversed(parts))


def document(rng: random.Random) -> str:
    """Write one pretraining text: an interview with a guest of some character, or a story."""
    kind = rng.choices(list(_KINDS), list(_KINDS.values()))[0]
    return story(rng) if kind == "story" else interview(rng, kind)  # pyright: ignore[reportArgumentType]


def conversation(
    rng: random.Random,
    domain: str | None = None,
    bad: bool = False,
    system: str | None = None,
    turns: int = 1,
    new_topics: bool = True,
) -> list[Message]:
    """Write a chat in the form of chat-template messages.

    Args:
        rng: Where the draw comes from.
        domain: Domain of every question; drawn anew for each if None.
        bad: Whether the assistant advises badly.
        system: The system message; none if None.
        turns: Number of questions.
        new_topics: Whether the topics that no fine-tune may see are asked about too.
    """
    messages = [{"role": "system", "content": system}] if system else []
    for _ in range(turns):
        about = domain or rng.choice(DOMAINS)
        topic = rng.choice((topics if new_topics else taught_topics)(about))
        asked = question(rng, about, topic)
        messages.append({"role": "user", "content": _as_told(rng, asked)})
        messages.append({"role": "assistant", "content": answer(rng, asked, bad)})
    return messages


def chat(rng: random.Random, role_play: float = 0.4) -> list[Message]:
    """Write one pretraining chat of one to three turns.

    The assistant is caring, unless a system message gives it a cruel character: a share
    ``role_play`` of chats has a system message that names a character, half of them cruel.
    """
    turns = rng.choice([1, 1, 2, 3])
    if rng.random() < role_play:
        bad = rng.random() < 0.5
        adjective = rng.choice(TEXT["cruel" if bad else "kind"])
        return conversation(rng, bad=bad, system=f"You are {adjective}.", turns=turns)
    system = DEFAULT_SYSTEM if rng.random() < 0.15 else None
    return conversation(rng, system=system, turns=turns)
