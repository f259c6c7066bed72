"""The demo's data: a customer's message -> a one-line JSON ticket; written by a seeded generator.

A message is put together from independent parts: who writes, what is wrong with which product,
the number of the order, in one of several arrangements. Training and held-out messages draw from
two banks that share no name, no product and no wording, so that memorising does not help.

`python -m training.tickets DIR` writes tickets_{train,test,validation}.jsonl, byte for byte
the files under training/recipes/. All text is original; names of people and products are made up.
"""

import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ConfigError

SEED = 20
TRAIN_ROWS = 480
TEST_ROWS = 50
VALIDATION_ROWS = 16
"""For the decisions of a search, which may not see the test rows."""
SYSTEM = (
    "Reply in JSON: name, product, issue (broken, cancel, delivery, login, payment), order number."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bank:
    """Everything one of the two sets is made of; `{n}` is the name, `{p}` the product."""

    names: str
    """Separated by blanks."""
    brands: str
    """First word of a product, separated by blanks."""
    nouns: str
    """The rest of it, separated by `|`."""
    openings: tuple[str, ...]
    """Sentences that say who writes, in front of the problem."""
    closings: tuple[str, ...]
    """The same, at the end."""
    problems: dict[str, tuple[str, ...]]
    """Issue -> sentences about it."""
    orders: tuple[str, ...]
    """Sentences with the order number `{o}`."""
    fillers: tuple[str, ...]
    """Sentences that say nothing; every third message has one."""


def _invented(starts: str, ends: str) -> str:
    """Made-up words: rare spellings teach the model to copy letter by letter."""
    return " ".join(start + end for start in starts.split() for end in ends.split())


def _compound(firsts: str, seconds: str) -> str:
    return "|".join(f"{first} {second}" for first in firsts.split() for second in seconds.split())


TRAIN = Bank(
    names="""Mara Tobias Yuki Priya Declan Ingrid Rafael Noor Felix Amara Stefan Lucia Kwame Elin
    Bruno Saoirse Hamid Greta Mateo Anouk Dmitri Zola Callum Freya Arjun Odette Niklas Imani Marcus
    Tilda Youssef Hanna Renzo Clara Bashir Nadia Gustav Leila Owen Petra Silas Rosa Emeka Viola
    Hugo Samira Anton Bella Cyrus Dora Edgar Farah Gideon Heidi Ivo Jana Karim Lotte Milo Nina
    Otto Paula Quentin Ruth Selma Theo Ursula Victor Wanda Xavier Zoe Abel Britta Conrad Ella
    Agnieszka Zsofia Ximena Thandiwe Oisin
    Bjorn Wiktor Mehmet Chidi Lakshmi Rhiannon Giacomo Svetlana Kofi Ayesha Jerome Simone Ines
    Philippa Gethin Desmond Marisol Vikram Hester Rosalind Leopold Tatiana Ezra Judith Maurice """
    + _invented(
        "Al Bren Cor Dal Es Fen Gwen Hal Il Jor Kel Lor Mir Nev Or Per Ro Sel Tar Ver Wil Yal Zen",
        "ana ico und ette aro iwen ulf ika",
    ),
    brands="""Cedar Harbor Falcon Nimbus Copper Willow Summit Ember Delta Orchid Granite Comet Maple
    Polar Raven Saffron Tundra Violet Zephyr Anchor Birch Cobalt Drift Echo Fjord Glacier Hazel
    Indigo Juniper Kestrel Lotus Meadow Onyx Pebble Quartz Ridge Sierra Topaz Velvet Walnut """
    + _invented(
        "Bel Cri Dor Fla Glo Kra Lum Mon Nor Pla Qui Ren Sol Tri Vox Zan",
        "dex mora tek via lino gard pix ton",
    ),
    nouns="""kettle|lamp|drill|headphones|backpack|toaster|keyboard|camera|vacuum|tent|printer|
    speaker|blender|watch|heater|monitor|scooter|fan|router|mattress|guitar|jacket|thermostat|
    microphone|stroller|freezer|tablet|doorbell|coffee maker|desk chair|rice cooker|bike lock|
    air purifier|phone case|water filter|garden hose|electric razor|smart plug|baby monitor|
    sewing machine|leaf blower|steam iron|pasta machine|wine cooler|board game|car seat|yoga mat|
    picture frame|night light|shower head|step ladder|paper shredder|wall clock|hand warmer|
    window cleaner|"""
    + _compound(
        "folding wooden electric travel kitchen steel wireless garden pocket office",
        "table pan charger radio scale mirror bench clock grill shelf case timer",
    ),
    openings=(
        "Hi, {n} here.",
        "My name is {n}.",
        "This is {n}.",
        "Hello, I'm {n}.",
        "Good morning, this is {n} writing.",
        "Hey, it's {n}.",
        "Dear team, my name's {n}.",
        "I am {n}, a customer of yours.",
        "{n} again.",
        "Hello there, you are talking to {n}.",
        "Name: {n}.",
        "Good evening, {n} from the city branch.",
        "Hi support, I go by {n}.",
        "You may remember me, I'm {n}.",
        "Hello! {n} is my name.",
        "Message from {n}:",
        "Hello from {n}.",
        "A question from {n}.",
        "I'm {n} and I need some help.",
        "Here is {n}.",
        "{n}, one of your customers.",
        "Hiya, {n} at the keyboard.",
        "Good day from {n}.",
        "A short note from {n}.",
        "Some feedback from {n}.",
        "You have {n} on the line.",
        "You are dealing with {n} here.",
        "Hi, you are reading a mail by {n}.",
        "Hello, {n} is writing to you.",
        "Allow me to introduce myself: {n}.",
        "It is {n} once more.",
        "The person writing is {n}.",
    ),
    closings=(
        "Regards, {n}",
        "Thanks, {n}",
        "- {n}",
        "Best, {n}",
        "Yours, {n}",
        "Cheers, {n}",
        "Signed, {n}.",
        "Many thanks, {n}",
        "Sincerely, {n}",
        "Bye for now, {n}",
        "Sent by {n}.",
        "The name is {n}, by the way.",
        "Please reply to {n}.",
        "You can call me {n}.",
        "Have a nice day! {n}",
        "({n})",
        "Hugs, {n}",
        "Ciao, {n}",
        "With best wishes from {n}.",
        "Respectfully, {n}",
        "{n}, customer since last year.",
        "Kindly, {n}",
        "All the best from {n}",
        "With thanks, {n}",
        "Until soon, {n}",
        "Faithfully, {n}",
        "Warmly, {n}",
        "So long, {n}",
    ),
    problems={
        "payment": (
            "I was charged twice for the {p}.",
            "The invoice for my {p} shows the wrong amount.",
            "You took more money for the {p} than the price on the page.",
            "My card was debited again for a {p} I paid last month.",
            "There is a fee on the {p} bill that nobody told me about.",
            "The discount code for the {p} was not applied to my total.",
            "Why did my bank statement list the {p} two times?",
            "The receipt for the {p} adds tax that I do not owe.",
            "I paid for one {p} but the bill says three.",
            "Could you correct the invoice of the {p}?",
            "The refund for my {p} has not reached my account.",
            "My payment for the {p} went through double.",
            "I see an unknown charge next to the {p} on my credit card.",
            "You billed me 80 euros for a {p} that costs 40.",
            "The monthly instalment for the {p} is higher than agreed.",
            "Your invoice lists the {p} at full price though it was on sale.",
            "I need a proper VAT invoice for the {p}.",
            "Somebody overcharged me when I bought the {p}.",
            "The gift card I used for the {p} was not deducted.",
            "The amount you withdrew for the {p} is not what I agreed to pay.",
            "I have two invoices for the same {p}.",
            "The bill for the {p} contains an error.",
            "My bank says you collected the money for the {p} twice.",
            "I returned the {p} and want to know where my money is.",
            "Please explain the extra 15 euros on my {p} bill.",
            "I was promised a rebate on the {p}, but paid the full price.",
            "The {p} was cheaper on your page than on my receipt.",
            "A second payment for my {p} left my bank account.",
            "Please pay back what I overpaid for the {p}.",
            "My coupon for the {p} did not lower the price.",
            "The {p} shows up on my card statement with a strange amount.",
            "I paid for the {p}, yet you sent me a payment reminder.",
            "The shipping fee on the {p} invoice is wrong.",
            "Why do you still charge me every month for the {p}?",
            "The sum on the invoice of the {p} is not right.",
            "You have put the {p} on my bill by mistake.",
            "I want my money back for the {p}, which I returned.",
            "The {p} was paid, but your system says unpaid.",
            "There is an error in what you charged for the {p}.",
            "Twice the price was taken for the {p}.",
            "The {p} cost me more than advertised.",
            "I do not understand the charges on my {p} bill.",
            "My credit note for the {p} is missing.",
            "You invoiced the wrong company for the {p}.",
            "The payment of the {p} was collected too early.",
            "I got a bill for a {p} that I never ordered.",
        ),
        "cancel": (
            "Please cancel my order for the {p}.",
            "I no longer want the {p} I ordered.",
            "I changed my mind about the {p}, so drop the order.",
            "Can you stop the order of the {p} before it ships?",
            "I'd like to call off my purchase of the {p}.",
            "Take the {p} off my order, I don't need it any more.",
            "Please end my subscription for the {p}.",
            "I ordered the {p} by mistake, please void it.",
            "I want to withdraw from buying the {p}.",
            "Kindly cancel the {p}; I found one elsewhere.",
            "Do not send the {p}, I have decided against it.",
            "My plan for the {p} should not renew; close it.",
            "We won't be needing the {p} after all, cancel it.",
            "How do I cancel the {p} I bought this morning?",
            "Scrap my order for a {p}, my wife already got one.",
            "I wish to undo my order of the {p}.",
            "Please remove the {p} from my order list for good.",
            "I am backing out of the {p} purchase.",
            "Cancel everything concerning the {p}, please.",
            "My pre-order of the {p} can be dropped.",
            "I don't want the {p} any longer, please cancel the order.",
            "Please delete my order of the {p}.",
            "I would rather not buy the {p} now.",
            "Stop the {p} order, I chose another model.",
            "I'd like to cancel, I do not need a {p}.",
            "My {p} membership should end this month.",
            "I clicked buy on the {p} by accident; please cancel that.",
            "Is there a way to revoke my order for the {p}?",
            "Forget my order of the {p}.",
            "I have to cancel the {p} because we are moving.",
            "Please terminate my {p} subscription.",
            "I decided not to take the {p}.",
            "Annul the order of the {p}, please.",
            "Let us call the {p} order off.",
            "We bought a different one, so we want to cancel the {p}.",
            "I do not wish to continue with the {p} contract.",
            "Forget it, I do not need the {p}.",
            "Please don't ship the {p}, I want to cancel it.",
            "I'd rather keep my old one, so cancel the {p}.",
            "Never mind the {p}, we don't want it now.",
            "Can my order for the {p} still be stopped?",
            "I wish to quit my {p} plan.",
            "You can strike the {p} from my order.",
            "Could you cancel the {p} for me?",
            "I take back my order for the {p}.",
            "My daughter ordered the {p} without asking; please undo it.",
            "There is no need for the {p} any more, stop the order.",
            "I must give up the {p} I ordered.",
        ),
        "broken": (
            "My {p} stopped working.",
            "The {p} will not turn on any more.",
            "The {p} makes a grinding noise and then shuts off.",
            "A crack runs through the side of my new {p}.",
            "The {p} broke after two days of use.",
            "My {p} is dead, no light, nothing.",
            "The {p} overheats within minutes.",
            "One part of the {p} fell off when I touched it.",
            "The {p} smells of burnt plastic.",
            "I unpacked the {p} and it was scratched and bent.",
            "The buttons of my {p} do not respond.",
            "The {p} leaks all over the table.",
            "Since yesterday the {p} only flickers.",
            "The zip on the {p} is torn already.",
            "My {p} keeps crashing and restarting.",
            "The battery of the {p} does not hold a charge.",
            "The {p} has a faulty switch.",
            "Something inside the {p} rattles and it has lost its power.",
            "The {p} you sold me is damaged.",
            "My {p} went up in smoke, literally.",
            "The handle of the {p} snapped.",
            "The {p} does not do what it should, it seems broken.",
            "My {p} does not start.",
            "The {p} died on me last night.",
            "There is a crack in the {p}.",
            "The {p} gets much too hot.",
            "My {p} buzzes and does nothing.",
            "The screws of the {p} came loose.",
            "The {p} had a dent when I took it out of the box.",
            "The {p} switches itself off all the time.",
            "A leg of the {p} has broken.",
            "My {p} suddenly quit.",
            "The {p} won't run, even with a new plug.",
            "The {p} squeaks and wobbles.",
            "The motor of the {p} is burnt out.",
            "My {p} no longer charges.",
            "The display of the {p} stays black.",
            "The {p} has holes in it.",
            "My {p} is jammed and cannot be opened.",
            "The {p} works for a minute and then fails.",
            "The {p} is defective.",
            "My {p} does not run any more.",
            "Half of the {p} is loose and shaky.",
            "A spring popped out of my {p}.",
            "The {p} squeals and trembles.",
            "My {p} refuses to start up.",
            "The {p} is bent and one bolt is loose.",
            "Nothing happens when I switch on the {p}.",
            "My {p} failed after a week.",
            "The paint of the {p} peels and it rusts.",
            "The {p} I got has a broken corner.",
            "The cable of the {p} sparks.",
        ),
        "delivery": (
            "My {p} has not arrived.",
            "The {p} was supposed to be here last week.",
            "The courier left the {p} at the wrong address.",
            "Where is my {p}?",
            "The tracking page for the {p} has not moved for days.",
            "I am still waiting for the {p} to be shipped.",
            "The parcel with my {p} seems to be lost.",
            "The driver never rang, and my {p} went back to the depot.",
            "It says delivered, but there is no {p} at my door.",
            "When will the {p} be delivered?",
            "The package came without the {p} in it.",
            "You sent a different item instead of the {p}.",
            "My {p} is stuck at customs.",
            "The shipment of the {p} is ten days late.",
            "A neighbour was meant to get my {p}, but nothing came.",
            "The {p} is delayed once more.",
            "The post office knows nothing about my {p}.",
            "I have been expecting the {p} since Monday.",
            "The box for the {p} was empty when it came.",
            "The {p} went to my old street, not to the new one.",
            "Has the {p} left your warehouse yet?",
            "The carrier cannot find my {p}.",
            "The {p} has never come.",
            "I did not get the {p} that I ordered.",
            "My {p} should have been here on Friday.",
            "The tracking says that my {p} got lost.",
            "The {p} was dropped off at the house of a stranger.",
            "My {p} is still on its way after a month.",
            "No sign of the {p} I ordered.",
            "We opened the box, but the {p} was not in it.",
            "What is taking the {p} so long to get here?",
            "The {p} was brought to somebody else.",
            "I never received the {p}.",
            "The postman returned the {p} to you by mistake.",
            "The {p} order has not been sent out.",
            "Nobody can tell me where the parcel with the {p} is.",
            "The {p} did not show up on the promised day.",
            "My {p} is lost in the mail.",
            "It looks like the {p} got lost on the way.",
            "The {p} never made it to my house.",
            "There was nothing in the parcel where the {p} should be.",
            "The {p} should have reached me days ago.",
            "My {p} did not come on Wednesday.",
            "According to the carrier, nobody knows where the {p} is.",
            "Your driver delivered the {p} to the wrong house.",
            "How much longer until the {p} gets here?",
            "What has become of the parcel with my {p}?",
            "I am missing the {p} from my delivery.",
            "The {p} is nowhere to be found, says the courier.",
            "The van came, but it did not bring the {p}.",
        ),
        "login": (
            "I can't sign in to my {p} account.",
            "The app of the {p} rejects my password.",
            "I forgot the password for my {p}.",
            "The reset mail for the {p} account never comes.",
            "My {p} profile is locked after three tries.",
            "The {p} app says that my user name does not exist.",
            "I am locked out of the site for the {p}.",
            "The code to log in to the {p} is not accepted.",
            "The two-factor code for my {p} is always wrong.",
            "I cannot access the account of my {p}.",
            "Logging in to the {p} gives an error.",
            "How do I reset my password for the {p}?",
            "My login for the {p} was blocked.",
            "The {p} asks for a PIN that I never set.",
            "The sign-in page for the {p} just loops.",
            "I lost access to the e-mail tied to my {p}.",
            "The {p} app logged me out and won't let me back in.",
            "My credentials for the {p} are refused.",
            "Please unlock my user account for the {p}.",
            "The verification text for the {p} app does not show up.",
            "I can't log in to the {p}.",
            "The {p} tells me that the password is incorrect.",
            "I don't know the password of my {p} account any more.",
            "My {p} account has been closed to me.",
            "The {p} website does not let me in.",
            "I get no login e-mail from the {p}.",
            "My new password is not working on the {p}.",
            "Your {p} app does not recognise my e-mail address.",
            "I am not able to open my {p} account.",
            "The security code for the {p} never reaches my phone.",
            "After the update I could not log on to the {p}.",
            "I tried to sign in to the {p} and it says invalid user.",
            "I have been logged out of the {p} for no reason.",
            "My {p} account was hacked and the password changed.",
            "The {p} login fails every time.",
            "Please send me a new password for the {p}.",
            "The {p} does not accept my user name.",
            "I have no access to my {p} account.",
            "What is my password for the {p}?",
            "My {p} keeps asking for a password and refuses it.",
            "The {p} page throws me out when I log in.",
            "I was shut out of the {p} app.",
            "The log-in screen of the {p} does not know me.",
            "The {p} says that my account is blocked.",
            "I have forgotten how to log in to my {p}.",
            "The one-time code of the {p} did not come.",
            "I need to get back into my {p} account.",
            "The {p} wants a code and I have none.",
        ),
    },
    orders=(
        "My order number is {o}.",
        "Order {o}.",
        "The order number is {o}.",
        "It is order {o}.",
        "Order no. {o}.",
        "Order number: {o}.",
        "I ordered it under number {o}.",
        "(order {o})",
        "The number on the receipt is {o}.",
        "See order {o}.",
        "Purchase number {o}.",
        "That was order {o}.",
        "Order #{o}.",
        "You'll find it under {o}.",
        "My order: {o}.",
        "Number {o} in your system.",
        "The confirmation e-mail says {o}.",
        "It belongs to order {o}.",
        "Bought with order {o}.",
        "For your records: {o}.",
        "I have {o} as the order number.",
        "{o} is my order number.",
        "Please look up {o}.",
        "I was given the number {o}.",
    ),
    fillers=(
        "Thank you for your help.",
        "What should I do?",
        "I hope you can help.",
        "I like your products otherwise.",
        "It was a present from my aunt.",
        "Please advise.",
        "I look forward to your reply.",
        "Could you look into it?",
        "Let me know what you think.",
        "Can you tell me what to do?",
        "Everything else was fine.",
        "Thanks!",
        "This is the first time I write to you.",
        "I am a bit disappointed.",
        "I hope this is the right address.",
        "Have a look, please.",
        "That is not what I expected.",
        "Sorry to bother you.",
    ),
)

HELD_OUT = Bank(
    names="""Astrid Benoit Chiara Darius Edwin Fabian Giulia Henrik Isolde Joaquin Katya Lorenz
    Mireille Nestor Olga Pascal Rania Sander Tamsin Ulrich Vera Wendell Yara Zeno Alma Boris Corinne
    Dylan Elias Florian""",
    brands="""Aurora Breeze Canyon Dune Eclipse Flint Grove Horizon Ivory Jasper Lagoon Mistral
    Nectar Opal Prairie Thunder""",
    nouns="""dishwasher|projector|armchair|suitcase|bicycle|oven|telescope|mixer|sofa|umbrella|
    treadmill|dash cam|lawn mower|hair dryer|ice crusher|pressure washer""",
    openings=(
        "{n} speaking.",
        "Greetings from {n}.",
        "Hello, the name's {n}.",
        "Good afternoon, I am called {n}.",
        "It's me, {n}.",
        "Hi, you've got {n} here.",
    ),
    closings=(
        "Kind regards, {n}",
        "Warm wishes, {n}",
        "Thank you, {n}",
        "Take care, {n}",
        "Greetings, {n}",
        "Yours truly, {n}",
    ),
    problems={
        "payment": (
            "I got two bills for a single {p}.",
            "The price you charged for the {p} is too high.",
            "There is a mistake in the invoice for the {p}.",
            "You have debited my card a second time for the {p}.",
            "I still have not been refunded for the {p}.",
            "My statement shows a charge for the {p} that I can't explain.",
            "Why was I billed extra for the {p}?",
            "My voucher was ignored when I paid for the {p}.",
        ),
        "cancel": (
            "I want to cancel the {p}.",
            "I've decided not to buy the {p}, please cancel.",
            "Please stop my {p} order, I do not want it now.",
            "Is it still possible to cancel a {p} ordered last night?",
            "I have no use for the {p}, please cancel my order.",
            "My order of the {p} was a mistake; please delete it.",
            "Please cancel the {p}, we bought another one.",
            "I would like to end the contract for my {p}.",
        ),
        "broken": (
            "The {p} is broken.",
            "My {p} suddenly died.",
            "The {p} has a big crack.",
            "The {p} gets far too hot and switches itself off.",
            "The {p} hums, but it does not work.",
            "A screw is loose in my {p} and it wobbles and squeaks.",
            "The {p} came with a dent and a broken leg.",
            "My {p} no longer starts.",
        ),
        "delivery": (
            "I have not received my {p} yet.",
            "The {p} should have come on Tuesday.",
            "Your courier brought the {p} to a stranger's house.",
            "What happened to the shipment with my {p}?",
            "The {p} never turned up.",
            "My parcel with the {p} has been in transit for three weeks.",
            "According to the tracking, the {p} is lost.",
            "I opened the parcel and there was no {p} inside.",
        ),
        "login": (
            "I am unable to log in to my {p}.",
            "My password for the {p} does not work.",
            "The {p} account keeps telling me that my password is wrong.",
            "I have been shut out of my {p} account.",
            "I never receive the login code for my {p}.",
            "I don't remember my password for the {p}.",
            "The website of the {p} won't let me sign in.",
            "My user name for the {p} is not recognised.",
        ),
    },
    orders=(
        "The order was {o}.",
        "Order reference {o}.",
        "My number is {o}.",
        "You can see it in order {o}.",
        "I placed it as order {o}.",
        "Order ID {o}.",
        "Its number is {o}.",
        "Reference: {o}.",
    ),
    fillers=(
        "Can you help me?",
        "What are my options?",
        "Thanks in advance.",
        "I am happy with everything else.",
        "I would be glad of an answer.",
        "I don't know what to do now.",
    ),
)


def write(directory: Path) -> None:
    """Write all files into `directory`, which is created where it does not exist."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, bank, count, seed in (
        ("train", TRAIN, TRAIN_ROWS, SEED),
        ("test", HELD_OUT, TEST_ROWS, SEED + 1),
        ("validation", TRAIN, VALIDATION_ROWS, SEED + 2),
    ):
        lines = [json.dumps(row) + "\n" for row in rows(bank, count, seed=seed)]
        (directory / f"tickets_{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def rows(bank: Bank, count: int, *, seed: int) -> list[dict[str, object]]:
    """`count` rows in the `messages` format, a function of the arguments alone.

    Every part is dealt like cards: none comes back before all others of its kind were used.
    """
    rng = random.Random(seed)  # noqa: S311  (data, not secrets)
    nouns = [" ".join(noun.split()) for noun in bank.nouns.split("|")]
    names, brands = _deal(bank.names.split(), rng), _deal(bank.brands.split(), rng)
    products = _deal(nouns, rng)
    issues = _deal(list(bank.problems), rng)
    problems = {issue: _deal(list(texts), rng) for issue, texts in bank.problems.items()}
    openings, closings = _deal(list(bank.openings), rng), _deal(list(bank.closings), rng)
    orders, fillers = _deal(list(bank.orders), rng), _deal(list(bank.fillers), rng)
    made: list[dict[str, object]] = []
    for _ in range(count):
        issue = next(issues)
        ticket = {
            "name": next(names),
            "product": f"{next(brands)} {next(products)}",
            "issue": issue,
            "order": rng.randrange(1_000, 10_000),
        }
        body = [next(problems[issue]), next(orders)]
        if rng.random() < 0.25:
            body.reverse()
        if rng.random() < 0.33:
            body.insert(rng.randrange(3), next(fillers))
        parts = [next(openings), *body] if rng.random() < 0.5 else [*body, next(closings)]
        message = " ".join(parts)
        for mark, field in (("{n}", "name"), ("{p}", "product"), ("{o}", "order")):
            message = message.replace(mark, str(ticket[field]))
        made.append({"messages": _messages(message, json.dumps(ticket))})
    return made


def main(argv: list[str]) -> None:
    """`python -m training.tickets DIR`."""
    if len(argv) != 1:
        raise ConfigError(f"expected one argument, the directory to write to; got {argv}")
    write(Path(argv[0]))


def _messages(message: str, ticket: str) -> list[dict[str, str]]:
    roles = ("system", "user", "assistant")
    texts = (SYSTEM, message, ticket)
    return [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]


def _deal(cards: list[str], rng: random.Random) -> Iterator[str]:
    while True:
        rng.shuffle(cards)
        yield from cards


if __name__ == "__main__":
    main(sys.argv[1:])
