"""What finetune scores while it runs: where teaching, which knows when, meets scoring, which knows what is right.

In: a recipe.  Out: an Exam for train().
"""

from dataclasses import replace

from tessella.checkpoint.read import Loaded
from tessella.evaluate.metrics import METRICS, RIGHT_FROM
from tessella.evaluate.skills import perplexity
from tessella.evaluate.tasks.general import PASSAGE, general
from tessella.generate import generate_batch
from tessella.sampling import GREEDY
from tessella.train.held_out import Exam
from tessella.train.recipe import Recipe


def exam_of(recipe: Recipe) -> Exam:
    """The recipe's metric, and the general questions when it asks for them."""
    metric = METRICS[recipe.metric]
    return Exam(lambda answer, expected: metric.score(answer, (expected,)), forgetting if recipe.forgetting else None)


def forgetting(loaded: Loaded) -> dict[str, float]:
    """Share of the general questions that are answered right, and the perplexity of a passage of English."""
    task = general()
    prompts = [loaded.inputs.build(item.messages, item.pictures, room=task.max_tokens) for item in task.items]
    ids = generate_batch(loaded.model, prompts, replace(GREEDY, max_tokens=task.max_tokens), loaded.stop_ids)
    texts = [loaded.tokenizer.decode(row).strip() for row in ids]
    scores = [task.judge.score(text, item.answers) for text, item in zip(texts, task.items, strict=True)]
    right = sum(score >= RIGHT_FROM for score in scores)
    return {"general_score": right / len(scores), "general_perplexity": perplexity(loaded, PASSAGE)}
