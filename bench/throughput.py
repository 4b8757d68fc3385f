"""How fast the engine decodes: against transformers, PEFT, itself without adapters, and what memory allows.

    python -m bench.throughput [--quick] [--shape mid] [--batches 1,8,32] [--prompts 64,512] [--record]

Random weights, greedy answers, all rows of a batch with prompts of one length. In every round each variant runs once,
in an order that rotates; a round's decode steps are compared with each other, and medians and quartiles of these ratios
are reported. Only the time in which all rows decode counts, so reading prompts is left out everywhere. First comes the
physical limit, then what was measured; the last line is one JSON object. See bench/README.md.
"""

import gc
import json
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM
from transformers.utils import logging

from bench import plans, report, serving
from bench.beds import bed_of
from bench.cases import Case, Measured, run_case
from bench.environment import describe
from bench.models import shaped
from bench.plans import CLIENTS, Plan, Stream
from bench.roofline import Memory, bytes_per_step
from bench.rounds import ratio, record, series
from bench.targets import missed
from bench.teams import release_team
from bench.work import drawn, steps_of
from lorafold.config import LogConfig
from lorafold.logs import set_up_logging
from lorafold.model import pick_device

RANK = 16
Timings = dict[str, dict[str, list[float]]]


def run_shape(shape: str, plan: Plan, device: torch.device, dtype: torch.dtype, memory: Memory) -> dict[Case, Measured]:
    """All cases of one shape, each said as soon as it is measured."""
    cases = plan.of(shape)
    names = list(dict.fromkeys(name for case in cases for name in case.names))
    measured = {}
    with (
        tempfile.TemporaryDirectory() as scratch,
        bed_of(shape, device, dtype, RANK, plan.size(shape), names, Path(scratch)) as bed,
    ):
        for case in cases:
            measured[case] = run_case(case, bed, memory.bandwidth, plan.rounds)
            found = report.outcome(measured[case], bytes_per_step(bed.base, case.batch), absolute=device.type == "cuda")
            report.show(case, found)
    free(device)
    return measured


def free(device: torch.device) -> None:
    """Gives memory of models that nobody has any more back to the device."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def run_stream(stream: Stream, device: torch.device, dtype: torch.dtype) -> dict[str, list[float]]:
    """Seconds through gRPC and on the engine. Raises RuntimeError if the tokens were not the same."""
    work = drawn(CLIENTS, stream.prompt, stream.answer, skeleton(stream.shape, dtype).config.vocab_size)
    with tempfile.TemporaryDirectory() as scratch:
        serving.write_base(shaped(stream.shape, device, dtype), Path(scratch))
        release_team()
        seconds, equal = serving.compare(Path(scratch), device, work, stream.rounds)
    if not equal and dtype == torch.float32:
        raise RuntimeError("clients got other tokens than the engine gives in process")
    return seconds


def skeleton(shape: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """A model of that shape without memory."""
    return shaped(shape, torch.device("meta"), dtype)


def show_limit(shape: str, dtype: torch.dtype, memory: Memory) -> None:
    """The physical limit, for people."""
    needed, bandwidth = bytes_per_step(skeleton(shape, dtype), 1), memory.bandwidth()
    print(
        f"{shape} in {dtype}: a decode step of one row reads {needed / 1e6:.0f} MB of weights; memory gives "
        f"{bandwidth / 1e9:.1f} GB/s, so no step is faster than {needed / bandwidth * 1e3:.2f} ms"
    )


def timings(measured: Mapping[Case, Measured], streamed: Mapping[str, list[float]]) -> Timings:
    """Everything that was timed, as `record` keeps it."""
    found: Timings = {
        f"{case.shape}, prompt {case.prompt}, batch {case.batch}": {
            **{name: steps_of(runs) for name, runs in of.runs.items()},
            "bytes_per_second": list(of.bandwidths),
        }
        for case, of in measured.items()
    }
    return found | ({"stream": dict(streamed)} if streamed else {})


def run(plan: Plan, device: torch.device, dtype: torch.dtype) -> tuple[dict[str, Any], Timings]:
    """The result without what was asked for, and every timing."""
    memory = Memory(device)
    show_limit(plan.headline, dtype, memory)
    measured: dict[Case, Measured] = {}
    for shape in plan.shapes:
        measured |= run_shape(shape, plan, device, dtype, memory)
    streamed = run_stream(plan.stream, device, dtype) if plan.stream else {}
    outcomes = {
        case: report.outcome(
            of, bytes_per_step(skeleton(case.shape, dtype), case.batch), absolute=device.type == "cuda"
        )
        for case, of in measured.items()
    }
    result = report.headline(plan, outcomes)
    result["grpc_over_engine"] = None
    if plan.stream:
        result["grpc"] = {**ratio(streamed["engine"], streamed["grpc"]), "clients": CLIENTS, "shape": plan.stream.shape}
        result["grpc_over_engine"] = result["grpc"]["median"]
        print(f"{CLIENTS} clients through gRPC: {result['grpc_over_engine']} of the engine's tokens per second")
    return {**result, "headline": plan.headline, "all": report.nested(outcomes)}, timings(measured, streamed)


def main() -> None:
    """Measures and prints."""
    arguments = plans.parsed(__doc__)
    warnings.filterwarnings("ignore", module="peft|transformers")
    logging.set_verbosity_error()
    set_up_logging(LogConfig(level="warning"))
    device = pick_device(arguments.device)
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    plan = plans.planned(arguments, device)
    result, seconds = run(plan, device, dtype)
    result |= {"rank": RANK, "left_out": plan.left_out, **describe(device, skeleton(plan.headline, dtype))}
    result["missed"] = list(missed(result, device.type))
    for line in result["missed"]:
        print(f"below target: {line}")
    if plan.left_out:
        print(f"left out: {'; '.join(plan.left_out)}")
    if arguments.record:
        print(f"every timing: {record('throughput', result, series(seconds))}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
