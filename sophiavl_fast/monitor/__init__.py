"""What people look at: metrics and samples on disk, progress in the terminal, the report page, the doctor's table."""
from sophiavl_fast.monitor.metrics import RunLog
from sophiavl_fast.monitor.progress import Progress
from sophiavl_fast.monitor.report import write_report

__all__ = ["Progress", "RunLog", "write_report"]
