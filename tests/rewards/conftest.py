import pytest

import sophiavl_fast  # noqa: F401  (its torchvision hook must be in place before a test imports transformers)


@pytest.fixture(scope="session")
def tiny_judge(tmp_path_factory):
    """A random 2.2 M-parameter Qwen2.5-VL with one token a character."""
    from sophiavl_fast.data.demo import tiny_model

    folder = tmp_path_factory.mktemp("judge")
    tiny_model.build(folder, 3)
    return folder
