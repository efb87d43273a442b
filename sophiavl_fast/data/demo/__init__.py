"""Demo data: pictures of handwritten digits, questions of all five problem types, traces with systematic slips.

`python -m sophiavl_fast.data.demo --out data/demo --model models/demo-init` writes the records, the pictures, the
registry and a tiny random model that can learn them on two cores.
"""
