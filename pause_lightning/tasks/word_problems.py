"""Built-in word problems in GSM8K's format, made on the fly: something real to learn without a download.

Lives here: ``WordProblems``. A problem is a chain of operations on one quantity; every intermediate result is a whole
number between 1 and ``max_result``. The answer works it out step by step with GSM8K's calculator annotations.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from pause_lightning.errors import UserError
from pause_lightning.tasks.problem import Problem, Splits, Task

NAMES = ["Tom", "Ann", "Sam", "Mia", "Ben", "Eva", "Leo", "Zoe", "Max", "Ivy", "Dan", "Amy", "Kai", "Liz", "Jon", "Meg"]
ITEMS = [
    "apples",
    "pens",
    "books",
    "coins",
    "cards",
    "eggs",
    "balls",
    "cakes",
    "shells",
    "stamps",
    "marbles",
    "stickers",
]
_REPEATS = 5000  # so many questions in a row seen before: there are hardly any others

# operation -> (sentence of the question, beginning of the line of the answer)
TEMPLATES: dict[str, list[tuple[str, str]]] = {
    "+": [
        ("{other} gives {name} {b} more {item}.", "After the gift {name} has"),
        ("{name} buys {b} more {item}.", "After buying more {name} has"),
        ("Then {name} finds {b} {item}.", "With the found ones {name} has"),
    ],
    "-": [
        ("{name} gives {b} {item} to {other}.", "After giving some away {name} has"),
        ("{name} loses {b} {item}.", "After losing some {name} has"),
        ("Then {name} sells {b} of the {item}.", "After the sale {name} has"),
    ],
    "*": [
        ("The number of {item} {name} has grows to {b} times as many.", "{b} times as many is"),
        ("{other} then makes it {b} times as many {item}.", "{b} times as many is"),
    ],
    "/": [
        ("{name} splits the {item} into {b} equal boxes and keeps one box.", "One box holds"),
        ("{name} shares the {item} equally among {b} people and keeps one share.", "One share is"),
    ],
}
APPLY: dict[str, Callable[[int, int], int]] = {
    "+": lambda x, b: x + b,
    "-": lambda x, b: x - b,
    "*": lambda x, b: x * b,
    "/": lambda x, b: x // b,
}


class WordProblems(Task):
    """Generated word problems; train and test never share a question.

    Args:
        num_train: training problems (a tenth of them becomes the validation split)
        num_test: test problems
        steps: numbers of operations a problem may have, drawn evenly
        max_number: largest number in a question
        max_result: largest intermediate or final result
        seed: the same seed makes the same problems
    """

    def __init__(
        self,
        num_train: int = 5000,
        num_test: int = 1000,
        steps: Sequence[int] = (1, 2),
        max_number: int = 10,
        max_result: int = 50,
        seed: int = 0,
    ) -> None:
        for name, value, least in (
            ("num_train", num_train, 1),
            ("num_test", num_test, 1),
            ("max_number", max_number, 2),
            ("max_result", max_result, 4),
            ("steps", min(steps, default=0), 1),
        ):
            if value < least:
                raise UserError(f"data.task.{name} must be at least {least}")
        if max_result < max_number:
            raise UserError("data.task.max_result must not be below data.task.max_number")
        self.num_train, self.num_test, self.steps = num_train, num_test, list(steps)
        self.max_number, self.max_result, self.seed = max_number, max_result, seed

    def load(self) -> Splits:
        rng = random.Random(self.seed)
        wanted = self.num_train + self.num_test
        made: dict[str, Problem] = {}
        repeats = 0
        while len(made) < wanted:
            problem = self.make(rng)
            repeats = repeats + 1 if problem.question in made else 0
            made.setdefault(problem.question, problem)
            if repeats == _REPEATS:
                raise UserError(
                    f"data.task: these options allow only about {len(made)} different questions, {wanted} are asked "
                    "for; raise max_number, max_result or steps"
                )
        problems = list(made.values())
        return {"train": problems[: self.num_train], "test": problems[self.num_train :]}

    def make(self, rng: random.Random) -> Problem:
        """One problem drawn from ``rng``."""
        name, other = rng.sample(NAMES, 2)
        item = rng.choice(ITEMS)
        x = rng.randint(2, self.max_number)
        question, answer = [f"{name} has {x} {item}."], []
        for _ in range(rng.choice(self.steps)):
            operation, b = self._operation(x, rng)
            y = APPLY[operation](x, b)
            sentence, opening = rng.choice(TEMPLATES[operation])
            words = {"name": name, "other": other, "item": item, "b": b}
            question.append(sentence.format(**words))
            answer.append(f"{opening.format(**words)} {x} {operation} {b} = <<{x}{operation}{b}={y}>>{y} {item}.")
            x = y
        question.append(f"How many {item} does {name} have now?")
        return Problem(" ".join(question), "\n".join([*answer, f"#### {x}"]))

    def _operation(self, x: int, rng: random.Random) -> tuple[str, int]:
        """An operation on x and its number, so that the result is whole and in range."""
        divisors = [d for d in range(2, 10) if x % d == 0]
        ranges: dict[str, list[int]] = {
            "+": list(range(2, min(self.max_number, self.max_result - x) + 1)),
            "-": list(range(1, min(self.max_number, x - 1) + 1)) if x > 3 else [],
            "*": list(range(2, min(9, self.max_result // x) + 1)),
            "/": divisors,
        }
        operation = rng.choice([o for o, numbers in ranges.items() if numbers])
        return operation, rng.choice(ranges[operation])
