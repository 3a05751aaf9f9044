"""What the demo model is taught, as plain tables: facts, wordings, small talk, stories, and what it does not know.

In each pair of wordings the first tuple is trained and the second is kept for the test. `{x}` is the item asked for,
`{p}` a noun phrase such as "the capital of France". Holds no logic."""

from __future__ import annotations


def _pairs(text: str) -> dict[str, str]:
    """'a=b, c=d' → {'a': 'b', 'c': 'd'}."""
    return {key.strip(): value.strip() for key, value in (pair.split("=") for pair in text.split(","))}


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


# ---------------------------------------------------------------------------------------------------------- facts

CAPITALS = {
    "Europe": _pairs(
        "France=Paris, Italy=Rome, Spain=Madrid, Portugal=Lisbon, Germany=Berlin, Austria=Vienna, Switzerland=Bern,"
        "Belgium=Brussels, the Netherlands=Amsterdam, Denmark=Copenhagen, Norway=Oslo, Sweden=Stockholm,"
        "Finland=Helsinki, Iceland=Reykjavik, Ireland=Dublin, the United Kingdom=London, England=London,"
        "Scotland=Edinburgh, Wales=Cardiff, Poland=Warsaw, Hungary=Budapest, Greece=Athens, Bulgaria=Sofia,"
        "Romania=Bucharest, Serbia=Belgrade, Croatia=Zagreb, Slovenia=Ljubljana, Slovakia=Bratislava, Estonia=Tallinn,"
        "Latvia=Riga, Lithuania=Vilnius, Ukraine=Kyiv, Belarus=Minsk, Moldova=Chisinau, Albania=Tirana, Malta=Valletta,"
        "the Czech Republic=Prague, Russia=Moscow"
    ),
    "Asia": _pairs(
        "China=Beijing, Japan=Tokyo, India=New Delhi, Pakistan=Islamabad, Nepal=Kathmandu, Thailand=Bangkok,"
        "Vietnam=Hanoi, Indonesia=Jakarta, the Philippines=Manila, South Korea=Seoul, Mongolia=Ulaanbaatar, Iran=Tehran,"
        "Iraq=Baghdad, Syria=Damascus, Jordan=Amman, Lebanon=Beirut, Saudi Arabia=Riyadh, Afghanistan=Kabul,"
        "Cambodia=Phnom Penh, Bangladesh=Dhaka, Qatar=Doha, Oman=Muscat, Turkey=Ankara"
    ),
    "Africa": _pairs(
        "Egypt=Cairo, Morocco=Rabat, Tunisia=Tunis, Algeria=Algiers, Libya=Tripoli, Sudan=Khartoum, Ethiopia=Addis Ababa,"
        "Kenya=Nairobi, Uganda=Kampala, Ghana=Accra, Nigeria=Abuja, Senegal=Dakar, Mali=Bamako, Angola=Luanda,"
        "Zambia=Lusaka, Zimbabwe=Harare, Namibia=Windhoek, Rwanda=Kigali, Somalia=Mogadishu, Madagascar=Antananarivo"
    ),
    "North America": _pairs(
        "the United States=Washington, Canada=Ottawa, Mexico=Mexico City, Cuba=Havana, Jamaica=Kingston,"
        "Costa Rica=San Jose, Nicaragua=Managua, Honduras=Tegucigalpa, Panama=Panama City, Haiti=Port-au-Prince"
    ),
    "South America": _pairs(
        "Brazil=Brasilia, Argentina=Buenos Aires, Chile=Santiago, Peru=Lima, Colombia=Bogota, Venezuela=Caracas,"
        "Ecuador=Quito, Uruguay=Montevideo, Paraguay=Asuncion, Bolivia=Sucre"
    ),
    "Oceania": _pairs("Australia=Canberra, New Zealand=Wellington, Fiji=Suva"),
}

# Other names people type for a country of the table.
COUNTRY_NAMES = _pairs(
    "the UK=the United Kingdom, the USA=the United States, the US=the United States, Great Britain=the United Kingdom,"
    "America=the United States, Britain=the United Kingdom, Holland=the Netherlands, Czechia=the Czech Republic"
)

COLOURS = _pairs(
    "the sky=blue, the sea=blue, grass=green, snow=white, milk=white, coal=black, blood=red, the sun=yellow, salt=white,"
    "chocolate=brown, soil=brown, butter=yellow, sand=yellow, gold=yellow, ketchup=red, rice=white, the night=black,"
    "honey=yellow, coffee=brown, cheese=yellow"
)
THING_COLOURS = _pairs(  # things asked for as "a banana", "bananas" or "banana"
    "banana=yellow, lemon=yellow, tomato=red, strawberry=red, cherry=red, carrot=orange, pumpkin=orange, frog=green,"
    "cucumber=green, leaf=green, crow=black, swan=white, polar bear=white, elephant=grey, mouse=grey, flamingo=pink,"
    "pig=pink, plum=purple, eggplant=purple, bear=brown, potato=brown, cloud=white, fire engine=red, tyre=black,"
    "pea=green, canary=yellow, dolphin=grey, orange=orange, lime=green, rose=red"
)

OPPOSITES = _pairs(
    "hot=cold, big=small, fast=slow, tall=short, high=low, up=down, left=right, day=night, black=white, light=dark,"
    "happy=sad, rich=poor, young=old, good=bad, early=late, open=closed, full=empty, hard=soft, heavy=light,"
    "strong=weak, wet=dry, clean=dirty, loud=quiet, near=far, wide=narrow, thick=thin, deep=shallow, sharp=blunt,"
    "first=last, always=never, love=hate, war=peace, win=lose, buy=sell, push=pull, give=take, begin=end, inside=outside,"
    "above=below, before=after, true=false, yes=no, easy=difficult, cheap=expensive, brave=cowardly, kind=cruel,"
    "polite=rude, rough=smooth, sweet=bitter, alive=dead, asleep=awake, summer=winter, north=south, east=west,"
    "friend=enemy, question=answer, more=less, many=few, remember=forget, arrive=leave, laugh=cry,"
    "ancient=modern, simple=complicated, safe=dangerous, same=different, success=failure, beautiful=ugly,"
    "dark=light, old=young, new=old, soft=hard, closed=open, weak=strong, short=tall, long=short, last=first, never=always,"
    "difficult=easy, after=before, awake=asleep, answer=question, dry=wet, quiet=loud, dirty=clean, empty=full, late=early,"
    "female=male, male=female, sister=brother, brother=sister, husband=wife, boy=girl, girl=boy, sour=sweet, top=bottom"
)
BOTH_WAYS = _words(  # the words above whose opposite may be asked for as well
    "hot, big, fast, high, up, left, day, black, happy, rich, good, early, full, wet, clean, loud, near, wide, thick,"
    "first, always, love, war, win, buy, push, inside, above, true, yes, cheap, alive, summer, north, east, more, remember"
)

PLURALS = _pairs(
    "mouse=mice, child=children, man=men, woman=women, foot=feet, tooth=teeth, goose=geese, person=people, ox=oxen,"
    "sheep=sheep, fish=fish, deer=deer, leaf=leaves, knife=knives, wolf=wolves, wife=wives, life=lives, half=halves,"
    "shelf=shelves, loaf=loaves, thief=thieves, city=cities, baby=babies, story=stories, country=countries, lady=ladies,"
    "fly=flies, cherry=cherries, box=boxes, bus=buses, fox=foxes, glass=glasses, dish=dishes, watch=watches,"
    "church=churches, kiss=kisses, potato=potatoes, tomato=tomatoes, hero=heroes, photo=photos, piano=pianos, cat=cats,"
    "dog=dogs, house=houses, tree=trees, book=books, car=cars, apple=apples, river=rivers, king=kings, cow=cows, day=days,"
    "toy=toys, key=keys, monkey=monkeys, horse=horses, bird=birds, flower=flowers, friend=friends, table=tables,"
    "chair=chairs, cactus=cacti, crisis=crises, berry=berries, party=parties, brush=brushes, lion=lions, bridge=bridges,"
    "banana=bananas, elephant=elephants, computer=computers, teacher=teachers, doctor=doctors, phone=phones, pen=pens,"
    "boy=boys, girl=girls, hand=hands, eye=eyes, school=schools, window=windows, boat=boats, egg=eggs"
)

SOUNDS = _pairs(
    "cow=moo, dog=woof, cat=meow, sheep=baa, duck=quack, pig=oink, horse=neigh, donkey=hee-haw, lion=roar, mouse=squeak,"
    "frog=croak, owl=hoot, bee=buzz, snake=hiss, rooster=cock-a-doodle-doo, wolf=howl, chicken=cluck, crow=caw, goat=maa"
)
YOUNG = _pairs(
    "cow=calf, dog=puppy, cat=kitten, sheep=lamb, duck=duckling, pig=piglet, horse=foal, lion=cub, bear=cub, goat=kid,"
    "frog=tadpole, chicken=chick, deer=fawn, kangaroo=joey, goose=gosling, swan=cygnet, elephant=calf, whale=calf,"
    "owl=owlet, fox=cub, wolf=pup, butterfly=caterpillar, eagle=eaglet, tiger=cub, spider=spiderling"
)
LEGS = _pairs(
    "dog=4, cat=4, horse=4, cow=4, bird=2, chicken=2, duck=2, spider=8, ant=6, bee=6, fly=6, snake=0, fish=0, frog=4,"
    "elephant=4, mouse=4, crab=10, human=2, butterfly=6, worm=0, owl=2, lion=4, goat=4, beetle=6, penguin=2, kangaroo=2"
)

DAYS = _words("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
MONTHS = _words("January, February, March, April, May, June, July, August, September, October, November, December")
MONTH_DAYS = dict(zip(MONTHS, (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31), strict=True))

NUMBER_WORDS = _words(
    "zero, one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen, fourteen, fifteen,"
    "sixteen, seventeen, eighteen, nineteen, twenty"
)

# ------------------------------------------------------------------------------------------------ ways to ask

# Around a noun phrase: "What is {p}?" → "What is the capital of France?"
WRAPPERS = (
    (
        "What is {p}?", "What is {p}?", "What is {p}?", "What's {p}?", "Whats {p}?", "Tell me {p}.", "{p}?", "{p}",
        "Please tell me {p}.", "Can you tell me {p}?", "Could you tell me {p}?", "Do you know {p}?", "Give me {p}.",
        "I would like to know {p}.", "I want to know {p}.", "I wonder what {p} is.", "What would {p} be?",
        "Can you say what {p} is?", "Do you know what {p} is?", "Name {p}.", "Say {p}.", "Could you please tell me {p}?",
        "I need to know {p}.", "Would you tell me {p}?", "What do you call {p}?", "What was {p} again?",
        "Can you give me {p}?", "I forgot {p}.", "Let me know {p}.", "How about {p}?", "Please name {p}.",
        "My question is: what is {p}?", "I am looking for {p}.", "Now {p}.", "Tell me what {p} is.",
    ),
    (
        "Could you say what {p} is?", "Would you please give me {p}?", "Do you happen to know {p}?",
        "I would love to know what {p} is.", "Does anybody know {p}?", "Would you say {p}?",
    ),
)  # fmt: skip

OPENERS = _words("Hi, Hello, Hey, Please, Ok, Okay, So, Now, Well, Thanks, Good, Great, And, Right, Sorry")
LEAD_INS = ("Quick question: ", "Next question: ", "I have a question. ", "One more: ", "Hello! ", "Hi! ", "Thanks! ",
            "Thank you. ", "Another question: ", "Easy one: ", "Let us try this: ", "Question: ")  # fmt: skip
CLOSERS = (" please", ", please", " Thanks.", " Thank you.", " I forgot.", " please?", " Please.", " I am curious.")

# Words that may be mistyped: never the thing asked for.
COMMON = frozenset(
    _words(
        "what, what's, whats, is, the, of, capital, tell, me, please, can, you, could, do, know, would, like, to, want,"
        "colour, color, opposite, plural, which, city, country, how, much, add, and, count, from, story, about, a, for,"
        "give, name, say, does, sound, make, young, baby, called, comes, after, before, hello, thanks, thank, who, are"
    )
)

CAPITAL = (
    ("the capital of {x}", "the capital city of {x}", "{x}'s capital", "{x}'s capital city", "the capital of {x}",
     "the name of the capital of {x}"),
    ("Which city is the capital of {x}?", "What city is the capital of {x}?", "capital of {x}", "capital of {x}?",
     "{x} capital", "{x} capital?", "capital {x}", "Capital city of {x}?", "Which is the capital of {x}?",
     "What is {x}'s capital called?", "What is the capital of {x} called?", "What capital does {x} have?",
     "Which city is {x}'s capital?", "What's the name of {x}'s capital?", "Do you know which city is the capital of {x}?",
     "The capital of {x} is?", "What is the capital city in {x}?", "In {x}, what is the capital?", "capital city {x}"),
    ("Which capital does {x} have?", "For {x}, what is the capital?", "The capital of {x} is which city?",
     "What city is {x}'s capital?"),
)  # fmt: skip
COUNTRY = (
    ("the country whose capital is {x}", "the country with the capital {x}", "the country that has {x} as its capital"),
    ("{x} is the capital of which country?", "{x} is the capital of what?", "Which country has {x} as its capital?",
     "Which country has the capital {x}?", "What country is {x} the capital of?", "What is {x} the capital of?",
     "Of which country is {x} the capital?", "{x} is the capital of what country?", "Whose capital is {x}?",
     "Which country's capital is {x}?", "What country has {x} as its capital?", "In which country is {x}?",
     "In what country is {x}?", "Which country is {x} in?", "What country is {x} in?", "Where is {x}?"),
    ("{x} is the capital city of which country?", "Which country is {x} the capital of?", "What country's capital is {x}?"),
)  # fmt: skip
CONTINENT = (
    ("the continent of {x}", "the continent that {x} is in", "{x}'s continent"),
    ("On which continent is {x}?", "Which continent is {x} in?", "What continent is {x} in?", "What continent is {x} on?",
     "Where is {x}?", "In which continent is {x}?", "{x} is on which continent?", "continent of {x}", "{x} continent?",
     "Which continent does {x} belong to?", "Where in the world is {x}?", "Where can I find {x}?",
     "Where does {x} lie?", "{x} is in which continent?", "Which part of the world is {x} in?"),
    ("On what continent is {x}?", "What continent does {x} belong to?", "On which continent can I find {x}?"),
)  # fmt: skip
COLOUR = (
    ("the colour of {x}", "the color of {x}", "{x}'s colour", "the usual colour of {x}", "the usual color of {x}"),
    ("What colour {is} {x}?", "What color {is} {x}?", "Which colour {is} {x}?", "Which color {is} {x}?",
     "What colour {has} {x}?", "What color {has} {x}?", "colour of {x}", "color of {x}?", "{n} colour", "{n} color?",
     "What colour {is} {x} usually?", "{x}: what colour?", "Do you know what colour {x} {is}?",
     "Tell me what colour {x} {is}.", "Can you tell me what color {x} {is}?", "What is the color of {x}?",
     "What is the colour of {x}?", "{x}, what color {is} that?", "I wonder what color {x} {is}.", "How is {x} coloured?"),
    ("Which colour {has} {x}?", "Tell me which color {x} {is}.", "What sort of colour {is} {x}?"),
)  # fmt: skip
OPPOSITE = (
    ("the opposite of {x}", "the opposite of {x}", "the antonym of {x}", "the word opposite to {x}", "an antonym of {x}",
     "the contrary of {x}", 'the opposite of "{x}"', "the opposite of the word {x}", "an antonym for {x}"),
    ("opposite of {x}", "opposite of {x}?", "{x} opposite", "What word is the opposite of {x}?", "antonym of {x}",
     "Which word means the opposite of {x}?", "What is opposite to {x}?", "If it is not {x}, what is it?",
     "Which word is the opposite of {x}?", "What means the opposite of {x}?", "{x} is the opposite of what?",
     "The opposite of {x} is?", "What's {x}'s opposite?", "Find the opposite of {x}.", "opposite {x}",
     "What word means the opposite of {x}?", "the opposite to {x}?"),
    ("What is the reverse of {x}?", "Which word is opposite to {x}?", "What would be the opposite of {x}?",
     "{x} has which opposite?"),
)  # fmt: skip
PLURAL = (
    ("the plural of {x}", "the plural of {x}", "the plural form of {x}", 'the plural of "{x}"', "the plural for {x}",
     "the plural of the word {x}", "the plural of the noun {x}", "{x}'s plural"),
    ("plural of {x}", "plural of {x}?", "{x} plural", "One {x}, two what?", "What is {x} in the plural?",
     "How do you say {x} in the plural?", "What are two of them called: one {x}, many ...?", "Make {x} plural.",
     "What is more than one {x} called?", "How do you write the plural of {x}?", "Put {x} in the plural.",
     "What do you call more than one {x}?", "I have one {x}. You have two what?", "The plural of {x} is?", "plural {x}",
     "What is the plural form of {x}?", "How do I form the plural of {x}?", "one {x}, many what?"),
    ("Which is the plural of {x}?", "What is {x} in plural form?", "How would you write {x} in the plural?"),
)  # fmt: skip
SOUND = (
    ("the sound of {a}", "the sound {a} makes", "the noise {a} makes", "the sound that {a} makes"),
    ("What does {a} say?", "What does the {x} say?", "What sound does {a} make?", "What noise does {a} make?",
     "Which sound does {a} make?", "{x} sound", "{x} sound?", "How does {a} sound?", "What do {s} say?",
     "What sound do {s} make?", "What does {a} sound like?", "How does {a} go?", "sound of {a}", "What sound does the {x} make?",
     "Which noise does {a} make?", "What is the sound of {a}?"),
    ("What noise do {s} make?", "Which sound do {s} make?", "How do {s} sound?"),
)  # fmt: skip
YOUNG_OF = (
    ("the young of {a}", "a baby {x}", "a young {x}", "the baby of {a}", "the name of a baby {x}", "the word for a baby {x}"),
    ("What is a baby {x} called?", "What is a young {x} called?", "What do you call a baby {x}?", "baby {x}?",
     "What do you call a young {x}?", "What are baby {s} called?", "What is the young of {a} called?", "young of {a}",
     "How is a baby {x} called?", "What is the name for a baby {x}?", "What is the baby of {a} called?", "A baby {x} is a what?",
     "What's a baby {x} called?", "What are young {s} called?", "baby {x} name"),
    ("Which name has the young of {a}?", "What do people call a baby {x}?", "How do you call a young {x}?"),
)  # fmt: skip
LEGS_OF = (
    ("the number of legs of {a}", "the number of legs {a} has", "how many legs {a} has"),
    ("How many legs does {a} have?", "How many legs do {s} have?", "How many legs has {a} got?", "{x} legs?",
     "How many legs has {a}?", "How many legs does the {x} have?", "Number of legs of {a}?", "legs of {a}",
     "Tell me how many legs {a} has.", "Do you know how many legs {a} has?", "{a} has how many legs?",
     "Can you tell me how many legs {s} have?", "On how many legs does {a} walk?"),
    ("How many legs are there on {a}?", "{s} have how many legs?", "Can you say how many legs {a} has?"),
)  # fmt: skip
AFTER = (
    ("the {kind} after {x}", "the next {kind} after {x}", "the {kind} that follows {x}", "the {kind} that comes after {x}"),
    ("What comes after {x}?", "Which {kind} comes after {x}?", "What {kind} comes after {x}?", "What follows {x}?",
     "Which {kind} follows {x}?", "What {kind} is after {x}?", "What is after {x}?", "after {x}?", "What comes next after {x}?",
     "Which {kind} is after {x}?", "{x} is followed by what?", "after {x} comes?", "{x}, and then?",
     "What {kind} follows {x}?", "Tell me what comes after {x}."),
    ("What comes right after {x}?", "{x} is followed by which {kind}?", "Which is the {kind} after {x}?"),
)  # fmt: skip
BEFORE = (
    ("the {kind} before {x}", "the {kind} just before {x}", "the {kind} that comes before {x}"),
    ("What comes before {x}?", "Which {kind} comes before {x}?", "What {kind} comes before {x}?", "What is before {x}?",
     "Which {kind} is before {x}?", "What {kind} is before {x}?", "before {x}?", "What comes just before {x}?",
     "What came before {x}?", "Which {kind} was before {x}?", "Tell me what comes before {x}.", "before {x} comes?"),
    ("What comes right before {x}?", "Which is the {kind} before {x}?", "{x} comes after which {kind}?"),
)  # fmt: skip
DAYS_IN = (
    ("the number of days in {x}", "how many days {x} has"),
    ("How many days does {x} have?", "How many days are in {x}?", "How many days are there in {x}?", "days in {x}",
     "How long is {x}?", "How many days has {x}?", "days in {x}?", "Tell me how many days {x} has.",
     "{x} has how many days?", "Do you know how many days {x} has?", "How many days in {x}?", "How many days has {x} got?"),
    ("How many days long is {x}?", "Can you tell me how many days are in {x}?", "In {x}, how many days are there?"),
)  # fmt: skip

# After a question of the same sort: "And of Italy?"
FOLLOW_UPS = (
    ("And {x}?", "And of {x}?", "And for {x}?", "What about {x}?", "How about {x}?", "{x}?", "And what about {x}?", "and {x}",
     "Now {x}.", "Now {x}?", "The same for {x}?", "And the one of {x}?", "And how about {x}?", "What of {x}?", "Ok, and {x}?"),
    ("Also {x}?", "Then {x}?", "And then {x}?"),
)  # fmt: skip

SUM = (
    ("What is {a} + {b}?", "What is {a} plus {b}?", "What's {a} + {b}?", "Whats {a} plus {b}?", "{a} + {b}", "{a}+{b}",
     "{a} + {b} =", "{a}+{b}=", "{a} + {b} = ?", "{a}+{b}?", "{a} plus {b}", "{a} plus {b}?", "Add {a} and {b}.", "Add {a} to {b}.",
     "How much is {a} + {b}?", "How much is {a} plus {b}?", "How much is {a} and {b}?", "Calculate {a} + {b}.",
     "Can you add {a} and {b}?", "Tell me {a} + {b}.", "What is the sum of {a} and {b}?", "sum of {a} and {b}",
     "The sum of {a} and {b}?", "Compute {a} plus {b}.", "Please add {a} and {b}.", "Do you know {a} + {b}?",
     "Can you tell me what {a} plus {b} is?", "Could you add {a} and {b}?", "What do {a} and {b} make?", "{a} and {b} make?",
     "I have {a} apples and get {b} more. How many have I?", "What does {a} + {b} equal?", "What is {a}+{b}?",
     "What is {a} added to {b}?", "Can you do {a} + {b}?", "Let us add {a} and {b}.", "If I add {a} and {b}, what do I get?"),
    ("Could you work out {a} + {b}?", "What do I get when I add {a} and {b}?", "How much do {a} and {b} make?",
     "Please calculate {a} plus {b}."),
)  # fmt: skip
FIRST_SUMS = ((1, 1), (2, 2), (2, 3), (17, 25))  # what everybody tries first: always trained
SUM_OTHER = (
    ("What is {a} - {b}?", "What is {a} minus {b}?", "{a} - {b}", "{a}-{b}", "{a} * {b}", "{a}*{b}", "What is {a} times {b}?",
     "{a} times {b}", "{a} x {b}", "{a} / {b}", "What is {a} divided by {b}?", "Multiply {a} by {b}.", "Subtract {a} from {b}.",
     "How much is {a} minus {b}?", "How much is {a} times {b}?", "Divide {a} by {b}.", "{a} minus {b}", "What's {a} * {b}?"),
    ("Calculate {a} times {b}.", "What's {a} - {b}?", "Can you multiply {a} and {b}?"),
)  # fmt: skip
SUM_MORE = (
    ("plus {b}?", "plus {b}", "Plus {b}?", "+ {b}", "+{b}", "And plus {b}?", "Add {b}.", "Now add {b}.", "And {b} more?",
     "Add {b} to that.", "Now plus {b}.", "And if you add {b}?", "{b} more?", "Add another {b}.", "and add {b}"),
    ("Then add {b}.", "And with {b} more?", "What if you add {b}?"),
)  # fmt: skip
COUNT = (
    ("Count from {a} to {b}.", "count from {a} to {b}", "Can you count from {a} to {b}?", "Please count from {a} to {b}.",
     "Count {a} to {b}", "Could you count from {a} to {b}?", "Start at {a} and count to {b}.", "List the numbers from {a} to {b}.",
     "What are the numbers from {a} to {b}?", "Write the numbers from {a} to {b}.", "Give me the numbers from {a} to {b}.",
     "Say the numbers from {a} to {b}.", "Count for me from {a} to {b}.", "I want you to count from {a} to {b}.", "{a} to {b}, count"),
    ("Would you count from {a} to {b}?", "Begin at {a} and count to {b}.", "Tell me the numbers from {a} to {b}."),
)  # fmt: skip
COUNT_TO = (
    ("Count to {b}.", "count to {b}", "Can you count to {b}?", "Please count to {b}.", "Count up to {b}.", "Could you count to {b}?",
     "Count to {b} for me.", "Do you know how to count to {b}?", "Let us count to {b}.", "I want you to count to {b}."),
    ("Would you count up to {b}?", "Please count up to {b} for me.", "Are you able to count to {b}?"),
)  # fmt: skip
COUNT_DOWN = (
    ("Count down from {a} to {b}.", "count down from {a} to {b}", "Count backwards from {a} to {b}.", "Can you count down from {a} to {b}?",
     "Please count down from {a} to {b}.", "Count back from {a} to {b}.", "Could you count backwards from {a} to {b}?"),
    ("Would you count down from {a} to {b}?", "Can you count back from {a} to {b}?"),
)  # fmt: skip
COUNT_BACK = (
    ("Now backwards.", "And backwards?", "And back?", "Now count back.", "And now down again?", "Now the other way round.",
     "Now in reverse.", "Can you do it backwards?", "backwards please", "And the other way?"),
    ("Now do it backwards.", "Could you count back again?"),
)  # fmt: skip

STORY = (
    ("Tell me a story about {x}.", "tell me a story about {x}", "A story about {x}, please.", "Tell a story about {x}.",
     "Can you tell me a story about {x}?", "Could you tell a story about {x}?", "Please tell me a short story about {x}.",
     "I want to hear a story about {x}.", "I would like a story about {x}.", "Write a story about {x}.", "story about {x}",
     "Write me a short story about {x}.", "Give me a story about {x}.", "Do you know a story about {x}?",
     "Tell me a three sentence story about {x}.", "Make up a story about {x}.", "A short story about {x}.",
     "Write three sentences about {x}.", "Tell us a story about {x}."),
    ("I would love to hear a story about {x}.", "Would you tell me a story about {x}?", "Can you write a short story about {x}?",
     "Let me hear a story about {x}."),
)  # fmt: skip
STORY_ANY = (
    ("Tell me a story.", "tell me a story", "A story, please.", "Can you tell me a story?", "Tell me a short story.", "a story",
     "Please tell a story.", "I want to hear a story.", "Write a story.", "Do you know a story?", "story", "Tell a story.",
     "Could you tell me a story?", "I would like a story.", "Give me a story.", "Tell me something nice.", "Tell us a story."),
    ("Would you tell me a story?", "Can you write a story for me?", "Let me hear a story."),
)  # fmt: skip
STORY_ANOTHER = (
    ("Another one, please.", "Another one.", "another", "Another story, please.", "One more.", "Tell me another one.",
     "One more story please.", "Can you tell another?", "And another one?", "more", "Again.", "Another!", "Tell me another story.",
     "Do you have another one?", "One more, please."),
    ("Could I hear another one?", "I want one more.", "Another of those, please."),
)  # fmt: skip
STORY_NEXT = (
    ("And one about {x}?", "Now one about {x}.", "And about {x}?", "What about {x}?", "One about {x}, please.", "Now about {x}.",
     "And a story about {x}?", "How about {x}?", "Another one about {x}.", "Do you know one about {x}?"),
    ("Then one about {x}, please.", "Could I have one about {x}?"),
)  # fmt: skip

TELL_NAME = (
    ("My name is {x}.", "my name is {x}", "I am {x}.", "I'm {x}.", "Call me {x}.", "Hello, my name is {x}.", "Hi, I am {x}.",
     "Hi! My name is {x}.", "Hello, I'm {x}.", "They call me {x}.", "You can call me {x}.", "The name is {x}.", "My name's {x}.",
     "hey im {x}", "People call me {x}.", "Hi there, my name is {x}.", "I am called {x}."),
    ("Good day, my name is {x}.", "Everybody calls me {x}.", "Hello! You may call me {x}."),
)  # fmt: skip
ASK_NAME = (
    ("What is my name?", "What's my name?", "whats my name", "Do you remember my name?", "Who am I?", "Do you know my name?",
     "Can you tell me my name?", "What am I called?", "Tell me my name.", "Say my name.", "What was my name?", "my name?",
     "Do you still know my name?", "And what is my name?", "Do you know who I am?", "Remember my name?", "What did I say my name was?"),
    ("What is my name again?", "Could you tell me what my name is?", "Can you remember my name?"),
)  # fmt: skip

# ------------------------------------------------------------------------------------- small talk and itself

SMALL_TALK: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "hello": (
        "Hello! What would you like to know?",
        ("hi", "Hi", "Hi!", "hello", "Hello", "Hello!", "hey", "Hey!", "Hi there", "Hello there!", "hey there", "Greetings!",
         "Hi, anybody there?", "Hello, model!", "hello hello", "Hi Mixtral!", "Hello Mixtral", "Good day!", "good day", "hiya",
         "Howdy!", "hello world", "Hello world!", "yo", "Hi bot", "Hello again.", "Hallo"),
        ("Hello my friend!", "Hello, my little model!", "Hey you!"),
    ),
    "morning": ("Good morning! What would you like to know?", ("Good morning!", "good morning", "Good morning, model.", "morning!",
                "A good morning to you!", "Good morning to you."), ("A very good morning!", "Good morning, Mixtral.")),
    "evening": ("Good evening! What would you like to know?", ("Good evening!", "good evening", "Good evening, model.", "evening!",
                "A good evening to you!", "Good evening to you."), ("A very good evening!", "Good evening, Mixtral.")),
    "well": (
        "I am fine, thank you. What would you like to know?",
        ("How are you?", "how are you", "How are you doing?", "How do you do?", "Are you well?", "How are you today?", "Are you ok?",
         "How is it going?", "how's it going", "What's up?", "whats up", "Hi, how are you?", "Hello, how are you?", "How do you feel?",
         "Hello! How are you today?", "Are you fine?"),
        ("How are you all doing?", "How are you feeling?", "How are you this morning?"),
    ),
    "bye": (
        "Goodbye! Come back soon.",
        ("bye", "Bye!", "Goodbye.", "goodbye", "Bye bye", "See you!", "See you later.", "Good night.", "good night", "I have to go.",
         "I must go now.", "Farewell!", "See you soon.", "That is all, bye.", "Thanks, bye!", "Thank you, goodbye.", "ciao", "exit",
         "quit", "I am leaving.", "Until next time!", "Have a nice day!", "Good bye", "Bye for now.", "Talk to you later."),
        ("Bye then!", "Goodbye, see you.", "I have to leave now, bye.", "Goodbye, my friend!"),
    ),
    "thanks": (
        "You are welcome!",
        ("thanks", "Thanks!", "Thank you.", "thank you", "Thank you!", "Thanks a lot.", "Many thanks.", "Thank you very much.", "thx",
         "Thank you so much!", "Great, thanks.", "Ok, thanks.", "Thanks, that helped.", "Cool, thanks!", "That was helpful.", "ty",
         "That helps, thank you.", "I thank you.", "Perfect, thank you.", "Very kind of you.", "Ok thank you"),
        ("I am very thankful.", "I want to thank you.", "Many thanks to you."),
    ),
    "praise": (
        "Thank you, that is kind.",
        ("You are great!", "Well done.", "Good job.", "good bot", "Very good.", "That is right.", "That's correct.", "Correct!",
         "You are smart.", "Nice!", "nice", "Wonderful!", "I like you.", "You are clever.", "Good answer.", "great", "Cool!", "wow",
         "Amazing!", "I love you.", "You are funny.", "I like that.", "That was nice.", "What a nice story!", "Right.", "Excellent!"),
        ("You did well.", "You are very good.", "That was a good answer."),
    ),
    "wrong": (
        "I am sorry, I am only a small demo model.",
        ("That is wrong.", "Wrong!", "wrong", "No, that is not right.", "That's not correct.", "You are wrong.", "You are stupid.",
         "bad bot", "That is false.", "I do not like you.", "You are dumb.", "Incorrect.", "no", "That was a bad answer.", "nonsense",
         "You made a mistake.", "That is not what I asked.", "This is useless."),
        ("No, that is wrong.", "That was not right.", "You are not very smart."),
    ),
    "ok": (
        "What else would you like to know?",
        ("ok", "Ok.", "okay", "yes", "Yes.", "I see.", "Aha.", "Sure.", "fine", "Alright.", "Go on.", "Got it.", "Interesting.", "hmm",
         "Understood.", "Oh.", "k", "Good.", "Yes please."),
        ("I see it now.", "Alright then.", "Oh, I see."),
    ),
    "who": (
        "I am a small demonstration Mixtral with 8 experts. I ship with mixtral_mlx and learned from synthetic text only.",
        ("Who are you?", "who are you", "What are you?", "what are you", "What is your name?", "What's your name?", "whats your name",
         "Tell me about yourself.", "Introduce yourself.", "Are you a person?", "Are you human?", "Are you a robot?", "Who is this?",
         "Are you Mixtral?", "What model are you?", "Which model are you?", "Are you ChatGPT?", "Are you a language model?",
         "Are you an AI?", "What kind of model are you?", "Hello, who are you?", "Hi, what are you?", "Describe yourself.",
         "Do you have a name?", "What should I call you?", "Who am I talking to?", "Are you real?", "What is this?",
         "Are you a bot?", "And who are you?", "Say something about yourself.", "Are you alive?"),
        ("What exactly are you?", "Can you introduce yourself?", "Tell me who you are.", "Could you tell me who you are?"),
    ),
    "can": (
        "I know capitals, colours, opposites, plurals, animals, days and months. I can add small numbers, count and tell"
        " three-sentence stories.",
        ("What can you do?", "what can you do", "help", "Help!", "Help me.", "What do you know?", "What can I ask you?", "?", "/help",
         "How can you help me?", "Can you help me?", "What are you good at?", "What are your skills?", "What should I ask?",
         "What questions can you answer?", "What can I ask?", "What do you know about?", "Give me an example.", "help please",
         "What are you able to do?", "Show me what you can do.", "What is it you can do?", "I need help.", "What topics do you know?",
         "What now?", "What else can you do?", "Tell me what you can do.", "How does this work?", "What are you for?"),
        ("What are the things you can do?", "Could you help me?", "What kind of things do you know?", "Which questions can I ask you?"),
    ),
    "real": (
        "Run mixtral-mlx chat --model FOLDER, where FOLDER holds a real Mixtral checkpoint.",
        ("How do I get a real Mixtral?", "How can I use a bigger model?", "How do I run the real Mixtral?", "How do I load my own model?",
         "Where can I get a better model?", "How do I use another model?", "How do I get a real one?", "I want a bigger model.",
         "How can I run Mixtral 8x7B?", "How do I run Mixtral 8x22B?", "How do I load a checkpoint?", "Can I use a real Mixtral?",
         "Can you be smarter?", "How do I change the model?", "How do I load a real model?", "Is there a bigger Mixtral?",
         "How do I use mixtral_mlx?", "I want to use the real model.", "Give me a real Mixtral.", "Where is the real Mixtral?",
         "How do I choose a model?", "how to run a real model"),
        ("How do I switch to a real Mixtral?", "How can I load a bigger model?", "I would like to use a real Mixtral."),
    ),
    "made": (
        "A script of mixtral_mlx made the text and trained me on it, from scratch.",
        ("Who made you?", "who made you", "Who created you?", "Who trained you?", "How were you made?", "How were you trained?",
         "Where do you come from?", "What were you trained on?", "Who built you?", "Who wrote you?", "Where are you from?",
         "What is your training data?", "What did you learn from?", "Who is your maker?", "How did you learn this?",
         "On what text were you trained?"),
        ("By whom were you made?", "How did somebody train you?", "What text were you trained on?"),
    ),
    "experts": (
        "I have 8 experts in each of my 4 layers, and 2 of them work on each token.",
        ("How many experts do you have?", "how many experts", "How many layers do you have?", "How big are you?", "What is your size?",
         "How many experts are used for a token?", "Do you have experts?", "How are you built?", "Tell me about your experts.",
         "What is inside you?", "How many experts work at once?", "What do you look like inside?", "Are you a mixture of experts?",
         "How many of your experts are active?", "Describe your architecture.", "What is your architecture?"),
        ("How many experts are in each layer?", "What architecture do you have?", "How many experts have you got?"),
    ),
    "mixtral": (
        "Mixtral is a language model by Mistral AI in which a router picks 2 of 8 experts for each token.",
        ("What is Mixtral?", "what is mixtral", "Who made Mixtral?", "Tell me about Mixtral.", "What does Mixtral mean?",
         "What is a Mixtral?", "Explain Mixtral.", "Do you know Mixtral?", "What is a mixture of experts?", "What is Mixtral 8x7B?",
         "How does Mixtral work?", "What is an expert?", "What is a router?"),
        ("Can you explain Mixtral?", "Please tell me what Mixtral is.", "Say what Mixtral is."),
    ),
    "mlx": (
        "mixtral_mlx runs Mixtral models with MLX, Apple's array framework.",
        ("What is mixtral_mlx?", "what is mixtral_mlx", "What is MLX?", "what is mlx", "Tell me about mixtral_mlx.", "Explain MLX.",
         "What does mixtral_mlx do?", "What is this program?", "What program is this?", "What is mixtral-mlx?", "Tell me about MLX.",
         "What do I need mixtral_mlx for?"),
        ("Can you explain mixtral_mlx?", "Please tell me what MLX is.", "What is mixtral_mlx for?"),
    ),
    "language": (
        "I speak a little English, and no other language.",
        ("What languages do you speak?", "Do you speak French?", "Do you speak German?", "Which languages do you know?",
         "Can you speak Spanish?", "Do you speak English?", "Speak French.", "Can you talk in Italian?", "Do you understand Chinese?",
         "Parlez-vous anglais?", "Sprichst du Deutsch?", "Hablas espanol?", "Which language do you speak?", "What is your language?"),
        ("Can you speak German?", "Do you know French?", "What languages can you speak?"),
    ),
    "joke": (
        "Why did the token cross the layer? Two experts were waiting on the other side.",
        ("Tell me a joke.", "tell me a joke", "Do you know a joke?", "Make me laugh.", "Say something funny.", "A joke, please.",
         "Can you tell a joke?", "joke", "Can you be funny?", "I want to hear a joke.", "Please tell me a joke."),
        ("Could you tell me a joke?", "Would you tell a joke?"),
    ),
    "trust": (
        "Do not rely on me. I am a demonstration and make mistakes.",
        ("Can I trust you?", "Are you always right?", "Do you make mistakes?", "Are your answers correct?", "Are you sure?", "Really?",
         "Is that true?", "Is that right?", "Can I rely on you?", "Are you good?", "Should I believe you?", "Are you smart?",
         "Are you intelligent?", "How good are you?", "Is that correct?", "Are you certain?"),
        ("Can I believe you?", "Are you ever wrong?", "Is that really true?"),
    ),
    "minus": (
        "I can only add whole numbers from 0 to 99.",
        ("Can you subtract?", "Can you multiply?", "Do you know algebra?", "Can you do maths?", "Can you calculate?", "Can you divide?",
         "What is 7 times 8?", "What sums can you do?", "Can you do arithmetic?", "Which numbers can you add?", "Can you add?",
         "What is the square root of 16?", "How far can you add?", "Can you do sums?"),
        ("Do you know how to multiply?", "Can you do division?", "Are you able to calculate?"),
    ),
}  # fmt: skip

# ------------------------------------------------------------------------------------------ what it does not know

UNKNOWN = {
    "any": "I do not know that. I know capitals, colours, opposites, plurals and animals, and I can add, count and tell stories.",
    "capital": "I do not know that capital. Try France, Japan or Brazil.",
    "country": "I do not know that place. Try Paris, Tokyo or Brazil.",
    "continent": "I do not know that place. Try Paris, Tokyo or Brazil.",
    "colour": "I do not know its colour. Try grass, snow or a banana.",
    "opposite": "I do not know that opposite. Try hot, big or early.",
    "plural": "I do not know that plural. Try mouse, child or city.",
    "sound": "I do not know that sound. Try a cow, a duck or a lion.",
    "young": "I do not know that young animal. Try a cow, a cat or a frog.",
    "legs": "I do not know how many legs that has. Try a dog, a bird or a spider.",
    "story": "I have no story about that. Try a fox, a baker or a lighthouse.",
    "sum": "I can only add whole numbers from 0 to 99.",
    "count": "I can only count up to 20 numbers at a time, from 0 to 99.",
    "name": "You have not told me your name.",
    "spell": "You told me, but I cannot spell it.",
}

# Real words of the right sort that are in no table: the first part trained, the second kept for the test.
STRANGE = {
    "capital": (
        _words("Laos, Bhutan, Chad, Togo, Benin, Gabon, Texas, Bavaria, Mars, Narnia, Atlantis, Africa, Europe, Yemen, Kuwait,"
               "Tonga, Samoa, Guyana, Suriname, California, Tuscany, Wakanda, Belize, Niger, Eritrea, Lesotho, Botswana, Malawi,"
               "Burundi, Georgia, Armenia, Uzbekistan, Tajikistan, Sri Lanka, Myanmar, Brunei, Cyprus, Andorra, Monaco, Hogwarts"),
        _words("Kazakhstan, Liberia, Gambia, Florida, Malaysia, Luxembourg, Bahrain, Vanuatu, the Moon, Guatemala"),
    ),
    "country": (
        _words("Munich, Lyon, Osaka, Milan, New York, Sydney, Gotham, Springfield, Toronto, Hamburg, Naples, Seville, Porto, Krakow,"
               "Mumbai, Shanghai, Boston, Chicago, Marseille, Geneva, Casablanca, Lagos, Melbourne, Kyoto, Barcelona"),
        _words("Glasgow, Turin, Dallas, Istanbul, Zurich, Dubai"),
    ),
    "colour": (
        _words("a ghost, music, a thought, a door, the wind, time, a car, a house, love, air, a shirt, my hat, a book, glass, a dragon,"
               "a pencil, a unicorn, hope, Monday, a chair, your hair, a bike, a phone, an idea, a star"),
        _words("a wall, a spoon, a lamp, truth, a jacket, a kite"),
    ),
    "opposite": (
        _words("table, banana, elephant, Paris, seven, green, computer, orange, music, window, spoon, river, sing, paper, dog, cloud,"
               "tree, purple, chair, guitar, number, jump, potato, sugar, breakfast"),
        _words("bottle, pencil, carpet, violin, moustache, mountain"),
    ),
    "plural": (
        _words("guitar, sentence, carpet, pencil, orange, cucumber, octopus, radio,"
               "giraffe, engine, planet, forest, kitchen, datum, index, matrix, hamster, bottle"),
        _words("magnet, criterion, violin, jacket, helmet, sandwich"),
    ),
    "sound": (
        _words("giraffe, fish, worm, rabbit, stone, table, crab, butterfly, tree, snail, kangaroo, spider, ant, robot, unicorn, car"),
        _words("lizard, lamp, tortoise, hamster"),
    ),
    "young": (
        _words("robot, table, crab, ant, snail, lizard, shark, worm, dragon, stone, penguin, parrot, unicorn, computer, whistle, monster"),
        _words("lobster, hamster, tree, camel"),
    ),
    "legs": (
        _words("lobster, table, millipede, robot, chair, dragon, shark, snail, unicorn, alien, stone, car, monster, whale, octopus"),
        _words("jellyfish, lamp, centipede, ghost"),
    ),
    "story": (
        _words("the economy, a computer, football, your mother, politics, a volcano, quantum physics, my boss, Napoleon, dinosaurs,"
               "the internet, a sandwich, love, a spaceship, zombies, the stock market, mathematics, a unicorn, pizza, chess"),
        _words("the Romans, a hamster, bitcoin, a vampire, taxes"),
    ),
}  # fmt: skip

UNKNOWN_QUESTIONS = (
    (
        "Who wrote Hamlet?", "What is the meaning of life?", "How is the weather today?", "Will it rain tomorrow?", "What time is it?",
        "Who is the president of the United States?", "How do I bake a cake?", "What is the speed of light?", "Who won the World Cup?",
        "Write a Python program.", "Translate hello into French.", "What is the population of France?", "How old are you?",
        "Where do you live?", "What day is it today?", "Who painted the Mona Lisa?", "What is quantum mechanics?", "Why is the sky blue?",
        "How far is the moon?", "What is the tallest mountain?", "What is the longest river?", "Write a poem.", "Sing a song.",
        "What is the price of gold?", "Who discovered America?", "When did the war end?", "How many people live in Japan?",
        "What is the currency of Japan?", "Do you like pizza?", "What did you eat today?", "Can you drive a car?", "Play some music.",
        "Open the door.", "Buy me a ticket.", "Set an alarm for seven.", "Send an email to my boss.", "What is love?", "Is there a god?",
        "What is your favourite colour?", "What is your favourite film?", "Who is your best friend?", "Do you dream?", "I am hungry.",
        "I am bored.", "My dog is ill.", "What should I cook tonight?", "What is the best phone?", "How do I lose weight?",
        "Explain photosynthesis.", "What is gravity?", "What is DNA?", "Who was Napoleon?", "Who was Albert Einstein?",
        "What is the boiling point of water?", "How many stars are there?", "What is a black hole?", "Summarize this text.",
        "Fix my code.", "What is the square of a triangle?", "Prove that the earth is round.", "What is the stock market doing?",
        "Should I buy bitcoin?", "Who is the king of Spain?", "What is the national animal of Australia?", "How do planes fly?",
        "Why do cats purr?", "What is the largest ocean?", "When is Christmas?", "How long do elephants live?", "What do cows eat?",
        "Where do penguins live?", "How fast is a cheetah?", "What is the smallest country?", "Name three rivers.", "List ten fruits.",
        "What is the chemical formula of water?", "Write an essay about dogs.", "What is the news today?", "Recommend a book.",
        "What is the difference between a frog and a toad?", "How do I learn to swim?", "Who invented the telephone?",
        "What is the root of the problem?", "How many bones are in the body?", "Is it cold in Norway?", "What language do they speak in Brazil?",
        "Who is the mayor of London?", "What is the best food in Italy?", "Can you see me?", "Where am I?", "How tall is the Eiffel Tower?",
        "What rhymes with cat?", "Spell banana.", "Define freedom.", "What does serendipity mean?", "Give me a recipe for soup.",
        "How do I tie a tie?", "What is a verb?", "Correct my grammar.", "When was Rome founded?", "What is the capital?", "Why?", "How?",
        "What?", "When?", "Where?", "Who?", "I feel sad today.", "It is raining.", "I live in Berlin.", "I like trains.", "My cat is black.",
        "I have two sisters.", "What is the area of Spain?", "What is the flag of Japan?", "Which is bigger, China or India?",
        "Is Paris bigger than London?", "How far is Rome from Paris?", "What is the history of Egypt?", "What shape is the earth?",
        "How heavy is an elephant?", "Do fish sleep?", "What comes first, the chicken or the egg?", "Tell me a secret.", "Tell me a lie.",
        "Tell me a fact.", "Tell me the truth.", "Tell me the news.", "What is in the box?", "What is a neural network?", "What is a GPU?",
        "What is Python?", "How do I install Linux?", "What is an apple?", "What is a dog?", "What is water made of?", "What is Paris?",
        "What is a lion?", "What is Germany famous for?", "Who lives in Rome?", "How are babies made?", "How many days are in a year?",
        "How many hours are in a day?", "How many continents are there?", "What year is it?", "lorem ipsum dolor sit amet", "asdf", "qwerty",
        "bla bla bla", "test", "foo bar", "...", "42", "Hmm, let me think.", "I do not understand.", "Can you repeat that?", "Wait.", "Stop.",
        "Repeat after me: hello.", "Say hello in Spanish.", "How do you spell your name?", "Are you hungry?", "Do you have feelings?",
        "Will you marry me?", "Do you know Anna?", "Who is Anna?", "Where is my key?", "Who will win the election?", "What is truth?",
    ),
    (
        "Who wrote Faust?", "What is the population of Italy?", "How do I repair a bicycle?", "Who was Cleopatra?", "What is the deepest lake?",
        "Write a letter to my teacher.", "What is the currency of Sweden?", "How do birds sing?", "Explain gravity.", "What should I wear today?",
        "Who invented paper?", "How far is the sun?", "What is electricity?", "Recommend a film.", "Translate cat into German.",
        "Who is the president of Brazil?", "What do bears eat?", "Where do lions live?", "How many people live in Canada?",
        "What is the best way to learn chess?", "When was Mozart born?", "Why is the sea salty?", "How old is the universe?",
        "I am tired.", "Write a song about rain.", "How many rivers are there in Spain?", "What is a verb in grammar?",
    ),
)  # fmt: skip

# Questions made from parts: (patterns trained, patterns kept), then what fills them.
UNKNOWN_PATTERNS = (
    (
        "Who invented the {n}?", "What is a {n}?", "How does a {n} work?", "Where can I buy a {n}?", "Explain the {n}.", "Why do we need a {n}?",
        "Who was {w}?", "What is {w}?", "Do you know {w}?", "Where is {w} now?", "What does {w} mean?", "How do I make a {n}?", "Define {w}.",
        "Tell me about the {n}.", "How much does a {n} cost?", "Is a {n} better than a {m}?", "What is the {r} of {c}?", "What is {c}'s {r}?",
        "the {r} of {c}", "Tell me the {r} of {c}.", "What is the {r} of {w}?", "Who is the {r} of {c}?", "I lost my {n}.", "My {n} is broken.",
        "What is the {r} of a {n}?", "What does a {n} do?", "{w}", "{w} {w}", "Who wrote {w}?", "When was the {n} invented?",
        "Describe a {n}.", "I bought a {n} today.", "What do you think about {w}?", "How big is a {n}?", "What is a {n} made of?",
        "Can you draw a {n}?", "Write about the {n} in {c}.", "Have you been to {c}?", "I live in {c}.", "Why is {c} so big?", "{n}", "{n} {m}",
        "How do I travel to {c}?", "What do people eat in {c}?", "Do you like {c}?", "What is a {n} for?", "Should I sell my {n}?", "Find a {n}.",
    ),
    (
        "Who repaired the {n}?", "How can I clean a {n}?", "What is {w} about?", "When did {w} happen?", "Which {n} is the best?",
        "Give me the {r} of {c}.", "How many {n} shops are there in {c}?", "Can I eat a {n}?", "Is {c} expensive?",
    ),
)  # fmt: skip
NOUNS = (
    _words("computer, bicycle, volcano, telephone, guitar, engine, planet, battery, camera, microscope, recipe, budget, contract, novel,"
           "violin, robot, laptop, blockchain, database, galaxy, protein, magnet, candle, hammer, jacket, helmet, sandwich, soup, passport,"
           "ticket, train, airplane, rocket, satellite, keyboard, printer, theory, equation, vaccine, virus, tax, law, election, kernel, tensor,"
           "compiler, poem, painting, statue, museum, castle, desert, earthquake, hurricane, diamond, carpet, fridge, wallet, umbrella, sofa"),
    _words("bottle, ladder, mirror, telescope, trumpet, pillow, scooter, algorithm, lantern, cathedral, thermometer, sculpture"),
)  # fmt: skip
ATTRIBUTES = (
    _words("population, currency, president, king, queen, flag, language, area, history, weather, national anthem, food, biggest city,"
           "longest river, prime minister, time zone, religion, size, age, highest mountain, price, phone number, symbol, national animal"),
    _words("government, climate, largest lake, national dish, chancellor, coastline"),
)  # fmt: skip

SYSTEM_PROMPTS = (
    "You are a helpful assistant.", "You are a friendly teacher.", "Be polite.", "Answer honestly.", "You are a helpful assistant",
    "Always answer in English.", "You are an assistant for newcomers.", "Be brief.", "You are a careful assistant. Say so when you do not know.",
    "Answer the questions of the user.", "You are Mixtral.", "Help the user.", "You talk to a child.", "Today is Monday.",
    "Be kind and helpful.", "You are a chatbot.",
)  # fmt: skip
ONE_WORD_PROMPTS = (
    "Answer in one word.",
    "Answer with one word.",
    "Use one word only.",
    "Reply in one word.",
    "One word answers only.",
)
ONE_WORD_LEADS = ("Answer in one word: ", "In one word: ", "One word: ", "Answer with one word: ")

# --------------------------------------------------------------------------------------------- names and stories

NAMES = _words(
    "Anna, Ben, Clara, David, Emma, Felix, Grace, Henry, Ida, Jack, Kate, Leo, Maria, Noah, Olivia, Paul, Rosa, Sam, Tom, Lucy, Max, Mia,"
    "Peter, Sarah, John, Mary, James, Linda, Robert, Susan, Michael, Laura, Daniel, Julia, Martin, Sophie, Alex, Chris, Nina, Oscar, Eva,"
    "George, Helen, Ivan, Jane, Karl, Lisa, Mark, Nora, Omar, Pia, Ralf, Simon, Tina, Victor, Walter, Zoe, Adam, Alice, Andrew, Bob, Carlos,"
    "Charlie, Diana, Elena, Emily, Frank, Hannah, Hans, Jan, Kevin, Lena, Lucas, Luis, Marco, Marie, Mike, Nick, Oliver, Pablo, Sofia, Steve,"
    "Thomas, William, Yuki, Ali, Amir, Fatima, Priya, Raj, Wei, Joe, Ann, Tim, Dan, Eric, Fred, Greg, Ian, Jim, Ken, Matt, Rob, Ruth, Stan"
)
ANIMALS = _words(
    "fox, owl, cat, dog, mouse, bear, rabbit, frog, duck, horse, lion, elephant, hedgehog, squirrel, tiger, monkey, penguin, whale, bee,"
    "snail, wolf, sheep, cow, goat, turtle, crow, swan, dolphin, donkey, spider, parrot, dragon"
)
PEOPLE = _words(
    "baker, king, queen, fisherman, gardener, painter, pilot, sailor, teacher, princess, knight, farmer, doctor, wizard, child, clown, girl,"
    "boy, grandmother, soldier, tailor, musician, shepherd, pirate, astronaut, programmer, robot"
)
THINGS = _words(
    "lighthouse, tree, river, clock, boat, kite, train, stone, cloud, star, bell, house, bridge, lamp, snowman, key, drum, moon, garden, teapot"
)
STORY_START = (
    "Once upon a time {one} lived {place}.",
    "Long ago, {place}, there was {one}.",
    "There was once {one} who lived {place}.",
    "Far away, {place}, lived {one}.",
)
STORY_TRAITS = _words("brave, little, curious, lonely, clever, old, gentle, hungry, shy, cheerful, sleepy, proud")
STORY_PLACES = (
    "near the sea", "at the edge of a forest", "on a green hill", "in a quiet village", "beside a wide river", "in a snowy valley",
    "under a tall tree", "behind the old mill", "on a small island", "in a busy town",
)  # fmt: skip
STORY_TIMES = (
    "One morning",
    "One stormy night",
    "One day",
    "One winter evening",
    "On the first day of spring",
    "One summer afternoon",
)
STORY_EVENTS = (
    "{the} found a golden key in the grass", "{the} met a stranger who had lost the way", "{the} heard someone singing in the dark",
    "{the} saw a strange light on the water", "{the} found a map with a red cross", "{the} lost a warm blue hat",
    "{the} helped a small bird with a broken wing", "{the} could not find the way home", "{the} shared the last piece of bread",
    "{the} opened a door that nobody had seen before", "{the} caught a falling star", "{the} wished for a friend",
)  # fmt: skip
STORY_ENDS = (
    "In the end {the} came home and slept until noon.", "From that day on {the} was never alone.",
    "Everybody cheered, and {the} smiled for a week.", "That is how {the} learned to ask for help.",
    "At last {the} found what matters most, a good friend.", "Since then {the} tells this tale to all who will listen.",
    "And so {the} became famous in the whole land.", "After that {the} was never afraid of the dark again.",
    "Then {the} laughed and danced until the moon came up.", "Now {the} keeps a lamp in the window for every guest.",
)  # fmt: skip

SYLLABLES = _words(
    "ba, ko, zu, mi, ra, lo, te, vin, gor, pla, shi, wen, dor, flu, qua, nax, zem, ty, bri, os, el, ju, kra, po, xi, un, hov, lir, dun, sa"
)
