"""What every record must hold to be answered and judged, whoever reads it: a run, `evaluate`, `data check`."""
from __future__ import annotations

from sophiavl_fast.data.dataset import Example
from sophiavl_fast.evaluate import accuracy
from sophiavl_fast.rewards import golds


def refuse_unusable(record: Example) -> None:
    """UserError for a rule of reasoning that cannot judge the record, or a reference answer that no response can match."""
    accuracy.refuse_unknown_rule(record)
    golds.refuse_unmatchable(record.problem_type, record.gold, record.options)
