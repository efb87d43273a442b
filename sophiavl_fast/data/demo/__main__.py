"""`python -m sophiavl_fast.data.demo --out data/demo --model models/demo-init --seed 0`."""
from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sophiavl_fast.compat.quiet import quiet
from sophiavl_fast.data.demo import generate, tiny_model
from sophiavl_fast.data.demo.traces import LUCKY_SHARE, SLIP_SHARE


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sophiavl_fast.data.demo", description="Write the demo's data and its tiny random model.")
    parser.add_argument("--out", type=Path, required=True, help="folder of records, pictures and registry")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder of the tiny model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lucky", type=float, default=LUCKY_SHARE, metavar="SHARE",
                        help="share of the warm start's traces with wrong lines and the right answer all the same (slips become fewer by as much)")
    arguments = parser.parse_args()
    if not 0 <= arguments.lucky <= SLIP_SHARE + LUCKY_SHARE:
        parser.error(f"--lucky {arguments.lucky}: must lie in 0..{SLIP_SHARE + LUCKY_SHARE}")
    quiet()
    console = Console()
    columns = TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        counts = generate.write(arguments.out, arguments.seed, lambda rows, label, total: progress.track(rows, total=total, description=label),
                                lucky=arguments.lucky)
    parameters = tiny_model.build(arguments.model, arguments.seed)
    console.print(f"{sum(counts.values()):,} records in {arguments.out / 'dataset_info.json'}: " + ", ".join(f"{k} {v:,}" for k, v in counts.items()))
    console.print(f"tiny Qwen2.5-VL, {parameters / 1e6:.1f} M parameters, in {arguments.model}")


if __name__ == "__main__":
    main()
