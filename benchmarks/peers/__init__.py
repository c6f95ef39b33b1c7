"""The peers of every op: other libraries, and what one writes with care in PyTorch."""

from benchmarks.peers import boxes, detect, matching, mining, multibox_loss, nms
from benchmarks.peers.spec import MissingPeerError, Peers
from opinfo.spec import OpInfo

PEERS = {
    name: peers for room in (boxes, detect, matching, mining, multibox_loss, nms) for name, peers in room.PEERS.items()
}


def peers_of(op: OpInfo) -> Peers:
    """Empty for an op that nobody else has."""
    return PEERS.get(op.name, Peers())


__all__ = ["PEERS", "MissingPeerError", "Peers", "peers_of"]
