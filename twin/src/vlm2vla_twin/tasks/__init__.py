"""The tasks of appendix D.1: suites as data, and a judge that scores a trial from physics."""

from vlm2vla_twin.tasks.judge import Judge, Score, score_of, task_done
from vlm2vla_twin.tasks.plans import KEYWORDS, decomposed, mentions
from vlm2vla_twin.tasks.suites import CARD_ITEMS, CONDITIONS, SUITES, Goal, Suite, kitchen_scene, match_task

__all__ = [
    "CARD_ITEMS",
    "CONDITIONS",
    "KEYWORDS",
    "SUITES",
    "Goal",
    "Judge",
    "Score",
    "Suite",
    "decomposed",
    "kitchen_scene",
    "match_task",
    "mentions",
    "score_of",
    "task_done",
]
