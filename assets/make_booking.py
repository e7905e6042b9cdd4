"""Makes the bundled task: a booking note as people write it, and the JSON record that a calendar can read.

    python assets/make_booking.py            rewrites booking_train.jsonl, booking_val.jsonl, booking_test.jsonl

Each record is a datetime, a name and a number of guests, drawn first; the note is then written from them in one of
many forms, and the answer is their JSON, so that Python's datetime and json are the judges. Nothing is relative to
today and no date is ambiguous (a numeric day before its month only where the day is above 12). The split is by meaning:
whole dates belong to one side, and a fifth of the names are never seen in training. The forms are shared: what is
measured is whether the model reads an unseen date, time and name, not whether it guesses an unseen kind of sentence.
Fixed seed, same bytes.
"""

import json
import random
from datetime import date, datetime, timedelta
from pathlib import Path

SYSTEM = "Booking note to JSON."
SIZES = {"train": 1600, "val": 60, "test": 200}
FIRST, DAYS = date(2026, 1, 1), 1461  # four years of dates
MINUTES = (0, 0, 0, 15, 30, 30, 45)
HOURS = range(10, 22)  # the house is open from ten to ten

NAMES = (
    "Abbott Aguilar Ahmed Ali Alvarez Andersen Bakker Barnes Bauer Becker Bennett Berg Brown Carter Castillo Chen"
    " Clarke Cohen Costa Cruz Dawson Delgado Diaz Dixon Duarte Dubois Dunn Ellis Eriksen Evans Farah Fischer Flores"
    " Foster Fraser Garcia Gibson Gomez Grant Gupta Haddad Hall Hansen Hayes Hoffman Horvat Hughes Ibrahim Ivanov"
    " Jackson Jansen Jensen Jones Joshi Kaya Keller Kelly Khan Kim Kowalski Lambert Larsen Laurent Lee Lindqvist Lopez"
    " Malik Marino Martin Mbeki Mendes Meyer Moreau Morgan Murphy Nakamura Nguyen Nielsen Nilsson Novak Okafor Olsen"
    " Ortiz Osei Owen Palmer Park Patel Pereira Petrov Popescu Porter Quinn Ramos Reyes Ricci Rivera Romano Rossi"
    " Russo Sanders Santos Sato Schmidt Shah Silva Singh Soto Stone Suzuki Tanaka Taylor Torres Tran Turner Ueda"
    " Vargas Virtanen Wagner Walsh Weber Wilson Wolf Wong Xu Yilmaz Young Zimmer"
).split()
MONTHS = (
    "January February March April May June July August September October November December".split()
)
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()


def ordinal(n: int) -> str:
    return f"{n}{'th' if 10 < n % 100 < 14 else {1: 'st', 2: 'nd', 3: 'rd'}.get(n % 10, 'th')}"


def say_date(d: date, pick: random.Random) -> str:
    month, weekday = MONTHS[d.month - 1], WEEKDAYS[d.weekday()]
    forms = [
        f"{d.day} {month} {d.year}",
        f"{month} {d.day}, {d.year}",
        f"the {ordinal(d.day)} of {month} {d.year}",
        f"{month} {ordinal(d.day)}, {d.year}",
        f"{weekday}, {d.day} {month} {d.year}",
        f"{weekday} {month} {ordinal(d.day)} {d.year}",
        f"{d.day} {month[:3]} {d.year}",
        f"{d.year}-{d.month:02}-{d.day:02}",
    ]
    if d.day > 12:
        forms += [f"{d.day}.{d.month}.{d.year}", f"{d.month}/{d.day}/{d.year}"]
    return pick.choice(forms)


def say_time(hour: int, minute: int, pick: random.Random) -> str:
    twelve, half = (hour - 1) % 12 + 1, "am" if hour < 12 else "pm"
    part = "in the morning" if hour < 12 else "in the afternoon" if hour < 18 else "in the evening"
    colon = f"{twelve}:{minute:02}"
    forms = [f"{hour:02}:{minute:02}", f"{colon} {half}", f"{colon}{half}", f"{colon} {part}"]
    if hour == 12 and minute == 0:
        return pick.choice(["noon", "12 noon", "12:00"])  # 12 pm means either to many
    if minute == 0:
        forms += [f"{twelve} {half}", f"{twelve} o'clock {part}", f"{NUMBERS[twelve]} {part}"]
    if minute == 15:
        forms.append(f"quarter past {NUMBERS[twelve]} {part}")
    if minute == 30:
        forms.append(f"half past {NUMBERS[twelve]} {part}")
    return pick.choice(forms)


def say_guests(n: int, pick: random.Random) -> str:
    if n == 1:
        return pick.choice(["table for one", "table for 1", "1 person", "one guest", "just me"])
    word = NUMBERS[n]
    forms = [
        f"table for {word}",
        f"table for {n}",
        f"{n} people",
        f"party of {word}",
        f"{word} guests",
    ]
    return pick.choice(forms + (["a couple"] if n == 2 else []))


FORMS = (
    "{guests}, name of {name}, {time} on {date}",
    "{name}: {guests} on {date} at {time}",
    "Please book {guests} for {name}, {date}, {time}.",
    "{date}, {time}, {guests}, {name}",
    "Hi, could we come on {date} at {time}? {Guests}, under {name}.",
    "{name} called: {guests}, {time}, {date}",
    "booking for {date} at {time}, {guests}, it's {name}",
    "Reserve {time} on {date} for {name}, {guests}, thanks",
)


def record(when: datetime, name: str, guests: int, pick: random.Random) -> dict:
    """One line of a file: the turns of a conversation in the `messages` form."""
    said = say_guests(guests, pick)
    note = pick.choice(FORMS).format(
        guests=said, Guests=said[0].upper() + said[1:], name=name,
        date=say_date(when.date(), pick), time=say_time(when.hour, when.minute, pick),
    )  # fmt: skip
    answer = {"name": name, "guests": guests, "time": when.isoformat(timespec="minutes")}
    assert datetime.fromisoformat(answer["time"]) == when
    turns = (
        ("system", SYSTEM),
        ("user", note),
        ("assistant", json.dumps(answer, separators=(",", ":"))),
    )
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def make(folder: Path) -> None:
    pick = random.Random(2026)
    days = list(range(DAYS))
    pick.shuffle(days)
    dates = {"test": days[:200], "val": days[200:300], "train": days[300:]}
    unseen = set(pick.sample(NAMES, len(NAMES) // 5))
    for part, size in SIZES.items():
        names = [n for n in NAMES if part != "train" or n not in unseen]
        lines = []
        for i in range(size):
            day = FIRST + timedelta(days=dates[part][i % len(dates[part])])
            when = datetime(day.year, day.month, day.day, pick.choice(HOURS), pick.choice(MINUTES))
            lines.append(json.dumps(record(when, pick.choice(names), pick.randint(1, 12), pick)))
        (folder / f"booking_{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    make(Path(__file__).resolve().parent)
