"""A run's pixel limits go with its export: AutoProcessor of the exported folder sees pictures as the trainer did."""
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from sophiavl_fast.data.demo import tiny_model
from sophiavl_fast.data.processor import Processor
from sophiavl_fast.policy import export
from tests.data import families

SIZES = [(28, 28), (60, 200), (300, 100), (500, 400)]
PICTURES = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (*size, 3), dtype=np.uint8)) for i, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "tiny"
    tiny_model.build(folder, 0)
    return folder


def asked(pictures):
    return [{"role": "user", "content": [{"type": "image"} for _ in pictures] + [{"type": "text", "text": "sum?"}]}]


def seen(processor: Processor):
    """The pixels and grids that the trainer has, without those of its prompt's text."""
    return processor.prepare(asked(PICTURES), PICTURES)[4:]


def by_transformers(folder):
    images = AutoProcessor.from_pretrained(folder).image_processor(images=PICTURES, return_tensors="pt")
    return images["pixel_values"], images["image_grid_thw"]


def equal(a, b):
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def rewritten(folder, form):
    """The folder with its image processor's settings in another form."""
    file = folder / "preprocessor_config.json"
    tree = json.loads(file.read_text())
    if form == "processor_config.json":     # as transformers 5 saves them; beside a preprocessor_config.json that does not count then
        AutoProcessor.from_pretrained(folder).save_pretrained(folder)
        assert "image_processor" in json.loads((folder / form).read_text())
        file.write_text(json.dumps(tree | {"max_pixels": 10**6}))
    elif form == "size":
        tree["size"] = {"shortest_edge": tree.pop("min_pixels", 28 * 28), "longest_edge": tree.pop("max_pixels", 64 * 28 * 28)}
        file.write_text(json.dumps(tree))
    return folder


@pytest.mark.parametrize("limits", [{"min_pixels": 8 * 28 * 28}, {"max_pixels": 12 * 28 * 28}, {"min_pixels": 6 * 28 * 28, "max_pixels": 20 * 28 * 28}],
                         ids=["min", "max", "both"])
@pytest.mark.parametrize("form", ["min_pixels", "size", "processor_config.json"])
def test_files_of_every_form_carry_the_limits(demo, tmp_path, form, limits):
    source = rewritten(shutil.copytree(demo, tmp_path / "source"), form)
    target = shutil.copytree(source, tmp_path / "target")
    export._limit_pixels(source, target, limits.get("min_pixels"), limits.get("max_pixels"))
    trained = seen(Processor(source, **limits))
    assert not equal(trained, seen(Processor(source)))
    assert equal(by_transformers(target), trained) and equal(seen(Processor(target)), trained)


def test_the_exported_folder_needs_no_option(demo, create, tmp_path):
    limits = {"min_pixels": 6 * 28 * 28, "max_pixels": 20 * 28 * 28}
    create(demo, model=limits).export(tmp_path / "limited")
    assert equal(by_transformers(tmp_path / "limited"), seen(Processor(demo, **limits)))
    create(demo).export(tmp_path / "plain")
    assert (tmp_path / "plain/preprocessor_config.json").read_bytes() == (demo / "preprocessor_config.json").read_bytes()


def test_qwen3_vl_and_a_family_that_cuts_tiles(tmp_path):
    limits = (8 * 32 * 32, 20 * 32 * 32)
    source = families.qwen3_vl(tmp_path / "qwen3")
    export._limit_pixels(source, target := shutil.copytree(source, tmp_path / "target"), *limits)
    assert equal(by_transformers(target), seen(Processor(source, min_pixels=limits[0], max_pixels=limits[1])))
    source = families.internvl(tmp_path / "internvl")
    export._limit_pixels(source, target := shutil.copytree(source, tmp_path / "tiles"), *limits)
    assert all((target / f.name).read_bytes() == f.read_bytes() for f in source.iterdir())
