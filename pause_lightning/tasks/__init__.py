"""Tasks: where problems come from and how a reply is graded. A task of your own is a subclass of ``Task``, named by
its class path in ``data.task``. Nothing here imports torch."""

from pause_lightning.tasks.grading import Grade, grade_gsm8k
from pause_lightning.tasks.gsm8k import GSM8K
from pause_lightning.tasks.problem import Problem, Splits, Task, check_disjoint, dataset_hash, split_train_val
from pause_lightning.tasks.word_problems import WordProblems

__all__ = [
    "GSM8K",
    "Grade",
    "Problem",
    "Splits",
    "Task",
    "WordProblems",
    "check_disjoint",
    "dataset_hash",
    "grade_gsm8k",
    "split_train_val",
]
