"""`python -m sophiavl_fast` is `sophiavl-fast`; under torchrun: `torchrun ... -m sophiavl_fast train CONFIG`."""
import sys

from sophiavl_fast.compat import heap


def start() -> int:
    """The program, as a process of its own: `cli.main` within it."""
    heap.bound_caches()
    if sys.argv[1:2] == ["train"]:
        heap.restart_with_huge_pages()
    from sophiavl_fast.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(start())
