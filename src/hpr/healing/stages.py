"""Stages of healing, each optional: block by block, a ramp from the original weights to the shared ones, end to end.

Block by block every layer of the student gets what the same layer of the teacher got, so no layer has to make up for those
below (FitNets, Romero et al. 2015, train stage-wise; SHARP, Wang et al. 2025, warms up layer by layer). On the ramp a site
gives (1 − t) · W x + t · Ŵ x, and t goes from 0 to 1.

Both work by hooks on the student that stay for the whole run, since activations may be computed again on the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from hpr.anatomy.lookup import has_module, module_at
from hpr.anatomy.model import Anatomy
from hpr.errors import HprError
from hpr.nn.experts import SharedExperts
from hpr.nn.site import SharedSite

BLOCKS, RAMP, WHOLE = "block by block", "ramp", "end to end"


@dataclass(frozen=True)
class Stages:
    """Which stage each step belongs to: the first ``blocks`` steps, the next ``ramp`` ones, the rest of ``steps``."""

    steps: int
    blocks: int = 0
    ramp: int = 0

    def at(self, step: int) -> str:
        """The stage of a step, from 0."""
        return BLOCKS if step < self.blocks else RAMP if step < self.blocks + self.ramp else WHOLE

    def blend(self, step: int) -> float:
        """t of a step: the share of the student's own weights, 1 outside the ramp."""
        return (step - self.blocks + 1) / (self.ramp + 1) if self.at(step) == RAMP else 1.0

    @property
    def ends(self) -> dict[int, str]:
        """Steps done at the end of a stage → its name, for the stages that there are."""
        ends = ((self.blocks, BLOCKS), (self.blocks + self.ramp, RAMP), (self.steps, WHOLE))
        return {step: name for step, name in ends if step and self.at(step - 1) == name}


def gains(history: Sequence[Mapping[str, Any]], stages: Stages, before: float) -> list[dict[str, Any]]:
    """For each stage its steps and the guard (nats per example) before and after it, as far as it was measured."""
    measured = {row["step"]: row["guard"] for row in history if "guard" in row}
    rows, start = [], 0
    for end, name in stages.ends.items():
        after = measured.get(end)
        rows.append({"stage": name, "steps": end - start, "before": before, "after": after})
        start, before = end, before if after is None else after
    return rows


class Course:
    """The stages of one run on one student: what has to be switched on at a step, and off for the guard.

    ``original``: the model whose weights the ramp starts from, the teacher or what it was turned into.
    """

    def __init__(self, stages: Stages, student: nn.Module, teacher: nn.Module, anatomy: Anatomy, original: nn.Module):
        self.stages = stages
        self.forcing = Forcing(student, teacher, anatomy) if stages.blocks else None
        self.ramp = Ramp(student, original) if stages.ramp else None

    def enter(self, step: int) -> Forcing | None:
        """Set everything as a step needs it; what forces the layers, where they are forced."""
        if self.ramp is not None:
            self.ramp.share = self.stages.blend(step)
        if self.forcing is not None:
            self.forcing.active = self.stages.at(step) == BLOCKS
        return self.forcing

    def leave(self) -> None:
        """The student by itself."""
        self.enter(self.stages.steps)

    def check(self, guard: Callable[[], float]) -> None:
        """Raise where a ramp starts from weights worse than the student's own: those of another model, or not turned."""
        if self.ramp is not None:
            own = guard()
            self.ramp.share = 0.0
            first = guard()
            self.leave()
            if not first < max(own, 1e-12):
                raise HprError(
                    f"the ramp starts at {first:.4g} nats per example, the student itself is at {own:.4g}: where a plan aligns "
                    f"layers, give the aligned teacher as original; else leave the ramp out"
                )

    def close(self) -> None:
        """Take all hooks away."""
        for one in (self.forcing, self.ramp):
            if one is not None:
                one.close()


class Forcing:
    """While ``active``, each layer of a student gets what the teacher's same layer got, as the teacher last ran.

    That is the hidden states, and what else hangs on the student's parameters: the encoder's output, shared positions. ``own``:
    path → what a layer of the student would have got, of the lowest layer of each stack.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, anatomy: Anatomy):
        self.active = False
        self.inputs: dict[str, Tensor] = {}
        self.own: dict[str, Tensor] = {}
        self._calls: dict[str, tuple[tuple, dict]] = {}
        self._lowest = {stack.block(0) for stack in anatomy.stacks}
        self._handles: list[RemovableHandle] = []
        for path in anatomy.blocks:
            if has_module(student, path):  # some are dropped
                taught, learnt = module_at(teacher, path), module_at(student, path)
                self._handles.append(taught.register_forward_pre_hook(self._note(path), with_kwargs=True))
                self._handles.append(learnt.register_forward_pre_hook(self._replace(path), with_kwargs=True))

    def close(self) -> None:
        """Take all hooks away."""
        for handle in self._handles:
            handle.remove()

    def _note(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if self.active:
                self._calls[path] = args, kwargs
                self.inputs[path] = args[0] if args else kwargs["hidden_states"]

        return hook

    def _replace(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if not self.active:
                return None
            if path in self._lowest:
                self.own[path] = args[0] if args else kwargs["hidden_states"]
            taught, named = self._calls[path]
            found = tuple(_taken(own, taught[place] if place < len(taught) else None) for place, own in enumerate(args))
            return found, {name: _taken(own, named.get(name)) for name, own in kwargs.items()}

        return hook


def _taken(own: Any, taught: Any) -> Any:
    """The teacher's tensor where the student's depends on its parameters."""
    return taught if isinstance(own, Tensor) and own.requires_grad and isinstance(taught, Tensor) else own


class Ramp:
    """Blends what each shared site gives with what the original's site gives; ``share`` is that of the student's own."""

    def __init__(self, student: nn.Module, original: nn.Module):
        self.share = 1.0
        self._handles = [
            module.register_forward_hook(self._blend(module_at(original, module.path)), with_kwargs=True)
            for module in student.modules()
            if isinstance(module, SharedSite | SharedExperts)
        ]

    def close(self) -> None:
        """Take all hooks away."""
        for handle in self._handles:
            handle.remove()

    def _blend(self, source: nn.Module) -> Any:
        fixed = {name: value.detach() for name, value in source.named_parameters()}  # views: nothing is copied

        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
            return None if self.share == 1 else functional_call(source, fixed, args, kwargs).lerp(output, self.share)

        return hook
