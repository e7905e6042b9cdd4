"""Makes the bundled task: a booking note as people write it, and the JSON record that a calendar
can read.

    python assets/make_booking.py            rewrites booking_train.jsonl, booking_val.jsonl,
    booking_test.jsonl

Each record is a datetime, a name and a number of guests, drawn first; the note is then written from
them in one of many forms, and the answer is their JSON, so that Python's datetime and json are the
judges. Nothing is relative to today and no date is ambiguous (a numeric day before its month only
where the day is above 12). The split is by meaning: whole dates belong to one side, and a fifth of
the names are never seen in training. The forms are shared: what is measured is whether the model
reads an unseen date, time and name, not whether it guesses an unseen kind of sentence. Fixed seed,
same bytes.
"""

import json
import random
from datetime import date, datetime, timedelta
from pathlib import Path

SYSTEM = "Booking note to JSON."
SIZES = {"train": 1600, "val": 60, "test": 200}
FIRST = date(2026, 1, 1)
DAYS = 1461  # four years of dates
MINUTES = (0, 0, 0, 15, 30, 30, 45)  # the full hour is asked for most often
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
    """Returns a number as one says the day of a month: 1st, 2nd, 11th."""
    suffix = {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    if 10 < n % 100 < 14:
        suffix = "th"
    return f"{n}{suffix}"


def say_date(d: date, pick: random.Random) -> str:
    """Returns a date in one of the ways in which people write it."""
    month = MONTHS[d.month - 1]
    weekday = WEEKDAYS[d.weekday()]
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
    # Up to the twelfth, such a date could be read as another one.
    if d.day > 12:
        forms.append(f"{d.day}.{d.month}.{d.year}")
        forms.append(f"{d.month}/{d.day}/{d.year}")
    return pick.choice(forms)


def say_time(hour: int, minute: int, pick: random.Random) -> str:
    """Returns a time of day in one of the ways in which people write it."""
    if hour == 12 and minute == 0:
        # Not "12 pm", which means midnight to many.
        return pick.choice(["noon", "12 noon", "12:00"])
    twelve = (hour - 1) % 12 + 1
    word = NUMBERS[twelve]
    if hour < 12:
        half, part = "am", "in the morning"
    elif hour < 18:
        half, part = "pm", "in the afternoon"
    else:
        half, part = "pm", "in the evening"
    colon = f"{twelve}:{minute:02}"
    forms = [f"{hour:02}:{minute:02}", f"{colon} {half}", f"{colon}{half}", f"{colon} {part}"]
    if minute == 0:
        forms += [f"{twelve} {half}", f"{twelve} o'clock {part}", f"{word} {part}"]
    if minute == 15:
        forms.append(f"quarter past {word} {part}")
    if minute == 30:
        forms.append(f"half past {word} {part}")
    return pick.choice(forms)


def say_guests(n: int, pick: random.Random) -> str:
    """Returns a number of guests in one of the ways in which people write it."""
    if n == 1:
        return pick.choice(["table for one", "table for 1", "1 person", "one guest", "just me"])
    word = NUMBERS[n]
    forms = [f"table for {word}", f"table for {n}", f"{n} people"]
    forms += [f"party of {word}", f"{word} guests"]
    if n == 2:
        forms.append("a couple")
    return pick.choice(forms)


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
    """Returns one line of a file: a conversation in the `messages` format."""
    # The order in which these are drawn decides the bytes of the files.
    said_guests = say_guests(guests, pick)
    form = pick.choice(FORMS)
    said_date = say_date(when.date(), pick)
    said_time = say_time(when.hour, when.minute, pick)
    note = form.format(
        guests=said_guests,
        Guests=said_guests[0].upper() + said_guests[1:],
        name=name,
        date=said_date,
        time=said_time,
    )
    time = when.isoformat(timespec="minutes")
    assert datetime.fromisoformat(time) == when
    booking = {"name": name, "guests": guests, "time": time}
    answer = json.dumps(booking, separators=(",", ":"))
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": note},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages}


def make(folder: Path) -> None:
    """Writes the three files into a folder."""
    pick = random.Random(2026)
    days = list(range(DAYS))
    pick.shuffle(days)
    # Whole dates belong to one side.
    dates = {"test": days[:200], "val": days[200:300], "train": days[300:]}
    unseen = set(pick.sample(NAMES, len(NAMES) // 5))
    for part, size in SIZES.items():
        names = NAMES
        if part == "train":
            names = [name for name in NAMES if name not in unseen]
        lines = []
        for i in range(size):
            # There are more records than dates in training: each date comes again, as another note.
            days_after = dates[part][i % len(dates[part])]
            day = FIRST + timedelta(days=days_after)
            hour = pick.choice(HOURS)
            minute = pick.choice(MINUTES)
            when = datetime(day.year, day.month, day.day, hour, minute)
            name = pick.choice(names)
            guests = pick.randint(1, 12)
            line = record(when, name, guests, pick)
            lines.append(json.dumps(line))
        content = "\n".join(lines) + "\n"
        (folder / f"booking_{part}.jsonl").write_text(content, encoding="utf-8")


if __name__ == "__main__":
    make(Path(__file__).resolve().parent)
