"""An engine that another thread has given up meanwhile is a lost one, not an accident."""
import pytest

from sophiavl_fast.errors import EngineLost
from sophiavl_fast.rollout.server import pick_port
from sophiavl_fast.rollout.transfer.gloo import GlooChannel
from sophiavl_fast.rollout.transfer.http import HttpControl


def test_a_closed_connection_is_a_lost_engine():
    control = HttpControl(f"http://127.0.0.1:{pick_port(0)}", "token", 5.0, None)
    with pytest.raises(EngineLost, match="cannot be reached for"):
        control.start()
    control.close()
    with pytest.raises(EngineLost, match=r"rollout server http://127.0.0.1:\d+ was given up before"):
        control.start()


def test_a_closed_group_is_a_lost_engine():
    channel = GlooChannel.__new__(GlooChannel)
    channel._control = HttpControl(f"http://127.0.0.1:{pick_port(0)}", "token", 5.0, None)
    channel.close()
    with pytest.raises(EngineLost, match="was given up before the weight transfer"):
        channel.send([])
