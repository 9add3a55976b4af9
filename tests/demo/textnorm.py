"""Seeded generator of (written, spoken) English sentence pairs for the demo text-normalisation task.

The spoken side is lower-case ASCII words separated by single spaces, without punctuation; the rules
below make it a function of the written side. Run as a script it writes the held-out set (eval.jsonl).

Conventions
  cardinals   American, no "and": 1,250 -> one thousand two hundred fifty; -7 -> minus seven
  decimals    digit by digit: 3.14 -> three point one four
  years       a bare four-digit number is always read as a year or in its style (1420 Elm St.);
              cardinals of four digits carry a comma: 1905 -> nineteen oh five, 2005 -> two thousand five
  dates       every format is read month, ordinal, year; n/n/yyyy is US order (month first)
  times       3:05 pm -> three oh five p m; 9:00 -> nine o clock; 14:00 -> fourteen hundred
  money       $1.05 -> one dollar and five cents; $0.75 -> seventy five cents; $3.5 million -> ... dollars
  fractions   one slash: 3/4 -> three quarters; 2 1/2 -> two and one half
  ranges      10-15 -> ten to fifteen (also scores and years); 555-0142 (three, four) is a phone number
  phones      digit by digit with "zero"
  St., Dr.    saint and doctor before a name, street and drive after a street's name
  Roman       after a monarch an ordinal (the eighth), after chapter, part, war, ... a cardinal
  initialisms letter by letter: FBI -> f b i
"""

import argparse
import json
import random
import re
from pathlib import Path

EVAL_SEED, EVAL_SIZE = 20_240_304, 1000
EVAL_PATH = Path(__file__).parent / "eval.jsonl"

# --- numbers into words -----------------------------------------------------------------------

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()
IRREGULAR = {
    "one": "first", "two": "second", "three": "third", "five": "fifth",
    "eight": "eighth", "nine": "ninth", "twelve": "twelfth",
}  # fmt: skip


def cardinal(n: int) -> str:
    if n < 0:
        return "minus " + cardinal(-n)
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + (" " + ONES[n % 10] if n % 10 else "")
    for size, name in ((1_000_000, "million"), (1000, "thousand"), (100, "hundred")):
        if n >= size:
            return f"{cardinal(n // size)} {name}" + (" " + cardinal(n % size) if n % size else "")


def ordinal(n: int) -> str:
    *head, last = cardinal(n).split()
    if last in IRREGULAR:
        last = IRREGULAR[last]
    else:
        last = (last[:-1] + "ie" if last.endswith("y") else last) + "th"
    return " ".join([*head, last])


def year(y: int) -> str:
    if y // 10 == 200:
        return cardinal(y)
    century, rest = divmod(y, 100)
    tail = "hundred" if rest == 0 else "oh " + ONES[rest] if rest < 10 else cardinal(rest)
    return f"{cardinal(century)} {tail}"


def digits(text: str) -> str:
    return " ".join(ONES[int(c)] for c in text if c.isdigit())


def decimal(text: str) -> str:
    """Reads "-1,234.50": integer part as a cardinal, fraction digit by digit."""
    sign = "minus " if text.startswith("-") else ""
    whole, _, fraction = text.lstrip("-").replace(",", "").partition(".")
    return sign + cardinal(int(whole)) + (" point " + digits(fraction) if fraction else "")


def suffix(n: int) -> str:
    return "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")


def plural(word: str) -> str:
    return word + "s"


# --- word lists -------------------------------------------------------------------------------

FIRST = (
    "Anna Ben Clara David Emma Frank Grace Henry Irene Jack Karen Leo Maria Nina Oscar Paul Rosa Sam "
    "Tom Vera Will Zoe Alice Peter Laura James Sofia Mark Julia Daniel"
).split()
LAST = (
    "Lee Smith Garcia Brown Chen Patel Jones Miller Davis Wilson Moore Taylor Kim Lopez Clark Lewis Hall "
    "Young King Wright Scott Green Baker Adams Nelson Carter Perez Turner Parker Evans Cook Morgan Reed "
    "Bell Cooper Ward Gray Watson Price Wood Ross Long Hughes Foster Novak Silva Rossi Weber Tanaka Okafor"
).split()
CITY = (
    "Boston Paris Chicago London Denver Tokyo Berlin Madrid Austin Dallas Seattle Toronto Rome Dublin "
    "Oslo Vienna Lisbon Houston Miami Atlanta Geneva Prague Cairo Delhi Sydney"
).split()
STREET = "Elm Oak Pine Main Maple Cedar Lake Hill Park River Church Mill Spring Walnut High Union".split()
SAINT = "Mary John Louis Paul George Andrew Helena Peter Patrick James".split()
MONARCH = "Henry Louis George Edward Charles James William Richard Philip Elizabeth Catherine Frederick".split()
MONTH = (
    "January February March April May June July August September October November December"
).split()
DAY = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
PEOPLE = (
    "teacher driver nurse editor lawyer farmer student manager guide pilot chef artist doctor player "
    "owner tenant guest client scientist engineer"
).split()
PLURALS = (
    "books tickets homes cars trees birds letters orders bottles tables chairs boxes pages units copies "
    "samples islands stars files songs photos apples eggs points votes jobs seats steps"
).split()
STAFF = "people visitors students workers voters members patients soldiers users teachers nurses guests".split()
THINGS = (
    "car house bike phone table camera piano ticket laptop painting coat watch boat lamp desk guitar "
    "printer chair book carpet"
).split()
EVENTS = (
    "meeting concert game lecture match party election flight train show class festival trial wedding "
    "exam tour sale race hearing dinner"
).split()
PLACES = (
    "bridge tower museum river road lake park school station hotel garden market library stadium tunnel "
    "castle farm harbor church factory"
).split()
ADJECTIVES = (
    "old new small large red blue green quiet local final early heavy famous public private broken "
    "modern empty narrow strange"
).split()
MEASURES = "price budget population revenue profit debt cost output demand income rent traffic".split()
INITIALISMS = "FBI CEO BBC ATM GPS USB DVD UN EU UK USA CPU PDF TV ID FAQ IBM HR VIP PR".split()
ONSET = "b br c ch d dr f g gr h j k kl l m n p pr r s st t tr v w z".split()
NUCLEUS = "a e i o u ai ea o a e".split()
CODA = " n r l s m t nd rt ck".split(" ")

TITLES = {
    "Dr.": "doctor", "Mr.": "mister", "Mrs.": "missus", "Ms.": "miss", "Prof.": "professor",
    "Capt.": "captain", "Sgt.": "sergeant", "Gov.": "governor", "Sen.": "senator", "Rev.": "reverend",
    "Gen.": "general", "Lt.": "lieutenant",
}  # fmt: skip
ROADS = {"St.": "street", "Ave.": "avenue", "Dr.": "drive", "Rd.": "road", "Blvd.": "boulevard", "Ln.": "lane"}
FIRMS = {"Inc.": "incorporated", "Ltd.": "limited", "Co.": "company", "Corp.": "corporation"}
LABELS = {
    "No.": "number", "p.": "page", "ch.": "chapter", "Fig.": "figure", "Vol.": "volume", "Apt.": "apartment",
    "Sec.": "section", "#": "number",
}  # fmt: skip
ADVERBS = {
    "approx.": "approximately", "e.g.": "for example", "i.e.": "that is", "est.": "estimated",
    "max.": "maximum", "min.": "minimum", "about": "about", "nearly": "nearly", "exactly": "exactly",
    "only": "only", "over": "over", "at least": "at least",
}  # fmt: skip
UNITS = {
    "length": {
        "km": "kilometer", "m": "meter", "cm": "centimeter", "mm": "millimeter", "mi": "mile", "ft": "foot",
        "yd": "yard",
    },
    "mass": {"kg": "kilogram", "g": "gram", "mg": "milligram", "lb": "pound", "oz": "ounce"},
    "volume": {"L": "liter", "ml": "milliliter"},
    "area": {"m²": "square meter", "km²": "square kilometer"},
    "duration": {"hrs": "hour", "mins": "minute", "ms": "millisecond"},
    "speed": {"mph": "mile per hour", "km/h": "kilometer per hour"},
    "temperature": {"°C": "degree celsius", "°F": "degree fahrenheit"},
    "data": {"GB": "gigabyte", "MB": "megabyte", "TB": "terabyte"},
    "energy": {"kW": "kilowatt", "kWh": "kilowatt hour", "MHz": "megahertz", "GHz": "gigahertz"},
}  # fmt: skip
FRACTIONS = {
    2: "half", 3: "third", 4: "quarter", 5: "fifth", 6: "sixth", 7: "seventh", 8: "eighth", 9: "ninth",
    10: "tenth", 12: "twelfth", 16: "sixteenth", 20: "twentieth",
}  # fmt: skip
CURRENCIES = {"$": ("dollar", "cent"), "€": ("euro", "cent"), "£": ("pound", "penny")}
CODES = {"USD": "dollar", "EUR": "euro", "GBP": "pound"}
ROMANS = "I II III IV V VI VII VIII IX X XI XII XIII XIV XV XVI XVII XVIII XIX XX".split()

# --- slots: each returns (written, spoken) ----------------------------------------------------


def word(words):
    return lambda r: ((w := r.choice(words)), w.lower())


def lookup(table):
    return lambda r: r.choice(list(table.items()))


def join(*parts, sep=" "):
    """Concatenates slots on the written side with sep, on the spoken side always as words."""
    return sep.join(p[0] for p in parts), " ".join(p[1] for p in parts)


def pick(r, *weighted):
    """Calls one of the (weight, slot) alternatives."""
    return r.choices([s for _, s in weighted], [w for w, _ in weighted])[0](r)


def integer(r, most=7):
    """An integer with a uniform number of digits, its zeros made more common than chance."""
    size = r.randint(1, most)
    n = r.randint(10 ** (size - 1) if size > 1 else 0, 10**size - 1)
    if size > 2 and r.random() < 0.4:
        n -= n % 10 ** r.randint(1, size - 1)
    if size > 3 and r.random() < 0.2:
        n -= n // 1000 % 10 * 1000
    return n


def grouped(n):
    return f"{n:,}"


def number(r, most=7):
    n = integer(r, most)
    bare = n >= 10_000 and r.random() < 0.15
    return str(n) if bare else grouped(n), cardinal(n)


def count(r):
    """A count of at least two, for plural nouns."""
    n = max(2, integer(r))
    return grouped(n), cardinal(n)


def real(r):
    text = f"{'-' if r.random() < 0.2 else ''}{r.choice([0, r.randint(0, 9), integer(r, 4)]):,}"
    text += "." + "".join(r.choices("0123456789", k=r.choice([1, 1, 2, 2, 3])))
    return text, decimal(text)


def signed(r):
    w, s = number(r)
    return ("-" + w, "minus " + s) if r.random() < 0.4 and w != "0" else (w, s)


def scaled(r):
    w = f"{r.randint(1, 99)}.{r.randint(1, 9)}" if r.random() < 0.6 else str(r.randint(2, 999))
    s = decimal(w)
    unit = r.choice(["million", "billion", "thousand"])
    return f"{w} {unit}", f"{s} {unit}"


def amount(units, cents, unit, cent):
    parts = []
    if units or not cents:
        parts.append(cardinal(units) + " " + (unit if units == 1 else plural(unit)))
    if cents:
        coins = cent if cents == 1 else "pence" if cent == "penny" else plural(cent)
        parts.append(f"{cardinal(cents)} {coins}")
    return " and ".join(parts)


def money(r):
    sign = r.choice("$$$€£")
    unit, cent = CURRENCIES[sign]
    kind = r.random()
    if kind < 0.15:
        w, s = scaled(r)
        return sign + w, f"{s} {plural(unit)}"
    if kind < 0.2:
        n = r.randint(2, 900)
        return f"{sign}{n}K", f"{cardinal(n)} thousand {plural(unit)}"
    if kind < 0.35:
        code = r.choice(list(CODES))
        n = integer(r, 6)
        w = f"{code} {n:,}" if r.random() < 0.5 else f"{n:,} {code}"
        return w, amount(n, 0, CODES[code], "")
    n = 0 if kind < 0.4 else integer(r)
    cents = r.randint(1, 99) if kind < 0.7 else 0
    return f"{sign}{n:,}" + (f".{cents:02}" if cents else ""), amount(n, cents, unit, cent)


def some_year(r):
    return r.choice([r.randint(1100, 1999), r.randint(1900, 2029), r.randint(1900, 2029)])


def year_slot(r):
    y = some_year(r)
    return str(y), year(y)


def decade(r):
    y = r.randint(150, 199) * 10
    y += 10 * (y % 100 == 0)
    return f"{y}s", re.sub(r"y$|n$", lambda m: {"y": "ies", "n": "ns"}[m[0]], year(y))


def month_name(r, m):
    name = MONTH[m]
    if r.random() < 0.35 and name not in ("May", "June", "July"):
        return name[:3] + r.choice(["", "."])
    return name


def date(r):
    m, d, y = r.randrange(12), r.randint(1, 28), some_year(r)
    spoken = f"{MONTH[m].lower()} {ordinal(d)}"
    kind = r.randrange(8)
    if kind == 0:
        return f"{month_name(r, m)} {d}", spoken
    if kind == 1:
        return f"{MONTH[m]} {d}{suffix(d)}", spoken
    spoken += " " + year(y)
    if kind in (2, 3):
        return f"{m + 1}/{d}/{y}", spoken
    if kind in (4, 5):
        return f"{month_name(r, m)} {d}, {y}", spoken
    if kind == 6:
        return f"{d} {month_name(r, m)} {y}", spoken
    return f"{y}-{m + 1:02}-{d:02}", spoken


def month_year(r):
    y, m = some_year(r), r.randrange(12)
    return f"{MONTH[m]} {y}", f"{MONTH[m].lower()} {year(y)}"


def minutes(m):
    return f"oh {ONES[m]}" if m < 10 else cardinal(m)


def clock(r):
    m = r.choice([0, r.randrange(10), r.randrange(60), r.randrange(60)])
    if r.random() < 0.6:
        h, half = r.randint(1, 12), r.choice("ap")
        mark = r.choice([f" {half}m", f"{half}m", f" {half}.m.", f" {half.upper()}M"])
        w = f"{h}" if m == 0 and r.random() < 0.7 else f"{h}:{m:02}"
        return w + mark, " ".join([ONES[h], *([minutes(m)] if m else []), half, "m"])
    h = r.randrange(24)
    w = f"{h:02}:{m:02}" if h == 0 or r.random() < 0.3 else f"{h}:{m:02}"
    return w, cardinal(h) + " " + (minutes(m) if m else "o clock" if 1 <= h <= 12 else "hundred")


def place_ordinal(r):
    n = max(1, integer(r, 3))
    return f"{n}{suffix(n)}", ordinal(n)


def fraction(r):
    bottom = r.choice(list(FRACTIONS))
    top = r.randint(1, bottom - 1)
    name = FRACTIONS[bottom]
    s = f"{ONES[top]} {name if top == 1 else 'halves' if bottom == 2 else plural(name)}"
    w = f"{top}/{bottom}"
    if r.random() < 0.3:
        n = r.randint(1, 20)
        return f"{n} {w}", f"{cardinal(n)} and {s}"
    return w, s


def percent(r):
    w, s = pick(r, (2, lambda r: number(r, 3)), (1, real))
    w, s = w.removeprefix("-"), s.removeprefix("minus ")
    return w + r.choice(["%", "%", " %"]), s + " percent"


def quantity(kind):
    """A number with a unit of that kind; only temperatures may be negative."""

    def slot(r):
        unit, name = r.choice(list(UNITS[kind].items()))
        w, s = pick(r, (4, lambda r: number(r, 4)), (2, real), (1, lambda r: ("1", "one")))
        if kind != "temperature":
            w, s = w.removeprefix("-"), s.removeprefix("minus ")
        elif r.random() < 0.2 and w[0] != "-":
            w, s = "-" + w, "minus " + s
        if w.lstrip("-") != "1" and not name.endswith("hertz"):
            head, *rest = name.split()
            if head == "square" or rest == ["hour"]:
                name = plural(name)
            else:
                name = " ".join(["feet" if head == "foot" else plural(head), *rest])
        return w + r.choice([" ", " ", ""]) + unit, f"{s} {name}"

    return slot


def degrees(r):
    n = r.randint(2, 360)
    return f"{n}°", f"{cardinal(n)} degrees"


def span(r):
    """A range or a score."""
    if r.random() < 0.3:
        a = some_year(r)
        b = min(2099, a + r.randint(1, 60))
        return f"{a}-{b}", f"{year(a)} to {year(b)}"
    a = r.randint(1, 200)
    b = a + r.randint(1, 90)
    return f"{a}{r.choice(['-', '-', '–'])}{b}", f"{cardinal(a)} to {cardinal(b)}"


def score(r):
    a, b = r.randint(0, 30), r.randint(0, 30)
    return f"{a}-{b}", f"{cardinal(a)} to {cardinal(b)}"


def phone(r):
    area, mid, line = (f"{r.randint(200, 999)}", f"{r.randint(200, 999)}", f"{r.randint(0, 9999):04}")
    w = r.choice(["{1}-{2}", "{0}-{1}-{2}", "({0}) {1}-{2}", "+1 {0} {1} {2}"]).format(area, mid, line)
    return w, ("plus " if w[0] == "+" else "") + digits(w)


def coined(r):
    """An invented name, so that copying is learnt and not only a list of words."""
    w = "".join(r.choice(ONSET) + r.choice(NUCLEUS) + r.choice(CODA) for _ in range(r.randint(1, 2)))
    return w.capitalize(), w


def surname(r):
    return pick(r, (6, word(LAST)), (1, coined))


def person(r):
    return pick(
        r,
        (4, lambda r: join(lookup(TITLES)(r), surname(r))),
        (2, word(FIRST)),
        (2, lambda r: join(word(FIRST)(r), surname(r))),
        (1, lambda r: join(word(FIRST)(r), surname(r), r.choice([("Jr.", "junior"), ("Sr.", "senior")]))),
        (1, lambda r: join(lookup(TITLES)(r), word(FIRST)(r), surname(r))),
        (2, lambda r: join(("the", "the"), word(PEOPLE)(r))),
        (1, lambda r: join(("the", "the"), word(ADJECTIVES)(r), word(PEOPLE)(r))),
    )


def monarch(r):
    n = r.randint(1, 20)
    w, s = join(r.choice([("King", "king"), ("", "")]), word(MONARCH)(r))
    return f"{w} {ROMANS[n - 1]}".strip(), f"{s} the {ordinal(n)}".strip()


def roman_part(r):
    n = r.randint(1, 20)
    w, s = word(["Chapter", "Part", "Act", "Volume", "Book", "Section"])(r)
    return f"{w} {ROMANS[n - 1]}", f"{s} {cardinal(n)}"


def street(r):
    w, s = join(word(STREET)(r), lookup(ROADS)(r))
    if r.random() < 0.2:
        n = max(1, integer(r, 3))
        road = lookup(ROADS)(r)
        w, s = join((f"{n}{suffix(n)}", ordinal(n)), road)
    return w, s


def address(r):
    n = r.choice([r.randint(1, 999), r.randint(1100, 1999), r.randint(1, 99)])
    return join((str(n), year(n) if n > 999 else cardinal(n)), street(r))


def saint(r):
    return join(("St.", "saint"), word(SAINT)(r))


def place(r):
    return pick(
        r,
        (5, word(CITY)),
        (2, lambda r: join(("the", "the"), word(PLACES)(r))),
        (2, lambda r: join(("the", "the"), word(ADJECTIVES)(r), word(PLACES)(r))),
        (1, saint),
        (1, lambda r: join(r.choice([("Mt.", "mount"), ("Ft.", "fort")]), pick(r, (2, word(LAST)), (1, coined)))),
        (1, coined),
    )


def firm(r):
    w, s = pick(r, (3, word(LAST)), (2, word(CITY)), (1, coined))
    if r.random() < 0.25:
        w, s = join((w, s), ("&", "and"), word(LAST)(r))
    return join((w, s), lookup(FIRMS)(r))


def initialism(r):
    w = r.choice(INITIALISMS)
    return w, " ".join(w.lower())


def label(r):
    mark, name = lookup(LABELS)(r)
    w, s = number(r, 3)
    return mark + ("" if mark == "#" else " ") + w, f"{name} {s}"


SLOTS = {
    "person": person, "first": word(FIRST), "city": word(CITY), "place": place, "firm": firm,
    "street": street, "address": address, "saint": saint, "monarch": monarch, "roman": roman_part,
    "day": word(DAY), "people": word(PEOPLE), "plural": word(PLURALS), "thing": word(THINGS),
    "event": word(EVENTS), "site": word(PLACES), "adj": word(ADJECTIVES), "measure": word(MEASURES),
    "initialism": initialism, "adverb": lookup(ADVERBS), "label": label, "number": number, "count": count,
    "real": real, "scaled": scaled, "money": money, "year": year_slot, "decade": decade, "date": date,
    "my": month_year, "time": clock, "ordinal": place_ordinal, "fraction": fraction, "percent": percent,
    "signed": signed, "staff": word(STAFF), "degrees": degrees, "span": span, "score": score, "phone": phone,
    "war": lambda r: r.choice([("I", "one"), ("II", "two")]), **{kind: quantity(kind) for kind in UNITS},
}  # fmt: skip

# --- sentences --------------------------------------------------------------------------------

CORES = """
{person} paid {money} on {date}
{person} bought the {adj} {thing} for {money}
{person} sold {count} {plural} for {money}
{person} owes {firm} {money}
the {measure} rose by {percent} in {year}
the {measure} fell from {money} to {money}
the {measure} of {city} reached {scaled} in {year}
the {thing} costs {adverb} {money}
{firm} lost {money} in {my}
{firm} hired {count} {staff} in {city}
the {event} starts at {time} on {date}
the {event} is on {day}, {date}, at {time}
the {event} at {place} ended at {time}
{person} arrives at {time}
meet {person} at {time} near {place}
{person} was born on {date} in {city}
{person} moved to {city} in {year}
{place} was built in the {decade}
{person} lives at {address}
{person} left {street} at {time}
turn left on {street} after {length}
{person} called {phone} at {time}
call {phone} or visit {address}
the number of {firm} is {phone}
{person} ran {length} in {duration}
the {adj} {thing} weighs {mass}
{place} is {adverb} {length} from {place}
the {site} is {length} long and {length} wide
it was {temperature} in {city} on {date}
{person} drove at {speed} to {place}
the {thing} uses {energy} and {data}
the file takes {data}
add {volume} of water and {mass} of salt
the {site} covers {area}
the {site} turned {degrees} to the left
{person} added {fraction} of the {plural}
{fraction} of the {plural} came from {place}
{percent} of the {plural} were {adj}
{adverb} {percent} of {staff} in {city} are {adj}
{person} finished {ordinal} in the {event}
this is the {ordinal} {event} in {city}
{person} won the {ordinal} {event} by {score}
{person} vs. {person} ended {score}
{city} beat {city} {score} on {day}
read {label} and {label}
see {label} for the {measure} of {year}
{person} wrote {roman} in {year}
{monarch} ruled {place} in {year}
{monarch} met {monarch} at {place}
World War {war} changed {city}
the {plural} of {saint} cost {money} each
we counted {count} {plural} near {saint}
{place} has {count} {plural}
{count} {staff} live in {city}
{person} saw {span} {staff} at {place}
pages {span} are about {monarch}
{person} worked for {firm} in {span}
the {adverb} value was {real}
the result was {real}, not {real}
the answer is {signed}
the {initialism} sent {count} {staff} to {place}
the {initialism} report of {date} lists {number} {plural}
{person} of the {initialism} spoke at {time}
they brought {plural}, {plural}, etc. to {place}
{person} asked about {plural}, {adverb} {count} {plural}
{person} and {person} met at {address}
{count} {plural}, {number} {plural} and {number} {plural}
""".strip().split("\n")

LEADS = [
    "Yesterday", "Today", "According to {person},", "In {year},", "On {date},", "At {time},", "On {day}",
    "We heard that", "It seems that", "By {my},", "In {city},", "As {person} said,", "Note that", "Later,",
]  # fmt: skip
TAILS = [
    "in {city}", "on {day}", "before {time}", "with {person}", "for {money}", "in {year}", "since {year}",
    "near {place}", "again", "as planned", "after the {event}", "without the {thing}", "by {date}",
]  # fmt: skip
JOINS = [" and ", ", but ", " while ", "; ", " because ", ", so "]


def plain(text: str) -> str:
    text = text.replace("vs.", "versus").replace("etc.", "et cetera")
    return re.sub(r"[^a-z ]", "", text.lower())


def fill(r, template: str):
    written, spoken = "", ""
    for i, part in enumerate(re.split(r"\{(\w+)\}", template)):
        w, s = SLOTS[part](r) if i % 2 else (part, plain(part))
        written, spoken = written + w, spoken + s
    return written, spoken


def example(r: random.Random) -> tuple[str, str]:
    """One (written, spoken) sentence."""
    template = r.choice(CORES)
    shape = r.random()
    if shape < 0.25:
        template = f"{r.choice(LEADS)} {template}"
    elif shape < 0.5:
        template = f"{template} {r.choice(TAILS)}"
    elif shape < 0.6:
        template = f"{template}{r.choice(JOINS)}{r.choice(CORES)}"
    written, spoken = fill(r, template)
    if r.random() < 0.9:
        written = written[0].upper() + written[1:]
    if not written.endswith("."):
        written += r.choices([".", "!", "?", ""], [16, 1, 1, 2])[0]
    return written, " ".join(spoken.split())


def pairs(seed):
    """An endless stream of pairs, the same for the same seed."""
    r = random.Random(seed)
    while True:
        yield example(r)


def held_out():
    """EVAL_SIZE distinct pairs; training skips every pair whose written side is among them."""
    found = {}
    for written, spoken in pairs(EVAL_SEED):
        found.setdefault(written, spoken)
        if len(found) == EVAL_SIZE:
            return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--show", type=int, metavar="N", help="print N pairs instead of writing eval.jsonl")
    args = parser.parse_args()
    if args.show:
        stream = pairs(0)
        for _ in range(args.show):
            print(*next(stream), sep="\n  ")
        return
    with EVAL_PATH.open("w", encoding="utf-8", newline="\n") as out:
        for written, spoken in held_out().items():
            out.write(json.dumps({"text": written, "target": spoken}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
