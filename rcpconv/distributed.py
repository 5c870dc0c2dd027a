"""A training spread over processes, one a GPU: who is first, what all agree on, shards, starting and ending.

torch does the work: FSDP2 shards student and teacher, torchrun's agent starts processes and ends them when one dies. In
a process of its own (no process group) every function here is the identity, but for `sharded`, which is for several.
The first process decides and says what there is to say; the others follow. Knows nothing of losses, texts or run
folders.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from rcpconv.errors import BadOption, ConversionError, NotEnoughMachine, ProcessDied
from rcpconv.model import Decoder, DecoderLayer, LazyDecoder, Piece

_PATIENCE = timedelta(hours=12)
"""How long processes wait for each other, for the first one may sample texts or evaluate for hours. That one of them
died is noticed otherwise: by torchrun's agent, and by connections that close."""
_GRACE_SECONDS = 2.0
"""How long a process keeps an error to itself, which is most often another's: that one's ends the job."""

T = TypeVar("T")


def rank() -> int:
    """This process's number; 0 is the first one, or the only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def launched() -> bool:
    """Whether torchrun, or what sets its variables, has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ and "RANK" in os.environ


@contextmanager
def joined() -> Iterator[None]:
    """Within, this process is one of those that torchrun started. Only the first one prints."""
    if not launched():
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(_local_rank() % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_PATIENCE)
    try:
        with open(os.devnull, "w") as nothing, redirect_stdout(nothing if rank() else sys.stdout):
            yield
            wait_for_all()
    except ConversionError as error:
        if not rank():
            raise
        time.sleep(_GRACE_SECONDS)
        raise type(error)(f"process {rank()} of {processes()}: {error}") from error
    except RuntimeError as error:
        time.sleep(_GRACE_SECONDS)
        if isinstance(error, dist.DistError) or "closed by peer" in str(error) or "reset by peer" in str(error):
            raise ProcessDied(f"process {rank()} of {processes()} has lost the connection to another one", 1) from error
        raise
    dist.destroy_process_group()  # not after an error, when others may still wait for an answer


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def own_device(device: str) -> str:
    """This process's device, when the first one's is `device`. Raises NotEnoughMachine when there is none left."""
    if device == "cpu" or not rank():
        return device
    if _local_rank() >= torch.cuda.device_count():
        raise NotEnoughMachine(
            f"{processes()} processes were started, of which this is number {_local_rank()} on its machine, counted "
            f"from 0, but it has {torch.cuda.device_count()} CUDA devices; start one process a GPU"
        )
    return f"cuda:{_local_rank()}"


def from_first(value: T) -> T:
    """The first process's value, in all of them; any object that can be pickled."""
    if processes() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def largest(value: int) -> int:
    """The largest of the processes' values, in all of them."""
    if processes() == 1:
        return value
    values = torch.tensor(value)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return int(values)


def wait_for_all() -> None:
    """Return when every process has come here."""
    largest(0)


@contextmanager
def first_before_others() -> Iterator[None]:
    """The first process goes through the block while the others wait."""
    if rank():
        wait_for_all()
    yield
    if not rank():
        wait_for_all()


def mean(tensor: Tensor) -> Tensor:
    """The mean of the processes' tensors, in all of them."""
    if processes() > 1:
        dist.all_reduce(tensor)
        tensor /= processes()
    return tensor


def own_sequences(first: int, batch: int, accum: int) -> list[tuple[int, int]]:
    """(first, count) of each batch that this process takes of the `batch` × `accum` sequences of a step.

    All processes take equally many, and none more than `batch` at a time. Raises BadOption when that cannot be.
    """
    own, rest = divmod(batch * accum, processes())
    if rest:
        raise BadOption(
            f"batch_size: {batch} × {accum} sequences a step cannot be divided equally among {processes()} processes; "
            f"choose --batch-size and --grad-accum whose product is a multiple of {processes()}"
        )
    count = next(size for size in range(min(batch, own), 0, -1) if own % size == 0)
    start = first + rank() * own
    return [(start + done, count) for done in range(0, own, count)]


def shard(model: Decoder, groups: list[dict[str, Any]]) -> None:
    """Leave each process its part of every parameter; groups: of an optimizer without state, which gets the new ones.

    Parameters stay in their dtype and whole ones are gathered in it, a layer at a time. Tables and what is around the
    layers stay whole from `hidden` to the end of the backward pass, because the head is computed after `hidden`.
    """
    if processes() == 1:
        return
    names = {parameter: name for name, parameter in model.named_parameters()}
    mesh = _mesh(model.inv_freq.device)
    for layer in model.layers:
        _shard_layer(layer, mesh)
    _shard_rest(model, mesh)
    parameters = dict(model.named_parameters())
    for group in groups:
        group["params"] = [parameters[names[parameter]] for parameter in group["params"]]


def sharded(lazy: LazyDecoder, device: torch.device, zero_stage: int = 3) -> Decoder:
    """All of a decoder made on `device`, as `shard` leaves it.

    zero_stage: with 2 or 1, layers too stay whole from `hidden` to the end of the backward pass, and are gathered once
    instead of twice; for 1, see `stay_whole`. Each layer is sharded before the next one is made: a process never has
    more than its part of the layers made so far, a whole one, and the tables.
    """
    mesh = _mesh(device)

    def shard_layer(name: str, module: nn.Module) -> None:
        if isinstance(module, DecoderLayer):
            _shard_layer(module, mesh, reshard_after_forward=zero_stage == 3)

    model = lazy.each(shard_layer).whole()
    model.inv_freq = model.inv_freq.to(device)
    _shard_rest(model, mesh)
    return model


def stay_whole(model: nn.Module, on: bool) -> None:
    """Whether parameters and their gradients stay whole after the next backward pass, for another one of the same step.

    ZeRO stage 1, for models from `sharded`.
    """
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(not on)
    model.set_reshard_after_backward(not on)


def is_sharded(model: nn.Module) -> bool:
    """Whether `sharded` or `shard` made it what it is."""
    return isinstance(model, FSDPModule)


def _mesh(device: torch.device) -> DeviceMesh:
    return init_device_mesh(device.type, (processes(),))


def _shard_layer(layer: Any, mesh: DeviceMesh, *, reshard_after_forward: bool = True) -> None:
    """FSDP2 gathers parameters in groups, and what learns in a group must have one dtype.

    Where weights are narrower than the other parameters, those of attention and MLP are a group each.
    """
    narrow = _narrow(layer)
    how: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": reshard_after_forward}
    fully_shard(layer, ignored_params=narrow or None, **how)
    if narrow:
        for part in (layer.attn, layer.mlp):
            fully_shard(part, ignored_params=set(part.parameters()) - narrow, **how)


def _shard_rest(model: Decoder, mesh: DeviceMesh) -> None:
    """What is around the layers, which are sharded."""
    if _narrow(model.embed):
        for part in (model.final_norm, model.head_input):
            if next(part.parameters(), None) is not None:
                fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for method in ("hidden", "hidden_and_streams"):
        register_fsdp_forward_method(model, method)


def _narrow(module: nn.Module) -> set[nn.Parameter]:
    """Parameters that learn in bfloat16."""
    return {p for p in module.parameters() if p.requires_grad and p.dtype == torch.bfloat16}


def reshard(model: nn.Module) -> None:
    """Leave nothing whole after passes without gradients."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def gathered(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The pieces of a decoder, the parameters of each whole in the first process until the next one is asked for.

    All processes go through them together; the others only help.
    """
    for piece in pieces:
        parts = _shared_out(piece[1])
        for module, name, part in parts:
            value = part.full_tensor()
            if not rank():
                setattr(module, name, nn.Parameter(value))
            del value
        yield piece
        for module, name, part in parts:
            setattr(module, name, part)


@contextmanager
def own_parts(module: nn.Module) -> Iterator[None]:
    """Within, a module's parameters are what this process has of them: the same rows of all, and changed in place."""
    parts = _shared_out(module)
    for owner, name, part in parts:
        setattr(owner, name, nn.Parameter(part.to_local(), requires_grad=False))
    try:
        yield
    finally:
        for owner, name, part in parts:
            setattr(owner, name, part)


def _shared_out(module: nn.Module) -> list[tuple[nn.Module, str, DTensor]]:
    """Parameters that processes have parts of: whose they are, their names in it, and this process's parts."""
    return [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if isinstance(parameter, DTensor)
    ]


def own_part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor; all of it where processes have no parts."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_part(part: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that is shared out by rows as `like` is; `part` itself where that is whole.

    A view. Rows may be of another length than those of `like`.
    """
    if not isinstance(like, DTensor):
        return part
    shape = torch.Size((like.shape[0], *part.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that processes have parts of; all of them have to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def launch(count: int, command: str | Callable[..., Any], *arguments: str, start_method: str = "spawn") -> None:
    """Run a command in `count` processes of this machine until all have ended. Raises ProcessDied when one fails.

    command: a program, or a function, whose processes start_method makes.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=str(uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        start_method=start_method,
    )
    try:
        elastic_launch(config, command)(*arguments)
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        code = failure.exitcode
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise ProcessDied(f"process {number} of {count} {how}, and the others were stopped", code) from None
    except SignalException as stopped:
        raise ProcessDied(f"stopped by {stopped.sigval.name}", 128 + stopped.sigval) from None
