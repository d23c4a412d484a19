"""Runs a training script under the FSDP settings of `accelerate launch` on a machine without a GPU.

    accelerate launch --config_file accelerate/fsdp2.yaml tests/launch_on_cpu.py scripts/train.py recipes/moelora.yaml

accelerate 1.15 leaves FSDP out when it runs on CPUs, without a word: its processes then train by DDP. Here its state is
told of FSDP by hand, and the Trainer takes that state over; all else is as on GPUs.
"""

import os
import runpy
import sys

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


def configure_cpu() -> None:
    """Make accelerate's state that of CPU processes, sharded by FSDP if the environment says so."""
    state = Accelerator(cpu=True).state
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        if state.mixed_precision != "no":
            state.fsdp_plugin.set_mixed_precision(state.mixed_precision)
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP


if __name__ == "__main__":
    configure_cpu()
    sys.argv = [*sys.argv[1:], "--use_cpu", "true", "--accelerator_config", '{"use_configured_state": true}']
    runpy.run_path(sys.argv[0], run_name="__main__")
