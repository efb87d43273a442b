"""Rewards: Group -> Scores. Outcome by problem type in outcome.py, the judge of the reasoning in thinking/."""
