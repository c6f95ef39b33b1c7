"""What peers of an op are."""

from collections.abc import Callable
from dataclasses import dataclass, field

from opinfo.spec import Call, Inputs


class MissingPeerError(Exception):
    """A peer that this machine or this input does not have; the text says why. An ImportError says so, too."""


@dataclass(frozen=True)
class Peers:
    """Who else computes what an op does."""

    # name -> f(inputs) -> a call that gives what the op gives, in the same form, or MissingPeerError
    calls: dict[str, Callable[[Inputs], Call]] = field(default_factory=dict)
    # name -> a function of the op's arguments, to be compiled by torch.compile; `run.py --no-compile` leaves them out
    compiled: dict[str, Callable] = field(default_factory=dict)


def onnx_session(graph, opset: int, threads: int):
    """ONNX Runtime's session of an ``onnx.GraphProto``."""
    import onnxruntime
    from onnx import helper

    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # else it disturbs the next contender
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
