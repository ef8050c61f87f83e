"""How the ranks of a run find each other: the network interface, and a store that only they use."""

import json
import os
import socket
import time
import uuid
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist

from dsft.errors import UserError

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""For one collective of NCCL or gloo. dsft.distributed.liveness sees a lost rank within a minute."""
POLL_SECONDS = 0.1


def start_process_group(device: torch.device) -> None:
    """Initialize the process group: nccl on CUDA, gloo on CPU. A single process needs no address."""
    if dist.is_initialized():
        return
    options: dict[str, Any] = {"backend": "nccl" if device.type == "cuda" else "gloo", "timeout": COLLECTIVE_TIMEOUT}
    if device.type == "cuda":
        options["device_id"] = device
    if "RANK" not in os.environ:
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    else:
        set_gloo_interface()
        try:
            store, rank, size = next(dist.rendezvous("env://"))
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            port = os.environ["MASTER_PORT"]
            raise UserError(f"port {port} is in use on this machine; give the launcher another --master_port") from None
        if "TORCHELASTIC_RUN_ID" in os.environ:
            store = store_of_this_start(store, rank, size)
        options |= {"store": store, "rank": rank, "world_size": size}
    dist.init_process_group(**options)


def set_gloo_interface() -> None:
    """Let gloo use the interface of the route to MASTER_ADDR, unless the user has set GLOO_SOCKET_IFNAME.

    By default it uses the address of this host's name, which no other host reaches where that is 127.0.0.1, 127.0.1.1,
    or cannot be resolved.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or os.environ.get("WORLD_SIZE") == os.environ.get("LOCAL_WORLD_SIZE"):
        return
    addresses = {
        address.address: name
        for name, entries in psutil.net_if_addrs().items()
        for address in entries
        if address.family in (socket.AF_INET, socket.AF_INET6)
    }
    loopback = {name for address, name in addresses.items() if address.startswith("127.") or address == "::1"}
    name = addresses.get(_source_address(os.environ.get("MASTER_ADDR", "")))
    if name is None or name in loopback:  # on the first host its own name may be that of the loopback interface
        others = set(addresses.values()) - loopback
        name = others.pop() if len(others) == 1 else None
    if name is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _source_address(host: str) -> str:
    """From which this host sends to another one."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as sender:
            sender.connect(target)  # a datagram socket sends nothing yet
            return str(sender.getsockname()[0])
    except OSError:
        return ""


def store_of_this_start(store: dist.Store, rank: int, size: int) -> dist.Store:
    """A part of torchrun's store that is new at every start of the ranks.

    torchrun keeps its store over restarts, with the addresses of ranks that have died, and its count of restarts
    differs between hosts after one has joined late. So rank 0 publishes a name, together with a token of every rank. A
    rank that finds its own token there confirms the name, and all use it once all have confirmed.
    """
    token = uuid.uuid4().hex
    store.set(f"dsft/token/{rank}", token)
    if rank == 0:
        while True:
            tokens = [store.get(f"dsft/token/{peer}").decode() for peer in range(size)]
            name = uuid.uuid4().hex
            store.set("dsft/start", json.dumps([name, tokens]))
            while store.add(f"dsft/confirmed/{name}", 0) < size - 1:
                time.sleep(POLL_SECONDS)
                if [store.get(f"dsft/token/{peer}").decode() for peer in range(size)] != tokens:
                    break  # one of them was left by a rank that has died
            else:
                store.set(f"dsft/agreed/{name}", "")
                return dist.PrefixStore(f"dsft/{name}", store)
    confirmed = ""
    while not confirmed or not store.check([f"dsft/agreed/{confirmed}"]):
        name, tokens = json.loads(store.get("dsft/start"))
        if len(tokens) == size and tokens[rank] == token and name != confirmed:
            store.add(f"dsft/confirmed/{name}", 1)
            confirmed = name
        time.sleep(POLL_SECONDS)
    return dist.PrefixStore(f"dsft/{confirmed}", store)
