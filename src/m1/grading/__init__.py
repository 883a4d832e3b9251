"""Extracts answers from texts and decides which are equal. It needs neither torch nor transformers."""

from m1.grading.extract import extract_answer, opens_thought, with_thought
from m1.grading.grader import Grader

__all__ = ["Grader", "extract_answer", "opens_thought", "with_thought"]
