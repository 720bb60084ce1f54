"""What each of several processes that prune together will hold, send and compute, for any number of them.

With m samples of d unpruned weights, of which a process takes m_r rows and then holds d_r columns, it holds `4 m_r d`
bytes of gradients while samples are taken, `4 (m_r d + m d_r)` and `ON_THE_WAY` times a piece of at most `PIECE` bytes
while they are exchanged, and `4 m d_r` while blocks are worked on. It sends `4 m_r (d - d_r)` bytes of rows and, to
each of the others, `16 d_r` of what it finds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from keras_woodfisher_backends.ranks.shares import column_edges, row_share

from keras_woodfisher.callbacks.pruning_run import Run
from keras_woodfisher.callbacks.update_plan import PlannedUpdate
from keras_woodfisher.gradients.footprint import Footprint
from keras_woodfisher.memory.plan import MemoryPlan
from keras_woodfisher.memory.planning import MemoryBudget, least_plan, plan_memory
from keras_woodfisher.options.checks import count
from keras_woodfisher.options.sizes import size_text
from keras_woodfisher.pruning.fisher import block_slices
from keras_woodfisher.pruning.workspace import budget_of, needs_of
from keras_woodfisher.recipe.dry_run.costs import kept_of, operations_of

_MOST = 1024
"""Processes that are thought of at most."""

Uses = Sequence[tuple[int, int]]
"""For each update its samples (m) and unpruned weights (d)."""


@dataclass(frozen=True)
class Processes:
    """Processes that are asked about.

    Attributes:
        ranks: How many (R).
        hosts: On how many machines like this one, as many on each.
    """

    ranks: int
    hosts: int = 1

    @classmethod
    def checked(cls, ranks: int | None, hosts: int | None) -> "Processes | None":
        """Those of the arguments of a dry run; None if nothing is asked.

        Raises:
            ValueError, TypeError: If a number is out of range.
        """
        if ranks is None:
            if hosts is not None:
                raise ValueError(f"hosts={hosts!r} says where processes run: give ranks=, how many there are, too.")
            return None
        found = cls(count("ranks", ranks), count("hosts", 1 if hosts is None else hosts))
        if found.ranks < found.hosts:
            raise ValueError(f"ranks={ranks} processes can't run on hosts={hosts} machines. Give at least one on each.")
        return found

    @property
    def on_each(self) -> int:
        """Processes of one machine, of that which has most."""
        return -(-self.ranks // self.hosts)


@dataclass(frozen=True)
class ProcessCost:
    """What the process that has most of it to do takes at the update that needs most.

    Attributes:
        ranks: How many processes there are.
        hosts: On how many machines.
        held_bytes: Bytes of memory at the peak, at most, beside those of the model and its training.
        expected_bytes: The same as it is to be expected; the rest is for layers whose gradients take more.
        gradient_bytes: Those of its rows, of its columns, which are there at the same time, and of what is on its way.
        sent_bytes: Bytes that it sends.
        operations: Floating-point operations of its blocks.
        limit_bytes: Bytes that it may use: what one machine has for this, over the processes there.
        fitting: The least number of processes, as many on each machine, that would fit; None if none would.
    """

    ranks: int
    hosts: int
    held_bytes: int
    expected_bytes: int
    gradient_bytes: int
    sent_bytes: int
    operations: float
    limit_bytes: int
    fitting: int | None

    def lines(self) -> list[str]:
        """The same as text."""
        where = "one machine" if self.hosts == 1 else f"{self.hosts} machines like this one"
        lines = [
            f"{self.ranks} processes on {where}, each: {size_text(self.expected_bytes)} expected at the peak, "
            f"{size_text(self.held_bytes)} at most, of {size_text(self.limit_bytes)}; "
            f"{size_text(self.gradient_bytes)} of gradients; {size_text(self.sent_bytes)} sent, and "
            f"{self.operations:.2g} operations, an update"
        ]
        if self.held_bytes > self.limit_bytes:
            mend = f"{self.fitting} processes would fit" if self.fitting else "no number of processes would fit"
            lines.append(f"that is too much: {mend}, with as many on each machine")
        return lines


def process_cost(run: Run, updates: Sequence[PlannedUpdate], processes: Processes) -> ProcessCost | None:
    """The cost of the updates of a run whose source of gradients is open; None where none are needed."""
    working = [u for u in updates if u.num_grads]
    if not working or run.source is None:
        return None
    footprint = run.source.footprint(max(u.num_grads for u in working))
    largest = max(working, key=lambda u: u.num_grads * u.kept)
    budget = budget_of(run.task.options)

    each = replace(budget, limit=budget.limit // processes.on_each)
    uses = [(update.num_grads, update.kept) for update in working]
    plan = _planned(run, uses, footprint, processes.ranks, each)
    machines = range(1, 1 + _MOST // processes.on_each)
    numbers = (processes.on_each * machine for machine in machines)
    fitting = next(
        (ranks for ranks in numbers if _planned(run, uses, footprint, ranks, each).total <= each.limit), None
    )
    sizes = [target.size for target in run.targets]
    blocks = block_slices(kept_of(sizes, largest), run.task.options.fisher_block_size)
    edges = column_edges([block.stop for block in blocks], processes.ranks)
    sent, operations = [], []
    for rank in range(processes.ranks):
        share = row_share(largest.num_grads, rank, processes.ranks)
        start, stop = edges[rank : rank + 2]
        rows, columns = share.stop - share.start, stop - start
        sent.append(4 * rows * (edges[-1] - columns) + 16 * columns * (processes.ranks - 1))
        own = [block.stop - block.start for block in blocks if start <= block.start < stop]
        operations.append(sum(operations_of(largest.num_grads, width) for width in own))
    return ProcessCost(
        ranks=processes.ranks,
        hosts=processes.hosts,
        held_bytes=plan.total,
        expected_bytes=plan.expected,
        gradient_bytes=plan.exchange or plan.gradients,
        sent_bytes=max(sent),
        operations=max(operations),
        limit_bytes=each.limit,
        fitting=fitting,
    )


def _planned(run: Run, uses: Uses, footprint: Footprint, ranks: int, budget: MemoryBudget) -> MemoryPlan:
    """The plan of one of so many processes, or the one that takes least where none fits."""
    space = run.pruner.workspace
    kernels = list(zip(space.devices, space.kernels, strict=True))
    sizes = [target.size for target in run.targets]
    needs = needs_of(uses, sizes, run.task.options, kernels, footprint, run.pruner.structure, ranks)
    try:
        return plan_memory(needs, budget)
    except MemoryError:
        return least_plan(needs, budget)
