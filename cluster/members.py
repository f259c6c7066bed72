"""The head's table of nodes, asked within a deadline by a process that is no part of Ray.

Ray's own client (2.60) tries for a minute and then ends its process where the head is silent, so
this asks the control service (GCS) over plain gRPC, on a fresh connection each time: one that was
cut would first sit out its own backoff.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import ClusterError


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A row of the table."""

    node_id: str
    """Ray's id, hexadecimal."""
    is_alive: bool
    is_head: bool
    host: str
    """Address that the node gave."""
    port: int
    """Of its raylet."""
    labels: Mapping[str, str]
    why_dead: str
    """In the head's words; empty while it lives."""


def ask(address: str, *, timeout_s: float) -> list[Member]:
    """All nodes that the head at `address` (host:port) knows, dead ones too.

    RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH say with which token. Raises ClusterError where the head
    does not answer within `timeout_s`, or refuses.
    """
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_pb2, gcs_service_pb2, gcs_service_pb2_grpc

    messages: Any = gcs_service_pb2  # made at run time
    states: Any = gcs_pb2.GcsNodeInfo  # pyright: ignore[reportAttributeAccessIssue]
    options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
    channel = init_grpc_channel(address, options=options)
    try:
        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        reply = stub.GetAllNodeInfo(messages.GetAllNodeInfoRequest(), timeout=timeout_s)
    except grpc.RpcError as error:
        reason = f"{error.code().name}: {error.details()}"  # pyright: ignore[reportAttributeAccessIssue]
        raise ClusterError(f"the head at {address} does not answer ({reason})") from None
    finally:
        channel.close()
    return [
        Member(
            node_id=row.node_id.hex(),
            is_alive=row.state == states.ALIVE,
            is_head=row.is_head_node,
            host=row.node_manager_address,
            port=row.node_manager_port,
            labels=dict(row.labels),
            why_dead=row.death_info.reason_message,
        )
        for row in reply.node_info_list
    ]
