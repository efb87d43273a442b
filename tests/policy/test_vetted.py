"""A torch_dist checkpoint's pickled metadata: what leaves something out, leads elsewhere or reaches for what is not its own."""
import os
import pickle
import struct

import pytest
import torch
from spoilt import agree, refused
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from sophiavl_fast.errors import UserError
from sophiavl_fast.policy import checkpoint
from sophiavl_fast.policy.checkpoint import vetted

EMBEDDING = "model/model.embed_tokens.weight"


def key(metadata, name):
    return next(k for k in metadata.storage_data if k.fqn == name)


def no_parts(m):
    m.state_dict_metadata[EMBEDDING].chunks.clear()


def a_part_cut(m):
    chunk = m.state_dict_metadata[EMBEDDING].chunks[0]
    chunk.sizes = torch.Size([10, *chunk.sizes[1:]])


def a_part_twice(m):
    chunk, place = m.state_dict_metadata[EMBEDDING].chunks[0], m.storage_data[key(m, EMBEDDING)]
    m.state_dict_metadata[EMBEDDING].chunks.append(ChunkStorageMetadata(torch.Size([5, 0]), torch.Size([5, chunk.sizes[1]])))
    m.storage_data[MetadataIndex(EMBEDDING, torch.Size([5, 0]))] = place


def a_part_over_another(m):
    """As many values as there should be, five rows of them twice and five not at all."""
    chunk = m.state_dict_metadata[EMBEDDING].chunks[0]
    chunk.sizes = torch.Size([chunk.sizes[0] - 5, *chunk.sizes[1:]])
    a_part_twice(m)


def a_part_beyond(m):
    chunk = m.state_dict_metadata[EMBEDDING].chunks[0]
    chunk.sizes = torch.Size([chunk.sizes[0] * 2, *chunk.sizes[1:]])


def a_part_elsewhere(m):
    place = m.storage_data.pop(key(m, EMBEDDING))
    m.storage_data[MetadataIndex(EMBEDDING, torch.Size([5, 0]))] = place


def a_part_too_many(m):
    m.storage_data[MetadataIndex("model/more", torch.Size([0]))] = m.storage_data[key(m, EMBEDDING)]


def before_the_file(m):
    m.storage_data[key(m, EMBEDDING)].offset = -5


def between_bytes(m):
    m.storage_data[key(m, EMBEDDING)].offset = 0.5


def no_properties(m):
    del m.state_dict_metadata[EMBEDDING].properties


def no_places(m):
    m.storage_data = None


@pytest.mark.parametrize("spoil,message", [
    (no_parts, f"the parts of tensor '{EMBEDDING}' do not make a whole of"), (a_part_cut, "do not make a whole"), (a_part_twice, "do not make a whole"),
    (a_part_over_another, "do not make a whole"),
    (a_part_beyond, "do not make a whole"), (a_part_elsewhere, rf"the part of tensor '{EMBEDDING}' at \[0, 0\] lies in no file"),
    (a_part_too_many, r"the part of tensor 'model/more' at \[0\] is none of its parts"), (before_the_file, "begins at -5"), (between_bytes, "begins at 0.5"),
    (no_properties, "not of the form"), (no_places, "not of the form")], ids=lambda value: getattr(value, "__name__", ""))
def test_metadata_that_leaves_something_out(saved, spoil, message):
    policy, path = saved("torch_dist")
    metadata = pickle.loads((path / ".metadata").read_bytes())
    spoil(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    agree(path)
    refused(policy, path, message, before_weights=True)


def test_bytes_that_are_no_tensor(saved):
    """A folder that agrees with itself, of a part that torch cannot read: one line, not torch's traceback of every rank."""
    policy, path = saved("torch_dist")
    part, metadata = path / "__0_0.distcp", pickle.loads((path / ".metadata").read_bytes())
    place = metadata.storage_data[key(metadata, EMBEDDING)]
    data = bytearray(part.read_bytes())
    data[place.offset:place.offset + place.length] = bytes(place.length)
    part.write_bytes(data)
    agree(path)
    with pytest.raises(UserError, match=f"^checkpoint '{path}' cannot be read \\(.{{1,200}}\\); another one is '{path.parent}/step_1'$") as told:
        checkpoint.load(policy, path)
    assert "\n" not in str(told.value) and "Traceback" not in str(told.value)


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def named(kind):
    return text(kind.__module__) + text(kind.__name__) + b"\x93"


def state(**fields):
    """A pickled (None, fields): what sets attributes of an object, whatever it is."""
    return b"N}" + b"".join(text(k) + v + b"s" for k, v in fields.items()) + b"\x86b"


FIVE = b"K\x05"


@pytest.mark.parametrize("steps,what", [
    (named(WriteItem) + state(polluted=FIVE), WriteItem), (named(TensorProperties) + state(__getstate__=FIVE), TensorProperties),
    (named(torch.serialization._get_layout) + b"}" + text("cache") + b"}sb", torch.serialization._get_layout),
    (named(WriteItemType) + b"K\x01\x85R" + b"}" + text("_value_") + FIVE + b"sb", WriteItemType.TENSOR)], ids=["class", "method", "function", "member"])
def test_no_class_function_or_member_is_changed(saved, steps, what):
    """They are the whole process's: changed, every later save or load of it would be spoilt."""
    policy, path = saved("torch_dist")
    before, record = dict(vars(what)), path / ".metadata"
    good = record.read_bytes()
    record.write_bytes(b"\x80\x04" + steps + b".")
    agree(path)
    refused(policy, path, "it would change", before_weights=True)
    assert dict(vars(what)) == before
    record.write_bytes(good)
    agree(path)
    checkpoint.load(policy, path)


def test_what_the_vetted_reader_gives_is_what_pickle_gives(saved):
    _, path = saved("torch_dist")
    assert vetted.read(path) == pickle.loads((path / ".metadata").read_bytes())


def test_metadata_that_is_none(saved):
    policy, path = saved("torch_dist")
    record = path / ".metadata"
    pickled = record.read_bytes()
    for spoilt, message in ((b"", "cannot be read .EOFError"), (b"not a pickle", "cannot be read"), (pickled[:200], "cannot be read"),
                            (pickle.dumps({"a": 1}), "names|not of the form"), (pickle.dumps([]), "not of the form")):
        record.write_bytes(spoilt)
        agree(path)
        refused(policy, path, message, before_weights=True)


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_nothing_that_a_checkpoint_names_is_run(saved, tmp_path):
    """A hostile metadata file, in every place where torch would unpickle one; the file is proved hostile first."""
    policy, path = saved("torch_dist")
    record, mark = path / ".metadata", tmp_path / "ran"
    metadata = pickle.loads(record.read_bytes())
    metadata.planner_data = Evil(mark)
    hostile = pickle.dumps(metadata)
    pickle.loads(hostile)
    assert mark.exists()
    mark.unlink()
    record.write_bytes(hostile)
    agree(path)
    for load in (lambda: checkpoint.refuse_unusable(path, policy.config), lambda: checkpoint.load(policy, path)):
        with pytest.raises(UserError, match=r"it names posix.system, which no checkpoint needs"):
            load()
    assert not mark.exists()


def test_metadata_that_leads_elsewhere_is_refused(saved):
    """A path out of the folder, and bytes in a tensor's place, which torch unpickles: neither is followed."""
    policy, path = saved("torch_dist")
    record = path / ".metadata"
    pickled = record.read_bytes()
    metadata = pickle.loads(pickled)
    first = next(iter(metadata.storage_data.values()))
    first.relative_path = f"../step_1/{first.relative_path}"
    record.write_bytes(pickle.dumps(metadata))
    agree(path)
    with pytest.raises(UserError, match=r"'\.\./step_1/__0_0.distcp' is no file of its own folder"):
        checkpoint.load(policy, path)
    metadata = pickle.loads(pickled)
    name = next(iter(metadata.state_dict_metadata))
    metadata.state_dict_metadata[name] = torch.distributed.checkpoint.metadata.BytesStorageMetadata()
    record.write_bytes(pickle.dumps(metadata))
    agree(path)
    with pytest.raises(UserError, match="BytesStorageMetadata, which no checkpoint needs"):
        checkpoint.load(policy, path)
    metadata = pickle.loads(pickled)
    gone = next(n for n in metadata.state_dict_metadata if n.startswith("exp_avg/"))
    del metadata.state_dict_metadata[gone]
    metadata.storage_data = {k: v for k, v in metadata.storage_data.items() if k.fqn != gone}
    record.write_bytes(pickle.dumps(metadata))
    agree(path)
    with pytest.raises(UserError, match=f"holds no tensor '{gone}'"):
        checkpoint.load(policy, path)
