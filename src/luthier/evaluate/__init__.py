"""Evaluation: judges of answers, and what their verdicts are worth."""
