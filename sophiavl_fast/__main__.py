"""`python -m sophiavl_fast` is `sophiavl-fast`; under torchrun: `torchrun ... -m sophiavl_fast train CONFIG`."""
import sys

from sophiavl_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
