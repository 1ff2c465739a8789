"""What the arguments alone say of the workers' processes: how many, on which PEs, which backend.

Cheap to import and to ask, so that the processes can be started before anything heavy is loaded.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from furiosa_llm.devices import parse_devices
from furiosa_llm.groups import PEGroup, form_groups
from furiosa_llm.topology import discover_topology

if TYPE_CHECKING:
    from furiosa_llm.args import EngineArgs


def worker_groups(args: EngineArgs) -> tuple[PEGroup, ...]:
    """The PEs of each worker. Raises: DeviceError."""
    return form_groups(
        None if args.devices is None else parse_devices(args.devices),
        discover_topology(),
        data_parallel_size=args.data_parallel_size,
        tensor_parallel_size=args.tensor_parallel_size,
    )


def worker_backend(args: EngineArgs) -> str:
    """The backend asked for; else native where its library was built, else numpy."""
    if args.backend:
        return args.backend
    return "numpy" if find_spec("furiosa_llm.workers.kernels._native") is None else "native"
