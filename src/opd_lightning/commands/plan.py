"""`opd-lightning plan`: what a step of a `fit` would take, without its weights and without its hardware."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import rich
from jsonargparse.typing import PositiveFloat, PositiveInt
from lightning import Trainer

from opd_lightning.backends.vllm.colocated import VLLMColocatedEngine
from opd_lightning.callbacks.rescue import trainer_callbacks
from opd_lightning.commands.plan_report import make_report
from opd_lightning.commands.planned_case import Surroundings, case_of, longest_prompt, planned_student
from opd_lightning.commands.suggestions import nearest
from opd_lightning.planning import (
    HARDWARE,
    THIS_MACHINE,
    Budget,
    Case,
    Hardware,
    Layout,
    Rehearsal,
    budget,
    rehearse,
    remedies,
    this_machine,
)
from opd_lightning.reports.files import write_json
from opd_lightning.reports.screen import show
from opd_lightning.training.datamodule import OPDDataModule
from opd_lightning.training.module import OPDModule
from opd_lightning.training.output_paths import check_file

PLANNED_ON = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "logger": False}
_VLLM_SHARE = 0.4  # of the device's memory, where engine_args say nothing (`placement.engine_defaults`)


class PlanningTrainer(Trainer):
    """Lightning's trainer, which can also say what a step would take. It is made for one CPU, whatever is planned.

    Attributes:
        asked: What the settings say in the place of `PLANNED_ON`.
    """

    asked: Mapping[str, Any]

    def plan(
        self,
        model: OPDModule,
        datamodule: OPDDataModule,
        hardware: str | None = None,
        memory_gb: PositiveFloat | None = None,
        tflops: PositiveFloat | None = None,
        bandwidth_gb_s: PositiveFloat | None = None,
        devices: PositiveInt | None = None,
        prompt_tokens: PositiveInt | None = None,
        response_tokens: PositiveInt | None = None,
        json: str | None = None,
    ) -> None:
        """Say what a step would take in memory and seconds, part by part, and which settings would make it fit.

        Args:
            model: Student, teacher and objective; of their folders config.json is enough.
            datamodule: Engine and sampling.
            hardware: A name such as H100, A100-80GB, RTX-4090, or "this-machine", which is measured; null is that one
                unless the next three say what it is.
            memory_gb: Gigabytes (10^9) of a device.
            tflops: Its dense bfloat16 products, 10^12 a second.
            bandwidth_gb_s: Its memory's, gigabytes a second.
            devices: How many run the step together; null is trainer.devices times trainer.num_nodes. More than one
                share the student's weights, gradients and moments (FSDP2) unless trainer.strategy is DDP.
            prompt_tokens: Of the longest prompt; null reads the prompts.
            response_tokens: Of an answer; null is data.sampling.max_new_tokens.
            json: File for the numbers.
        """
        if json is not None:
            json = str(Path(json).expanduser())
            check_file("json", json)
        machine = find_hardware(hardware, memory_gb, tflops, bandwidth_gb_s)
        num_devices = devices or _number(self.asked["devices"]) * int(self.asked["num_nodes"])
        strategy = str(self.asked["strategy"])
        layout = layout_of(num_devices, strategy, datamodule, machine.memory_gb, is_gpu=machine.is_gpu)
        surroundings = Surroundings(str(self.precision), num_devices, trainer_callbacks(self))
        prompt = prompt_tokens or longest_prompt(planned_student(model), datamodule)
        case = case_of(model, datamodule, surroundings, prompt, response_tokens)
        found = rehearse(case, machine)
        planned = budget(case, found, layout, machine.memory_gb)

        def make_budget(changed: Case) -> Budget:
            return budget(changed, rehearse(changed), layout, machine.memory_gb)

        useful = [] if planned.fits else remedies(case, layout.is_gpu, make_budget)
        show(make_report(case, planned, machine, layout, useful), rich.get_console())
        if json is not None:
            write_json(Path(json), as_json(case, planned, found, machine, layout))
            print(f"\n{json}")


def find_hardware(
    name: str | None, memory_gb: float | None = None, tflops: float | None = None, bandwidth_gb_s: float | None = None
) -> Hardware:
    """Hardware by name, by its numbers, or this machine.

    Raises:
        ValueError: There is none of that name, or it is both given and described, or described by halves.
    """
    given = {"memory_gb": memory_gb, "tflops": tflops, "bandwidth_gb_s": bandwidth_gb_s}
    missing = [argument for argument, value in given.items() if value is None]
    if name is not None and len(missing) < len(given):
        raise ValueError(f"hardware: {name} has its own {', '.join(given)}. Leave either it or them out.")
    if memory_gb is not None and tflops is not None and bandwidth_gb_s is not None:
        return Hardware("by flags", memory_gb, tflops, bandwidth_gb_s, tflops / 8, "the command line")
    if name is None and len(missing) < len(given):
        raise ValueError(f"{missing[0]}: hardware is described by all of {', '.join(given)}. Set --{missing[0]} too.")
    if name is None or name == THIS_MACHINE:
        return this_machine()
    if name not in HARDWARE:
        known = [*HARDWARE, THIS_MACHINE]
        raise ValueError(
            f"hardware: there is no {name} here.{nearest(name, known)} Expected one of {', '.join(known)}, or"
            " --memory_gb, --tflops and --bandwidth_gb_s."
        )
    return HARDWARE[name]


def layout_of(num_devices: int, strategy: str, data: OPDDataModule, memory_gb: float, *, is_gpu: bool) -> Layout:
    """Who shares a device and its memory.

    Args:
        num_devices: Which run the step together.
        strategy: Name of the strategy.
        data: Has the engine.
        memory_gb: Of a device.
        is_gpu: Whether it is one.
    """
    awake = asleep = 0.0
    engine = data.engine
    if isinstance(engine, VLLMColocatedEngine) and engine.devices is None and is_gpu:
        awake = memory_gb * float(engine.engine_args.get("gpu_memory_utilization", _VLLM_SHARE))
        asleep = 0.0 if engine.sleep else awake
    return Layout(is_gpu, num_devices, num_devices > 1 and "ddp" not in strategy.lower(), awake, asleep)


def _number(devices: Any) -> int:
    """Of trainer.devices; 1 where it leaves the number to the machine."""
    if isinstance(devices, str) and "," in devices:  # "0,1" names two, as [0, 1] does
        devices = [place for place in devices.split(",") if place.strip()]
    if isinstance(devices, list):
        return len(devices)
    return int(devices) if str(devices).strip().isdigit() else 1


def as_json(case: Case, planned: Budget, found: Rehearsal, machine: Hardware, layout: Layout) -> dict[str, Any]:
    """Everything that was found out, in bytes and seconds."""
    return {
        "hardware": asdict(machine),
        "layout": asdict(layout),
        "step": {
            "rollouts": case.num_rollouts,
            "prompt_tokens": case.prompt_tokens,
            "response_tokens": case.response_tokens,
            "rollouts_per_micro_batch": case.rows,
            "micro_batches": case.num_micro_batches,
        },
        "trained_bytes": found.trained_bytes,
        "phases": [asdict(phase) | {"total": phase.total} for phase in planned.phases],
        "peak_bytes": planned.worst.total,
        "seconds": planned.seconds,
        "fits": planned.fits,
    }
