"""`Site`: one place of a model where neighborhood attention is computed, and `Sites`, all of a model's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from na_compiler.compiler.spec import KernelSpec
from na_compiler.problem import Problem
from na_compiler.schedules.choose import takes
from na_compiler.target import Target

__all__ = ["Site", "Sites"]


@dataclass(frozen=True)
class Site:
    """One node of a graph that computes neighborhood attention.

    Parameters
    ----------
    node
        Name of the node in its graph.
    layer
        Qualified name of the module that it came from, as ``state_dict`` has it; where the graph does not say, the
        names of the graph inside the model, if it is not the outermost one, and of the node.
    operator
        Whose operator it is: ``"na_compiler::na2d"``, ``"natten::na2d_forward"``, ``"natten.functional.na2d"``.
    direction
        ``"forward"``, ``"backward"`` or ``"tangent"``.
    problem
        What it computes, at the sizes that the graph was exported with or that were asked for; ``None`` where a
        dimension is dynamic and nobody said how long it is.
    dynamic
        Dimensions that may change from call to call: ``"batch"``, ``"layout[0]"``, ``"additional"``.
    batch
        Batch entries at these sizes; ``None`` where unknown.
    device
        Type of the device that its tensors are on, as torch names it; an ONNX model does not say.
    graph
        Which graph the node is in, as nodes of different graphs may have one name: ``""`` for the model's own, or else
        the path of a branch, a loop's body or a function.
    open_problem
        What it computes with an open layout, where the layout is dynamic; ``None`` where it is not, or more than that
        is not known.
    """

    node: str
    layer: str
    operator: str
    direction: str
    problem: Problem | None
    dynamic: tuple[str, ...] = ()
    batch: int | None = None
    device: str = "cpu"
    graph: str = ""
    open_problem: Problem | None = None

    @property
    def is_ours(self) -> bool:
        """Whether the node is an operator of this package."""
        return self.operator.partition("::")[0] == "na_compiler"


class Sites(tuple[Site, ...]):
    """The sites of a model, in the order of its graph."""

    __slots__ = ()

    def __new__(cls, sites: Iterable[Site] = ()) -> Sites:
        """Make one of any sites."""
        return super().__new__(cls, tuple(sites))

    def problems(self) -> dict[Problem, list[Site]]:
        """Return the distinct problems, each with the sites that pose it."""
        found: dict[Problem, list[Site]] = {}
        for site in self:
            if site.problem is not None:
                found.setdefault(site.problem, []).append(site)
        return found

    def unknown(self) -> list[Site]:
        """Return the sites whose problem depends on a size that nobody said."""
        return [site for site in self if site.problem is None]

    def on(self, device: str) -> Sites:
        """Return the sites on a type of device."""
        return Sites(site for site in self if site.device == device)

    def specs(
        self,
        targets: Iterable[str | Target] = ("llvm",),
        *,
        training: bool = False,
        tangents: bool = False,
        tf32: bool = False,
    ) -> list[KernelSpec]:
        """Return the distinct kernels that the sites need.

        Parameters
        ----------
        targets
            What machines to compile for.
        training
            Whether forwards need their backward as well.
        tangents
            Whether forwards are differentiated in forward mode, by kernels that compute output, lse and the tangents
            of both.
        tf32
            Whether products of float32 forwards on a GPU may round to TF32, whatever torch's switch says where they
            run. Kernels that cannot stay exact, as all on a CPU do.
        """
        if not self:
            return []  # Before a target such as "cuda" is looked for.
        parsed = list(dict.fromkeys(one for target in targets for one in Target.several(target)))
        wanted: dict[tuple[Problem, str], None] = {}
        for site in self:
            if site.problem is not None:
                wanted[site.problem, site.direction] = None
                more = ("forward",) * (training or tangents)
                more += ("backward",) * training + ("tangent",) * tangents
                wanted |= dict.fromkeys((site.problem, direction) for direction in more)
        return [
            KernelSpec.make(problem, target, direction, rounds=tf32)
            for target in parsed for problem, direction in wanted
        ]  # fmt: skip

    def open_specs(
        self, targets: Iterable[str | Target] = ("llvm",), *, training: bool = False, tangents: bool = False
    ) -> list[KernelSpec]:
        """Return the kernels for open layouts that serve the sites whose layouts are dynamic, whatever these are.

        Only those that there are for a target; parameters are those of `specs`.
        """
        opened = Sites(replace(site, problem=site.open_problem) for site in self if site.open_problem is not None)
        specs = opened.specs(targets, training=training, tangents=tangents)
        return [spec for spec in specs if takes(spec.problem, spec.target, spec.direction)]

    def __add__(self, other: Iterable[Site]) -> Sites:  # type: ignore[override]
        return Sites((*self, *other))

    def __iter__(self) -> Iterator[Site]:
        return super().__iter__()
