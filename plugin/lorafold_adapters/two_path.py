"""Where adapters attach: a `Site` for each module that one of them changes, and families of those that share an input.

While nothing is routed no module knows of its site: it is exactly what it was, and costs what it did. Inside `routed`
a site puts a step's `forward` before its module's own. Knows nothing of what a step computes.

Shapes in the names: I in-features, R rank.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from lorafold_adapters.paths import AdapterPath, LowRankPath, laid_out

SITE = "_lorafold_site"


class Step(Protocol):
    """What a module runs in place of its own forward, inside `routed`."""

    def forward(self, inputs: Tensor, /, *args: Any, **kwargs: Any) -> Any:
        """The outputs of the module with the adapters of the rows."""
        ...


class Site:
    """What is attached to one module."""

    __slots__ = ("attributes", "family", "is_head", "module", "own", "paths")

    def __init__(self, module: nn.Module, *, is_head: bool) -> None:
        self.module = module
        self.is_head = is_head
        self.paths: dict[str, AdapterPath] = {}
        """By adapter."""
        self.family = Family([self])
        self.attributes = module.__dict__
        """Where a step's forward is put, so that the module's own is not found."""
        self.own: Any = None
        """A forward that somebody else had put there; None for that of the module's class."""

    def base(self, inputs: Tensor) -> Any:
        """What the module's own forward makes of the inputs."""
        return type(self.module).forward(self.module, inputs) if self.own is None else self.own(inputs)


@dataclass(frozen=True, slots=True)
class Patch:
    """A step, ready to be put before its module's own forward. Used at every step of a batch, so plain and quick."""

    site: Site
    attributes: dict[str, Any]
    forward: Callable[..., Any]

    @classmethod
    def of(cls, site: Site, step: Step) -> "Patch":
        """The patch for one module."""
        return cls(site, site.attributes, step.forward)


def enter(patches: Iterable[Patch]) -> None:
    """From now on the modules run the steps."""
    for patch in patches:
        attributes = patch.attributes
        patch.site.own = attributes.get("forward")
        attributes["forward"] = patch.forward


def leave(patches: Iterable[Patch]) -> None:
    """The modules are what they were."""
    for patch in patches:
        own = patch.site.own
        if own is not None:
            patch.attributes["forward"] = own
        elif "forward" in patch.attributes:
            del patch.attributes["forward"]


class Family:
    """Sites that were seen to get the same tensor: what A makes of it is computed once.

    Of each adapter the family keeps the sites' A's as one tensor; the paths hold views of it.
    """

    def __init__(self, sites: list[Site]) -> None:
        self.sites = sites
        self.products: dict[str, Tensor] = {}
        """By adapter: the A's of all sites that it changes, [I, sum of R], in the order of `sites`."""

    def place(self, site: Site) -> int:
        """The site's place in the family."""
        return next(index for index, sibling in enumerate(self.sites) if sibling is site)

    def low_rank(self, name: str) -> dict[int, LowRankPath]:
        """The paths of one adapter that are low-rank products, by place."""
        paths = {index: site.paths.get(name) for index, site in enumerate(self.sites)}
        return {index: path for index, path in paths.items() if isinstance(path, LowRankPath)}

    def gather(self, name: str) -> None:
        """Lays one adapter's A's side by side; called once its paths are at their sites."""
        paths = self.low_rank(name)
        self.forget(name)
        if not paths:
            return
        if len(paths) == 1:
            joined_IR = next(iter(paths.values())).a_IR
        else:
            with torch.inference_mode(False):  # The tensors outlive the mode in which they are made.
                joined_IR = laid_out(torch.cat([path.a_IR.T for path in paths.values()]))
        stop = 0
        for index, path in paths.items():
            start, stop = stop, stop + path.rank
            self.sites[index].paths[name] = replace(path, a_IR=joined_IR[:, start:stop])
        self.products[name] = joined_IR

    def forget(self, name: str) -> None:
        """Drops what is kept of one adapter."""
        self.products.pop(name, None)


def merged(families: Iterable[Family]) -> Family:
    """One family of all the sites."""
    parts = list(families)
    family = Family([site for part in parts for site in part.sites])
    for site in family.sites:
        site.family = family
    for name in dict.fromkeys(name for site in family.sites for name in site.paths):
        family.gather(name)
        for part in parts:
            part.forget(name)
    return family


def install(module: nn.Module, *, is_head: bool) -> Site:
    """The site of `module`, made if it has none."""
    if SITE not in module.__dict__:
        module.__dict__[SITE] = Site(module, is_head=is_head)
    return cast(Site, module.__dict__[SITE])


def uninstall(module: nn.Module) -> None:
    """Makes `module` exactly what it was."""
    site: Site = module.__dict__.pop(SITE)
    site.family.sites = [sibling for sibling in site.family.sites if sibling is not site]
    for name in list(site.family.products):
        site.family.gather(name)
