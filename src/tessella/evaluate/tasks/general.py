"""General questions that have nothing to do with pictures: what a model must not forget while it is taught.

Short on purpose: a small language model answers a good part of them, so that losing some can be seen.
The passage is our own English; its perplexity is the second sign of forgetting.
"""

from tessella.chat import Message
from tessella.evaluate.task import Item, Task

QUESTIONS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "knowledge": (
        ("What is the capital of France?", ("Paris",)),
        ("What is the capital of Japan?", ("Tokyo",)),
        ("What is the capital of Italy?", ("Rome",)),
        ("What is the largest ocean on Earth?", ("Pacific",)),
        ("Which planet is known as the Red Planet?", ("Mars",)),
        ("What is the largest planet in our solar system?", ("Jupiter",)),
        ("Who wrote the play Romeo and Juliet?", ("Shakespeare",)),
        ("What is the chemical formula of water?", ("H2O", "H₂O")),
        ("On which continent is Egypt?", ("Africa",)),
        ("Which gas do plants take in from the air to make their food?", ("carbon dioxide", "CO2", "CO₂")),
        ("Who painted the Mona Lisa?", ("Leonardo", "da Vinci")),
        ("What is the tallest mountain on Earth?", ("Everest",)),
        ("Which language do most people in Brazil speak?", ("Portuguese",)),
        ("Which metal has the chemical symbol Fe?", ("iron",)),
    ),
    "arithmetic": (
        ("What is 2 plus 3?", ("5", "five")),
        ("What is 7 plus 8?", ("15", "fifteen")),
        ("What is 10 minus 4?", ("6", "six")),
        ("What is 3 times 4?", ("12", "twelve")),
        ("What is 20 divided by 5?", ("4", "four")),
        ("What is 9 times 9?", ("81", "eighty one")),
        ("What is half of 50?", ("25", "twenty five")),
        ("What is 100 minus 1?", ("99", "ninety nine")),
        ("How many minutes are in one hour?", ("60", "sixty")),
        ("How many days are in a week?", ("7", "seven")),
        ("How many months are in a year?", ("12", "twelve")),
        ("I have two apples and I buy three more. How many apples do I have?", ("5", "five")),
        ("What number comes after 19?", ("20", "twenty")),
    ),
    "common sense": (
        ("What color is the sky on a clear day?", ("blue",)),
        ("Which animal says meow?", ("cat", "cats", "kitten")),
        ("What do bees make that people eat?", ("honey",)),
        ("What is the opposite of hot?", ("cold",)),
        ("What is frozen water called?", ("ice",)),
        ("Which season comes after winter?", ("spring",)),
        ("Which is bigger, an elephant or a mouse?", ("elephant",)),
        ("What do you use to cut paper?", ("scissors",)),
        ("How many legs does a dog have?", ("4", "four")),
        ("Which part of the body do you use to see?", ("eye", "eyes")),
        ("What color do you get when you mix blue and yellow?", ("green",)),
        ("What do you open over your head when it rains?", ("umbrella",)),
        ("Which meal do people eat in the morning?", ("breakfast",)),
    ),
}

PASSAGE = (
    "The market opens before the sun is up. Trucks stand in a row along the canal, their lamps still on, and men in "
    "heavy gloves carry crates of apples, onions and fish across the wet stones. Nobody speaks much at that hour. A "
    "woman who sells bread from a green van pours coffee for the drivers and writes down what they owe her in a "
    "small book, because she knows that all of them will pay on Friday.\n\n"
    "By seven o'clock the first customers arrive. Most of them are cooks. They walk slowly from stall to stall, "
    "lift a tomato, smell it, and put it back if it is too soft. An old cook once told me that good food begins "
    "with patience: you have to wait until the fruit is ripe, wait until the pan is hot, and wait until the guests "
    "are hungry. Then you must hurry, because a dish that stands for five minutes has already lost half of what "
    "made it good.\n\n"
    "I went there every week for a year to take photographs. At first the sellers turned away from the camera. "
    "Later they asked me to send the pictures to their children, who had moved to larger cities and rarely came "
    "home. In winter the light was poor and many pictures were dark, but there was always something worth keeping: "
    "a hand full of walnuts, a knife on a wooden board, steam above a pot of soup. When I look at them now I can "
    "still hear the sound of the place, the wheels of the carts, the bell of the church across the bridge, and a "
    "boy who called out the price of his father's lemons, louder and louder, until somebody laughed and bought them "
    "all.\n"
)


def general() -> Task:
    """Forty short questions; an answer is right when it holds an accepted word."""
    items = tuple(
        Item(f"{kind} {number}", (Message("user", question),), (), answers, label=answers[0], kind=kind)
        for kind, asked in QUESTIONS.items()
        for number, (question, answers) in enumerate(asked, 1)
    )
    return Task("general", items, metric="contains", max_tokens=24, about="general questions without pictures")
